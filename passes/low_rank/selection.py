"""Which decomposition every layer gets: layer by layer, or for all together within a budget."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median_high
from typing import Literal

from graphopt.errors import PassError
from graphopt.passes.low_rank.budget import Option, choose
from graphopt.passes.low_rank.candidates import Candidate, Candidates
from graphopt.passes.low_rank.gate import Gate, is_faster
from graphopt.pipeline import Context

Cost = Literal["macs", "parameters", "time"]
WEIGHTS = 8
"""In which steps limits of several costs are weighted."""
BOUNDS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
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
        network: seconds of the network as it is and with the chains, where a speedup is asked for.
    """

    chosen: list[Candidate | None]
    times: dict[int, tuple[float, float]] = field(default_factory=dict)
    refused: dict[int, tuple[Candidate, tuple[float, float]]] = field(default_factory=dict)
    network: tuple[float, float] | None = None


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
        if is_faster(times[best]):
            selection.chosen[place], selection.times[place] = best, times[best]
        else:
            selection.refused[place] = best, times[best]
    return selection


@dataclass(frozen=True)
class Limit:
    """A bound of what the network may cost.

    Attributes:
        cost: what is bounded.
        total: what the whole network costs now: multiply-adds, parameters, or seconds.
        allowed: what it may cost.
        own: what each of the layers costs now.
    """

    cost: Cost
    total: float
    allowed: float
    own: Sequence[float]


class Budget:
    """Decompositions of all layers together within a budget.

    Args:
        layers: the layers.
        options: the decompositions of each to choose from.
        limits: the bounds; one or several, of different costs.
        gate: measures times; None if they do not matter.
    """

    def __init__(
        self,
        layers: Sequence[Candidates],
        options: Sequence[list[Candidate]],
        limits: Sequence[Limit],
        gate: Gate | None,
    ) -> None:
        self._layers, self._limits, self._gate = layers, limits, gate
        self._options: list[list[Candidate]] = [list(some) for some in options]
        self._rooms = [limit.allowed - (limit.total - sum(limit.own)) for limit in limits]
        self._overhead: dict[tuple[int, str], float] = {}
        self._measured: dict[tuple[int, Candidate], tuple[float, float]] = {}
        self._refused: dict[int, tuple[Candidate, tuple[float, float]]] = {}

    def solve(self, ctx: Context) -> Selection:
        """Choose until everything that is chosen was measured and is faster than its layer.

        Raises:
            PassError: the budget cannot be met.
        """
        is_timed = any(limit.cost == "time" for limit in self._limits)
        rounds = 0
        while True:
            chosen = self._choose(only_measured=rounds >= ROUNDS and is_timed)
            fresh = [
                (place, candidate)
                for place, candidate in enumerate(chosen)
                if candidate is not None and (place, candidate) not in self._measured
            ]
            if self._gate is None or not fresh:
                times = {
                    place: self._measured[place, candidate]
                    for place, candidate in enumerate(chosen)
                    if candidate is not None and self._gate is not None
                }
                return Selection(chosen, times, dict(self._refused))
            for place, candidate in ctx.track(fresh, "times"):
                self._measure(place, candidate)
            rounds += 1

    def total(self, cost: Cost) -> float:
        """What the whole network costs now."""
        return self._limits[self._number(cost)].total

    def set_room(self, cost: Cost, room: float) -> None:
        """Allow the layers more or less than the limit and the network's other costs say."""
        self._rooms[self._number(cost)] = room

    def spent(self, cost: Cost, chosen: Sequence[Candidate | None]) -> float:
        """What the layers cost together with some of the decompositions."""
        number = self._number(cost)
        return sum(self._cost_of(number, place, c) for place, c in enumerate(chosen))

    def _number(self, cost: Cost) -> int:
        return [limit.cost for limit in self._limits].index(cost)

    def _measure(self, place: int, candidate: Candidate) -> None:
        assert self._gate is not None
        before, after = times = self._gate.pair(self._layers[place], candidate)
        self._measured[place, candidate] = times
        share = candidate.macs / max(self._layers[place].subject.macs(), 1)
        self._overhead[place, candidate.method] = after / before / max(share, 1e-9)
        if not is_faster(times):
            self._options[place].remove(candidate)
            self._refused[place] = candidate, times

    def _choose(self, only_measured: bool) -> list[Candidate | None]:
        """The option of every layer, None to leave it.

        Several limits are one for a weighted sum of the costs, which all that keeps to the limits
        keeps to as well. Weights are tried in steps; where all answers break a limit, the sum is
        bounded more tightly.
        """
        kept: list[list[Candidate | None]] = []
        for place, options in enumerate(self._options):
            known = [c for c in options if not only_measured or (place, c) in self._measured]
            kept.append([None, *known])
        costs = [
            [[self._cost_of(number, place, c) for c in row] for place, row in enumerate(kept)]
            for number in range(len(self._limits))
        ]
        if any(
            sum(map(min, of_limit)) > room or room <= 0
            for of_limit, room in zip(costs, self._rooms, strict=True)
        ):
            raise self._unreachable(costs)
        losses = [[0.0 if c is None else c.loss for c in row] for row in kept]
        for bound in BOUNDS[: 1 if len(self._limits) == 1 else None]:
            answers = [
                choose(self._weighted(costs, losses, weights), bound)
                for weights in _weights(len(self._limits))
            ]
            fitting = [answer for answer in answers if answer and self._fits(costs, answer)]
            if fitting:
                best = min(
                    fitting,
                    key=lambda a: sum(row[k] for row, k in zip(losses, a, strict=True)),
                )
                return [row[k] for row, k in zip(kept, best, strict=True)]
        raise self._unreachable(costs)

    def _weighted(
        self, costs: list[list[list[float]]], losses: list[list[float]], weights: tuple[float, ...]
    ) -> list[list[Option]]:
        scales = [weight / room for weight, room in zip(weights, self._rooms, strict=True)]
        return [
            [
                Option(sum(s * costs[n][place][k] for n, s in enumerate(scales)), loss)
                for k, loss in enumerate(row)
            ]
            for place, row in enumerate(losses)
        ]

    def _fits(self, costs: list[list[list[float]]], answer: list[int]) -> bool:
        return all(
            sum(row[k] for row, k in zip(of_limit, answer, strict=True)) <= room * (1 + 1e-9)
            for of_limit, room in zip(costs, self._rooms, strict=True)
        )

    def _cost_of(self, number: int, place: int, candidate: Candidate | None) -> float:
        """Seconds that were not measured are estimated from the multiply-adds, and from how a
        chain of the same kind compared with its own."""
        cost, own = self._limits[number].cost, self._limits[number].own[place]
        if candidate is None:
            return own
        if cost == "macs":
            return candidate.macs
        if cost == "parameters":
            return candidate.parameters
        if (place, candidate) in self._measured:
            before, after = self._measured[place, candidate]
            return own * after / before
        of_method = [v for (_, method), v in self._overhead.items() if method == candidate.method]
        typical = median_high(of_method) if of_method else 1.0
        overhead = self._overhead.get((place, candidate.method), typical)
        return own * overhead * candidate.macs / max(self._layers[place].subject.macs(), 1)

    def _unreachable(self, costs: list[list[list[float]]]) -> PassError:
        faster = " that are faster than their layers" if self._gate is not None else ""
        for limit, room, of_limit in zip(self._limits, self._rooms, costs, strict=True):
            least = limit.allowed - room + sum(map(min, of_limit))
            share = least / limit.total if limit.total else 0.0
            if least <= limit.allowed:
                continue
            if limit.cost == "time":
                remedy = f"at most speedup={math.floor(100 / share) / 100:g}"
            else:
                remedy = f"at least {limit.cost}={math.ceil(100 * share) / 100:g}"
            return PassError(
                f"the budget cannot be met: even with the smallest chains{faster} the network "
                f"keeps {share:.1%} of its {_NOUNS[limit.cost]}; ask for {remedy}, or allow other "
                "methods"
            )
        names = " and ".join(_NOUNS[limit.cost] for limit in self._limits)
        return PassError(f"the budgets of {names} can be met one by one, but not together")


def _weights(count: int) -> list[tuple[float, ...]]:
    """Shares that add up to 1, in steps."""
    if count == 1:
        return [(1.0,)]
    steps = itertools.product(range(WEIGHTS + 1), repeat=count)
    return [tuple(n / WEIGHTS for n in some) for some in steps if sum(some) == WEIGHTS]
