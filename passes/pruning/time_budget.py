"""Sparsities that make the whole network as much faster as asked, by measured time.

Each layer is timed alone at several sparsities; the levels with the least sum of errors within a
budget of time are chosen together. Times of layers do not add up to the time of the network, so
the whole is measured and the budget corrected until the speed-up is what was asked.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from graphopt.errors import PassError
from graphopt.ir import Graph
from graphopt.passes.pruning.allocation import choose_levels
from graphopt.passes.pruning.layer_times import Times
from graphopt.passes.pruning.layers_to_prune import PrunableLayer
from graphopt.pipeline import Context

TOLERANCE = 0.1
"""Largest relative difference between the speed-up asked and measured,"""
AIM = 0.04
"""and the one at which corrections end."""
TURNS = 3
"""How often a network is timed as it is and pruned: a single time may be wrong by as much."""
ROUNDS = 10
BETWEEN = 4
"""Into how many parts an interval between two timed sparsities is divided."""


@dataclass(frozen=True)
class TimedChoice:
    """What `sparsities_for_speedup` found.

    Attributes:
        sparsities: per layer.
        times: dense, and with these sparsities.
    """

    sparsities: dict[PrunableLayer, float]
    times: Times

    @property
    def speedup(self) -> float:
        return self.times.speedup


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
    budget = max(least, most - ctx.target.time(graph) * (1 - 1 / speedup))
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
        before, after = (1e3 * seconds for seconds in best.times.network)
        raise PassError(
            f"a speed-up of {speedup:g} cannot be reached: the best that sparse layers reach is "
            f"{best.speedup:.2f} ({before:.3g} ms before, {after:.3g} ms after); ask for less, "
            "ignore fewer layers, or prune channels"
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
    """Time the network as it is and with sparsities, in turns; the medians."""
    weights = {layer: pruned(layer, s) for layer, s in sparsities.items() if s > 0}
    sparse = _with_weights(graph, weights)
    turns = [(ctx.target.time(graph), ctx.target.time(sparse)) for _ in range(TURNS)]
    before, after = (statistics.median(seconds) for seconds in zip(*turns, strict=True))
    alone = {
        layer.name: (table.seconds[layer][0], table.seconds[layer][table.levels.index(sparsity)])
        for layer, sparsity in sparsities.items()
    }
    return TimedChoice(sparsities, Times(alone, (before, after)))


def _with_weights(graph: Graph, weights: Mapping[PrunableLayer, Tensor]) -> Graph:
    """A copy of the graph in which layers have other weights."""
    copy = graph.clone()
    for layer, tensor in weights.items():
        layer.twin(copy).write(tensor)
    return copy


def _ascending(errors: Sequence[float]) -> list[float]:
    """Errors that do not fall where the sparsity rises: what noise there is, is removed."""
    return np.maximum.accumulate(np.asarray(errors)).tolist()


def _miss(choice: TimedChoice, speedup: float) -> float:
    return abs(choice.speedup / speedup - 1)
