"""One spelling for operators that have several."""

from __future__ import annotations

from graphopt.ir import Graph, Value
from graphopt.ir.rewriting import Decline, Match, op, operand, rule, value
from graphopt.passes.identity_rules import CASTS

_SCALAR_FORMS = ("aten.add.Scalar", "aten.sub.Scalar", "aten.mul.Scalar", "aten.div.Scalar")
_FILLED = {
    "aten.new_ones": 1,
    "aten.new_zeros": 0,
    "aten.new_full": None,
    "aten.ones_like": 1,
    "aten.zeros_like": 0,
    "aten.full_like": None,
}


@rule("add.Scalar(x, number) => add.Tensor(x, number)", op(_SCALAR_FORMS, value(), ...))
def number_as_operand(graph: Graph, match: Match) -> Value:
    root = match.root
    return graph.add(root.op.replace(".Scalar", ".Tensor"), **root.operands)


@rule("type_as(x, y) => to.dtype(x, dtype)", op(CASTS, value("x"), ...))
def cast_by_dtype(graph: Graph, match: Match) -> Value | Decline:
    result = match.root.output
    if set(match.root.operands) == {"self", "dtype"} and match.root.op == "aten.to.dtype":
        return Decline("it is that already")
    return graph.add("aten.to.dtype", match["x"], result.dtype)


@rule(
    "concatenate(parts) => cat(parts)",
    op(("aten.concat", "aten.concatenate"), operand("parts"), operand("dim")),
)
def concatenation_by_cat(graph: Graph, match: Match) -> Value:
    return graph.add("aten.cat", match["parts"], match["dim"])


@rule("ones_like(x) => full(shape of x, 1)", op(tuple(_FILLED), value("x"), ...))
def fill_by_size(graph: Graph, match: Match) -> Value | Decline:
    """Does away with an operand of which only shape and dtype matter."""
    root, result = match.root, match.root.output
    number = _FILLED[root.op]
    if number is None:
        number = root["fill_value"]
    if "size" in root.operands:
        size = root["size"]
    else:
        size = [result.fixed_size(dimension) for dimension in range(result.rank)]
        if None in size:
            return Decline("its shape is free")
    return graph.add("aten.full", size, number, dtype=result.dtype)


RULES = (number_as_operand, cast_by_dtype, concatenation_by_cat, fill_by_size)
