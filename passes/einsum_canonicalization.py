"""Einstein sums that are matrix products become matrix products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from graphopt.ir import Graph, Value
from graphopt.ir.rewriting import Decline, Match, literal, op, rewrite, rule, value
from graphopt.pipeline import Context, register_pass


@dataclass(frozen=True)
class MatrixProduct:
    """An einsum as a matrix product; every index is a letter.

    Attributes:
        batch: indices of both operands and the result, in the result's order.
        row, column: the index that only the first, only the second operand has.
        inner: the index that is summed over.
    """

    batch: str
    row: str
    column: str
    inner: str


def matrix_product(first: str, second: str, result: str) -> MatrixProduct | Decline:
    """The matrix product that an einsum of two operands is, if it is one."""
    if any(len(set(term)) != len(term) for term in (first, second, result)):
        return Decline("an index is repeated within one operand")
    shared = set(first) & set(second)
    if (set(first) ^ set(second)) - set(result):
        return Decline("an operand is summed on its own")
    inner = "".join(letter for letter in first if letter in shared and letter not in result)
    row = "".join(letter for letter in first if letter not in shared)
    column = "".join(letter for letter in second if letter not in shared)
    if not len(inner) == len(row) == len(column) == 1:
        return Decline(f"it sums over '{inner}', with rows '{row}' and columns '{column}'")
    batch = "".join(letter for letter in result if letter in shared)
    return MatrixProduct(batch, row, column, inner)


@rule(
    "einsum('bik,bjk->bij', x, y) => matmul(x, y.T)",
    op("aten.einsum", literal("equation"), [value("x"), value("y")], literal()),
)
def _einsum(graph: Graph, match: Match) -> Any:
    x, y = match["x"], match["y"]
    terms, arrow, result = match["equation"].replace(" ", "").partition("->")
    first, _, second = terms.partition(",")
    if not arrow or not (first + second + result).isalpha():
        return Decline(f"the equation {match['equation']} has no result, or an ellipsis")
    product = matrix_product(first, second, result)
    if isinstance(product, Decline):
        return product
    if x.dtype != y.dtype or not x.dtype.is_floating_point:
        return Decline(f"it multiplies {x.dtype} with {y.dtype}")
    for a, b in zip(x.types, y.types, strict=True):
        if any(a.shape[first.index(c)] != b.shape[second.index(c)] for c in {*first} & {*second}):
            return Decline("a size of 1 is broadcast")
    left = _arrange(graph, x, first, product.batch + product.row + product.inner)
    if second == product.batch + product.column + product.inner:
        right = graph.add("aten.transpose.int", y, -2, -1)
    else:
        right = _arrange(graph, y, second, product.batch + product.inner + product.column)
    made = graph.add("aten.matmul", left, right)
    return _arrange(graph, made, product.batch + product.row + product.column, result)


def _arrange(graph: Graph, tensor: Value, have: str, want: str) -> Value:
    if have == want:
        return tensor
    return graph.add("aten.permute", tensor, [have.index(letter) for letter in want])


@register_pass("canonicalize-einsum")
@dataclass(frozen=True)
class CanonicalizeEinsum:
    """Writes Einstein sums of two operands as matrix products."""

    def run(self, graph: Graph, ctx: Context) -> bool:
        return rewrite(graph, [_einsum])
