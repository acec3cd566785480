"""Granularity "residual-block" of `Prune`: which residual blocks go, and how many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from graphopt.calibration import CalibrationData
from graphopt.errors import PassError
from graphopt.ir import Graph
from graphopt.pass_report import PassReport
from graphopt.passes.layer_choice import as_patterns, chosen
from graphopt.passes.pruning.channel_report import size_remark
from graphopt.passes.pruning.criteria import INFLUENCE, CriterionContext, find_criterion
from graphopt.passes.pruning.layer_times import Times
from graphopt.passes.pruning.layers_to_prune import prunable_layers
from graphopt.passes.pruning.residual_blocks import (
    ResidualBlock,
    block_influence,
    find_residual_blocks,
    remove_blocks,
)
from graphopt.passes.pruning.statistics import Statistics
from graphopt.pipeline import Context
from graphopt.report import totals

if TYPE_CHECKING:
    from graphopt.passes.pruning.prune import Prune

RESIDUAL_BLOCK = "residual-block"


def prune_depth(options: Prune, graph: Graph, ctx: Context) -> bool:
    """Remove the residual blocks of least importance from a graph, as many as the options ask for.
    Returns whether any went.

    Raises:
        PassError: there are no residual blocks, or removing all does not meet the budget.
    """
    ignored = chosen(graph, as_patterns(options.ignore))
    found = find_residual_blocks(graph)
    blocks = [block for block in found if not ignored.intersection(block.branch)]
    if not blocks:
        raise PassError(
            f"there is no residual block to prune: of {len(found)} in the network all have layers "
            "that are ignored"
            if found
            else "there is no residual block to prune"
        )
    scores = _scores(options, graph, blocks, ctx)
    order: list[int] = scores.argsort(stable=True).tolist()
    gone = order[: _count(options, graph, [blocks[k] for k in order], ctx)]
    before = graph.clone()
    remove_blocks(graph, [blocks[k] for k in gone])
    rows = tuple(
        (block.name, float(scores[k]), "removed" if k in gone else "kept")
        for k, block in enumerate(blocks)
    )
    remarks = [size_remark(before, graph)]
    if options.wants_times:
        remarks.append(str(Times({}, (ctx.target.time(before), ctx.target.time(graph)))))
    title = f"prune: residual blocks, {find_criterion(options.criterion).name}"
    ctx.report(PassReport(title, ("block", "importance", "result"), rows, tuple(remarks)))
    return bool(gone)


def _scores(options: Prune, graph: Graph, blocks: Sequence[ResidualBlock], ctx: Context) -> Tensor:
    """Influence of each block, or the sum of its weights' scores by another criterion."""
    criterion = find_criterion(options.criterion)
    data = None if options.data is None else CalibrationData(options.data)
    if criterion is INFLUENCE:
        assert data is not None
        return block_influence(graph, blocks, data, ctx)
    layers, _ = prunable_layers(graph, depthwise=True)
    statistics = Statistics(graph, layers, data, options.loss, ctx)
    scores = torch.zeros(len(blocks), dtype=torch.float64)
    for layer in layers:
        inside = [k for k, block in enumerate(blocks) if layer.node in block.branch]
        if inside:
            context = CriterionContext(layer, statistics, ctx.generator)
            scores[inside] += criterion.scores(context).double().sum()
    return scores


def _count(options: Prune, graph: Graph, ordered: Sequence[ResidualBlock], ctx: Context) -> int:
    """How many blocks, the least important first, have to go."""
    if options.sparsity is not None:
        return round(options.sparsity * len(ordered))
    whole = totals(graph)
    seconds = ctx.target.time(graph) if options.speedup is not None else 0.0
    for count in ctx.track(range(len(ordered) + 1), "meeting the budget"):
        copy = graph.clone()
        results = {block.result.name for block in ordered[:count]}
        remove_blocks(copy, [b for b in find_residual_blocks(copy) if b.result.name in results])
        if options.speedup is not None:
            met = ctx.target.time(copy) * options.speedup <= seconds
        elif options.macs is not None:
            met = totals(copy).macs <= options.macs * whole.macs
        else:
            assert options.parameters is not None
            met = totals(copy).parameters <= options.parameters * whole.parameters
        if met:
            return count
    raise PassError(f"removing all {len(ordered)} residual blocks does not meet the budget")
