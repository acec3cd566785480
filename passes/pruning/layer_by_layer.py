"""The Hessian method through a whole network: layer by layer, each with the inputs it will get."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphopt import reference
from graphopt.calibration import CalibrationData
from graphopt.ir import Graph, Node, Value
from graphopt.ir.inference import flatten_results
from graphopt.passes.pruning import hessian
from graphopt.passes.pruning.granularity import Granularity
from graphopt.passes.pruning.layer_inputs import as_matrix, columns, from_matrix
from graphopt.passes.pruning.layers_to_prune import PrunableLayer
from graphopt.pipeline import Context

ROUNDING = 1e-6
"""Relative error of a second moment that is summed up in float32."""


@dataclass
class Moments:
    """First and second moments of a layer's inputs.

    Attributes:
        second: [groups, taps * input channels, taps * input channels], float64.
        first: [groups, taps * input channels].
        count: of results that they are summed over.
    """

    second: Tensor
    first: Tensor
    count: int = 0

    @staticmethod
    def of(layer: PrunableLayer) -> Moments:
        groups, _, inputs, taps = layer.taps(layer.weight.tensor).shape
        size = inputs * taps
        second = torch.zeros(groups, size, size, dtype=torch.float64)
        return Moments(second, torch.zeros(groups, size, dtype=torch.float64))

    def add(self, layer: PrunableLayer, node: Node, x: Tensor) -> None:
        for chunk in columns(node, x, layer.kernel):
            self.second += chunk @ chunk.transpose(1, 2)
            self.first += chunk.sum(dim=2, dtype=torch.float64)
            self.count += chunk.shape[2]

    def centred(self) -> Tensor:
        """Second moments about the mean."""
        outer = self.first.unsqueeze(2) * self.first.unsqueeze(1)
        return self.second - outer / max(1, self.count)


def prune_layer_by_layer(
    graph: Graph,
    sparsities: Mapping[PrunableLayer, float],
    granularity: Granularity,
    data: CalibrationData,
    ctx: Context,
    *,
    sequential: bool = True,
    damping: float = 0.1,
) -> None:
    """Prune layers of a graph in place.

    The values that later nodes need are kept for all of the data, so memory grows with it; the
    data is read once.

    Args:
        graph: whose layers they are.
        sparsities: fraction of the remaining weights to prune, per layer; not for embeddings.
        granularity: shape of the zeros.
        data: calibration data.
        ctx: shows the progress.
        sequential: each layer sees what the layers pruned before it compute, and makes up for
            their errors as far as it can; otherwise all see the dense network.
        damping: fraction of the mean of the Hessian's diagonal that is added to it.
    """
    frontier = _Frontier(graph, data)
    pending: dict[Node, list[PrunableLayer]] = {}
    for layer in sparsities:
        for node in layer.products:
            pending.setdefault(node, []).append(layer)
    moments: dict[PrunableLayer, Moments] = {}
    left = len(sparsities)
    for node in ctx.track(graph.nodes, "pruning layer by layer"):
        ready = []
        for layer in pending.get(node, ()):
            gathered = moments.setdefault(layer, Moments.of(layer))
            for environment in frontier.environments:
                gathered.add(layer, node, frontier.read(node, node["input"], environment))
            if node is layer.products[-1]:
                ready.append(layer)
        if not sequential:
            frontier.advance(node)
        for layer in ready:
            _prune_layer(layer, moments.pop(layer), granularity, sparsities[layer], damping)
        left -= len(ready)
        if left == 0:
            break
        if sequential:
            frontier.advance(node)


def _prune_layer(
    layer: PrunableLayer,
    moments: Moments,
    granularity: Granularity,
    sparsity: float,
    damping: float,
) -> None:
    weight = layer.weight.tensor
    taps = layer.taps(weight).double()
    old, adjustable = as_matrix(taps), _adjustable_bias(layer)
    second = moments.second if adjustable is None else moments.centred()
    new = torch.empty_like(old)
    for group in range(len(old)):
        rounding = ROUNDING * float(moments.second[group].diagonal().mean())
        moment = hessian.damped(second[group], damping, rounding)
        problem = hessian.Problem(old[group], moment, old[group] != 0, taps.shape[3])
        new[group] = hessian.prune(problem, granularity, sparsity)
    layer.write(layer.stored(from_matrix(new, taps.shape)).to(weight.dtype))
    if adjustable is not None:
        mean = moments.first / max(1, moments.count)
        shift = ((old - new) @ mean.unsqueeze(2)).flatten()
        bias = adjustable.constant
        assert bias is not None
        layer.weight.graph.set_constant(adjustable, (bias.double() + shift).to(bias.dtype))


def _adjustable_bias(layer: PrunableLayer) -> Value | None:
    """The bias, where it is a constant of this layer's own: then it takes up the change of the
    output's mean, and the weights need only keep what is about the mean."""
    if len(layer.nodes) > 1:
        return None
    bias = layer.node["bias"]
    own = bias is not None and bias.is_constant and bias.only_user() is layer.node
    return bias if own and bias.dtype.is_floating_point else None


class _Frontier:
    """The values that are alive between two nodes, for every batch of the data."""

    def __init__(self, graph: Graph, data: CalibrationData) -> None:
        self._graph = graph
        self.environments: list[dict[Value, Any]] = [
            dict(zip(graph.inputs, batch.inputs, strict=True)) for batch in data.batches(graph)
        ]
        self._known: dict[Value, Any] = {}
        self._last_use: dict[Value, Node] = {}
        for node in graph.nodes:
            for value in node.input_values():
                self._last_use[value] = node

    def advance(self, node: Node) -> None:
        """Compute a node for all batches, with its weight as it is now."""
        with torch.no_grad():
            if all(value.is_constant or value in self._known for value in node.input_values()):
                self._known.update(self._results(node, {}))
                return
            for environment in self.environments:
                results = self._results(node, environment)
                for value in node.input_values():
                    if self._last_use[value] is node:
                        environment.pop(value, None)
                environment.update((v, r) for v, r in results.items() if v in self._last_use)

    def _results(self, node: Node, environment: dict[Value, Any]) -> dict[Value, Any]:
        given = {value: self.read(node, value, environment) for value in node.input_values()}
        results = flatten_results(reference.evaluate(node, given))
        return dict(zip(node.outputs, results, strict=True))

    def read(self, node: Node, value: Value, environment: dict[Value, Any]) -> Any:
        """An operand of a node for one batch, a weight as it is now."""
        if value.is_constant:
            return value.constant
        if value in environment:
            return environment[value]
        producer = value.producer
        if producer is not None and producer.op == "graphopt.dequantize":
            return self._results(producer, environment)[value]  # its constant may have changed
        return self._known[value]
