"""Normalisations and softmax as layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from graphopt.engine.layer_rules import Layer, layer_rule
from graphopt.engine.work import Scope
from graphopt.ir import Node, Value
from graphopt.kernels.expression import Expression, Instruction, Ref
from graphopt.kernels.operand import Operand
from graphopt.kernels.problem import NormalizationProblem, Problem, SoftmaxProblem

_AFFINE = ("mul", "add")

Reshape = Callable[[tuple[int, ...]], tuple[int, ...]]
"""The shape in the problem of an operand that broadcasts to the node's result."""


@layer_rule("aten.layer_norm", "aten.rms_norm")
def _layer_norm(scope: Scope, node: Node) -> Layer | None:
    centered = node.op == "aten.layer_norm"
    parameters = [node["weight"], node["bias"] if centered else None]
    epsilon = scope.literal(node["eps"])
    if epsilon is None:
        epsilon = torch.finfo(torch.float32).eps
    shape, dimensions = scope.shape(node["input"]), len(node["normalized_shape"])
    return _normalization(
        scope, node, parameters, shape, dimensions, epsilon, centered=centered, own=lambda s: s
    )


@layer_rule("aten.group_norm")
def _group_norm(scope: Scope, node: Node) -> Layer | None:
    parameters = [node["weight"], node["bias"]]
    return _grouped(scope, node, parameters, scope.literal(node["num_groups"]))


@layer_rule("aten.instance_norm")
def _instance_norm(scope: Scope, node: Node) -> Layer | None:
    if not node["use_input_stats"] or node["running_mean"] is not None:
        return None
    parameters = [node["weight"], node["bias"]]
    return _grouped(scope, node, parameters, scope.shape(node["input"])[1])


def _grouped(scope: Scope, node: Node, parameters: list[Value | None], groups: int) -> Layer | None:
    """The normalisation of each sample's channels in ``groups`` groups."""

    def split(shape: tuple[int, ...]) -> tuple[int, ...]:
        batch, channels, *spatial = shape
        if channels == 1:
            return (batch, 1, 1, *spatial)
        return (batch, groups, channels // groups, *spatial)

    shape, epsilon = split(scope.shape(node["input"])), scope.literal(node["eps"])

    def own(given: tuple[int, ...]) -> tuple[int, ...]:
        return split((1, *given, *[1] * (len(shape) - 3)))

    return _normalization(
        scope, node, parameters, shape, len(shape) - 2, epsilon, own=own, split=split
    )


def _normalization(
    scope: Scope,
    node: Node,
    parameters: list[Value | None],
    shape: tuple[int, ...],
    dimensions: int,
    epsilon: Any,
    *,
    own: Reshape,
    split: Reshape = lambda shape: shape,
    centered: bool = True,
) -> Layer | None:
    """The layer of a node.

    Args:
        scope: the graph.
        node: what is lowered.
        parameters: the learned scale and shift, where there are any.
        shape: the input's shape in the problem.
        dimensions: how many of these make a row.
        epsilon: is added to the variance.
        own: gives the shape of a parameter in the problem.
        split: gives the shape in the problem of what an epilogue reads.
        centered: whether the mean is subtracted.
    """
    x, weight, bias = node["input"], *parameters
    if not scope.all_float32(x, weight, bias) or not dimensions:
        return None
    given = [value for value in (weight, bias) if value is not None]
    steps = [op for op, value in zip(_AFFINE, (weight, bias), strict=True) if value is not None]
    source = Operand.plain("float32", shape)
    fixed = [_reshaped(scope.operand(value), own) for value in given]

    def make(epilogue: Expression | None, extra: tuple[Operand, ...]) -> Problem | None:
        expression = _after_affine(epilogue, steps)
        result = Operand.plain(expression.result_dtypes[0], shape)
        operands = (source, *fixed, *(_reshaped(operand, split) for operand in extra))
        return NormalizationProblem(
            operands, (result,), dimensions, float(epsilon), centered, expression
        )

    return Layer(scope, node.output, (x, *given), make, takes_epilogue=True)


def _reshaped(operand: Operand, reshape: Reshape) -> Operand:
    return Operand.plain(operand.dtype, reshape(operand.shape))


def _after_affine(epilogue: Expression | None, steps: list[str]) -> Expression:
    """An epilogue after operators that take its second and following inputs, one each."""
    old = epilogue or Expression(("float32",), (), (Ref(0),))
    count, inputs = len(steps), len(old.inputs)

    value = Ref(0)
    body = []
    for place, op in enumerate(steps):
        body.append(Instruction(op, (value, Ref(1 + place)), "float32"))
        value = Ref(inputs + count + place)

    def moved(index: int) -> Ref:
        if index == 0:
            return value
        return Ref(index + (count if index < inputs else 2 * count))

    for step in old.instructions:
        operands = (moved(o.index) if isinstance(o, Ref) else o for o in step.operands)
        body.append(Instruction(step.op, tuple(operands), step.dtype))
    results = tuple(moved(result.index) for result in old.results)
    first, *others = old.inputs
    return Expression((first, *["float32"] * count, *others), tuple(body), results)


_SOFTMAX = ("aten.softmax.int", "aten._softmax", "aten.special_softmax")
_LOG_SOFTMAX = ("aten.log_softmax.int", "aten._log_softmax", "aten.special_log_softmax")


@layer_rule(*_SOFTMAX, *_LOG_SOFTMAX)
def _softmax(scope: Scope, node: Node) -> Layer | None:
    source = node["self"]
    if not scope.all_float32(source, node.output):
        return None
    operand, dimension = scope.operand(source), scope.literal(node["dim"])
    operand = Operand.plain(operand.dtype, operand.shape)
    problem = SoftmaxProblem((operand,), (operand,), dimension, node.op in _LOG_SOFTMAX)

    def make(epilogue: Expression | None, extra: tuple[Operand, ...]) -> Problem | None:
        return problem if epilogue is None else None

    return Layer(scope, node.output, (source,), make)
