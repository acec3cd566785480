"""Which decomposition every layer gets: layer by layer, or for all together within a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from graphopt.errors import PassError
from graphopt.passes.low_rank.budget import Option, choose
from graphopt.passes.low_rank.candidates import Candidate, Candidates
from graphopt.passes.low_rank.gate import FASTER, Gate
from graphopt.pipeline import Context

Cost = Literal["macs", "parameters", "time"]
_NOUNS = {"macs": "multiply-adds", "parameters": "parameters", "time": "time"}
ROUNDS = 12
"""How often a time budget is solved with estimates among the times."""


MEASURED = 3
"""Of how many decompositions of a layer times are compared: those with the fewest multiply-adds."""


@dataclass
class Selection:
    """What was chosen, and what was not.

    Attributes:
        chosen: per layer, in order; None for a layer that stays.
        times: seconds of layer and chain, for chosen ones where they were measured.
        refused: per layer, chains that are not faster, with both times.
    """

    chosen: list[Candidate | None]
    times: dict[int, tuple[float, float]] = field(default_factory=dict)
    refused: dict[int, tuple[Candidate, tuple[float, float]]] = field(default_factory=dict)


def layer_by_layer(
    layers: Sequence[Candidates], wanted: Sequence[list[Candidate]], gate: Gate | None, ctx: Context
) -> Selection:
    """Of a few decompositions that are all good enough for a layer, the fastest, if it is faster
    than the layer; without a gate that with the fewest multiply-adds.

    Args:
        layers: the layers.
        wanted: the decompositions to choose from, per layer.
        gate: measures times; None if they do not matter.
        ctx: shows the progress.
    """
    selection = Selection([None] * len(layers))
    for place, one in enumerate(ctx.track(layers, "times" if gate else "decompositions")):
        options = sorted(wanted[place], key=lambda c: (c.macs, c.parameters))
        if not options:
            continue
        if gate is None:
            selection.chosen[place] = options[0]
            continue
        options = options[:MEASURED]
        times = {candidate: gate.pair(one, candidate) for candidate in options}
        best = min(options, key=lambda c: times[c][1] / times[c][0])
        if gate.passes(one, best):
            selection.chosen[place], selection.times[place] = best, times[best]
        else:
            selection.refused[place] = best, times[best]
    return selection


class Budget:
    """Decompositions of all layers together within a budget.

    Args:
        layers: the layers.
        options: the decompositions of each to choose from.
        cost: what is bounded.
        total: what the whole network costs now.
        limit: what it may cost: multiply-adds, parameters, or seconds.
        gate: measures times; None if they do not matter.
    """

    def __init__(
        self,
        layers: Sequence[Candidates],
        options: Sequence[list[Candidate]],
        cost: Cost,
        total: float,
        limit: float,
        gate: Gate | None,
    ) -> None:
        self._layers, self._cost, self._gate = layers, cost, gate
        self._options: list[list[Candidate]] = [list(some) for some in options]
        self._own = [self._cost_of_layer(one) for one in layers]
        self._limit = limit - (total - sum(self._own))
        self._total, self._given = total, limit
        self._overhead: dict[tuple[int, str], float] = {}
        self._measured: set[tuple[int, Candidate]] = set()

    def solve(self, ctx: Context) -> Selection:
        """Choose until everything that is chosen was measured and is faster than its layer.

        Raises:
            PassError: the budget cannot be met.
        """
        selection = Selection([None] * len(self._layers))
        rounds = 0
        while True:
            chosen = self._choose(rounds >= ROUNDS and self._cost == "time")
            fresh = [
                (place, candidate)
                for place, candidate in enumerate(chosen)
                if candidate is not None and (place, candidate) not in self._measured
            ]
            if self._gate is None or not fresh:
                selection.chosen = chosen
                for place, candidate in enumerate(chosen):
                    if candidate is None or self._gate is None:
                        continue
                    times = self._gate.pair(self._layers[place], candidate)
                    selection.times[place] = times
                    selection.refused.pop(place, None)
                return selection
            for place, candidate in ctx.track(fresh, "times"):
                self._measure(place, candidate, selection)
            rounds += 1

    def _measure(self, place: int, candidate: Candidate, selection: Selection) -> None:
        assert self._gate is not None
        self._measured.add((place, candidate))
        before, after = self._gate.pair(self._layers[place], candidate)
        share = candidate.macs / max(self._layers[place].subject.macs(), 1)
        self._overhead[place, candidate.method] = after / before / max(share, 1e-9)
        if after > FASTER * before:
            self._options[place].remove(candidate)
            selection.refused[place] = candidate, (before, after)

    def _choose(self, only_measured: bool) -> list[Candidate | None]:
        rows: list[list[Option]] = []
        kept: list[list[Candidate | None]] = []
        for place, own in enumerate(self._own):
            options = [
                candidate
                for candidate in self._options[place]
                if not only_measured or (place, candidate) in self._measured
            ]
            kept.append([None, *options])
            rows.append(
                [Option(own, 0.0), *(Option(self._cost_of(place, c), c.loss) for c in options)]
            )
        chosen = choose(rows, self._limit)
        if chosen is None:
            raise self._unreachable(rows)
        return [kept[place][index] for place, index in enumerate(chosen)]

    def _cost_of_layer(self, one: Candidates) -> float:
        if self._cost == "macs":
            return one.subject.macs()
        if self._cost == "parameters":
            return one.subject.parameters()
        assert self._gate is not None
        return self._gate.layer(one.subject)

    def _cost_of(self, place: int, candidate: Candidate) -> float:
        """Seconds that were not measured are estimated from the multiply-adds, and from how a
        chain of the same kind compared with its own."""
        if self._cost == "macs":
            return candidate.macs
        if self._cost == "parameters":
            return candidate.parameters
        assert self._gate is not None
        own = self._own[place]
        if (place, candidate) in self._measured:
            before, after = self._gate.pair(self._layers[place], candidate)
            return own * after / before
        of_method = [v for (_, method), v in self._overhead.items() if method == candidate.method]
        typical = sorted(of_method)[len(of_method) // 2] if of_method else 1.0
        overhead = self._overhead.get((place, candidate.method), typical)
        return own * overhead * candidate.macs / max(self._layers[place].subject.macs(), 1)

    def _unreachable(self, rows: list[list[Option]]) -> PassError:
        fixed = self._given - self._limit
        least = fixed + sum(min(option.cost for option in row) for row in rows)
        share = least / self._total if self._total else 0.0
        faster = " that are faster than their layers" if self._gate is not None else ""
        if self._cost == "time":
            remedy = f"at most speedup={math.floor(100 / share) / 100:g}"
        else:
            remedy = f"at least {self._cost}={math.ceil(100 * share) / 100:g}"
        return PassError(
            f"the budget cannot be met: even with the smallest chains{faster} the network keeps "
            f"{share:.1%} of its {_NOUNS[self._cost]}; ask for {remedy}, or allow other methods"
        )
