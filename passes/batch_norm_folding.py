"""Batch normalisation with fixed statistics becomes part of a neighbouring layer.

``gamma * (x - mean) / sqrt(variance + eps) + beta`` is a scale and a shift per channel (Ioffe and
Szegedy, 2015), and so is what a convolution or linear layer does last to its channels, or first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from graphopt.ir import Graph, Node, Value
from graphopt.ir.rewriting import Decline, Match, op, rewrite, rule
from graphopt.passes.channels import ChannelAffine, fold_into_consumers, fold_into_producer
from graphopt.pipeline import Context, register_pass

BATCH_NORMS = ("aten.batch_norm", "aten._native_batch_norm_legit_no_training")


def batch_norm_affine(node: Node) -> ChannelAffine | Decline:
    """What a batch norm does to its channels, or why that is not fixed."""
    if node.op == "aten.batch_norm" and node["training"]:
        return Decline(f"%{node.name} normalises with the statistics of its batch")
    if any(v.users or v.is_output for v in node.outputs[1:]):
        return Decline(f"the saved statistics of %{node.name} are used")
    parameters = {}
    for name in ("weight", "bias", "running_mean", "running_var"):
        value = node[name]
        if value is not None and value.constant is None:
            return Decline(f"%{value.name} is not a constant")
        parameters[name] = None if value is None else value.constant.double()
    mean, variance = parameters["running_mean"], parameters["running_var"]
    if mean is None or variance is None:
        return Decline(f"%{node.name} has no running statistics")
    scale = torch.rsqrt(variance + node["eps"])
    if parameters["weight"] is not None:
        scale = scale * parameters["weight"]
    shift = -mean * scale
    if parameters["bias"] is not None:
        shift = shift + parameters["bias"]
    if not (scale.isfinite().all() and shift.isfinite().all()):
        return Decline(f"the scale or shift of %{node.name} is not finite")
    source, result = node["input"], node.outputs[0]
    if source.types != result.types or not source.dtype.is_floating_point:
        return Decline(f"%{node.name} changes the dtype, or computes on integers")
    return ChannelAffine(source, result, scale, shift, 1)


def _fold(match: Match, fold: Callable[[ChannelAffine], Value | Decline]) -> Any:
    affine = batch_norm_affine(match.root)
    if isinstance(affine, Decline):
        return affine
    new = fold(affine)
    return new if isinstance(new, Decline) else [new, *[None] * (len(match.root.outputs) - 1)]


@rule("batch_norm(layer(x, w, b)) => layer(x, w * scale, b * scale + shift)", op(BATCH_NORMS, ...))
def _into_producer(graph: Graph, match: Match) -> Any:
    return _fold(match, lambda affine: fold_into_producer(graph, affine))


@rule("layer(batch_norm(x), w, b) => layer(x, w * scale, b + w * shift)", op(BATCH_NORMS, ...))
def _into_consumers(graph: Graph, match: Match) -> Any:
    return _fold(match, lambda affine: fold_into_consumers(graph, affine))


@register_pass("fold-batch-norm")
@dataclass(frozen=True)
class FoldBatchNorm:
    """Folds batch normalisation into the convolution or linear layer before or after it."""

    def run(self, graph: Graph, ctx: Context) -> bool:
        return rewrite(graph, [_into_producer, _into_consumers])
