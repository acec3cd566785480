"""Whether a chain of layers is faster than the layer that it stands for, on this machine."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from graphopt.ir import Graph
from graphopt.passes.low_rank.candidates import Candidate, Candidates
from graphopt.passes.low_rank.replacement import fragment
from graphopt.passes.low_rank.subjects import Subject
from graphopt.target import Target

FASTER = 0.92
"""Which part of the layer's time a chain may take: what is measured as little faster may be slower
the next time."""
TURNS = 2


@dataclass
class Gate:
    """Measured times of layers and of chains; those of equal shapes are measured once.

    Attributes:
        target: the machine.
    """

    target: Target
    _layers: dict[str, float] = field(default_factory=dict)
    _chains: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict)

    def layer(self, subject: Subject) -> float:
        """Seconds of a layer as it is, with its zeros."""
        alone = fragment(subject)
        key = _key(alone)
        if key not in self._layers:
            self._layers[key] = self.target.time(alone)
        return self._layers[key]

    def pair(self, candidates: Candidates, candidate: Candidate) -> tuple[float, float]:
        """Seconds of the layer and of a chain in its place, measured in turn."""
        alone = fragment(candidates.subject)
        chain = fragment(candidates.subject, candidates.draft(candidate))
        key = _key(alone), _key(chain)
        if key not in self._chains:
            times = [(self.target.time(alone), self.target.time(chain)) for _ in range(TURNS)]
            self._chains[key] = min(t[0] for t in times), min(t[1] for t in times)
        return self._chains[key]


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
