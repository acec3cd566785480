"""Pooling of bytes, and images of one pixel that become rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from graphopt.engine.integer_units import (
    IntegerRule,
    IntegerUnit,
    Target,
    derived,
    image_operand,
    image_shape,
    make_unit,
)
from graphopt.engine.layer_rules import per_dimension
from graphopt.engine.quantization import Bytes, flattened_pixels, image_of, is_grouped, private
from graphopt.engine.work import AliasWork, Scope
from graphopt.ir import Node
from graphopt.kernels.integer_problems import IntegerPoolingProblem
from graphopt.kernels.operand import Operand


def max_pool(scope: Scope, node: Node, target: Target) -> IntegerUnit | None:
    image, found = _pooled(scope, node), target.scheme
    if image is None or found is None or not is_grouped(scope, target.output):
        return None
    same = (found.scale, found.zero_point) == (image.scheme.scale, image.scheme.zero_point)
    if not same or target.low > image.scheme.low or target.high < image.scheme.high:
        return None
    kernel, stride, padding = _window(scope, node)
    spatial = len(scope.shape(node["self"])) - 2
    problem = IntegerPoolingProblem(
        (image_operand(scope, image.value),),
        (image_operand(scope, target.output),),
        kernel,
        stride,
        ((padding[0], padding[0]), (padding[1], padding[1])),
        _pair(scope, node["dilation"], spatial, 1),
    )
    return make_unit(problem, (image.value,), target, node)


def _pooled(scope: Scope, node: Node) -> Bytes | None:
    """The image that a node pools, all its dimensions but the first two."""
    spatial = len(scope.shape(node["self"])) - 2
    if node.op != "aten.mean.dim" and not node.op.endswith(f"pool{spatial}d"):
        return None
    return image_of(scope, node["self"])


Pair = tuple[int, int]


def _window(scope: Scope, node: Node) -> tuple[Pair, Pair, Pair]:
    """Size, stride and padding of windows, by (vertical, horizontal)."""
    spatial = len(scope.shape(node["self"])) - 2
    kernel = _pair(scope, node["kernel_size"], spatial, 1)
    stride = _pair(scope, node["stride"], spatial, 1) if node["stride"] else kernel
    return kernel, stride, _pair(scope, node["padding"], spatial, 0)


def _pair(scope: Scope, operand: Any, spatial: int, missing: int) -> Pair:
    """Numbers of ``spatial`` dimensions as two: a signal is an image of height 1, for which the
    number is the one that is ``missing``."""
    numbers = per_dimension(scope, operand, spatial)
    vertical, horizontal = numbers if spatial == 2 else (missing, *numbers)
    return vertical, horizontal


def _avg_pool(scope: Scope, node: Node, target: Target) -> IntegerUnit | None:
    if _pooled(scope, node) is None:
        return None
    kernel, stride, padding = _window(scope, node)
    override = node.op == "aten.avg_pool2d" and scope.literal(node["divisor_override"])
    divisor = override or math.prod(kernel)
    shape, result = (image_shape(scope.shape(value)) for value in (node["self"], node.output))
    # Windows beyond the padding, and averages of what is inside alone, divide by other numbers.
    for size, count, length, step, pad in zip(
        shape[2:], result[2:], kernel, stride, padding, strict=True
    ):
        if (count - 1) * step + length > size + 2 * pad:
            return None
    if any(padding) and not scope.literal(node["count_include_pad"]):
        return None
    return _average(scope, node, target, kernel, stride, padding, divisor)


def _global_avg_pool(scope: Scope, node: Node, target: Target) -> IntegerUnit | None:
    """The average of all pixels: adaptive pooling to one, or a mean."""
    shape = scope.shape(node["self"])
    if _pooled(scope, node) is None:
        return None
    if node.op == "aten.mean.dim":
        rank, dimensions = len(shape), node["dim"]
        if dimensions is None or sorted(d % rank for d in dimensions) != list(range(2, rank)):
            return None
    elif any(count != 1 for count in scope.literal(node["output_size"])):
        return None
    _, _, *size = image_shape(shape)
    kernel = (size[0], size[1])
    return _average(scope, node, target, kernel, (1, 1), (0, 0), math.prod(kernel))


def _average(
    scope: Scope,
    node: Node,
    target: Target,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    divisor: int,
) -> IntegerUnit | None:
    image, found = image_of(scope, node["self"]), target.scheme
    if image is None or found is None:
        return None
    result = scope.shape(node.output)
    shape = (*result, 1, 1) if len(result) == 2 else image_shape(result)
    rows = len(scope.shape(target.output)) == 2 and shape[1] % 4 == 0
    if not rows and not is_grouped(scope, target.output):
        return None
    multiplier = np.full(shape[1], image.scheme.scale / found.scale / divisor, np.float32)
    numbers = [image.scheme.zero_point, found.zero_point, target.low, target.high, 0, 0]
    constants = (
        derived(target, "multiplier", multiplier),
        derived(target, "bias", np.zeros(shape[1], np.int32)),
        derived(target, "numbers", np.array(numbers, np.float32)),
    )
    problem = IntegerPoolingProblem(
        (image_operand(scope, image.value), *map(scope.operand, constants)),
        (Operand.grouped("uint8", shape),),
        kernel,
        stride,
        ((padding[0], padding[0]), (padding[1], padding[1])),
    )
    return make_unit(problem, (image.value, *constants), target, node)


def flattened(scope: Scope, node: Node, target: Target) -> IntegerUnit | None:
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
    layer = private(image)
    if layer is None or layer.op not in POOLS:
        return None
    whole = Target(nodes, target.output, target.scheme, target.low, target.high)
    return POOLS[layer.op](scope, layer, whole)


POOLS: dict[str, IntegerRule] = {
    "aten.avg_pool1d": _avg_pool,
    "aten.avg_pool2d": _avg_pool,
    "aten.adaptive_avg_pool1d": _global_avg_pool,
    "aten.adaptive_avg_pool2d": _global_avg_pool,
    "aten._adaptive_avg_pool2d": _global_avg_pool,
    "aten.mean.dim": _global_avg_pool,
}
