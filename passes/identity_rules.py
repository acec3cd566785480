"""Operators that return their operand: neutral elements, casts, copies, inverses of each other."""

from __future__ import annotations

import math
from typing import Any

import torch

from graphopt.ir import Graph, Operand, Value
from graphopt.ir.rewriting import (
    Decline,
    Match,
    either,
    literal,
    op,
    operand,
    rule,
    value,
)

CASTS = (
    "aten.to.dtype",
    "aten.to.dtype_layout",
    "aten.to.device",
    "aten.to.other",
    "aten._to_copy",
    "aten.type_as",
)
COPIES = (
    "aten.alias",
    "aten.alias_copy",
    "aten.clone",
    "aten.contiguous",
    "aten.detach",
    "aten.detach_copy",
    "aten.lift_fresh",
    "aten.lift_fresh_copy",
    "aten.positive",
    "aten.resolve_conj",
    "aten.resolve_neg",
)
_CONJUNCTIONS = ("aten.logical_and", "aten.bitwise_and.Tensor", "aten.__and__.Tensor")
_DISJUNCTIONS = ("aten.logical_or", "aten.bitwise_or.Tensor", "aten.__or__.Tensor")
DROPOUTS = (
    "aten.dropout",
    "aten.alpha_dropout",
    "aten.feature_dropout",
    "aten.feature_alpha_dropout",
)


def uniform(operand: Operand) -> int | float | bool | None:
    """The number that a literal is, or that all elements of a constant are; -0.0 is not 0.0."""
    if isinstance(operand, (bool, int, float)):
        return operand
    tensor = operand.constant if isinstance(operand, Value) else None
    if tensor is None or tensor.numel() == 0 or tensor.is_complex():
        return None
    elements = tensor.reshape(-1)
    first = elements[0]
    if elements[-1] != first or not bool((elements == first).all()):
        return None
    if not bool((elements.signbit() == first.signbit()).all()):
        return None
    number: int | float | bool = first.item()
    return number


def same_type(x: Value, match: Match) -> Value | Decline:
    """x in the place of the root's result, if dtype and shape are the same whatever the sizes."""
    result = match.root.outputs[0]
    if x.types == result.types:
        return x
    return Decline(f"%{result.name} is {result.type}, its operand {x.type}")


def _is_one(operand: Operand) -> bool:
    return uniform(operand) == 1


def _is_zero(operand: Operand) -> bool:
    return uniform(operand) == 0


@rule(
    "x * 1 => x",
    either(
        op("aten.mul.Tensor", value("x"), operand("one", where=_is_one)),
        op(("aten.div.Tensor", "aten.pow.Tensor_Scalar"), value("x"), operand(where=_is_one)),
        op("operator.mul", value("x"), literal(where=_is_one)),
        op("operator.floordiv", value("x"), literal(where=_is_one)),
    ),
)
def neutral_factor(graph: Graph, match: Match) -> Value | Decline:
    return same_type(match["x"], match)


@rule(
    "x + 0 => x",
    either(
        op("aten.add.Tensor", value("x"), operand("zero", where=_is_zero), alpha=literal("alpha")),
        op("aten.add.Tensor", operand("zero", where=_is_zero), value("x")),
        op("aten.sub.Tensor", value("x"), operand("zero", where=_is_zero), alpha=literal("alpha")),
        op(("operator.add", "operator.sub"), value("x"), literal("zero", where=_is_zero)),
    ),
)
def neutral_summand(graph: Graph, match: Match) -> Value | Decline:
    """Adding 0.0 turns -0.0 into 0.0; adding -0.0, or subtracting 0.0, changes nothing."""
    zero, x = uniform(match["zero"]), match["x"]
    assert zero is not None
    if x.is_tensor and x.dtype.is_complex:
        return Decline("signs of complex zeros are not tracked")
    if x.is_tensor and x.dtype.is_floating_point:
        summand = float(zero) * match.names.get("alpha", 1)
        added = -summand if match.root.op == "aten.sub.Tensor" else summand
        if math.copysign(1.0, added) > 0:
            return Decline("adding 0.0 to -0.0 gives 0.0")
    return same_type(x, match)


@rule(
    "x & True => x",
    either(
        op(_CONJUNCTIONS, value("x"), operand(where=_is_one)),
        op(_CONJUNCTIONS, operand(where=_is_one), value("x")),
        op(_DISJUNCTIONS, value("x"), operand(where=_is_zero)),
        op(_DISJUNCTIONS, operand(where=_is_zero), value("x")),
    ),
)
def neutral_truth(graph: Graph, match: Match) -> Value | Decline:
    x = match["x"]
    return same_type(x, match) if x.dtype == torch.bool else Decline(f"%{x.name} is no truth value")


@rule("copy(x) => x", op(COPIES, value("x"), ...))
def copy(graph: Graph, match: Match) -> Value | Decline:
    return same_type(match["x"], match)


@rule("cast(x, dtype of x) => x", op(CASTS, value("x"), ...))
def cast_to_own_dtype(graph: Graph, match: Match) -> Value | Decline:
    return same_type(match["x"], match)


def _keeps_everything(node: Any) -> bool:
    return node["train"] is False or node["p"] == 0


@rule("dropout(x) => x", op(DROPOUTS, value("x"), ..., where=_keeps_everything))
def dropout_in_evaluation(graph: Graph, match: Match) -> Value | Decline:
    return same_type(match["x"], match)


@rule(
    "native_dropout(x) => x",
    op("aten.native_dropout", value("x"), ..., where=_keeps_everything),
)
def native_dropout_in_evaluation(graph: Graph, match: Match) -> Any:
    mask = match.root.outputs[1]
    if mask.users or mask.is_output:
        return Decline("its mask is used")
    return match["x"], None


def holds_exactly(narrow: torch.dtype, wide: torch.dtype) -> bool:
    """Whether every number of one dtype is a number of the other."""
    if narrow == wide or narrow == torch.bool:
        return True
    if wide == torch.bool or narrow.is_complex or wide.is_complex:
        return False
    if narrow.is_floating_point:
        if not wide.is_floating_point:
            return False
        small, large = torch.finfo(narrow), torch.finfo(wide)
        return large.eps <= small.eps and large.max >= small.max and large.tiny <= small.tiny
    limits = torch.iinfo(narrow)
    if wide.is_floating_point:
        return max(-limits.min, limits.max) <= 2 / torch.finfo(wide).eps
    return torch.iinfo(wide).min <= limits.min and limits.max <= torch.iinfo(wide).max


@rule(
    "cast(cast(x, wide), dtype) => cast(x, dtype)",
    op(CASTS, op(CASTS, value("x"), ..., single_use=False), ...),
)
def cast_chain(graph: Graph, match: Match) -> Value | Decline:
    x, between, result = match["x"], match.root["self"], match.root.output
    if not holds_exactly(x.dtype, between.dtype):
        return Decline(f"{between.dtype} does not hold every {x.dtype}")
    return x if x.types == result.types else graph.add("aten.to.dtype", x, result.dtype)


@rule(
    "-(-x) => x",
    either(
        op("aten.neg", op("aten.neg", value("x"), single_use=False)),
        op("aten.bitwise_not", op("aten.bitwise_not", value("x"), single_use=False)),
        op("aten.logical_not", op("aten.logical_not", value("x"), single_use=False)),
    ),
)
def double_negation(graph: Graph, match: Match) -> Value | Decline:
    return same_type(match["x"], match)


@rule(
    "relu(relu(x)) => relu(x)",
    op("aten.relu", op("aten.relu", value("x"), name="inner", single_use=False)),
)
def double_relu(graph: Graph, match: Match) -> Value:
    result: Value = match["inner"].output
    return result


RULES = (
    neutral_factor,
    neutral_summand,
    neutral_truth,
    copy,
    cast_to_own_dtype,
    dropout_in_evaluation,
    native_dropout_in_evaluation,
    cast_chain,
    double_negation,
    double_relu,
)
