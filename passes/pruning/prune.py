"""The pass `Prune`: its options, and the order of its work."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch

from graphopt.calibration import CalibrationData
from graphopt.errors import PassError
from graphopt.ir import Graph
from graphopt.passes.layer_choice import LayerPattern, as_patterns, chosen
from graphopt.passes.pruning import allocation
from graphopt.passes.pruning.allocation import Share, Sparsities
from graphopt.passes.pruning.channel_front import STRUCTURED, prune_channels
from graphopt.passes.pruning.criteria import INFLUENCE, Criterion, ScoreFunction, find_criterion
from graphopt.passes.pruning.depth_front import RESIDUAL_BLOCK, prune_depth
from graphopt.passes.pruning.granularity import Granularity, Pattern, parse_granularity
from graphopt.passes.pruning.layer_by_layer import prune_layer_by_layer
from graphopt.passes.pruning.layer_times import measure, time_layers
from graphopt.passes.pruning.layers_to_prune import PrunableLayer, prunable_layers
from graphopt.passes.pruning.masks import ScoredLayers
from graphopt.passes.pruning.pruning_report import Before, pruning_report
from graphopt.passes.pruning.sensitivity import sensitivities
from graphopt.passes.pruning.statistics import Loss, Statistics
from graphopt.passes.pruning.time_budget import (
    TimedChoice,
    TimeTable,
    sparsities_for_speedup,
)
from graphopt.pipeline import Context, register_pass
from graphopt.report import totals

ALLOCATIONS = ("uniform", "global", "erk", "sensitivity")
AIMS = ("sparsity", "threshold", "parameters", "macs", "speedup")
TIMED_LEVELS = (0.0, 0.5, 0.65, 0.8, 0.9, 0.95, 0.98)
"""Kernels that skip zeros pay from about a half of them on."""


@register_pass("prune", accuracy="lossy")
@dataclass(frozen=True)
class Prune:
    """Sets weights to zero, where they matter least.

    Convolutions, transposed convolutions, linear layers and embeddings are pruned; a weight that
    several share, once. A layer in which the granularity does not fit is left alone, as are
    depthwise convolutions unless asked for; the report says which and why.

    Zeros stay zeros where the network is quantized afterwards, and where it is trained after
    `graphopt.passes.keep_zeros`.

    Exactly one of the five aims is given; with a granularity N:M, none means sparsity 1 - N/M.

    Args:
        sparsity: the fraction, in [0, 1), of those weights in the prunable layers that are not
            zero yet. So pruning twice composes: 0.5 and 0.5 again leave a quarter, and a network
            with zeros of its own gets more of them. A block counts with all of its weights unless
            it is zero altogether. With N:M, weights that are zero already count among those that
            the pattern wants to be zero, so that it can be applied twice without harm.
        granularity: ``"unstructured"``; ``"N:M"`` keeps at most N of M neighbouring input channels;
            ``"RxC"`` prunes blocks of R output x C input channels. Both are taken at each position
            of the kernel and within each group of channels. A last block that does not fit is
            filled up with zeros that count neither as weights nor in its score. ``"channel"`` and
            ``"head"`` remove output channels and attention heads with all that depends on them,
            so that tensors shrink; see `channel_groups`. ``"residual-block"`` removes whole
            residual blocks, with ``criterion="influence"`` those that change least of what flows
            through.
        criterion: which weights matter: a name of `criteria.CRITERIA`, or a function ``(weight,
            context) -> scores`` with a `criteria.CriterionContext`. ``"hessian"`` also updates the
            weights that stay, so that each layer's output changes least; not for channels and
            heads, which it only ranks. These are ranked by the sum over the weights that make
            them.
        allocation: how layers share the burden: ``"uniform"``; ``"global"``, the lowest scores
            wherever they are; ``"erk"``, by the Erdos-Renyi kernel; ``"sensitivity"``, least sum of
            the measured errors of the network's results. For channels and heads ``sparsity`` is
            the fraction of units: of each group, or with ``"global"`` and ``"sensitivity"`` of all
            groups together; there is no ``"erk"``.
        threshold: prune weights whose magnitude is smaller, blocks whose mean magnitude is.
        parameters: the fraction of the network's parameters, in (0, 1], that may stay non-zero.
        macs: the fraction of the network's multiply-adds, in (0, 1], that may stay: those with
            weights that are zero do not count.
        speedup: how many times faster the network is to be, within 10 %, by measured time. Layers
            where sparse kernels do not pay stay dense; the choice is joint, with the errors of
            ``allocation="sensitivity"`` where there is data, else the criterion's scores.
        round_to: leave multiples of so many channels, where channels or heads are removed.
        data: calibration data, see `graphopt.calibration.CalibrationData`.
        loss: a function of (output, target), for criteria that need gradients.
        ignore: layers to leave alone, see `graphopt.passes.layer_choice.LayerPattern`.
        depthwise: prune depthwise convolutions too.
        sequential: for ``"hessian"``: each layer sees the inputs that the layers pruned before
            it give, and makes up for their errors; otherwise those of the dense network.
        damping: for ``"hessian"``: fraction of the mean of the diagonal that is added to it; the
            fewer data, the more.
        measure: time the network and its layers before and after, for the report; the largest
            layers first, for about a minute. With ``speedup`` they are timed anyway.

    Raises:
        PassError: when it is made, if options are out of range or contradict each other, or data
            is missing; when it runs, if a pattern means no layer, there is nothing to prune, the
            data does not fit, or the budget or the speed-up cannot be reached.
    """

    sparsity: float | None = None
    _: KW_ONLY
    granularity: str = "unstructured"
    criterion: str | ScoreFunction = "magnitude"
    allocation: str = "uniform"
    threshold: float | None = None
    parameters: float | None = None
    macs: float | None = None
    speedup: float | None = None
    data: Iterable[Any] | None = None
    loss: Loss | None = None
    round_to: int = 1
    ignore: LayerPattern | Iterable[LayerPattern] = ()
    depthwise: bool = False
    sequential: bool = True
    damping: float = 0.1
    measure: bool = False

    def __post_init__(self) -> None:
        as_patterns(self.ignore)
        if not isinstance(self.granularity, str):
            raise PassError(f"the granularity {self.granularity!r} is no text, such as '1x4'")
        criterion = find_criterion(self.criterion)
        if self.allocation not in ALLOCATIONS:
            known = ", ".join(ALLOCATIONS)
            raise PassError(f"the allocation {self.allocation!r} is unknown; there are {known}")
        self._check_aim()
        if self.granularity in (*STRUCTURED, RESIDUAL_BLOCK):
            self._check_structured()
        else:
            self._check_granularity(parse_granularity(self.granularity))
        self._check_data(criterion)
        if criterion is INFLUENCE and self.granularity != RESIDUAL_BLOCK:
            raise PassError("criterion='influence' goes with granularity='residual-block'")
        if not isinstance(self.measure, bool):
            raise PassError(f"measure is {self.measure!r}; it must be True or False")
        if not (isinstance(self.damping, (int, float)) and self.damping > 0):
            raise PassError(f"the damping {self.damping!r} is no positive number")

    def _check_aim(self) -> None:
        given = [name for name in AIMS if getattr(self, name) is not None]
        if len(given) > 1 or (not given and ":" not in self.granularity):
            found = " and ".join(given) or "none of them"
            raise PassError(f"Prune takes one of {', '.join(AIMS)}; given: {found}")
        for name in given:
            _check_number(name, getattr(self, name))

    def _check_structured(self) -> None:
        if self.threshold is not None or self.allocation == "erk":
            odd = "a threshold" if self.threshold is not None else "allocation='erk'"
            raise PassError(f"{odd} is about single weights, not about a {self.granularity}")
        if self.granularity == RESIDUAL_BLOCK and self.allocation != "uniform":
            raise PassError("residual blocks are ranked all together; leave the allocation out")
        if not isinstance(self.round_to, int) or self.round_to < 1:
            raise PassError(f"round_to is {self.round_to!r}; it must be a whole number from 1 on")

    def _check_granularity(self, granularity: Granularity) -> None:
        if self.round_to != 1:
            raise PassError("round_to goes with granularity='channel' or 'head'")
        if not isinstance(granularity, Pattern):
            return
        if self.threshold is not None:
            raise PassError(f"a threshold cannot be kept with {granularity}, which fixes how many")
        if self.sparsity is None or self.allocation == "sensitivity":
            return
        if not math.isclose(self.sparsity, granularity.sparsity):
            raise PassError(
                f"{granularity} has the sparsity {granularity.sparsity:g}, not {self.sparsity:g}; "
                "leave the sparsity out, or let allocation='sensitivity' choose the layers"
            )

    def _check_data(self, criterion: Criterion) -> None:
        if self.data is not None:
            CalibrationData(self.data)
        needy = f"the criterion '{criterion.name}'" if criterion.needs_data else None
        if self.allocation == "sensitivity":
            needy = needy or "allocation='sensitivity'"
        if needy and self.data is None:
            raise PassError(f"{needy} needs data; give Prune(data=...) batches of inputs")
        if criterion.needs_loss and self.loss is None:
            raise PassError(
                f"the criterion '{criterion.name}' needs a loss; give Prune(loss=...) a function "
                "of (output, target)"
            )
        if self.threshold is not None and criterion.name not in ("magnitude", "l1"):
            raise PassError(
                "a threshold compares magnitudes; it goes with criterion='magnitude' alone"
            )

    def run(self, graph: Graph, ctx: Context) -> bool:
        """Prune a graph in place. Returns whether any weight changed."""
        if self.measure:
            ctx.target.require_timer()
        if self.granularity in STRUCTURED:
            return prune_channels(self, graph, ctx)
        if self.granularity == RESIDUAL_BLOCK:
            return prune_depth(self, graph, ctx)
        granularity, criterion = parse_granularity(self.granularity), find_criterion(self.criterion)
        data = None if self.data is None else CalibrationData(self.data)
        layers, left = self._layers(graph, granularity)
        before, version = Before(graph, layers), graph.version
        statistics = Statistics(graph, layers, data, self.loss, ctx)
        scored = ScoredLayers(layers, granularity, criterion, statistics, ctx.generator)
        times = None
        if self.speedup is not None:
            timed = self._timed(graph, scored, data, ctx)
            sparsities, times = timed.sparsities, timed.times
        elif self.threshold is not None:
            sparsities = {layer: scored.below(layer, self.threshold) for layer in layers}
        else:
            sparsities = self._allocated(graph, scored, data, ctx)
        with graph.edit():
            self._apply(graph, scored, sparsities, data, ctx)
        if self.wants_times and times is None:
            times = measure(before.graph, graph, before.and_now(graph), ctx)
        ctx.report(pruning_report(before, graph, self, sparsities, left, times))
        return graph.version != version

    @property
    def wants_times(self) -> bool:
        """Whether the report is to have measured times."""
        return self.measure or self.speedup is not None

    def _layers(
        self, graph: Graph, granularity: Granularity
    ) -> tuple[list[PrunableLayer], dict[str, str]]:
        ignored = chosen(graph, as_patterns(self.ignore))
        found, left = prunable_layers(graph, ignored, depthwise=self.depthwise)
        layers = []
        for layer in found:
            obstacle = granularity.obstacle(layer.taps(layer.weight.tensor).shape)
            if obstacle is None:
                layers.append(layer)
            else:
                left[layer.name] = obstacle
        if not layers:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in list(left.items())[:8])
            raise PassError(f"there is nothing to prune: {reasons or 'no layer has a weight'}")
        return layers, left

    def _allocated(
        self, graph: Graph, scored: ScoredLayers, data: CalibrationData | None, ctx: Context
    ) -> Sparsities:
        shares, removed = self._budget(graph, scored)
        available = sum(share.total for share in shares)
        if removed <= 0:
            return dict.fromkeys(scored.layers, 0.0)
        pattern = isinstance(scored.granularity, Pattern)
        most = 1.0 if self.allocation == "uniform" else allocation.MOST
        if isinstance(scored.granularity, Pattern):
            most = scored.granularity.sparsity
        if removed > most * available * (1 + 1e-9):
            raise PassError(
                f"the budget cannot be met: the layers that may be pruned hold {available:.4g} "
                f"of the cost, of which {most:.0%} could go, and {removed:.4g} would have to"
            )
        if self.allocation == "sensitivity":
            assert data is not None
            levels = (0.0, most) if pattern else allocation.LEVELS
            errors = sensitivities(graph, scored.layers, levels, scored.pruned, data, ctx)
            return allocation.by_sensitivity(
                shares, removed, levels, errors, continuous=not pattern
            )
        if pattern:
            return self._patterned(shares, removed, scored)
        if self.allocation == "global":
            scores = {layer: scored.block_scores(layer) for layer in scored.layers}
            return allocation.by_score(shares, removed, scores)
        if self.allocation == "erk":
            return allocation.erdos_renyi(shares, removed)
        return allocation.uniform(shares, removed)

    def _patterned(self, shares: list[Share], removed: float, scored: ScoredLayers) -> Sparsities:
        """With N:M a layer has the pattern or is dense: all have it where the sparsity says so,
        otherwise those that lose least by the criterion."""
        assert isinstance(scored.granularity, Pattern)
        most = scored.granularity.sparsity
        if self.sparsity is not None or (self.macs is None and self.parameters is None):
            return dict.fromkeys(scored.layers, most)
        errors = {layer: scored.losses(layer, (0.0, most)) for layer in scored.layers}
        return allocation.by_sensitivity(shares, removed, (0.0, most), errors, continuous=False)

    def _budget(self, graph: Graph, scored: ScoredLayers) -> tuple[list[Share], float]:
        """The layers with what their weights cost, and how much of the cost is to go."""
        by_macs = self.macs is not None
        shares = [
            Share(layer, scored.remaining(layer), layer.macs_per_weight if by_macs else 1.0)
            for layer in scored.layers
        ]
        available = sum(share.total for share in shares)
        whole = totals(graph)
        if self.macs is not None:
            dense = sum(
                layer.macs_per_weight * layer.weight.tensor.numel() for layer in scored.layers
            )
            return shares, whole.macs - dense + available - self.macs * whole.macs
        if self.parameters is not None:
            return shares, whole.nonzeros - self.parameters * whole.parameters
        if self.sparsity is not None:
            return shares, self.sparsity * available
        assert isinstance(scored.granularity, Pattern)
        return shares, scored.granularity.sparsity * available

    def _timed(
        self, graph: Graph, scored: ScoredLayers, data: CalibrationData | None, ctx: Context
    ) -> TimedChoice:
        assert self.speedup is not None
        pattern = scored.granularity if isinstance(scored.granularity, Pattern) else None
        levels = TIMED_LEVELS if pattern is None else (0.0, pattern.sparsity)
        seconds = time_layers(scored.layers, levels, scored.pruned, ctx)
        if data is not None:
            errors = dict(sensitivities(graph, scored.layers, levels, scored.pruned, data, ctx))
        else:
            errors = {layer: scored.losses(layer, levels) for layer in scored.layers}
        table = TimeTable(levels, errors, seconds)
        return sparsities_for_speedup(graph, table, self.speedup, scored.pruned, ctx)

    def _apply(
        self,
        graph: Graph,
        scored: ScoredLayers,
        sparsities: Sparsities,
        data: CalibrationData | None,
        ctx: Context,
    ) -> None:
        updated: dict[PrunableLayer, float] = {}
        for layer, sparsity in sparsities.items():
            if sparsity == 0:
                continue
            if scored.criterion.updates and layer.products:
                updated[layer] = sparsity
                continue
            weight = scored.pruned(layer, sparsity)
            if not torch.equal(weight, layer.weight.tensor):
                layer.write(weight)
        if updated:
            assert data is not None
            prune_layer_by_layer(
                graph,
                updated,
                scored.granularity,
                data,
                ctx,
                sequential=self.sequential,
                damping=self.damping,
            )


def _check_number(name: str, value: object) -> None:
    """Raises PassError where an aim is out of its range."""
    ranges = {
        "sparsity": ("in [0, 1)", lambda x: 0 <= x < 1),
        "threshold": ("positive", lambda x: 0 < x < math.inf),
        "parameters": ("in (0, 1]", lambda x: 0 < x <= 1),
        "macs": ("in (0, 1]", lambda x: 0 < x <= 1),
        "speedup": ("above 1", lambda x: 1 < x < math.inf),
    }
    text, holds = ranges[name]
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and holds(value)):
        raise PassError(f"the {name} {value!r} is out of range; it must be {text}")
