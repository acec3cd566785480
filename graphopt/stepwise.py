"""Several batches through a graph together, node by node, while the graph's weights change."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from graphopt import reference
from graphopt.ir import Graph, Node, Value


class Stepwise:
    """The values that are alive between two nodes of a graph, for every batch.

    Constants are read when a node is computed, so that a layer may be given another weight before
    its turn comes; nodes may not be added or removed meanwhile.

    Args:
        graph: what is evaluated, in its own dtypes, by torch.
        batches: for each, one tensor per input of the graph.

    Attributes:
        environments: for each batch, what later nodes or the caller of the graph need.
    """

    def __init__(self, graph: Graph, batches: Iterable[Sequence[torch.Tensor]]) -> None:
        self.environments: list[dict[Value, Any]] = [
            dict(zip(graph.inputs, inputs, strict=True)) for inputs in batches
        ]
        self._last_uses = reference.last_uses(graph)

    def advance(self, node: Node) -> None:
        """Compute a node for all batches, with its constants as they are now."""
        if _is_quantized_constant(node):
            return  # `read` computes it anew
        with torch.no_grad():
            for environment in self.environments:
                results = self._results(node, environment)
                for value in self._last_uses.get(node, ()):
                    environment.pop(value, None)
                environment.update(
                    (value, result)
                    for value, result in zip(node.outputs, results, strict=True)
                    if value.users or value.is_output
                )

    def read(self, value: Value, environment: dict[Value, Any]) -> Any:
        """An operand of the next node for one batch, a constant as it is now."""
        if value.is_constant:
            return value.constant
        if value.producer is not None and _is_quantized_constant(value.producer):
            return self._results(value.producer, environment)[value.index]
        return environment[value]

    def _results(self, node: Node, environment: dict[Value, Any]) -> list[Any]:
        given = {value: self.read(value, environment) for value in node.input_values()}
        return reference.results_of(node, given)


def _is_quantized_constant(node: Node) -> bool:
    return node.op == "graphopt.dequantize" and all(v.is_constant for v in node.input_values())
