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
    make_unit,
)
from graphopt.engine.layer_rules import per_dimension
from graphopt.engine.quantization import flattened_pixels, image_of, is_grouped, private
from graphopt.engine.work import AliasWork, Scope
from graphopt.ir import Node
from graphopt.kernels.integer_problems import IntegerPoolingProblem
from graphopt.kernels.problem import Operand


def max_pool(scope: Scope, node: Node, target: Target) -> IntegerUnit | None:
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
        (image_operand(scope, image.value),),
        (image_operand(scope, target.output),),
        kernel,
        stride,
        ((padding[0], padding[0]), (padding[1], padding[1])),
        _pair(scope, node["dilation"]),
    )
    return make_unit(problem, (image.value,), target, node)


def _pair(scope: Scope, operand: Any) -> tuple[int, int]:
    vertical, horizontal = per_dimension(scope, operand, 2)
    return vertical, horizontal


def _avg_pool(scope: Scope, node: Node, target: Target) -> IntegerUnit | None:
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


def _global_avg_pool(scope: Scope, node: Node, target: Target) -> IntegerUnit | None:
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
    shape = result if len(result) == 4 else (*result, 1, 1)
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
    "aten.avg_pool2d": _avg_pool,
    "aten.adaptive_avg_pool2d": _global_avg_pool,
    "aten._adaptive_avg_pool2d": _global_avg_pool,
    "aten.mean.dim": _global_avg_pool,
}
