"""Nodes with a kernel family of their own: layers, reductions, pooling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from graphopt.engine.work import Scope
from graphopt.ir import Node, Value
from graphopt.kernels.expression import Expression
from graphopt.kernels.problem import Operand, Problem, ReductionProblem

MakeProblem = Callable[[Expression | None, tuple[Operand, ...]], Problem | None]


@dataclass(frozen=True)
class Layer:
    """A node as a problem, which may take an epilogue.

    Attributes:
        output: what the node yields.
        inputs: the values of the problem's first inputs.
        make: the problem, given an epilogue (its first input is the layer's result, the others
            are further inputs of the problem) and the operands of those others.
        takes_epilogue: whether elementwise nodes may follow inside the kernel.
    """

    scope: Scope
    output: Value
    inputs: tuple[Value, ...]
    make: MakeProblem
    takes_epilogue: bool = False

    def problem(self, epilogue: Expression | None, extra: Sequence[Value]) -> Problem | None:
        """The problem with an epilogue; None where the kernels do not take it."""
        return self.make(epilogue, tuple(self.scope.operand(value) for value in extra))


Rule = Callable[[Scope, Node], "Layer | None"]

LAYERS: dict[str, Rule] = {}
"""By operator: the rule that turns a node into a layer, or declines."""


def layer_rule(*ops: str) -> Callable[[Rule], Rule]:
    """Register the rule of some operators."""

    def add(rule: Rule) -> Rule:
        LAYERS.update(dict.fromkeys(ops, rule))
        return rule

    return add


_REDUCTIONS = {
    "aten.sum": "sum",
    "aten.sum.dim_IntList": "sum",
    "aten.mean": "mean",
    "aten.mean.dim": "mean",
    "aten.amax": "amax",
    "aten.amin": "amin",
    "aten.max": "amax",
    "aten.min": "amin",
}


@layer_rule(*_REDUCTIONS)
def _reduction(scope: Scope, node: Node) -> Layer | None:
    source = node["self"]
    rank = len(scope.shape(source))
    dimensions = _dimensions(node, "dim", rank)
    same = scope.tensor_type(source).dtype == scope.tensor_type(node.output).dtype
    if not same or not dimensions or not scope.has_kernels(source):
        return None
    return _reduce(scope, node, source, _REDUCTIONS[node.op], dimensions)


@layer_rule("aten.adaptive_avg_pool2d", "aten.adaptive_avg_pool1d")
def _global_average(scope: Scope, node: Node) -> Layer | None:
    source = node["self"]
    size = scope.literal(node["output_size"])
    if any(n != 1 for n in size) or not scope.all_float32(source):
        return None
    rank = len(scope.shape(source))
    return _reduce(scope, node, source, "mean", tuple(range(rank - len(size), rank)))


def _dimensions(node: Node, name: str, rank: int) -> tuple[int, ...]:
    """The dimensions that a node reduces, all where it names none."""
    names = [parameter.name for parameter in node.operator.parameters]
    given: Any = node[name] if name in names else None
    if isinstance(given, int):
        given = [given]
    return tuple(sorted({d % rank for d in given})) if given else tuple(range(rank))


def _reduce(
    scope: Scope, node: Node, source: Value, operator: str, dimensions: tuple[int, ...]
) -> Layer | None:
    operand, result = scope.operand(source), scope.operand(node.output)
    empty = any(operand.shape[d] == 0 for d in dimensions)
    if empty and operator != "sum":
        return None

    def make(epilogue: Expression | None, extra: tuple[Operand, ...]) -> Problem | None:
        if extra:
            return None
        return ReductionProblem(operator, dimensions, (operand,), (result,), epilogue=epilogue)

    return Layer(scope, node.output, (source,), make, takes_epilogue=True)
