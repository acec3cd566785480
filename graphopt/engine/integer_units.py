"""What rules for integer kernels share: units, what follows a layer, and a layer's constants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from graphopt.engine.quantization import DEQUANTIZE, Bytes, Scheme
from graphopt.engine.work import Derived, KernelWork, Scope, Work
from graphopt.ir import Node, Value
from graphopt.kernels.operand import Operand
from graphopt.kernels.problem import Problem
from graphopt.kernels.registry import candidates

_LARGEST_BIAS = 2**31 - 1


@dataclass(frozen=True)
class IntegerUnit:
    """Nodes that are computed together, and how."""

    nodes: tuple[Node, ...]
    works: tuple[Work, ...]


@dataclass(frozen=True)
class Target:
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


IntegerRule = Callable[[Scope, Node, Target], "IntegerUnit | None"]
"""Makes a layer, and what is said to follow it, a unit, or declines."""


def make_unit(
    problem: Problem,
    inputs: tuple[Value | Derived, ...],
    target: Target,
    layer: Node | None = None,
) -> IntegerUnit | None:
    """A problem as a unit, where a kernel solves it."""
    if not candidates(problem):
        return None
    nodes = target.nodes if layer is None else (layer, *target.nodes)
    return IntegerUnit(nodes, (KernelWork(problem, inputs, (target.output,), nodes),))


def derived(target: Target, name: str, array: np.ndarray) -> Derived:
    """A constant that a unit's kernel needs; the name tells it from others of the unit."""
    return Derived(f"{target.output.name}.{name}", torch.from_numpy(array))


def image_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape (N, C, H, W) of an image; a signal (N, C, L) is one of height 1."""
    return shape if len(shape) == 4 else (*shape[:2], 1, *shape[2:])


def image_operand(scope: Scope, value: Value) -> Operand:
    """An image of bytes as a kernel sees it."""
    return Operand.grouped("uint8", image_shape(scope.shape(value)))


def float_image_operand(scope: Scope, value: Value) -> Operand:
    """An image of floats as a kernel sees it."""
    return Operand.plain("float32", image_shape(scope.shape(value)))


def layer_constants(
    scope: Scope, node: Node, x: Scheme, target: Target
) -> tuple[Value, Derived, Derived, Derived] | None:
    """A layer's int8 weight, its multiplier, its bias as int32, and the numbers of a problem."""
    dequantize = node["weight"].producer
    weight = int8_constant(dequantize)
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
        derived(target, "multiplier", multiplier),
        derived(target, "bias", bias),
        derived(target, "numbers", np.array(numbers, np.float32)),
    )


def int8_constant(dequantize: Node | None) -> Value | None:
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
