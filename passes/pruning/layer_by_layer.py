"""The Hessian method through a whole network: layer by layer, each with the inputs it will get."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.calibration import CalibrationData
from graphopt.ir import Graph, Node, Value
from graphopt.passes.pruning import hessian
from graphopt.passes.pruning.granularity import Granularity
from graphopt.passes.pruning.layer_inputs import as_matrix, columns, from_matrix
from graphopt.passes.pruning.layers_to_prune import PrunableLayer
from graphopt.passes.pruning.output_importance import output_importance
from graphopt.pipeline import Context
from graphopt.stepwise import Stepwise

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
    inputs = [batch.inputs for batch in data.batches(graph)]
    importance = output_importance(graph, list(sparsities), inputs, ctx)
    walk = Stepwise(graph, inputs)
    del inputs
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
            for environment in walk.environments:
                gathered.add(layer, node, walk.read(node["input"], environment))
            if node is layer.products[-1]:
                ready.append(layer)
        if not sequential:
            walk.advance(node)
        for layer in ready:
            _prune_layer(
                *(layer, moments.pop(layer), importance[layer]),
                *(granularity, sparsities[layer], damping),
            )
        left -= len(ready)
        if left == 0:
            break
        if sequential:
            walk.advance(node)


def _prune_layer(
    layer: PrunableLayer,
    moments: Moments,
    importance: Tensor,
    granularity: Granularity,
    sparsity: float,
    damping: float,
) -> None:
    weight = layer.weight.tensor
    taps = layer.taps(weight).double()
    old, adjustable = as_matrix(taps), _adjustable_bias(layer)
    second = moments.second if adjustable is None else moments.centred()
    new, counts = torch.empty_like(old), importance.reshape(len(old), -1, 1)
    for group in range(len(old)):
        rounding = ROUNDING * float(moments.second[group].diagonal().mean())
        moment = hessian.damped(second[group], damping, rounding)
        remaining = old[group] != 0
        problem = hessian.Problem(old[group], moment, remaining, taps.shape[3], counts[group])
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
