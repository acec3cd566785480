"""Layers as chains of smaller ones, where these are faster."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graphopt.calibration import CalibrationData
from graphopt.errors import PassError
from graphopt.flops import count_flops
from graphopt.ir import Graph, Node
from graphopt.ir.patterns import Decline
from graphopt.pass_report import PassReport
from graphopt.passes.layer_choice import LayerPattern, as_patterns, chosen, settings
from graphopt.passes.low_rank.candidates import (
    Candidate,
    Candidates,
    LayerMoments,
    Rank,
    candidates_of,
)
from graphopt.passes.low_rank.gate import Gate
from graphopt.passes.low_rank.gathering import gather, gather_pairs
from graphopt.passes.low_rank.merging import merge_neighbours
from graphopt.passes.low_rank.methods import AUTOMATIC, METHODS, PRODUCTS
from graphopt.passes.low_rank.replacement import replace_layer
from graphopt.passes.low_rank.selection import Budget, Limit, Selection, layer_by_layer
from graphopt.passes.low_rank.speedup import meet_speedup, speedup_remark
from graphopt.passes.low_rank.subjects import Subject, subject_of
from graphopt.pipeline import Context, register_pass

BUDGETS = {"macs", "parameters", "speedup"}
"""Options that may be given together."""


@register_pass("low-rank", accuracy="lossy")
@dataclass(frozen=True)
class LowRank:
    """Replace convolutions, linear layers and embeddings by chains of smaller layers.

    How far is said by ``rank``, by ``energy``, or by one or more of ``macs``, ``parameters`` and
    ``speedup``; by default every layer gets the rank that empirical variational Bayes finds. Ranks
    other than those given as whole numbers are rounded up to what the kernels like. A layer stays
    as it is where its chain is not faster on this machine.

    Attributes:
        method: ``"svd"`` (linear layers, 1x1 convolutions and embeddings as two; convolutions with
            taps as a convolution to fewer channels and a 1x1 back, also called ``"channel"``),
            ``"grouped"`` (the same, the first convolution in groups), ``"depthwise_separable"``
            (with a group per channel), ``"spatial"`` (a column of taps, then a row),
            ``"tucker2"`` (1x1, taps, 1x1), ``"cp"`` (1x1, depthwise column, depthwise row, 1x1),
            several of these to choose from, or ``"auto"``: all but ``"cp"``.
        rank: a whole number, a fraction of the full rank, a pair of either for the input and
            output channels of ``"tucker2"``, ``"evbmf"``; or a dict of such per layer (see
            `graphopt.passes.layer_choice.LayerPattern`), all other layers stay. The rank of
            ``"grouped"`` and ``"depthwise_separable"`` is that of a group.
        energy: the least share of every kernel's sum of squares (with data: of the variance of
            the layer's output) that is kept.
        macs: the share of the network's multiply-adds that may be left.
        parameters: the share of its parameters that may be left.
        speedup: how many times faster the network is to be, in measured time. It is measured
            again with the chains, and the budget corrected; the report tells what is reached.
        data: calibration data, see `graphopt.calibration.CalibrationData`. With it the error of
            the layers' outputs is kept small instead of that of their weights. Of fewer images
            less is believed: with few of them, layers that see a single vector per image are
            decomposed nearly as without data.
        asymmetric: with data, let every layer make up for the error of those before it: it is
            fitted to the outputs of the network as it was, from inputs as they are now. One sweep
            over the data per layer.
        batches: read only the first so many batches of the data.
        groups: of the first convolution of ``"grouped"``.
        ignore: layers that stay.
        only_faster: whether chains have to be faster than their layers. Without it nothing is
            measured; for size alone, or for another machine.
        multiple: what ranks are rounded up to; by default half of what a vector register
            holds of numbers.

    Raises:
        PassError: an option does not fit, a budget cannot be met, or the data does not fit.

    In a budget the sum over layers of ``-log(1 - error)`` is the least possible, error being the
    squared relative one (Zhang et al., "Accelerating very deep convolutional networks", 2015).
    """

    method: str | Sequence[str] = "auto"
    rank: Rank | Mapping[LayerPattern, Rank] | None = None
    energy: float | None = None
    macs: float | None = None
    parameters: float | None = None
    speedup: float | None = None
    data: Iterable[Any] | None = None
    asymmetric: bool = False
    batches: int | None = None
    groups: int = 2
    ignore: LayerPattern | Sequence[LayerPattern] = ()
    only_faster: bool = True
    multiple: int | None = None

    def __post_init__(self) -> None:
        for method in self._methods:
            if method not in METHODS:
                raise PassError(
                    f"LowRank: method has {method!r}; there are 'auto', {', '.join(METHODS)}"
                )
        if not self._methods:
            raise PassError("LowRank: method is empty")
        names = ("rank", "energy", "macs", "parameters", "speedup")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) > 1 and not BUDGETS.issuperset(given):
            raise PassError(f"LowRank: {' and '.join(given)} cannot be given together")
        for name in ("energy", "macs", "parameters"):
            share = getattr(self, name)
            if share is not None and not 0 < share <= 1:
                raise PassError(f"LowRank: {name} is {share}; it is a share, above 0 and at most 1")
        if self.speedup is not None and not 1 <= self.speedup < math.inf:
            raise PassError(f"LowRank: speedup is {self.speedup}; it is a factor of at least 1")
        if self.speedup is not None and not self.only_faster:
            raise PassError("LowRank: speedup is about measured time and needs only_faster=True")
        if self.asymmetric and self.data is None:
            raise PassError("LowRank: asymmetric needs data")
        for name in ("groups", "multiple", "batches"):
            number = getattr(self, name)
            if number is not None and not (isinstance(number, int) and number >= 1):
                raise PassError(f"LowRank: {name} is {number!r}; it is a whole number from 1")
        ranks = self.rank.values() if isinstance(self.rank, Mapping) else [self.rank]
        for rank in ranks:
            self._check_rank(rank)

    def _check_rank(self, rank: Any) -> None:
        if rank is None or rank == "evbmf":
            return
        items = [rank] if isinstance(rank, (int, float)) else rank
        valid = isinstance(items, (list, tuple)) and bool(items)
        for item in items if valid else []:
            whole = isinstance(item, int) and not isinstance(item, bool) and item >= 1
            valid = valid and (whole or (isinstance(item, float) and 0 < item <= 1))
        if not valid:
            raise PassError(
                f"LowRank: rank has {rank!r}; it takes whole numbers from 1, fractions of the full "
                "rank above 0 and at most 1.0, pairs of these, and 'evbmf'"
            )
        if len(self._methods) > 1:
            raise PassError(
                "LowRank: a rank means something else for every method; say which method, or give "
                "energy or a budget instead"
            )

    @property
    def _methods(self) -> tuple[str, ...]:
        if self.method == "auto":
            return AUTOMATIC
        return (self.method,) if isinstance(self.method, str) else tuple(self.method)

    def run(self, graph: Graph, ctx: Context) -> bool:
        """Decompose layers. The report tells ranks, errors and times, and why layers stay."""
        remarks: list[str] = []
        subjects = self._subjects(graph, remarks)
        data = None if self.data is None else CalibrationData(self.data, self.batches)
        layers = self._candidates(graph, subjects, data, ctx, remarks)
        gate = Gate(ctx.target) if self.only_faster else None
        selection = self._select(graph, layers, gate, ctx)
        rows = self._apply(graph, layers, selection, data, ctx)
        for place, (candidate, times) in sorted(selection.refused.items()):
            if selection.chosen[place] is None:
                remarks.append(
                    f"{layers[place].subject.name} stays: {candidate.method} of rank "
                    f"{_ranks(candidate)} takes {1e3 * times[1]:.3g} ms, the layer "
                    f"{1e3 * times[0]:.3g} ms"
                )
        if rows and selection.network is not None and self.speedup is not None:
            remarks.append(speedup_remark(selection.network, self.speedup))
        merged = merge_neighbours(graph) if rows else 0
        if merged:
            remarks.append(f"{merged} of the new layers were merged with a neighbour")
        ctx.report(_report(rows, len(layers), self.data is not None, remarks))
        return bool(rows)

    def _subjects(self, graph: Graph, remarks: list[str]) -> list[Subject]:
        """The layers that may be decomposed."""
        ignored = chosen(graph, as_patterns(self.ignore)) if self.ignore else set()
        wanted: set[Node] | None = None
        if isinstance(self.rank, Mapping):
            wanted = set(settings(graph, self.rank, "rank"))
        subjects = []
        for node in graph.nodes:
            if node in ignored or (wanted is not None and node not in wanted):
                continue
            found = subject_of(graph, node)
            if isinstance(found, Decline):
                remarks.append(f"{node.origin.module or node.name} stays: {found.reason}")
            elif found is not None:
                subjects.append(found)
        return subjects

    def _candidates(
        self,
        graph: Graph,
        subjects: list[Subject],
        data: CalibrationData | None,
        ctx: Context,
        remarks: list[str],
    ) -> list[Candidates]:
        moments: dict[Node, LayerMoments] = {}
        if data is not None and subjects:
            needs = {subject: self._needs(subject) for subject in subjects}
            moments = gather(graph, needs, data, ctx)
        multiple = self.multiple or max(1, ctx.target.vector_bytes // 8)
        layers = []
        for subject in ctx.track(subjects, "decompositions"):
            one = candidates_of(
                subject,
                self._methods,
                ctx.generator,
                self.groups,
                multiple,
                moments.get(subject.node),
            )
            if one.families:
                layers.append(one)
            else:
                reasons = "; ".join(dict.fromkeys(one.declined.values()))
                remarks.append(f"{subject.name} stays: {reasons}")
        return layers

    def _needs(self, subject: Subject) -> tuple[bool, bool]:
        """Whether inputs and outputs of a layer are to be known."""
        has_taps = math.prod(subject.weight.shape[2:]) > 1
        others = [method for method in self._methods if method not in PRODUCTS]
        return bool(others) and has_taps, set(self._methods) & set(PRODUCTS) != set()

    def _select(
        self, graph: Graph, layers: list[Candidates], gate: Gate | None, ctx: Context
    ) -> Selection:
        if self.macs is not None or self.parameters is not None or self.speedup is not None:
            return self._within_budget(graph, layers, gate, ctx)
        ranks: dict[Node, Rank] = {}
        if isinstance(self.rank, Mapping):
            ranks = settings(graph, self.rank, "rank")
        wanted = []
        for one in ctx.track(layers, "ranks"):
            if self.energy is not None:
                wanted.append([one.with_energy(method, self.energy) for method in one.families])
                continue
            rank: Rank = ranks.get(one.subject.node, "evbmf")
            if self.rank is not None and not isinstance(self.rank, Mapping):
                rank = self.rank
            wanted.append([one.given(method, rank) for method in one.families])
        return layer_by_layer(layers, wanted, gate, ctx)

    def _within_budget(
        self, graph: Graph, layers: list[Candidates], gate: Gate | None, ctx: Context
    ) -> Selection:
        limits = []
        subjects = [one.subject for one in layers]
        if self.macs is not None:
            total = sum(count_flops(node) for node in graph.nodes) // 2
            own = [subject.macs() for subject in subjects]
            limits.append(Limit("macs", total, self.macs * total, own))
        if self.parameters is not None:
            total = sum(math.prod(value.shape) for value in graph.constants if value.trainable)
            own = [subject.parameters() for subject in subjects]
            limits.append(Limit("parameters", total, self.parameters * total, own))
        if self.speedup is not None:
            assert gate is not None
            seconds, times = gate.parts(graph, subjects)
            limits.append(Limit("time", seconds, seconds / self.speedup, times))
        only_size = self.macs is None and self.speedup is None
        priced = "parameters" if only_size else "macs"
        options = [one.ladder(self._methods, priced) for one in ctx.track(layers, "ranks")]
        budget = Budget(layers, options, limits, gate)
        if self.speedup is None or gate is None:
            return budget.solve(ctx)
        return meet_speedup(budget, graph, layers, self.speedup, gate, ctx)

    def _apply(
        self,
        graph: Graph,
        layers: list[Candidates],
        selection: Selection,
        data: CalibrationData | None,
        ctx: Context,
    ) -> list[list[str | float | None]]:
        """Put the chains in place; returns the rows of the report."""
        original = graph.clone() if self.asymmetric else None
        rows: list[list[str | float | None]] = []
        for place, one in enumerate(ctx.track(layers, "chains")):
            candidate = selection.chosen[place]
            if candidate is None:
                continue
            subject, fitted = one.subject, one
            macs, parameters = subject.macs(), subject.parameters()
            if original is not None and data is not None and rows:
                inputs = candidate.method not in PRODUCTS
                moments = gather_pairs(original, graph, subject, inputs, data)
                fitted = candidates_of(
                    subject, [candidate.method], ctx.generator, self.groups, 1, moments
                )
            chain, offsets = fitted.chain(candidate)
            replace_layer(graph, subject, chain, offsets)
            times = selection.times.get(place)
            measured = [None, None] if times is None else [1e3 * times[0], 1e3 * times[1]]
            rows.append(
                [
                    subject.name,
                    candidate.method,
                    _ranks(candidate),
                    parameters,
                    candidate.parameters,
                    macs,
                    candidate.macs,
                    math.sqrt(max(candidate.error, 0.0)),
                    *measured,
                ]
            )
        return rows


def _ranks(candidate: Candidate) -> str:
    return ", ".join(map(str, candidate.ranks))


def _report(
    rows: list[list[str | float | None]], layers: int, on_data: bool, remarks: list[str]
) -> PassReport:
    error = "error of output" if on_data else "error of weight"
    columns = (
        "layer", "method", "rank", "parameters", "after", "MACs", "after", error, "ms", "after",
    )  # fmt: skip
    title = f"low-rank: {len(rows)} of {layers} layers decomposed"
    return PassReport(title, columns, tuple(rows), tuple(remarks))
