"""What `Prune` tells of channels and heads: how many each group keeps, and what that makes of each
layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graphopt.ir import Graph
from graphopt.pass_report import PassReport
from graphopt.passes.pruning.channel_groups import ChannelGroup
from graphopt.passes.pruning.channel_removal import mask_units
from graphopt.passes.pruning.criteria import find_criterion
from graphopt.passes.pruning.layer_errors import error_remark, output_errors, readable_again
from graphopt.passes.pruning.layer_times import TIME_COLUMNS, measure, remarks_on
from graphopt.passes.pruning.layers_to_prune import PrunableLayer
from graphopt.passes.pruning.pruning_report import Before
from graphopt.pipeline import Context
from graphopt.report import totals

if TYPE_CHECKING:
    from graphopt.passes.pruning.prune import Prune

Removal = Mapping[ChannelGroup, Sequence[int]]


def groups_report(
    before: Before, graph: Graph, options: Prune, removal: Removal, left: Iterable[str]
) -> PassReport:
    """How many of its units each group keeps.

    Args:
        before: the network as it was.
        graph: as it is.
        options: what was asked.
        removal: the units that went, of all groups that might have lost some.
        left: what was left alone, and why.
    """
    rows = []
    for group, gone in removal.items():
        kept = group.units - len(gone)
        rows.append(
            (group.name, group.units, group.channels_per_unit, kept, 1 - kept / group.units)
        )
    title = (
        f"prune: {options.granularity}, {find_criterion(options.criterion).name}, "
        f"{options.allocation}"
    )
    remarks = (size_remark(before.graph, graph), *(f"left alone: {text}" for text in left))
    columns = ("group", "units", "channels per unit", "kept", "sparsity")
    return PassReport(title, columns, tuple(rows), remarks)


def layers_report(
    before: Before, graph: Graph, options: Prune, removal: Removal, ctx: Context
) -> PassReport:
    """What has become of each layer with a weight.

    Args:
        before: the network as it was.
        graph: as it is.
        options: what was asked.
        removal: the units that went.
        ctx: has the timer, and shows the progress.
    """
    layers = before.and_now(graph)
    times = measure(before.graph, graph, layers, ctx) if options.wants_times else None
    data = readable_again(options.data)
    masked = mask_units(before.graph, removal)
    errors = output_errors(before.graph, before.and_now(masked), data)
    columns = ["layer", "weight before", "weight after", "error", "MACs before", "MACs after"]
    columns += ["bytes before", "bytes after"]
    columns += TIME_COLUMNS if times is not None else []
    rows = []
    for old, new in layers:
        row: list[Any] = [
            old.name,
            *("x".join(map(str, layer.weight.constant.shape)) for layer in (old, new)),
        ]
        row += [errors[old.name], old.macs, new.macs, *(_bytes(layer) for layer in (old, new))]
        row += times.row(old.name) if times is not None else []
        rows.append(row)
    remarks = [error_remark(data) + "; channels that are gone count as zeros"]
    remarks += remarks_on(times)
    title = f"prune: {options.granularity}, layer by layer"
    return PassReport(title, tuple(columns), tuple(rows), tuple(remarks))


def size_remark(before: Graph, after: Graph) -> str:
    """Multiply-adds and parameters of a network before and after."""
    old, new = totals(before), totals(after)
    return (
        f"MACs: {old.macs:,} before, {new.macs:,} after; parameters: "
        f"{old.parameters:,} before, {new.parameters:,} after"
    )


def _bytes(layer: PrunableLayer) -> int:
    constant = layer.weight.constant.constant
    assert constant is not None
    return constant.numel() * constant.element_size()
