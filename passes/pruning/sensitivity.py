"""How much the network's results suffer when one layer alone is pruned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt import reference
from graphopt.calibration import Batch, CalibrationData
from graphopt.ir import Graph, Value
from graphopt.passes.pruning.layers_to_prune import PrunableLayer
from graphopt.pipeline import Context

SAMPLES = 4
"""How many samples of the first batch are enough to rank layers."""


def sensitivities(
    graph: Graph,
    layers: Sequence[PrunableLayer],
    levels: Sequence[float],
    pruned: Callable[[PrunableLayer, float], Tensor],
    data: CalibrationData,
    ctx: Context,
) -> Mapping[PrunableLayer, list[float]]:
    """Squared error of the graph's results relative to their squares, per layer and level.

    Args:
        graph: the network.
        layers: each is pruned while all others are dense.
        levels: sparsities.
        pruned: a layer's weight at a level.
        data: its first batch is used, of that at most `SAMPLES` samples.
        ctx: shows the progress.
    """
    batch = next(iter(data.batches(graph)))
    with torch.no_grad():
        environment = reference.every_value(graph, few_samples(graph, batch))
    exact = [environment[out] for out in graph.outputs if isinstance(out, Value)]
    errors: dict[PrunableLayer, list[float]] = {}
    for layer in ctx.track(layers, "sensitivity of layers"):
        errors[layer] = []
        for level in levels:
            if level == 0:
                errors[layer].append(0.0)
                continue
            operand = layer.node[layer.weight.operand]
            got = _again(graph, environment, operand, pruned(layer, level))
            errors[layer].append(relative_error(got, exact))
    return errors


def relative_error(results: Sequence[Any], exact: Sequence[Any]) -> float:
    """Sum of squared differences of floating tensors over the sum of squares."""
    difference = scale = 0.0
    for a, b in zip(results, exact, strict=True):
        if isinstance(b, Tensor) and b.is_floating_point():
            difference += float((a.double() - b.double()).square().sum())
            scale += float(b.double().square().sum())
    return difference / max(scale, 1e-30)


def few_samples(graph: Graph, batch: Batch) -> list[Tensor]:
    """The first `SAMPLES` samples of a batch, as inputs of the graph."""
    return [
        tensor[:SAMPLES] if 0 in value.free else tensor
        for value, tensor in zip(graph.inputs, batch.inputs, strict=True)
    ]


def _again(
    graph: Graph, environment: Mapping[Value, Any], changed: Value, tensor: Tensor
) -> list[Any]:
    """The results of the graph if one value were another."""
    new: dict[Value, Any] = {changed: tensor}
    with torch.no_grad():
        for node in graph.nodes:
            if changed in node.outputs or not any(v in new for v in node.input_values()):
                continue
            given = {value: new.get(value, environment[value]) for value in node.input_values()}
            results = reference.results_of(node, given)
            new.update(zip(node.outputs, results, strict=True))
    return [new.get(o, environment[o]) for o in graph.outputs if isinstance(o, Value)]
