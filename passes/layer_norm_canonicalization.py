"""Layer and RMS normalisation that an exporter has written out become one operator each.

Ba, Kiros and Hinton, "Layer Normalization", 2016; Zhang and Sennrich, "Root Mean Square Layer
Normalization", 2019.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from graphopt.ir import Graph, Node, TensorType, Value
from graphopt.ir.patterns import Pattern
from graphopt.ir.rewriting import Decline, Match, Rule, either, literal, op, rewrite, rule, value
from graphopt.passes.arithmetic import MULTIPLICATIONS, Number
from graphopt.pipeline import Context, register_pass

# float16 overflows in the squares that are written out, and not in the operator.
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def _squared(term: Pattern) -> Pattern:
    """The square of a term whose every occurrence is the same value."""
    return either(
        op("aten.pow.Tensor_Scalar", term, Number(2)),
        op("aten.square", term),
        op("aten.mul.Tensor", term, term),
    )


def _normalised(term: Pattern, mean_square: Pattern) -> Pattern:
    """``term / sqrt(mean_square + eps)``, in each way that it is written."""
    with_eps = op(("aten.add.Tensor", "aten.add.Scalar"), mean_square, Number(name="eps"))
    root = either(op("aten.sqrt", with_eps), op("aten.pow.Tensor_Scalar", with_eps, Number(0.5)))
    inverse = either(
        op("aten.rsqrt", with_eps),
        op("aten.pow.Tensor_Scalar", with_eps, Number(-0.5)),
        op("aten.reciprocal", root),
    )
    return either(op("aten.div.Tensor", term, root), op("aten.mul.Tensor", term, inverse))


def _layer_norm_pattern() -> Pattern:
    x, dims = value("x"), literal("dims")
    mean = op("aten.mean.dim", x, literal("mean_dims"), True)
    statistics = op(
        "aten.var_mean.correction",
        x, literal("mean_dims"), correction=Number(0), keepdim=True,
        name="statistics", output=1,
    )  # fmt: skip
    centered = op("aten.sub.Tensor", x, either(mean, statistics))
    variance = either(
        op("aten.mean.dim", _squared(centered), dims, True),
        op("aten.var.correction", x, dims, correction=Number(0), keepdim=True),
        op("aten.var.dim", x, dims, False, True),
        statistics.output(0),
    )
    return _normalised(centered, variance)


def _rms_norm_pattern() -> Pattern:
    x = value("x")
    return _normalised(x, op("aten.mean.dim", _squared(x), literal("dims"), True))


def _normalised_shape(node: Node, x: Value, dims: Any, mean_dims: Any) -> list[int] | Decline:
    """The sizes over which is normalised, if an operator for that exists."""
    if x.types != node.output.types or x.dtype not in DTYPES:
        return Decline(f"%{node.name} is not of the type of %{x.name}, or that is {x.dtype}")
    if not isinstance(dims, (list, tuple)) or not isinstance(mean_dims, (list, tuple)):
        return Decline(f"%{node.name} normalises over everything, the batch included")
    over = sorted(d % x.rank for d in dims)
    if over != sorted(d % x.rank for d in mean_dims):
        return Decline("mean and variance are taken over different dimensions")
    if not over or over != list(range(x.rank - len(over), x.rank)):
        return Decline(f"it normalises over the dimensions {over}, which are not the last")
    sizes = [x.fixed_size(d) for d in over]
    if any(size is None for size in sizes):
        return Decline("it normalises over a free dimension")
    return [size for size in sizes if size is not None]


@rule("(x - mean(x)) / sqrt(var(x) + eps) => layer_norm(x)", _layer_norm_pattern())
def _layer_norm(graph: Graph, match: Match) -> Any:
    dims = match.names.get("dims", match["mean_dims"])
    shape = _normalised_shape(match.root, match["x"], dims, match["mean_dims"])
    if isinstance(shape, Decline):
        return shape
    return graph.add("aten.layer_norm", match["x"], shape, eps=match["eps"])


@rule("x / sqrt(mean(x ** 2) + eps) => rms_norm(x)", _rms_norm_pattern())
def _rms_norm(graph: Graph, match: Match) -> Any:
    shape = _normalised_shape(match.root, match["x"], match["dims"], match["dims"])
    if isinstance(shape, Decline):
        return shape
    return graph.add("aten.rms_norm", match["x"], shape, eps=match["eps"])


def _affine(graph: Graph, operand: Value, shape: list[int], norm: Value) -> Value | Decline:
    """An operand as weight or bias of a norm; leading dimensions of size 1 are dropped."""
    if operand.dtype != norm.dtype:
        return Decline(f"%{operand.name} is {operand.dtype}, %{norm.name} is {norm.dtype}")
    if all(isinstance(t, TensorType) and list(t.shape) == shape for t in operand.types):
        return operand
    leading = operand.rank - len(shape)
    if operand.constant is None or list(operand.shape) != [1] * leading + shape:
        return Decline(f"%{operand.name} is {operand.type}, not of the shape {shape}")
    reshaped = operand.constant.reshape(shape)
    if operand.only_user() is None:
        return graph.constant(reshaped, operand.name, trainable=operand.trainable)
    graph.set_constant(operand, reshaped)
    return operand


def _absorb(name: str, pattern: Pattern, operand: str) -> Rule:
    """A rule that makes the other operand of an arithmetic node a norm's weight or bias."""

    def replacement(graph: Graph, match: Match) -> Any:
        norm, root = match["norm"], match.root
        if root.output.types != norm.output.types:
            return Decline(f"%{root.name} is not of the type of %{norm.name}")
        shape = list(norm["normalized_shape"])
        if not all(isinstance(size, int) for size in shape):
            return Decline(f"%{norm.name} normalises over a free dimension")
        parameter = _affine(graph, match["parameter"], shape, norm.output)
        if isinstance(parameter, Decline):
            return parameter
        return graph.add(norm.op, **{**norm.operands, operand: parameter})

    return Rule(name, (pattern,), replacement)


def _norm(operator: str, **absent: Any) -> Pattern:
    return op(operator, ..., name="norm", **absent)


_PARAMETER = value("parameter")
RULES = [
    _layer_norm,
    _rms_norm,
    _absorb(
        "layer_norm(x) * weight => layer_norm(x, weight)",
        op(MULTIPLICATIONS[0], _norm("aten.layer_norm", weight=None, bias=None), _PARAMETER),
        "weight",
    ),
    _absorb(
        "layer_norm(x, weight) + bias => layer_norm(x, weight, bias)",
        op("aten.add.Tensor", _norm("aten.layer_norm", bias=None), _PARAMETER),
        "bias",
    ),
    _absorb(
        "rms_norm(x) * weight => rms_norm(x, weight)",
        op(MULTIPLICATIONS[0], _norm("aten.rms_norm", weight=None), _PARAMETER),
        "weight",
    ),
]


@register_pass("canonicalize-layer-norm")
@dataclass(frozen=True)
class CanonicalizeLayerNorm:
    """Recognises layer and RMS normalisation where they are written out."""

    def run(self, graph: Graph, ctx: Context) -> bool:
        return rewrite(graph, RULES)
