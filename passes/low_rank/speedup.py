"""Budgets of time that the network keeps to as a whole.

Times of layers do not add up to the time of their network: activations may be in the cache or not,
and what is fused with a layer is not fused with its chain. So the network is measured with the
chosen chains in place, and the budget corrected by what it shows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from graphopt.errors import PassError
from graphopt.ir import Graph
from graphopt.passes.low_rank.candidates import Candidate, Candidates
from graphopt.passes.low_rank.gate import Gate
from graphopt.passes.low_rank.merging import merge_neighbours
from graphopt.passes.low_rank.replacement import replace_layer
from graphopt.passes.low_rank.selection import Budget, Selection
from graphopt.pipeline import Context

TRIALS = 6
AIM = 1.05
"""How far above the speedup that was asked for corrections end."""
STEP = 0.15
"""By which part of it the time of the layers changes at most from one trial to the next: what is
measured may be wrong."""


def meet_speedup(
    budget: Budget,
    graph: Graph,
    layers: Sequence[Candidates],
    speedup: float,
    gate: Gate,
    ctx: Context,
) -> Selection:
    """Of the selections that make the network as much faster as asked, that with the least loss
    that was found; where there is none, the fastest.

    Args:
        budget: what the network may cost, with a limit of time.
        graph: the network.
        layers: the layers that the budget is about.
        speedup: time before over time after.
        gate: measures times.
        ctx: shows the progress.

    Raises:
        PassError: the budget cannot be met, judging by the times of the layers.
    """
    trials: list[Selection] = []
    total = budget.total("time")
    corrections = _Corrections(total, speedup)
    for _ in range(TRIALS):
        try:
            selection = budget.solve(ctx)
        except PassError:
            if not trials:
                raise
            break
        if any(selection.chosen == trial.chosen for trial in trials):
            break
        times = total, total
        if any(selection.chosen):
            times = gate.networks(graph, draft(graph, layers, selection.chosen))
        trials.append(replace(selection, network=times))
        if speedup <= _reached(trials[-1]) <= AIM * speedup:
            break
        corrections.apply(budget, selection.chosen, times)
    met = [trial for trial in trials if _reached(trial) >= speedup]
    best = min(met, key=_loss) if met else max(trials, key=_reached)
    return replace(best, refused=selection.refused)


@dataclass
class _Corrections:
    """What is known of the time that the layers may take together.

    Attributes:
        total: seconds of the network, in the measure of the budget's times of layers.
        speedup: that was asked for.
        enough: the most with which it was met.
        too_much: the least with which it was not.
    """

    total: float
    speedup: float
    enough: float = 0.0
    too_much: float = math.inf

    def apply(
        self, budget: Budget, chosen: Sequence[Candidate | None], times: tuple[float, float]
    ) -> None:
        """Allow as much as would have been right if everything beside the layers costs what it did
        in a trial, but nothing that other trials speak against.

        Args:
            budget: its room is changed.
            chosen: what was tried.
            times: seconds of the network without and with it.
        """
        before, after = times
        spent = budget.spent("time", chosen)
        if before >= self.speedup * after:
            self.enough = max(self.enough, spent)
        else:
            self.too_much = min(self.too_much, spent)
        room = spent + self.total * (1 / self.speedup - after / before)
        room = min(max(room, (1 - STEP) * spent), (1 + STEP) * spent)
        if not self.enough < room < self.too_much and self.enough < self.too_much < math.inf:
            room = (self.enough + self.too_much) / 2
        budget.set_room("time", room)


def draft(graph: Graph, layers: Sequence[Candidates], chosen: Sequence[Candidate | None]) -> Graph:
    """The network with chains of the shapes that were chosen, for timing."""
    copy = graph.clone()
    with copy.making(graph.made_by):
        for one, candidate in zip(layers, chosen, strict=True):
            if candidate is not None:
                subject = one.subject.twin(copy)
                replace_layer(copy, subject, one.draft(candidate), subject.offsets())
        merge_neighbours(copy)
    return copy


def speedup_remark(times: tuple[float, float], speedup: float) -> str:
    """What is reached of a speedup, by the seconds of the network before and after."""
    before, after = times
    remark = (
        f"the network takes {1e3 * after:.3g} ms, before {1e3 * before:.3g} ms: it is "
        f"{before / after:.2f} times faster"
    )
    if before < speedup * after:
        remark += f"; {speedup:g} was asked for and is not reached"
    return remark


def _reached(trial: Selection) -> float:
    assert trial.network is not None
    before, after = trial.network
    return before / after


def _loss(trial: Selection) -> float:
    return sum(candidate.loss for candidate in trial.chosen if candidate is not None)
