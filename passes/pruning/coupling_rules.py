"""The coupling of a whole graph, by the rules of its operators."""

from __future__ import annotations

from collections.abc import Mapping

from graphopt.ir import Graph, Node, Value
from graphopt.ir.value import values_in
from graphopt.passes.pruning.coupling import (
    Axes,
    Components,
    Coupling,
    Rule,
    check_axes,
    describe,
)
from graphopt.passes.pruning.coupling_rules_einsum import EINSUM_RULES
from graphopt.passes.pruning.coupling_rules_elementwise import (
    ELEMENTWISE_RULES,
    is_pointwise,
    pointwise,
)
from graphopt.passes.pruning.coupling_rules_layers import LAYER_RULES
from graphopt.passes.pruning.coupling_rules_views import VIEW_RULES

RULES: dict[str, Rule] = {
    **ELEMENTWISE_RULES,
    **VIEW_RULES,
    **LAYER_RULES,
    **EINSUM_RULES,
}
"""By the operator's name. Other operators that torch declares to be pointwise need none."""

_MOST_ROUNDS = 8


def couple(graph: Graph) -> tuple[Coupling, Components]:
    """Which channels of a graph go together.

    Where a grid of channels can lose either rows or columns (the heads or the places within all
    heads, the groups of a convolution or the places within all groups), the first way is tried;
    the decisions that leave nothing to be removed are taken otherwise in the next round.
    """
    choices: dict[str, int] = {}
    tried: dict[str, int] = {}
    coupling, components = _couple(graph, choices)
    for _ in range(_MOST_ROUNDS):
        futile = [
            key
            for key, decision in coupling.decisions.items()
            if tried.get(key, 0) < decision.count - 1
            and len(components.removable(decision.channels)) < 2
        ]
        if not futile:
            break
        for key in futile:
            choices[key] = choices.get(key, 0) + 1
            tried[key] = tried.get(key, 0) + 1
        coupling, components = _couple(graph, choices)
    return coupling, components


def _couple(graph: Graph, choices: Mapping[str, int]) -> tuple[Coupling, Components]:
    coupling = Coupling(len(graph.assignments), choices)
    for value in graph.values:
        if value.is_constant:
            coupling.axes[value] = coupling.new(value)
        elif value.is_input and value.is_tensor:
            coupling.axes[value] = coupling.all_fixed(value, f"%{value.name} is an input")
    for node in graph.nodes:
        results = _apply(coupling, node)
        check_axes(node, results)
        coupling.axes.update(zip(node.outputs, results, strict=True))
    for position, value in enumerate(values_in({"outputs": list(graph.outputs)})):
        for axis in coupling.axes.get(value, ()):
            coupling.pin(axis, f"output {position} of the network, %{value.name}, has it")
    return coupling, coupling.components()


def _apply(coupling: Coupling, node: Node) -> list[Axes]:
    tensors = [value for value in node.input_values() if value.is_tensor]
    rule = RULES.get(node.op)
    if rule is None and is_pointwise(node):
        rule = pointwise
    if rule is not None and not _has_odd_operands(node):
        return list(rule(coupling, node))
    what = "has no coupling rule" if rule is None else "has a dimension that is computed"
    reason = f"{describe(node)} {what}"
    for value in tensors:
        for axis in coupling.axes[value]:
            coupling.pin(axis, reason)
    return [coupling.all_fixed(v, reason) if v.is_tensor else () for v in node.outputs]


def _has_odd_operands(node: Node) -> bool:
    """Whether a dimension is a computed number, which no rule can follow."""
    return any(isinstance(node.operands.get(name), Value) for name in ("dim", "dims", "dim0"))
