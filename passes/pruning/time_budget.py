"""Sparsities that make the whole network as much faster as asked, by measured time.

Each layer is timed alone at several sparsities; the levels with the least sum of errors within a
budget of time are chosen together. Times of layers do not add up to the time of the network, so
the whole is measured and the budget corrected until the speed-up is what was asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from graphopt.errors import PassError
from graphopt.ir import Graph, Node, TensorType, Value
from graphopt.ir.inference import map_operand
from graphopt.passes.pruning.allocation import choose_levels
from graphopt.passes.pruning.layers_to_prune import PrunableLayer
from graphopt.pipeline import Context

TOLERANCE = 0.1
"""Largest relative difference between the speed-up asked and measured,"""
AIM = 0.04
"""and the one at which corrections end."""
ROUNDS = 10
BETWEEN = 4
"""Into how many parts an interval between two timed sparsities is divided."""


@dataclass(frozen=True)
class TimedChoice:
    """What `sparsities_for_speedup` found.

    Attributes:
        sparsities: per layer.
        layer_seconds: per layer, alone: dense, and at its sparsity.
        seconds: of the whole network: as it was, and with the sparsities.
    """

    sparsities: dict[PrunableLayer, float]
    layer_seconds: dict[PrunableLayer, tuple[float, float]]
    seconds: tuple[float, float]

    @property
    def speedup(self) -> float:
        return self.seconds[0] / self.seconds[1]


@dataclass(frozen=True)
class TimeTable:
    """Errors and times of every layer at the same sparsities, ascending from 0."""

    levels: tuple[float, ...]
    errors: Mapping[PrunableLayer, Sequence[float]]
    seconds: Mapping[PrunableLayer, Sequence[float]]

    def refined(self) -> TimeTable:
        """With sparsities between those above zero, where errors and times are interpolated; from
        zero to the first a kernel that skips zeros takes over, and nothing can be said between."""
        first = self.levels[1]
        fine = [0.0, first]
        for low, high in zip(self.levels[1:], self.levels[2:], strict=False):
            fine += [low + (high - low) * k / BETWEEN for k in range(1, BETWEEN + 1)]

        def between(own: Sequence[float]) -> list[float]:
            return [own[0], *np.interp(fine[1:], self.levels[1:], own[1:]).tolist()]

        return TimeTable(
            tuple(fine),
            {layer: between(own) for layer, own in self.errors.items()},
            {layer: between(own) for layer, own in self.seconds.items()},
        )


def time_layers(
    layers: Sequence[PrunableLayer],
    levels: Sequence[float],
    pruned: Callable[[PrunableLayer, float], Tensor],
    ctx: Context,
) -> dict[PrunableLayer, list[float]]:
    """Seconds of every layer alone at every sparsity; layers that are the same problem, of the
    same shapes and settings, are timed once.

    Args:
        layers: which.
        levels: sparsities.
        pruned: a layer's weight at a sparsity.
        ctx: has the timer, and shows the progress.
    """
    known: dict[str, list[float]] = {}
    for layer in ctx.track(layers, "timing layers"):
        key = _problem(layer)
        if key not in known:
            known[key] = [
                sum(ctx.target.time(fragment(node, pruned(layer, level))) for node in layer.nodes)
                for level in levels
            ]
    return {layer: known[_problem(layer)] for layer in layers}


def fragment(node: Node, weight: Tensor) -> Graph:
    """A graph of one layer alone, with another weight. All its sizes are fixed.

    A quantized layer is taken as if it were not; the time of the whole network puts that right.
    """
    graph = Graph()
    made: dict[Value, Value] = {}

    def twin(leaf: object) -> object:
        if not isinstance(leaf, Value):
            return leaf
        if leaf is node["weight"]:
            made.setdefault(leaf, graph.constant(weight, "weight"))
        elif leaf.constant is not None:
            made.setdefault(leaf, graph.constant(leaf.constant, leaf.name))
        elif isinstance(leaf.type, TensorType):
            made.setdefault(leaf, graph.add_input(leaf.name, leaf.type))
        return made[leaf]

    operands = {name: map_operand(operand, twin) for name, operand in node.operands.items()}
    graph.set_outputs(graph.add_node(node.op, **operands).outputs)
    return graph


def sparsities_for_speedup(
    graph: Graph,
    table: TimeTable,
    speedup: float,
    pruned: Callable[[PrunableLayer, float], Tensor],
    ctx: Context,
) -> TimedChoice:
    """The sparsities with the least error that make the whole network so much faster.

    Args:
        graph: the network.
        table: errors and times of its layers.
        speedup: time now over time then.
        pruned: a layer's weight at a sparsity.
        ctx: has the timer.

    Raises:
        PassError: even the fastest sparsities do not reach it; the message tells what they reach.
    """
    fine = table.refined()
    layers = list(fine.errors)
    errors = [_ascending(fine.errors[layer]) for layer in layers]
    seconds = [list(fine.seconds[layer]) for layer in layers]
    least, most = sum(map(min, seconds)), sum(own[0] for own in seconds)
    slow, fast = _Trial(most, 1.0), None
    best: TimedChoice | None = None
    budget = max(least, most - graph_seconds(graph, ctx) * (1 - 1 / speedup))
    for _ in ctx.track(range(ROUNDS), "meeting the time budget"):
        places = choose_levels(errors, seconds, budget)
        sparsities = {la: fine.levels[k] for la, k in zip(layers, places, strict=True)}
        tried = _measure(graph, sparsities, fine, pruned, ctx)
        if best is None or _miss(tried, speedup) < _miss(best, speedup):
            best = tried
        if _miss(best, speedup) <= AIM:
            break
        if tried.speedup < speedup:
            if budget <= least:
                break
            slow = _Trial(budget, tried.speedup)
        else:
            fast = _Trial(budget, tried.speedup)
        budget = _next_budget(slow, fast, least, speedup)
    assert best is not None
    if _miss(best, speedup) > TOLERANCE:
        raise PassError(
            f"a speed-up of {speedup:g} cannot be reached: the best that sparse layers reach is "
            f"{best.speedup:.2f} ({1e3 * best.seconds[0]:.3g} ms before, "
            f"{1e3 * best.seconds[1]:.3g} ms after); ask for less, ignore fewer layers, or prune "
            "channels"
        )
    return best


@dataclass(frozen=True)
class _Trial:
    """A budget for the layers, and the speed-up of the network that it gave."""

    budget: float
    speedup: float


def _next_budget(slow: _Trial, fast: _Trial | None, least: float, speedup: float) -> float:
    """Between a budget that was too slow and one that was too fast, where the network's time would
    be right if it were linear in the budget; the least of all where none was too fast yet."""
    if fast is None:
        return least
    low, high = 1 / fast.speedup, 1 / slow.speedup
    share = min(0.9, max(0.1, (1 / speedup - low) / max(high - low, 1e-12)))
    return fast.budget + (slow.budget - fast.budget) * share


def _measure(
    graph: Graph,
    sparsities: dict[PrunableLayer, float],
    table: TimeTable,
    pruned: Callable[[PrunableLayer, float], Tensor],
    ctx: Context,
) -> TimedChoice:
    """Time the network as it is and with sparsities, one right after the other."""
    before = graph_seconds(graph, ctx)
    weights = {layer: pruned(layer, s) for layer, s in sparsities.items() if s > 0}
    after = graph_seconds(_with_weights(graph, weights), ctx)
    alone = {
        layer: (table.seconds[layer][0], table.seconds[layer][table.levels.index(sparsity)])
        for layer, sparsity in sparsities.items()
    }
    return TimedChoice(sparsities, alone, (before, after))


def graph_seconds(graph: Graph, ctx: Context) -> float:
    """Seconds of a network."""
    return ctx.target.time(graph)


def _with_weights(graph: Graph, weights: Mapping[PrunableLayer, Tensor]) -> Graph:
    """A copy of the graph in which layers have other weights."""
    copy = graph.clone()
    twins = dict(zip(graph.nodes, copy.nodes, strict=True))
    for layer, tensor in weights.items():
        nodes = tuple(twins[node] for node in layer.nodes)
        PrunableLayer(layer.name, nodes, copy.weight(nodes[0])).write(tensor)
    return copy


def _ascending(errors: Sequence[float]) -> list[float]:
    """Errors that do not fall where the sparsity rises: what noise there is, is removed."""
    return np.maximum.accumulate(np.asarray(errors)).tolist()


def _miss(choice: TimedChoice, speedup: float) -> float:
    return abs(choice.speedup / speedup - 1)


def _problem(layer: PrunableLayer) -> str:
    """The same for layers that take the same time."""
    parts = []
    for node in layer.nodes:
        operands = {
            name: map_operand(o, lambda leaf: leaf.type if isinstance(leaf, Value) else leaf)
            for name, o in node.operands.items()
        }
        parts.append(f"{node.op} {operands}")
    density = int(torch.count_nonzero(layer.weight.tensor))
    return f"{parts} {density}"
