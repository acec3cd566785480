"""Layers between dequantize and quantize nodes, computed in integers.

A unit reaches from the layer to the quantize node that follows: over a residual, and activations
that clamp. What lies in between is not rounded to float32 at all, so results may differ by a step
from those of the operators one after another; `graphopt.kernels.integer_problems` says what they
are.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from graphopt.engine.integer_linear_rules import dynamic_linear, linear, weight_only_linear
from graphopt.engine.integer_pooling_rules import POOLS, flattened, max_pool
from graphopt.engine.integer_units import (
    IntegerRule,
    IntegerUnit,
    Target,
    derived,
    float_image_operand,
    image_operand,
    layer_constants,
    make_unit,
)
from graphopt.engine.layer_rules import CONVOLUTIONS, convolution_geometry
from graphopt.engine.quantization import (
    ACTIVATIONS,
    DEQUANTIZE,
    QUANTIZE,
    Bytes,
    image_of,
    is_grouped,
    private,
    scheme,
)
from graphopt.engine.work import Derived, Scope
from graphopt.ir import Node, Value
from graphopt.kernels.integer_problems import (
    DequantizeProblem,
    IntegerConvolutionProblem,
    IntegerSumProblem,
    QuantizeProblem,
)

_MULTIPLYING = (*CONVOLUTIONS, "aten.linear")
"""Layers whose sums may become float32 as well."""


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
            claim(_LAYERS[node.op](scope, node, Target((), node.output, None)))
        if node.op == "aten.linear" and node not in claimed:
            claim(dynamic_linear(scope, node) or weight_only_linear(scope, node))
    return units


def _quantized(scope: Scope, quantize: Node) -> IntegerUnit | None:
    """The unit that ends with a quantize node, where integers suffice for what it quantizes."""
    found = scheme(quantize, QUANTIZE)
    output = quantize.output
    if found is None or scope.tensor_type(output).dtype != torch.uint8:
        return None
    nodes, value, low, high = [quantize], quantize["x"], found.low, found.high
    while (node := private(value)) is not None:
        bounds = _clamp(scope, node)
        if bounds is None:
            break
        low, high = (min(max(found.step(bound), low), high) for bound in bounds)
        nodes.insert(0, node)
        value = node["self"]
    image = image_of(scope, value)
    if image is not None:
        return _combined(scope, [image], Target(tuple(nodes), output, found, low, high), False)
    if node is None:
        return None

    def target(residual: Bytes | None = None) -> Target:
        return Target(tuple(nodes), output, found, low, high, residual)

    if node.op in _LAYERS:
        return _LAYERS[node.op](scope, node, target())
    if node.op == "aten.add.Tensor" and _is_plain_sum(scope, node):
        nodes.insert(0, node)
        return _sum(scope, node, target)
    return None


def _clamp(scope: Scope, node: Node) -> tuple[float, float] | None:
    """The least and the largest number that an activation lets pass; None for other nodes."""
    infinite = math.inf
    if node.op not in ACTIVATIONS:
        return None
    if node.op == "aten.relu":
        return 0.0, infinite
    if node.op == "aten.relu6":
        return 0.0, 6.0
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


def _sum(scope: Scope, node: Node, target: Callable[[Bytes | None], Target]) -> IntegerUnit | None:
    """A sum: of a layer and a residual, or of two images."""
    left, right = node["self"], node["other"]
    for value, other in ((left, right), (right, left)):
        layer, residual = private(value), image_of(scope, other)
        if layer is not None and layer.op in CONVOLUTIONS and residual is not None:
            unit = _convolution(scope, layer, target(residual))
            if unit is not None:
                return unit
    images = [image_of(scope, value) for value in (left, right)]
    return _combined(scope, images, target(None), concatenates=False)


def _combined(
    scope: Scope, images: list[Bytes | None], target: Target, concatenates: bool
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
    parameters = derived(target, "parameters", np.array(numbers, np.float32))
    problem = IntegerSumProblem(
        (*(image_operand(scope, part.value) for part in parts), scope.operand(parameters)),
        (image_operand(scope, target.output),),
        concatenates,
    )
    return make_unit(problem, (*(part.value for part in parts), parameters), target)


def _quantized_image(scope: Scope, node: Node) -> IntegerUnit | None:
    """Floats become an image of bytes."""
    found = scheme(node, QUANTIZE)
    source: Value = node["x"]
    if found is None or not is_grouped(scope, node.output) or not scope.all_float32(source):
        return None
    numbers = np.array([found.scale, found.zero_point, found.low, found.high], np.float32)
    target = Target((node,), node.output, found)
    parameters = derived(target, "parameters", numbers)
    problem = QuantizeProblem(
        (float_image_operand(scope, source), scope.operand(parameters)),
        (image_operand(scope, node.output),),
    )
    return make_unit(problem, (source, parameters), target)


def _dequantized_image(scope: Scope, node: Node) -> IntegerUnit | None:
    """An image of bytes becomes floats; left out where no one reads them."""
    image = image_of(scope, node.output)
    if image is None:
        return None
    numbers = np.array([image.scheme.scale, image.scheme.zero_point], np.float32)
    target = Target((node,), node.output, None)
    parameters = derived(target, "parameters", numbers)
    problem = DequantizeProblem(
        (image_operand(scope, image.value), scope.operand(parameters)),
        (float_image_operand(scope, node.output),),
    )
    return make_unit(problem, (image.value, parameters), target)


def _convolution(scope: Scope, node: Node, target: Target) -> IntegerUnit | None:
    geometry = convolution_geometry(scope, node)
    if geometry is None or len(geometry.stride) > 2:
        return None
    image = image_of(scope, geometry.x)
    constants = None if image is None else layer_constants(scope, node, image.scheme, target)
    if image is None or constants is None:
        return None
    x: Value = image.value
    floating = target.scheme is None
    if not floating and not is_grouped(scope, target.output):
        return None
    operand = float_image_operand if floating else image_operand
    stride, padding, dilation = geometry.stride, geometry.padding, geometry.dilation
    inputs: list[Value | Derived] = [x, *constants]
    if len(stride) == 1:
        stride, padding, dilation = (1, *stride), ((0, 0), *padding), (1, *dilation)
        assert constants[0].constant is not None
        inputs[1] = derived(target, "weight", constants[0].constant.numpy()[:, :, None])
    operands = [image_operand(scope, x), *map(scope.operand, inputs[1:])]
    if target.residual is not None:
        inputs.append(target.residual.value)
        operands.append(image_operand(scope, target.residual.value))
    problem = IntegerConvolutionProblem(
        tuple(operands),
        (operand(scope, target.output),),
        (stride[0], stride[1]),
        (padding[0], padding[1]),
        (dilation[0], dilation[1]),
        geometry.groups,
    )
    return make_unit(problem, tuple(inputs), target, node)


def _concatenation(scope: Scope, node: Node, target: Target) -> IntegerUnit | None:
    values = node["tensors"]
    if target.scheme is None or scope.literal(node["dim"]) % len(scope.shape(node.output)) != 1:
        return None
    whole = Target((node, *target.nodes), target.output, target.scheme, target.low, target.high)
    return _combined(scope, [image_of(scope, value) for value in values], whole, True)


_LAYERS: dict[str, IntegerRule] = {
    **dict.fromkeys(CONVOLUTIONS, _convolution),
    **POOLS,
    "aten.linear": linear,
    "aten.cat": _concatenation,
    "aten.max_pool1d": max_pool,
    "aten.max_pool2d": max_pool,
    "aten.flatten.using_ints": flattened,
    "aten.reshape": flattened,
    "aten.squeeze": flattened,
    "aten.squeeze.dims": flattened,
}

"""By operator: the rule that makes it, and what follows, a unit, or declines."""
