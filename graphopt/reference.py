"""Reference execution: the graph, node by node, through torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from graphopt.errors import GraphError
from graphopt.ir.graph import Graph
from graphopt.ir.inference import flatten_results, map_operand
from graphopt.ir.types import TensorType
from graphopt.ir.value import Node, Value


def run(
    graph: Graph,
    inputs: Sequence[Any],
    *,
    dtype: torch.dtype | None = None,
    observe: Callable[[Node, list[Any]], None] | None = None,
    until: Node | None = None,
) -> list[Any]:
    """Evaluate a graph.

    Args:
        graph: what to evaluate.
        inputs: one tensor (or number) per graph input.
        dtype: compute in this floating dtype instead, such as float64 for an exact reference:
            floating inputs, constants and results are converted, and so are dtypes among the
            operands.
        observe: called with every node and its results.
        until: the last node to evaluate, where only what is observed matters.

    Returns:
        The flat outputs; `Graph.interface` knows the model's structure for them. Nothing with
        ``until``.

    Raises:
        GraphError: the number, dtypes or ranks of the inputs are not the graph's.
    """
    _check(graph, inputs)
    with torch.no_grad():
        environment: dict[Value, Any] = {}
        last_use = last_uses(graph)
        for value, given in zip(graph.inputs, inputs, strict=True):
            environment[value] = _convert(given, dtype)
        for value in graph.constants:
            environment[value] = _convert(value.constant, dtype)
        for node in graph.nodes:
            results = results_of(node, environment, dtype)
            environment.update(zip(node.outputs, results, strict=True))
            if observe is not None:
                observe(node, results)
            if node is until:
                return []
            for value in last_use.get(node, ()):
                del environment[value]
        return [
            environment[output] if isinstance(output, Value) else output for output in graph.outputs
        ]


def every_value(
    graph: Graph,
    inputs: Sequence[torch.Tensor],
    observe: Callable[[Node, list[Any]], None] | None = None,
) -> dict[Value, Any]:
    """All values of a graph, none of which is released; with gradients where they are enabled.

    Args:
        graph: what is evaluated, in its own dtypes.
        inputs: tensors of the graph's inputs.
        observe: called with every node and its results, before others read them.
    """
    environment: dict[Value, Any] = {value: value.constant for value in graph.constants}
    environment.update(zip(graph.inputs, inputs, strict=True))
    for node in graph.nodes:
        results = results_of(node, environment)
        if observe is not None:
            observe(node, results)
        environment.update(zip(node.outputs, results, strict=True))
    return environment


def results_of(
    node: Node, environment: Mapping[Value, Any], dtype: torch.dtype | None = None
) -> list[Any]:
    """What `evaluate` gives, one result per output of the node.

    Raises:
        GraphError: there are more or fewer.
    """
    flat = flatten_results(evaluate(node, environment, dtype))
    if len(flat) != len(node.outputs):
        raise GraphError(f"{node} gave {len(flat)} results")
    return [_convert(result, dtype) for result in flat]


def evaluate(node: Node, environment: Mapping[Value, Any], dtype: torch.dtype | None = None) -> Any:
    """Apply one node to the values of its operands."""

    def read(leaf: Any) -> Any:
        if isinstance(leaf, Value):
            return environment[leaf]
        if dtype is not None and isinstance(leaf, torch.dtype) and leaf.is_floating_point:
            return dtype
        return leaf

    operands = {name: map_operand(operand, read) for name, operand in node.operands.items()}
    return node.operator.call(operands)


def _convert(given: Any, dtype: torch.dtype | None) -> Any:
    if dtype is None or not isinstance(given, torch.Tensor) or not given.is_floating_point():
        return given
    return given.to(dtype)


def last_uses(graph: Graph) -> dict[Node, list[Value]]:
    """By node: the values that nobody needs after it, which are no outputs of the graph."""
    last: dict[Value, Node] = {}
    for node in graph.nodes:
        for value in node.input_values():
            last[value] = node
    kept = {output for output in graph.outputs if isinstance(output, Value)}
    by_node: dict[Node, list[Value]] = {}
    for value, node in last.items():
        if value not in kept:
            by_node.setdefault(node, []).append(value)
    return by_node


def _check(graph: Graph, inputs: Sequence[Any]) -> None:
    if len(inputs) != len(graph.inputs):
        raise GraphError(f"the graph has {len(graph.inputs)} inputs, {len(inputs)} were given")
    for value, given in zip(graph.inputs, inputs, strict=True):
        if not isinstance(value.type, TensorType):
            continue
        if not isinstance(given, torch.Tensor):
            raise GraphError(f"input %{value.name} is a tensor, got {type(given).__name__}")
        if given.dtype != value.dtype or given.dim() != value.rank:
            raise GraphError(f"input %{value.name} is {value.type}, got {TensorType.of(given)}")
