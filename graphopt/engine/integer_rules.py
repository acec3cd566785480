"""Layers between dequantize and quantize nodes, computed in integers.

A unit reaches from the layer to the quantize node that follows: over a residual, and activations
that clamp. What lies in between is not rounded to float32 at all, so results may differ by a step
from those of the operators one after another; `graphopt.kernels.integer_problems` says what they
are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from graphopt.engine.layer_rules import convolution_geometry, per_dimension
from graphopt.engine.quantization import (
    DEQUANTIZE,
    QUANTIZE,
    Bytes,
    Scheme,
    flattened_pixels,
    image_of,
    is_grouped,
    rows_of,
    scheme,
)
from graphopt.engine.work import AliasWork, Derived, KernelWork, Scope, Work
from graphopt.ir import Node, Value
from graphopt.kernels.integer_problems import (
    DequantizeProblem,
    IntegerConvolutionProblem,
    IntegerMatmulProblem,
    IntegerPoolingProblem,
    IntegerSumProblem,
    QuantizeProblem,
)
from graphopt.kernels.problem import ConstantOperand, Layout, Operand, Problem
from graphopt.kernels.registry import candidates

_LARGEST_BIAS = 2**31 - 1


@dataclass(frozen=True)
class IntegerUnit:
    """Nodes that are computed together, and how."""

    nodes: tuple[Node, ...]
    works: tuple[Work, ...]


@dataclass(frozen=True)
class _Target:
    """What becomes of a layer's sums.

    Attributes:
        nodes: those after the layer, in topological order.
        output: the value that is kept.
        scheme: how it is quantized; None for float32.
        low: the least byte that the activations leave, and
        high: the largest.
        residual: what is added.
    """

    nodes: tuple[Node, ...]
    output: Value
    scheme: Scheme | None
    low: int = 0
    high: int = 255
    residual: Bytes | None = None


def integer_units(scope: Scope) -> list[IntegerUnit]:
    """The units of a graph that integer kernels compute, and conversions to and from floats."""
    units: list[IntegerUnit] = []
    claimed: set[Node] = set()

    def claim(unit: IntegerUnit | None) -> None:
        if unit is not None:
            units.append(unit)
            claimed.update(unit.nodes)

    for node in scope.graph.nodes:
        if node.op == QUANTIZE:
            claim(_quantized(scope, node) or _quantized_image(scope, node))
        elif node.op == DEQUANTIZE:
            claim(_dequantized_image(scope, node))
    for node in scope.graph.nodes:
        if node.op in _MULTIPLYING and node not in claimed:
            claim(_LAYERS[node.op](scope, node, _Target((), node.output, None)))
    return units


# -- what surrounds a layer ----------------------------------------------------------------------


def _quantized(scope: Scope, quantize: Node) -> IntegerUnit | None:
    """The unit that ends with a quantize node, where integers suffice for what it quantizes."""
    found = scheme(quantize, QUANTIZE)
    output = quantize.output
    if found is None or scope.tensor_type(output).dtype != torch.uint8:
        return None
    nodes, value, low, high = [quantize], quantize["x"], found.low, found.high
    while (node := _private(value)) is not None:
        bounds = _clamp(scope, node)
        if bounds is None:
            break
        low, high = (min(max(found.step(bound), low), high) for bound in bounds)
        nodes.insert(0, node)
        value = node["self"]
    image = image_of(scope, value)
    if image is not None:
        return _combined(scope, [image], _Target(tuple(nodes), output, found, low, high), False)
    if node is None:
        return None

    def target(residual: Bytes | None = None) -> _Target:
        return _Target(tuple(nodes), output, found, low, high, residual)

    if node.op in _LAYERS:
        return _LAYERS[node.op](scope, node, target())
    if node.op == "aten.add.Tensor" and _is_plain_sum(scope, node):
        nodes.insert(0, node)
        return _sum(scope, node, target)
    return None


def _private(value: Value) -> Node | None:
    """The node that computes a value for one other node alone."""
    return value.producer if value.only_user() is not None else None


def _clamp(scope: Scope, node: Node) -> tuple[float, float] | None:
    """The least and the largest number that an activation lets pass; None for other nodes."""
    infinite = math.inf
    if node.op == "aten.relu":
        return 0.0, infinite
    if node.op == "aten.relu6":
        return 0.0, 6.0
    if node.op not in ("aten.hardtanh", "aten.clamp", "aten.clamp_min", "aten.clamp_max"):
        return None
    names = ("min_val", "max_val") if node.op == "aten.hardtanh" else ("min", "max")
    given = [
        scope.literal(node[name]) if name in node.operands and node[name] is not None else None
        for name in names
    ]
    if node.op == "aten.hardtanh":
        given = [-1.0 if given[0] is None else given[0], 1.0 if given[1] is None else given[1]]
    least = -infinite if given[0] is None else float(given[0])
    return least, infinite if given[1] is None else float(given[1])


def _is_plain_sum(scope: Scope, node: Node) -> bool:
    operands = node["self"], node["other"]
    if not all(scope.is_tensor(operand) for operand in operands):
        return False
    shapes = {scope.shape(operand) for operand in (*operands, node.output)}
    return len(shapes) == 1 and scope.literal(node["alpha"]) == 1


def _sum(scope: Scope, node: Node, target: Callable[[Bytes | None], _Target]) -> IntegerUnit | None:
    """A sum: of a layer and a residual, or of two images."""
    left, right = node["self"], node["other"]
    for value, other in ((left, right), (right, left)):
        layer, residual = _private(value), image_of(scope, other)
        if layer is not None and layer.op in _CONVOLUTIONS and residual is not None:
            unit = _convolution(scope, layer, target(residual))
            if unit is not None:
                return unit
    images = [image_of(scope, value) for value in (left, right)]
    return _combined(scope, images, target(None), concatenates=False)


def _combined(
    scope: Scope, images: list[Bytes | None], target: _Target, concatenates: bool
) -> IntegerUnit | None:
    """The sum of images, or all of them side by side."""
    parts = [image for image in images if image is not None]
    if target.scheme is None or len(parts) != len(images) or not is_grouped(scope, target.output):
        return None
    whole = all(scope.shape(part.value)[1] % 4 == 0 for part in parts[:-1])
    if concatenates and not whole:
        return None
    numbers: list[float] = [target.scheme.zero_point, target.low, target.high]
    for part in parts:
        numbers += [part.scheme.zero_point, part.scheme.scale / target.scheme.scale]
    parameters = _derived(target, "parameters", np.array(numbers, np.float32))
    problem = IntegerSumProblem(
        (*(_image(scope, part.value) for part in parts), _constant(parameters)),
        (_image(scope, target.output),),
        concatenates,
    )
    return _unit(problem, (*(part.value for part in parts), parameters), target)


def _quantized_image(scope: Scope, node: Node) -> IntegerUnit | None:
    """Floats become an image of bytes."""
    found = scheme(node, QUANTIZE)
    source: Value = node["x"]
    if found is None or not is_grouped(scope, node.output) or not scope.all_float32(source):
        return None
    numbers = np.array([found.scale, found.zero_point, found.low, found.high], np.float32)
    target = _Target((node,), node.output, found)
    parameters = _derived(target, "parameters", numbers)
    problem = QuantizeProblem(
        (scope.operand(source), _constant(parameters)), (_image(scope, node.output),)
    )
    return _unit(problem, (source, parameters), target)


def _dequantized_image(scope: Scope, node: Node) -> IntegerUnit | None:
    """An image of bytes becomes floats; left out where no one reads them."""
    image = image_of(scope, node.output)
    if image is None:
        return None
    numbers = np.array([image.scheme.scale, image.scheme.zero_point], np.float32)
    target = _Target((node,), node.output, None)
    parameters = _derived(target, "parameters", numbers)
    problem = DequantizeProblem(
        (_image(scope, image.value), _constant(parameters)), (scope.operand(node.output),)
    )
    return _unit(problem, (image.value, parameters), target)


def _unit(
    problem: Problem,
    inputs: tuple[Value | Derived, ...],
    target: _Target,
    layer: Node | None = None,
) -> IntegerUnit | None:
    """A problem as a unit, where a kernel solves it."""
    if not candidates(problem):
        return None
    nodes = target.nodes if layer is None else (layer, *target.nodes)
    # The node that names the unit is its first; a conversion has only one.
    return IntegerUnit(nodes, (KernelWork(problem, inputs, (target.output,), nodes),))


def _derived(target: _Target, name: str, array: np.ndarray) -> Derived:
    return Derived(f"{target.output.name}.{name}", torch.from_numpy(array))


def _constant(derived: Derived) -> ConstantOperand:
    array = derived.constant.numpy()
    return ConstantOperand(array.shape, Layout.plain(str(array.dtype), array.ndim))


def _image(scope: Scope, value: Value) -> Operand:
    return Operand.grouped("uint8", scope.shape(value))


# -- layers --------------------------------------------------------------------------------------

_LayerRule = Callable[[Scope, Node, _Target], "IntegerUnit | None"]
_CONVOLUTIONS = ("aten.conv2d", "aten.conv2d.padding", "aten.convolution")
_MULTIPLYING = (*_CONVOLUTIONS, "aten.linear")
"""Layers whose sums may become float32 as well."""


def _convolution(scope: Scope, node: Node, target: _Target) -> IntegerUnit | None:
    geometry = convolution_geometry(scope, node)
    if geometry is None or len(geometry.stride) != 2:
        return None
    image = image_of(scope, geometry.x)
    constants = None if image is None else _layer_constants(scope, node, image.scheme, target)
    if image is None or constants is None:
        return None
    x: Value = image.value
    floating = target.scheme is None
    if not floating and not is_grouped(scope, target.output):
        return None
    weight = constants[0]
    y = scope.operand(target.output) if floating else _image(scope, target.output)
    inputs: list[Value | Derived] = [x, *constants]
    operands = [_image(scope, x), scope.operand(weight), *map(_constant, constants[1:])]
    if target.residual is not None:
        inputs.append(target.residual.value)
        operands.append(_image(scope, target.residual.value))
    problem = IntegerConvolutionProblem(
        tuple(operands),
        (y,),
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        geometry.groups,
    )
    return _unit(problem, tuple(inputs), target, node)


def _layer_constants(
    scope: Scope, node: Node, x: Scheme, target: _Target
) -> tuple[Value, Derived, Derived, Derived] | None:
    """A layer's int8 weight, its multiplier, its bias as int32, and the numbers of a problem."""
    dequantize = node["weight"].producer
    weight = _int8_constant(dequantize)
    if weight is None or dequantize is None:
        return None
    outputs = scope.shape(weight)[0]
    scales = dequantize["scale"].constant.double().reshape(-1).expand(outputs).numpy()
    steps = x.scale * scales
    bias = _int32_bias(node["bias"], steps)
    out_scale = 1.0 if target.scheme is None else target.scheme.scale
    multiplier = (steps / out_scale).astype(np.float32)
    if bias is None or not np.isfinite(multiplier).all():
        return None
    residual = target.residual
    numbers = [
        x.zero_point,
        0 if target.scheme is None else target.scheme.zero_point,
        target.low,
        target.high,
        0 if residual is None else residual.scheme.zero_point,
        0.0 if residual is None else residual.scheme.scale / out_scale,
    ]
    return (
        weight,
        _derived(target, "multiplier", multiplier),
        _derived(target, "bias", bias),
        _derived(target, "numbers", np.array(numbers, np.float32)),
    )


def _int8_constant(dequantize: Node | None) -> Value | None:
    """The int8 constant behind a symmetric dequantize node, whole or per output channel."""
    if dequantize is None or dequantize.op != DEQUANTIZE or dequantize["block_size"] is not None:
        return None
    weight, scale, zero_point = (dequantize[name] for name in ("x", "scale", "zero_point"))
    if not weight.is_constant or weight.constant.dtype != torch.int8 or not scale.is_constant:
        return None
    if zero_point is not None and not (zero_point.is_constant and not zero_point.constant.any()):
        return None
    if scale.constant.dtype != torch.float32 or dequantize["axis"] not in (None, 0):
        return None
    found: Value = weight
    return found


def _int32_bias(bias: Value | None, steps: np.ndarray) -> np.ndarray | None:
    """A bias in ``steps``, one per output channel; None where it is no constant or too large.

    An int32 constant of just these steps is taken as it is; others are rounded to them.
    """
    if bias is None:
        return np.zeros(len(steps), np.int32)
    tensor, own = bias.constant, None
    producer = bias.producer
    if producer is not None and producer.op == DEQUANTIZE and producer["x"].is_constant:
        zero_point, scale = producer["zero_point"], producer["scale"]
        if zero_point is None and scale.is_constant and producer["block_size"] is None:
            tensor = producer["x"].constant
            own = scale.constant.double().reshape(-1).expand(len(steps)).numpy()
    if tensor is None:
        return None
    values: np.ndarray = tensor.detach().double().numpy()
    if own is not None and not np.allclose(own, steps, rtol=1e-5, atol=0):
        values, own = values * own, None
    if own is None:
        with np.errstate(divide="ignore", invalid="ignore"):
            values = np.rint(values / steps)
    if not (np.abs(values) <= _LARGEST_BIAS).all():
        return None
    return values.astype(np.int32)


def _linear(scope: Scope, node: Node, target: _Target) -> IntegerUnit | None:
    rows = rows_of(scope, node["input"])
    constants = None if rows is None else _layer_constants(scope, node, rows.scheme, target)
    if rows is None or constants is None or is_grouped(scope, target.output):
        return None
    weight = constants[0]
    x = Operand.plain("uint8", scope.shape(node["input"]))
    problem = IntegerMatmulProblem(
        (x, scope.operand(weight), *map(_constant, constants[1:])),
        (scope.operand(target.output),),
    )
    return _unit(problem, (rows.value, *constants), target, node)


def _concatenation(scope: Scope, node: Node, target: _Target) -> IntegerUnit | None:
    values = node["tensors"]
    if target.scheme is None or scope.literal(node["dim"]) % len(scope.shape(node.output)) != 1:
        return None
    whole = _Target((node, *target.nodes), target.output, target.scheme, target.low, target.high)
    return _combined(scope, [image_of(scope, value) for value in values], whole, True)


def _max_pool(scope: Scope, node: Node, target: _Target) -> IntegerUnit | None:
    image, found = image_of(scope, node["self"]), target.scheme
    if image is None or found is None or not is_grouped(scope, target.output):
        return None
    same = (found.scale, found.zero_point) == (image.scheme.scale, image.scheme.zero_point)
    if not same or target.low > image.scheme.low or target.high < image.scheme.high:
        return None
    kernel = _pair(scope, node["kernel_size"])
    stride = _pair(scope, node["stride"]) if node["stride"] else kernel
    padding = _pair(scope, node["padding"])
    problem = IntegerPoolingProblem(
        (_image(scope, image.value),),
        (_image(scope, target.output),),
        kernel,
        stride,
        ((padding[0], padding[0]), (padding[1], padding[1])),
        _pair(scope, node["dilation"]),
    )
    return _unit(problem, (image.value,), target, node)


def _pair(scope: Scope, operand: Any) -> tuple[int, int]:
    vertical, horizontal = per_dimension(scope, operand, 2)
    return vertical, horizontal


def _avg_pool(scope: Scope, node: Node, target: _Target) -> IntegerUnit | None:
    if len(scope.shape(node["self"])) != 4:
        return None
    kernel = _pair(scope, node["kernel_size"])
    stride = _pair(scope, node["stride"]) if node["stride"] else kernel
    padding = _pair(scope, node["padding"])
    divisor = scope.literal(node["divisor_override"]) or math.prod(kernel)
    shape, result = scope.shape(node["self"]), scope.shape(node.output)
    # Windows beyond the padding, and averages of what is inside alone, divide by other numbers.
    for size, count, length, step, pad in zip(
        shape[2:], result[2:], kernel, stride, padding, strict=True
    ):
        if (count - 1) * step + length > size + 2 * pad:
            return None
    if any(padding) and not scope.literal(node["count_include_pad"]):
        return None
    return _average(scope, node, target, kernel, stride, padding, divisor)


def _global_avg_pool(scope: Scope, node: Node, target: _Target) -> IntegerUnit | None:
    """The average of all pixels: adaptive pooling to one, or a mean."""
    shape = scope.shape(node["self"])
    if len(shape) != 4:
        return None
    if node.op == "aten.mean.dim":
        dimensions = node["dim"]
        if dimensions is None or sorted(d % 4 for d in dimensions) != [2, 3]:
            return None
    elif any(count != 1 for count in scope.literal(node["output_size"])):
        return None
    kernel = (shape[2], shape[3])
    return _average(scope, node, target, kernel, (1, 1), (0, 0), math.prod(kernel))


def _average(
    scope: Scope,
    node: Node,
    target: _Target,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    divisor: int,
) -> IntegerUnit | None:
    image, found = image_of(scope, node["self"]), target.scheme
    if image is None or found is None:
        return None
    result = scope.shape(node.output)
    shape = result if len(result) == 4 else (*result, 1, 1)
    rows = len(scope.shape(target.output)) == 2 and shape[1] % 4 == 0
    if not rows and not is_grouped(scope, target.output):
        return None
    multiplier = np.full(shape[1], image.scheme.scale / found.scale / divisor, np.float32)
    numbers = [image.scheme.zero_point, found.zero_point, target.low, target.high, 0, 0]
    constants = (
        _derived(target, "multiplier", multiplier),
        _derived(target, "bias", np.zeros(shape[1], np.int32)),
        _derived(target, "numbers", np.array(numbers, np.float32)),
    )
    problem = IntegerPoolingProblem(
        (_image(scope, image.value), *map(_constant, constants)),
        (Operand.grouped("uint8", shape),),
        kernel,
        stride,
        ((padding[0], padding[0]), (padding[1], padding[1])),
    )
    return _unit(problem, (image.value, *constants), target, node)


def _flattened(scope: Scope, node: Node, target: _Target) -> IntegerUnit | None:
    """An image of one pixel becomes rows: the same bytes, or those of a layer before."""
    image = flattened_pixels(scope, node.output)
    if image is None or target.scheme is None:
        return None
    nodes = (node, *target.nodes)
    kept = image_of(scope, image)
    if kept is not None:
        same = kept.scheme == target.scheme
        if not same or (target.low, target.high) != (kept.scheme.low, kept.scheme.high):
            return None
        return IntegerUnit(nodes, (AliasWork(target.output, kept.value, 0, node),))
    layer = _private(image)
    if layer is None or layer.op not in _POOLS:
        return None
    whole = _Target(nodes, target.output, target.scheme, target.low, target.high)
    return _POOLS[layer.op](scope, layer, whole)


_POOLS: dict[str, _LayerRule] = {
    "aten.avg_pool2d": _avg_pool,
    "aten.adaptive_avg_pool2d": _global_avg_pool,
    "aten._adaptive_avg_pool2d": _global_avg_pool,
    "aten.mean.dim": _global_avg_pool,
}
_LAYERS: dict[str, _LayerRule] = {
    **dict.fromkeys(_CONVOLUTIONS, _convolution),
    **_POOLS,
    "aten.linear": _linear,
    "aten.cat": _concatenation,
    "aten.max_pool2d": _max_pool,
    "aten.flatten.using_ints": _flattened,
    "aten.reshape": _flattened,
    "aten.squeeze": _flattened,
    "aten.squeeze.dims": _flattened,
}
"""By operator: the rule that makes it, and what follows, a unit, or declines."""
