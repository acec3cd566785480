"""Pooling as layers."""

from __future__ import annotations

from graphopt.engine.layer_rules import Layer, layer_rule, per_dimension, reduction_layer
from graphopt.engine.work import Scope
from graphopt.ir import Node, Value
from graphopt.kernels.expression import Expression
from graphopt.kernels.operand import Operand
from graphopt.kernels.problem import AdaptivePoolingProblem, PoolingProblem, Problem


@layer_rule("aten.max_pool1d", "aten.max_pool2d", "aten.max_pool2d_with_indices")
def _max_pool(scope: Scope, node: Node) -> Layer | None:
    result, *indices = node.outputs
    if any(value.users or value.is_output for value in indices):
        return None
    return _pool(scope, node, result, "max", 1 if node.op == "aten.max_pool1d" else 2)


@layer_rule("aten.avg_pool1d", "aten.avg_pool2d")
def _avg_pool(scope: Scope, node: Node) -> Layer | None:
    return _pool(scope, node, node.output, "mean", 1 if node.op == "aten.avg_pool1d" else 2)


def _pool(scope: Scope, node: Node, output: Value, operator: str, spatial: int) -> Layer | None:
    source = node["self"]
    if not scope.all_float32(source):
        return None
    kernel = per_dimension(scope, node["kernel_size"], spatial)
    stride = per_dimension(scope, node["stride"] or kernel, spatial)
    padding = tuple((n, n) for n in per_dimension(scope, node["padding"], spatial))
    dilation, count_padding, divisor = (1,) * spatial, True, None
    if operator == "max":
        dilation = per_dimension(scope, node["dilation"], spatial)
    else:
        count_padding = bool(scope.literal(node["count_include_pad"]))
    if node.op == "aten.avg_pool2d":
        divisor = scope.literal(node["divisor_override"])
    x, y = _batched(scope, source, spatial), _batched(scope, output, spatial)
    shapes = kernel, stride, padding, dilation

    def make(epilogue: Expression | None, extra: tuple[Operand, ...]) -> Problem | None:
        return PoolingProblem(
            (x, *extra), (y,), operator, *shapes, count_padding, divisor, epilogue
        )

    is_batched = len(scope.shape(source)) == spatial + 2
    return Layer(scope, output, (source,), make, takes_epilogue=is_batched)


@layer_rule("aten.adaptive_avg_pool1d", "aten.adaptive_avg_pool2d", "aten._adaptive_avg_pool2d")
def _adaptive_avg_pool(scope: Scope, node: Node) -> Layer | None:
    source = node["self"]
    bins = scope.literal(node["output_size"])
    if not scope.all_float32(source):
        return None
    if all(count == 1 for count in bins):
        rank = len(scope.shape(source))
        dimensions = tuple(range(rank - len(bins), rank))
        return reduction_layer(scope, node, source, "mean", dimensions)
    x, y = _batched(scope, source, len(bins)), _batched(scope, node.output, len(bins))
    problem = AdaptivePoolingProblem((x,), (y,))

    def make(epilogue: Expression | None, extra: tuple[Operand, ...]) -> Problem | None:
        return problem if epilogue is None else None

    return Layer(scope, node.output, (source,), make)


def _batched(scope: Scope, value: Value, spatial: int) -> Operand:
    """A tensor with its batch, which is 1 where it has none."""
    shape = scope.shape(value)
    missing = spatial + 2 - len(shape)
    return Operand.plain("float32", (1,) * missing + shape)
