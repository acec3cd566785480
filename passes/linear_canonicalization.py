"""Multiplication by a constant matrix becomes a linear layer, which every other pass knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from graphopt.ir import Graph, Value
from graphopt.ir.rewriting import Decline, Match, constant, op, rewrite, rule, value
from graphopt.pipeline import Context, register_pass

_WEIGHT = constant("weight", single_use=True)


def _linear(graph: Graph, match: Match, bias: Value | None) -> Value | Decline:
    x, weight = match["x"], match["weight"]
    if weight.rank != 2:
        return Decline(f"%{weight.name} has {weight.rank} dimensions, not two")
    if not x.dtype.is_floating_point:
        return Decline(f"%{match.root.name} computes in {x.dtype}")
    if x.is_constant:
        return Decline(f"%{x.name} is a constant too")
    graph.set_constant(weight, weight.constant.t().contiguous())
    return graph.add("aten.linear", x, weight, bias)


@rule("matmul(x, w) => linear(x, w.T)", op(("aten.matmul", "aten.mm"), value("x"), _WEIGHT))
def _matmul(graph: Graph, match: Match) -> Any:
    return _linear(graph, match, None)


@rule("addmm(b, x, w) => linear(x, w.T, b)",
      op("aten.addmm", value("bias"), value("x"), _WEIGHT))  # fmt: skip
def _addmm(graph: Graph, match: Match) -> Any:
    bias = match["bias"]
    if bias.rank != 1 or bias.fixed_size(0) != match["weight"].shape[-1]:
        return Decline(f"%{bias.name} is {bias.type}, not one number per column of the matrix")
    return _linear(graph, match, bias)


@register_pass("canonicalize-linear")
@dataclass(frozen=True)
class CanonicalizeLinear:
    """Writes multiplications by a constant matrix as linear layers."""

    def run(self, graph: Graph, ctx: Context) -> bool:
        return rewrite(graph, [_matmul, _addmm])
