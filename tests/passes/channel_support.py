"""What the tests of channel pruning share: random removals, and the check against masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from agreement import largest_error
from pass_support import Net, random_inputs

from graphopt import reference
from graphopt.ir import Graph, Value
from graphopt.passes.pruning.channel_groups import ChannelGroup, find_groups
from graphopt.passes.pruning.channel_removal import mask_units, remove_units

Removals = dict[ChannelGroup, list[int]]


def net(*shape: int) -> Net:
    return Net(*shape, dtype=torch.float64)


def head(n: Net, x: Value) -> Graph:
    """Global pooling and a linear layer, so that channels can go."""
    pooled = n("aten.mean.dim", x, [-1, -2]) if x.rank == 4 else x
    return n.done(n.linear(pooled, 3, name="head"))


def all_groups(graph: Graph) -> list[ChannelGroup]:
    return find_groups(graph)[0] + find_groups(graph, heads=True)[0]


def random_removals(groups: Sequence[ChannelGroup], part: float = 1 / 3, seed: int = 0) -> Removals:
    """A part of the units of every group, at least one."""
    generator = torch.Generator().manual_seed(seed)
    return {
        group: torch.randperm(group.units, generator=generator)[
            : max(1, int(group.units * part))
        ].tolist()
        for group in groups
    }


def sizes(groups: Sequence[ChannelGroup]) -> list[tuple[int, int]]:
    """(units, channels per unit) of each group."""
    return [(group.units, group.channels_per_unit) for group in groups]


def assert_removal_is_masking(graph: Graph, removals: Removals, tolerance: float = 1e-10) -> Graph:
    """A clone without the units, after checking it against the masked graph under every
    assignment of the free sizes, and that the units mattered."""
    masked = mask_units(graph, removals)
    pruned = graph.clone()
    remove_units(pruned, removals)
    pruned.verify()
    for tensors in random_inputs(graph):
        dense, wanted, found = (
            reference.run(g, tensors, dtype=torch.float64) for g in (graph, masked, pruned)
        )
        assert largest_error(found, wanted) <= tolerance
        assert largest_error(wanted, dense) > 1e-3, "the removal changed nothing"
    return pruned


def assert_prunes(graph: Graph, expected: Sequence[tuple[int, int]]) -> Graph:
    """The groups have the expected units and channels per unit; each alone can lose all but one,
    and all together random ones. Returns the graph without a third of all units."""
    groups = all_groups(graph)
    assert sizes(groups) == list(expected)
    for number, group in enumerate(groups):
        kept = number % group.units
        assert_removal_is_masking(graph, {group: [u for u in range(group.units) if u != kept]})
    assert_removal_is_masking(graph, random_removals(groups, 0.75, 7))
    return assert_removal_is_masking(graph, random_removals(groups))


def reasons(graph: Graph, heads: bool = False) -> dict[str, str]:
    """Why each protected layer is."""
    return {one.name: one.reason for one in find_groups(graph, heads=heads)[1]}
