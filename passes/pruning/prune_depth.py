"""The pass `PruneDepth`: whole residual blocks go, those first that change their input least."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass
from typing import Any

from graphopt.calibration import CalibrationData
from graphopt.errors import PassError
from graphopt.flops import count_flops
from graphopt.ir import Graph
from graphopt.pass_report import PassReport
from graphopt.passes.layer_choice import LayerPattern, as_patterns, chosen
from graphopt.passes.pruning.residual_blocks import (
    ResidualBlock,
    block_influence,
    find_residual_blocks,
    remove_blocks,
)
from graphopt.pipeline import Context, register_pass


@register_pass("prune-depth", accuracy="lossy")
@dataclass(frozen=True)
class PruneDepth:
    """Removes whole residual blocks, those first whose result is most like their input (Men et
    al., "ShortGPT", 2024).

    Exactly one of the two aims is given.

    Args:
        blocks: how many go.
        macs: the fraction of the network's multiply-adds, in (0, 1], that may stay.
        data: calibration data, see `graphopt.calibration.CalibrationData`.
        ignore: layers to leave alone, and with them the blocks that they are part of, see
            `graphopt.passes.layer_choice.LayerPattern`.

    Raises:
        PassError: when it is made, if an option is out of range or data is missing; when it runs,
            if a pattern means no layer, the data does not fit, or there are too few blocks. The
            graph stays as it is.
    """

    blocks: int | None = None
    _: KW_ONLY
    macs: float | None = None
    data: Iterable[Any] | None = None
    ignore: LayerPattern | Iterable[LayerPattern] = ()

    def __post_init__(self) -> None:
        as_patterns(self.ignore)
        if (self.blocks is None) == (self.macs is None):
            raise PassError("PruneDepth takes either blocks or macs")
        if self.blocks is not None and (type(self.blocks) is not int or self.blocks < 1):
            raise PassError(f"blocks={self.blocks!r} is no number of blocks")
        if self.macs is not None and not 0 < self.macs <= 1:
            raise PassError(f"macs={self.macs!r} is no fraction in (0, 1]")
        if self.data is None:
            raise PassError("PruneDepth ranks blocks by data; give data=[...], batches of inputs")

    def run(self, graph: Graph, ctx: Context) -> bool:
        assert self.data is not None
        ignored = chosen(graph, as_patterns(self.ignore))
        blocks = [b for b in find_residual_blocks(graph) if not ignored.intersection(b.branch)]
        if not blocks:
            raise PassError("the network has no residual block that may go")
        influence = block_influence(graph, blocks, CalibrationData(self.data), ctx).tolist()
        ranked = sorted(zip(influence, blocks, strict=True), key=lambda pair: pair[0])
        before = _macs(graph)
        with graph.edit():  # undone where the aim is not reached
            gone = self._remove(graph, [block for _, block in ranked], before)
        rows = tuple(
            (block.name, value, "removed" if block in gone else "kept")
            for value, block in zip(influence, blocks, strict=True)
        )
        remark = f"MACs: {before:,} before, {_macs(graph):,} after"
        ctx.report(
            PassReport("prune-depth", ("block", "influence", "what became of it"), rows, (remark,))
        )
        return bool(gone)

    def _remove(self, graph: Graph, ranked: list[ResidualBlock], before: int) -> set[ResidualBlock]:
        count = 0
        for block in ranked:
            if self._is_reached(graph, count, before):
                break
            if block.addition in graph:  # it may have been part of another block
                remove_blocks(graph, [block])
                count += 1
        if not self._is_reached(graph, count, before):
            raise PassError(
                f"the network has no more than {count} residual blocks that may go; without them "
                f"{_macs(graph) / max(before, 1):.1%} of the multiply-adds are left"
            )
        return {block for block in ranked if block.addition not in graph}

    def _is_reached(self, graph: Graph, count: int, before: int) -> bool:
        if self.macs is not None:
            return _macs(graph) <= self.macs * before
        return count == self.blocks


def _macs(graph: Graph) -> int:
    return sum(count_flops(node) for node in graph.nodes) // 2
