"""Scaled dot-product attention that an exporter has written out becomes one operator.

Vaswani et al., "Attention Is All You Need", 2017. A row in which every score is minus infinity is
NaN where attention is written out, and zero from the operator; so a mask is only accepted if it
cannot produce one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from graphopt.ir import Graph, TensorType, Value
from graphopt.ir.patterns import Pattern
from graphopt.ir.rewriting import Decline, Match, either, literal, op, rewrite, rule, value
from graphopt.passes.arithmetic import DIVISIONS, MULTIPLICATIONS, Number
from graphopt.passes.intervals import bounds
from graphopt.pipeline import Context, register_pass

MATMULS = ("aten.matmul", "aten.bmm")
# float16 overflows in the products that are written out, and not in the operator.
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def _times(term: Pattern, name: str) -> Pattern:
    """A term, multiplied or divided by a number or not."""
    return either(
        op(MULTIPLICATIONS, term, Number(name=f"{name}_factor")),
        op(DIVISIONS, term, Number(name=f"{name}_divisor")),
        term,
    )


def _pattern() -> Pattern:
    query, key = _times(value("query"), "query"), _times(value("key"), "key")
    dimensions = literal("first"), literal("second")
    transposed = either(
        op("aten.transpose.int", key, *dimensions),
        _times(op("aten.transpose.int", value("key"), *dimensions), "key"),
        _times(value("transposed_key"), "key"),
    )
    scores = _times(op(MATMULS, query, transposed, name="scores"), "scores")
    masked = either(op("aten.add.Tensor", scores, value("mask")), scores)
    weights = either(
        op("aten.softmax.int", masked, literal("dim"), literal("dtype")),
        op("aten._softmax", masked, literal("dim"), False),
    )
    return op(MATMULS, weights, value("value"))


@rule("softmax(query @ key.T * scale + mask) @ value => "
      "scaled_dot_product_attention(query, key, value, mask, scale)", _pattern())  # fmt: skip
def _attention(graph: Graph, match: Match) -> Any:
    names, query, scores = match.names, match["query"], match["scores"].output
    mask = names.get("mask")
    for obstacle in (_wrong_shapes(match), _wrong_dimensions(match), _wrong_mask(mask, scores)):
        if obstacle is not None:
            return obstacle
    scale = 1.0
    for what in ("query", "key", "scores"):
        divisor = names.get(f"{what}_divisor", 1.0)
        scale *= names.get(f"{what}_factor", 1.0) / divisor if divisor else math.nan
    if not 1e-6 <= scale <= 1e6:
        return Decline(f"the scale {scale} is not an ordinary positive number")
    key = names.get("key")
    if key is None:
        key = graph.add("aten.transpose.int", match["transposed_key"], -2, -1)
    return graph.add(
        "aten.scaled_dot_product_attention", query, key, match["value"], mask, scale=scale
    )


def _wrong_shapes(match: Match) -> Decline | None:
    query, values, result = match["query"], match["value"], match.root.output
    key = match.names.get("key", match.names.get("transposed_key"))
    dtypes = {v.dtype for v in (query, key, values, result)}
    if len(dtypes) > 1 or query.dtype not in DTYPES:
        return Decline(f"query, key and value are {', '.join(sorted(map(str, dtypes)))}")
    if match.names.get("dtype") not in (None, query.dtype):
        return Decline(f"the softmax is taken in {match['dtype']}")
    for q, k, v in zip(query.types, key.types, values.types, strict=True):
        if q.rank < 3 or not q.shape[:-2] == k.shape[:-2] == v.shape[:-2]:
            return Decline("query, key and value have no common leading dimensions")
        if v.shape[-2] == 0:
            return Decline("there is nothing to attend to")
    return None


def _wrong_dimensions(match: Match) -> Decline | None:
    rank = match["query"].rank
    if match["dim"] % rank != rank - 1:
        return Decline(f"the softmax runs along dimension {match['dim']}")
    if "key" in match.names:
        exchanged = {match["first"] % rank, match["second"] % rank}
        if exchanged != {rank - 2, rank - 1}:
            return Decline("the key is transposed in other dimensions than the last two")
    return None


def _wrong_mask(mask: Value | None, scores: Value) -> Decline | None:
    if mask is None:
        return None
    if not mask.is_tensor or mask.dtype != scores.dtype or mask.rank < 2:
        return Decline(f"%{mask.name} is no mask in the dtype of the scores")
    for kind, wanted in zip(mask.types, scores.types, strict=True):
        assert isinstance(kind, TensorType)
        assert isinstance(wanted, TensorType)
        if torch.broadcast_shapes(kind.shape, wanted.shape) != wanted.shape:
            return Decline(f"%{mask.name} makes the scores larger")
    if mask.constant is not None:
        rows = mask.constant.isfinite().any(dim=-1)
        allowed = mask.constant.isfinite() | (mask.constant == -math.inf)
        if not rows.all() or not allowed.all():
            return Decline(f"%{mask.name} has a row of minus infinities, or NaN")
    elif math.inf in map(abs, bounds(mask)):
        return Decline(f"%{mask.name} may have a row of minus infinities")
    return None


@register_pass("canonicalize-attention")
@dataclass(frozen=True)
class CanonicalizeAttention:
    """Recognises scaled dot-product attention where it is written out."""

    def run(self, graph: Graph, ctx: Context) -> bool:
        return rewrite(graph, [_attention])
