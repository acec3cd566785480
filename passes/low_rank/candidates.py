"""What may be done with a layer: every method at every rank that is worth a look."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from graphopt.errors import PassError
from graphopt.ir.patterns import Decline
from graphopt.passes.low_rank.factors import Chain, side_by_side
from graphopt.passes.low_rank.methods import PRODUCTS, Family, Ranks, family
from graphopt.passes.low_rank.moments import Moments
from graphopt.passes.low_rank.splitting import Splitting
from graphopt.passes.low_rank.subjects import Subject
from graphopt.passes.low_rank.whitening import PrincipalOutputs, Refined

Rank = int | float | str | Sequence[int | float]
"""A rank, a fraction of the full rank, one of either per rank of a method with several, or
``"evbmf"``."""

STEPS = 16
"""At how many ranks a layer's decompositions are looked at for a budget."""
STEPS_OF_PAIRS = 8
"""The same for each of two ranks."""


@dataclass(frozen=True)
class Candidate:
    """A decomposition of a layer.

    Attributes:
        method: one of `methods.METHODS`.
        ranks: of it.
        macs, parameters: of the chain.
        error: squared, relative to the weight's square, or with data to the output's variance.
    """

    method: str
    ranks: Ranks
    macs: int
    parameters: int
    error: float

    @property
    def loss(self) -> float:
        """Adds up over layers: the negative logarithm of the share that is kept (Zhang et al.
        2015)."""
        return -math.log(max(1.0 - self.error, 1e-12))


@dataclass
class Candidates:
    """A layer and its decompositions.

    Attributes:
        subject: the layer.
        families: per method that applies, the decompositions of the groups.
        declined: why the other methods do not.
        splits: groups of the first convolution of each method.
        multiple: what the channels between the layers of a chain should be a multiple of.
    """

    subject: Subject
    families: dict[str, list[Family]]
    declined: dict[str, str]
    splits: dict[str, int]
    multiple: int
    _known: dict[tuple[str, Ranks], Candidate] = field(default_factory=dict)

    def at(self, method: str, ranks: Ranks) -> Candidate:
        """The decomposition at some ranks."""
        if (method, ranks) not in self._known:
            families = self.families[method]
            chain = side_by_side([one.draft(ranks) for one in families])
            error = sum(
                share * one.error(ranks) for share, one in zip(self._shares, families, strict=True)
            )
            macs, parameters = self.subject.macs(chain), self.subject.parameters(chain)
            self._known[method, ranks] = Candidate(method, ranks, macs, parameters, error)
        return self._known[method, ranks]

    def chain(self, candidate: Candidate) -> tuple[Chain, Tensor]:
        """The layers of a decomposition, and their bias [output channels]."""
        chains, shifts = [], []
        for one in self.families[candidate.method]:
            chains.append(one.chain(candidate.ranks))
            if isinstance(one, (PrincipalOutputs, Refined)):
                shifts.append(one.shift(candidate.ranks, chains[-1]))
        offsets = self.subject.offsets()
        return side_by_side(chains), offsets + torch.cat(shifts) if shifts else offsets

    def draft(self, candidate: Candidate) -> Chain:
        """A chain of the same shapes, for timing."""
        families = self.families[candidate.method]
        return side_by_side([one.draft(candidate.ranks) for one in families])

    def given(self, method: str, rank: Rank) -> Candidate:
        """The decomposition at a rank as the user gives it."""
        full = self.families[method][0].full
        if rank == "evbmf":
            found = [one.evbmf() for one in self.families[method]]
            ranks = tuple(map(max, zip(*found, strict=True)))
            return self.at(method, self.rounded(method, ranks))
        items: Sequence[int | float]
        items = [rank] * len(full) if isinstance(rank, (int, float)) else list(rank)  # type: ignore[arg-type]
        if len(items) != len(full):
            raise PassError(
                f"{self.subject.name}: rank has {len(items)} numbers, {method} has {len(full)} "
                "ranks" + (", of the input and of the output channels" if len(full) == 2 else "")
            )
        if all(isinstance(item, int) for item in items):
            ranks = tuple(int(item) for item in items)
            if any(not 1 <= r <= most for r, most in zip(ranks, full, strict=True)):
                raise PassError(
                    f"{self.subject.name}: rank is {rank}; with {method} this layer has ranks "
                    f"from 1 to {_shown(full)}"
                )
            return self.at(method, ranks)
        wanted = tuple(
            item if isinstance(item, int) else max(1, round(item * most))
            for item, most in zip(items, full, strict=True)
        )
        return self.at(method, self.rounded(method, wanted))

    def with_energy(self, method: str, energy: float) -> Candidate:
        """The decomposition at the least rank that keeps a share of the square."""
        found = [one.ranks_for(energy) for one in self.families[method]]
        ranks = tuple(map(max, zip(*found, strict=True)))
        return self.at(method, self.rounded(method, ranks))

    def ladder(self, methods: Sequence[str], cost: str) -> list[Candidate]:
        """Decompositions that cost less than the layer; none of them is both cheaper and nearer
        to it than another one of the same method.

        Args:
            methods: those to look at.
            cost: ``"macs"`` or ``"parameters"``.
        """
        own = self.subject.macs() if cost == "macs" else self.subject.parameters()
        found: list[Candidate] = []
        for method in methods:
            if method not in self.families:
                continue
            steps = [self._steps(method, place) for place in range(len(self._full(method)))]
            if len(steps) == 1:
                ranks: list[Ranks] = [(r,) for r in steps[0]]
            else:
                ranks = [(a, b) for a in steps[0] for b in steps[1]]
            pairs = [(getattr(c, cost), c) for c in (self.at(method, r) for r in ranks)]
            found += _undominated([(price, c) for price, c in pairs if price < own])
        return found

    def rounded(self, method: str, ranks: Ranks) -> Ranks:
        """Ranks rounded up to what the kernels like, at most the full ones."""
        return tuple(
            min(full, -(-rank // multiple) * multiple)
            for rank, full, multiple in zip(
                ranks, self._full(method), self._multiples(method), strict=True
            )
        )

    def _full(self, method: str) -> Ranks:
        return self.families[method][0].full

    def _multiples(self, method: str) -> Ranks:
        splits = self.splits[method]
        multiples = []
        for full in self._full(method):
            multiple = max(1, self.multiple // math.gcd(self.multiple, splits))
            while 4 * multiple > full and multiple > 1:
                multiple //= 2
            multiples.append(multiple)
        return tuple(multiples)

    def _steps(self, method: str, place: int) -> list[int]:
        """Ranks to look at, in equal steps of multiples."""
        full, multiple = self._full(method)[place], self._multiples(method)[place]
        single = len(self._full(method)) == 1
        most = min(full, self.families[method][0].at_hand[place])
        if single:  # ranks at which nothing is saved are not worth a step
            unit = self.at(method, (1,)).parameters
            most = min(most, self.subject.parameters() // unit)
        count, limit = max(1, most // multiple), STEPS if single else STEPS_OF_PAIRS
        wanted = sorted({max(1, round(count * k / limit)) for k in range(1, limit + 1)})
        return [min(max(1, most), step * multiple) for step in wanted]

    @cached_property
    def _shares(self) -> list[float]:
        """Of the groups in the kernel's square."""
        squares = [kernel.square().sum().item() for kernel in self.subject.kernels()]
        total = sum(squares)
        return [square / total if total else 1 / len(squares) for square in squares]


def candidates_of(
    subject: Subject,
    methods: Sequence[str],
    generator: torch.Generator,
    splits: int,
    multiple: int,
    moments: LayerMoments | None = None,
) -> Candidates:
    """The decompositions of a layer by the methods that apply to it."""
    families: dict[str, list[Family]] = {}
    declined: dict[str, str] = {}
    first: dict[str, int] = {}
    kernels = subject.kernels()
    for method in methods:
        made: list[Family] = []
        for group, kernel in enumerate(kernels):
            one = family(method, kernel, generator, splits)
            if isinstance(one, Decline):
                declined[method] = one.reason
                break
            made.append(one if moments is None else on_data(method, one, kernel, moments, group))
        else:
            families[method] = made
            channels = kernels[0].shape[1]
            first[method] = {"grouped": splits, "depthwise_separable": channels}.get(method, 1)
            first[method] *= subject.groups
    return Candidates(subject, families, declined, first, multiple)


@dataclass(frozen=True)
class LayerMoments:
    """Moments of one layer over calibration data, a pair per group of its channels.

    Attributes:
        inputs: of what the layer sees, as x; empty where no method needs them.
        outputs: of its outputs without bias, as x.
    """

    inputs: list[Moments]
    outputs: list[Moments]


def on_data(method: str, one: Family, kernel: Tensor, moments: LayerMoments, group: int) -> Family:
    """The decompositions by a method, for the layer's output on data."""
    if method in PRODUCTS:
        assert isinstance(one, Splitting)
        return PrincipalOutputs(one, kernel, moments.outputs[group])
    return Refined(one, kernel, moments.inputs[group])


def _undominated(priced: list[tuple[int, Candidate]]) -> list[Candidate]:
    kept: list[Candidate] = []
    least = math.inf
    for _, candidate in sorted(priced, key=lambda pair: (pair[0], pair[1].error)):
        if candidate.error < least:
            kept.append(candidate)
            least = candidate.error
    return kept


def _shown(ranks: Ranks) -> str:
    return str(ranks[0]) if len(ranks) == 1 else str(ranks)
