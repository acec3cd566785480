"""Whether a chain of layers is faster than the layer that it stands for, on this machine."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from graphopt.ir import Graph
from graphopt.passes.low_rank.candidates import Candidate, Candidates
from graphopt.passes.low_rank.replacement import fragment
from graphopt.passes.low_rank.subjects import Subject
from graphopt.target import Target

FASTER = 0.92
"""Which part of the layer's time a chain may take: what is measured as little faster may be slower
the next time."""
AGREE = 1.08
"""How much longer than the least time of a graph the next one may be, for the least to be
believed."""
ROUNDS = 6
"""How often graphs are measured at most until the least times of all of them are believed."""


@dataclass
class Gate:
    """Measured times of networks, layers and chains; chains of equal shapes are measured once.

    Attributes:
        target: the machine.
    """

    target: Target
    _chains: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict)

    def parts(self, graph: Graph, subjects: Sequence[Subject]) -> tuple[float, list[float]]:
        """Seconds of a network, and of each of its layers as it is, with its zeros."""
        alone = [fragment(subject) for subject in subjects]
        keys = [_key(one) for one in alone]
        different = dict(zip(keys, alone, strict=True))
        whole, *layers = in_turn(self.target, [graph, *different.values()])
        times = dict(zip(different, layers, strict=True))
        return whole, [times[key] for key in keys]

    def networks(self, before: Graph, after: Graph) -> tuple[float, float]:
        """Seconds of two networks, measured in turn."""
        first, second = in_turn(self.target, [before, after])
        return first, second

    def pair(self, candidates: Candidates, candidate: Candidate) -> tuple[float, float]:
        """Seconds of the layer and of a chain in its place, measured in turn."""
        alone = fragment(candidates.subject)
        chain = fragment(candidates.subject, candidates.draft(candidate))
        key = _key(alone), _key(chain)
        if key not in self._chains:
            before, after = in_turn(self.target, [alone, chain])
            self._chains[key] = before, after
        return self._chains[key]


def in_turn(target: Target, graphs: Sequence[Graph]) -> list[float]:
    """Seconds of each graph, in proportion to one another also on a machine that is slow at times.

    All graphs are measured in rounds. The least times count as soon as all of them were met twice:
    where a slow spell begins or ends within a round, those of some graphs are not, unless it is
    soon over. Where that does not happen, because a spell lasts on or times scatter, the median
    over rounds of a graph's share in its round counts; a spell that covers whole rounds does not
    change it.
    """
    rounds: list[list[float]] = []
    while len(rounds) < ROUNDS:
        rounds.append([target.time(graph) for graph in graphs])
        ordered = [sorted(own) for own in zip(*rounds, strict=True)]
        if len(rounds) > 1 and all(own[1] <= AGREE * own[0] for own in ordered):
            return [own[0] for own in ordered]
    sums = [sum(times) for times in rounds]
    shares = [
        median(seconds / whole for seconds, whole in zip(own, sums, strict=True))
        for own in zip(*rounds, strict=True)
    ]
    return [share * min(sums) for share in shares]


def is_faster(times: tuple[float, float]) -> bool:
    """Whether a chain is faster than its layer, by the seconds of layer and chain."""
    before, after = times
    return after <= FASTER * before


def _key(graph: Graph) -> str:
    """Equal for fragments of the same operators, shapes and zeros."""
    digest = hashlib.sha256(graph.to_text().encode())
    for value in graph.constants:
        assert value.constant is not None
        zeros = value.constant == 0
        if zeros.any():
            digest.update(zeros.numpy().tobytes())
    return digest.hexdigest()
