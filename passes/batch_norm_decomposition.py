"""Batch normalisation with fixed statistics as one multiplication and one addition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from graphopt.ir import Graph
from graphopt.ir.rewriting import Decline, Match, op, rewrite, rule
from graphopt.passes.batch_norm_folding import BATCH_NORMS, batch_norm_affine
from graphopt.pipeline import Context, register_pass


@rule("batch_norm(x) => x * scale + shift", op(BATCH_NORMS, ...))
def _decompose(graph: Graph, match: Match) -> Any:
    node = match.root
    affine = batch_norm_affine(node)
    if isinstance(affine, Decline):
        return affine
    dtype = affine.source.dtype
    if dtype not in (torch.float32, torch.float64):
        return Decline(f"two operators in {dtype} would round twice where %{node.name} rounds once")
    shape = (-1, *[1] * (affine.source.rank - 2))
    scale, shift = affine.scale.to(dtype).reshape(shape), affine.shift.to(dtype).reshape(shape)
    if not (scale.isfinite().all() and shift.isfinite().all()):
        return Decline(f"the scale or shift of %{node.name} leaves the range of {dtype}")
    stem = node["running_mean"].name.removesuffix("running_mean")
    scaled = graph.add("aten.mul.Tensor", affine.source, graph.constant(scale, f"{stem}scale"))
    shifted = graph.add("aten.add.Tensor", scaled, graph.constant(shift, f"{stem}shift"))
    return [shifted, *[None] * (len(node.outputs) - 1)]


@register_pass("decompose-batch-norm")
@dataclass(frozen=True)
class DecomposeBatchNorm:
    """Writes batch normalisation as a multiplication and an addition per channel."""

    def run(self, graph: Graph, ctx: Context) -> bool:
        return rewrite(graph, [_decompose])
