"""Granularities "channel" and "head" of `Prune`: how many units each group loses, and which."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from graphopt import reference
from graphopt.calibration import CalibrationData
from graphopt.errors import PassError
from graphopt.ir import Graph, Node, Value
from graphopt.passes.layer_choice import as_patterns, chosen
from graphopt.passes.pruning.allocation import choose_levels
from graphopt.passes.pruning.channel_groups import ChannelGroup, Member, find_groups
from graphopt.passes.pruning.channel_removal import mask_units, remaining_macs, remove_units
from graphopt.passes.pruning.channel_report import groups_report, layers_report
from graphopt.passes.pruning.coupling import describe
from graphopt.passes.pruning.criteria import Criterion, CriterionContext, find_criterion
from graphopt.passes.pruning.layers_to_prune import prunable_layers
from graphopt.passes.pruning.pruning_report import Before
from graphopt.passes.pruning.sensitivity import few_samples, relative_error
from graphopt.passes.pruning.statistics import Statistics
from graphopt.pipeline import Context
from graphopt.report import totals

if TYPE_CHECKING:
    from graphopt.passes.pruning.prune import Prune

STRUCTURED = ("channel", "head")
LEVELS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
RELATIVE = frozenset("magnitude l1 l2 geometric-median lamp wanda".split())
"""Criteria whose scores depend on the size of a layer: across groups they are compared relative to
the mean of their group."""
MOST = 0.95
"""No group loses more of its units than this in answer to a budget."""
STEPS = 24
TIMED_STEPS = 8

Removal = dict[ChannelGroup, list[int]]
Choice = Callable[[float], Removal]
"""The units to remove, more of them for larger amounts between 0 and 1."""


def prune_channels(options: Prune, graph: Graph, ctx: Context) -> bool:
    """Remove channels or heads from a graph as the options say. Returns whether any went.

    Raises:
        PassError: no group can be pruned, or a budget cannot be met.
    """
    ignored = chosen(graph, as_patterns(options.ignore))
    groups, left = _groups(graph, options, ignored)
    criterion = find_criterion(options.criterion)
    scores = _scores(options, criterion, graph, groups, ctx)
    choice = _choice(options, criterion, graph, scores, ctx)
    removal = _within_budget(options, graph, choice, ctx)
    before = Before(graph, prunable_layers(graph, depthwise=True)[0])
    remove_units(graph, removal)
    ctx.report(groups_report(before, graph, options, removal, left))
    ctx.report(layers_report(before, graph, options, removal, ctx))
    return any(removal.values())


def _groups(
    graph: Graph, options: Prune, ignored: Collection[Node]
) -> tuple[list[ChannelGroup], list[str]]:
    """The groups that may be pruned, and what is left alone for which reason."""
    found, protected = find_groups(graph, heads=options.granularity == "head")
    left = [str(one) for one in protected]
    ranked = {layer.weight.constant for layer in prunable_layers(graph, depthwise=True)[0]}
    groups = []
    for group in found:
        makers = [member for member in group.members if member.makes_channels]
        nodes = [node for member in makers for node, _ in member.nodes]
        if any(node in ignored for node in nodes):
            left.append(f"{group.name}: ignored")
        elif ranked.isdisjoint(member.constant for member in makers):
            left.append(
                f"{group.name}: criteria rank the weights of convolutions, linear layers and "
                f"embeddings, not of {describe(nodes[0])}; the exact passes make layers of products"
            )
        else:
            groups.append(group)
    if not groups:
        reasons = "; ".join(left[:8]) or "no layer makes channels"
        raise PassError(f"there is no {options.granularity} to prune: {reasons}")
    return groups, left


def _scores(
    options: Prune,
    criterion: Criterion,
    graph: Graph,
    groups: Sequence[ChannelGroup],
    ctx: Context,
) -> dict[ChannelGroup, Tensor]:
    """Per group, the sum of each unit's scores over the weights that make its channels."""
    layers, _ = prunable_layers(graph, depthwise=True)
    data = None if options.data is None else CalibrationData(options.data)
    statistics = Statistics(graph, layers, data, options.loss, ctx)
    by_constant = {layer.weight.constant: layer for layer in layers}
    makers = {m.constant for group in groups for m in group.members if m.makes_channels}
    known: dict[Value, Tensor] = {}
    for constant in graph.constants:
        if constant in makers and constant in by_constant:
            context = CriterionContext(by_constant[constant], statistics, ctx.generator)
            known[constant] = criterion.scores(context)

    def of(member: Member) -> Tensor:
        if member.makes_channels and member.constant in known:
            return known[member.constant]
        return torch.zeros(member.constant.shape)

    scores = {group: group.scores(of) for group in groups}
    if criterion.normalize is not None:
        return {group: criterion.normalize(own) for group, own in scores.items()}
    return scores


def _choice(
    options: Prune,
    criterion: Criterion,
    graph: Graph,
    scores: Mapping[ChannelGroup, Tensor],
    ctx: Context,
) -> Choice:
    """How an amount becomes units to remove."""
    if options.allocation == "global":
        return _lowest_anywhere(options.round_to, scores, criterion.name in RELATIVE)
    if options.allocation == "sensitivity":
        return _least_sensitive(options, graph, scores, ctx)

    def choice(amount: float) -> Removal:
        return {g: _lowest(g, own, amount, options.round_to) for g, own in scores.items()}

    return choice


def _lowest(group: ChannelGroup, scores: Tensor, fraction: float, round_to: int) -> list[int]:
    """The units of lowest score; as many stay as `_rounded` says."""
    stay = _rounded(group, group.units * (1 - fraction), round_to)
    order: list[int] = scores.argsort(stable=True).tolist()
    return sorted(order[: group.units - stay])


def _rounded(group: ChannelGroup, units: float, round_to: int) -> int:
    """The number of units nearest to a wanted one whose channels are a multiple of ``round_to``;
    at least the least such multiple, at most all."""
    size = group.channels_per_unit
    step = round_to // math.gcd(round_to, size)  # units that make a multiple of channels
    return min(group.units, max(step, round(units / step) * step))


def _lowest_anywhere(
    round_to: int, scores: Mapping[ChannelGroup, Tensor], relative: bool
) -> Choice:
    """The units of lowest score wherever they are, in groups of rounded size."""
    comparable = {
        group: own / own.mean().clamp_min(1e-30) if relative else own
        for group, own in scores.items()
    }
    everything = torch.cat(list(comparable.values())).sort().values

    def choice(amount: float) -> Removal:
        count = round(amount * len(everything))
        bound = everything[count - 1] if count else -torch.inf
        removal = {}
        for group, own in comparable.items():
            fraction = min(MOST, float((own <= bound).double().mean()))
            removal[group] = _lowest(group, own, fraction, round_to)
        return removal

    return choice


def _least_sensitive(
    options: Prune, graph: Graph, scores: Mapping[ChannelGroup, Tensor], ctx: Context
) -> Choice:
    """Fractions with the least sum of the measured errors of the network's results."""
    assert options.data is not None
    batch = next(iter(CalibrationData(options.data).batches(graph)))
    inputs = few_samples(graph, batch)
    exact = reference.run(graph, inputs)
    errors: list[list[float]] = []
    for group, own in ctx.track(list(scores.items()), "sensitivity of groups"):
        errors.append([])
        for level in LEVELS:
            units = _lowest(group, own, level, options.round_to)
            results = reference.run(mask_units(graph, {group: units}), inputs) if units else exact
            errors[-1].append(relative_error(results, exact))
    costs = [[group.units * (1 - level) for level in LEVELS] for group in scores]

    def choice(amount: float) -> Removal:
        whole = sum(group.units for group in scores)
        places = choose_levels(errors, costs, max(whole * (1 - amount), sum(map(min, costs))))
        return {
            group: _lowest(group, own, LEVELS[place], options.round_to)
            for (group, own), place in zip(scores.items(), places, strict=True)
        }

    return choice


def _within_budget(options: Prune, graph: Graph, choice: Choice, ctx: Context) -> Removal:
    """The least removal that keeps the budget, by bisection of the amount."""
    if options.sparsity is not None:
        return choice(options.sparsity)
    cost, budget, steps = _cost(options, graph, ctx)
    low, high = 0.0, MOST
    if cost(choice(low)) <= budget:
        return choice(low)
    best = choice(high)
    least = cost(best)
    if least > budget:
        raise PassError(_out_of_reach(options, least, budget))
    for _ in ctx.track(range(steps), "meeting the budget"):
        middle = (low + high) / 2
        tried = choice(middle)
        if cost(tried) <= budget:
            high, best = middle, tried
        else:
            low = middle
    return best


def _cost(
    options: Prune, graph: Graph, ctx: Context
) -> tuple[Callable[[Removal], float], float, int]:
    """What a removal leaves of what the budget is about, the budget, and how finely to search."""
    if options.macs is not None:
        dense = remaining_macs(graph, {})
        return lambda removal: remaining_macs(graph, removal), options.macs * dense, STEPS
    if options.parameters is not None:
        whole = totals(graph).parameters

        def parameters(removal: Removal) -> float:
            return totals(_without(graph, removal)).parameters

        return parameters, options.parameters * whole, STEPS
    assert options.speedup is not None

    def relative_time(removal: Removal) -> float:
        after = _without(graph, removal)
        return ctx.target.time(after) / ctx.target.time(graph)

    return relative_time, 1 / options.speedup, TIMED_STEPS


def _without(graph: Graph, removal: Removal) -> Graph:
    copy = graph.clone()
    remove_units(copy, removal)
    return copy


def _out_of_reach(options: Prune, least: float, budget: float) -> str:
    if options.speedup is not None:
        return (
            f"a speed-up of {options.speedup:g} cannot be reached by removing {options.granularity}"
            f"s: the best is {1 / least:.2f}"
        )
    what = "MACs" if options.macs is not None else "parameters"
    return (
        f"the budget of {budget:,.0f} {what} cannot be met by removing {options.granularity}s: "
        f"at least {least:,.0f} stay"
    )
