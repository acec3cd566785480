"""Patterns for arithmetic written out: numbers, polynomials and products in any arrangement.

Exporters write ``0.5 * x * (1 + erf(x / sqrt(2)))`` in a dozen ways; what they share is the
polynomial under the erf and the factors of the product.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import torch

from graphopt.ir import Node, Operand, Value
from graphopt.ir.patterns import Match, Misses, Pattern, as_pattern

SUMS = tuple(f"aten.{n}.{kind}" for n in ("add", "sub", "rsub") for kind in ("Tensor", "Scalar"))
MULTIPLICATIONS = ("aten.mul.Tensor", "aten.mul.Scalar")
DIVISIONS = ("aten.div.Tensor", "aten.div.Scalar")
POWERS = ("aten.pow.Tensor_Scalar", "aten.square")
HIGHEST_POWER = 3
# Numbers beyond these could overflow or cancel between operators where one operator does not.
SMALLEST, LARGEST = 1e-3, 1e3


def number(operand: Operand) -> float | None:
    """A real literal, or the element of a constant with one element; else None."""
    if isinstance(operand, (int, float)) and not isinstance(operand, bool):
        return float(operand)
    tensor = operand.constant if isinstance(operand, Value) else None
    if tensor is not None and tensor.numel() == 1:
        element = tensor.item()
        if isinstance(element, (int, float)) and not isinstance(element, bool):
            return float(element)
    return None


def nearly(actual: float, wanted: float, dtype: torch.dtype) -> bool:
    """Whether a computation in a dtype could tell two numbers apart by no more than rounding.
    Half precision computes in float32."""
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    return abs(actual - wanted) <= 4 * eps * abs(wanted)


@dataclass(frozen=True, eq=False)
class Number(Pattern):
    """A number (see `number`): one that is wanted, of whatever type, or any.

    Attributes:
        wanted: the exact value; None for any.
        name: what the number is bound to, as a float.
    """

    wanted: float | None = None
    name: str | None = None

    def match(self, operand: Operand, found: Match, misses: Misses | None) -> Iterator[Match]:
        actual = number(operand)
        fits = actual is not None and self.wanted in (None, actual)
        bound = found.bind(self.name, actual) if fits else None
        if bound is not None:
            yield bound
        elif misses:
            wanted = self.wanted if self.name is None else f"`{self.name}`"
            misses.add(found, lambda: f"{operand!r} is not the number {wanted}")


@dataclass(frozen=True, eq=False)
class Polynomial(Pattern):
    """A polynomial in one value, of degree up to 3, however it is written.

    Attributes:
        name: what the variable is bound to.
        coefficients: from the constant one upwards; compared within rounding.
    """

    name: str
    coefficients: tuple[float, ...]

    def match(self, operand: Operand, found: Match, misses: Misses | None) -> Iterator[Match]:
        known = found.names.get(self.name)
        for variable in [known] if known is not None else _variables(operand):
            expanded = _expand(operand, variable)
            if expanded is not None and self._fits(expanded[0], variable.dtype):
                bound = found.bind(self.name, variable)
                assert bound is not None
                yield _extend(bound, expanded[1])
                return
        if misses:
            misses.add(found, lambda: f"{operand!r} is not a polynomial {self.coefficients}")

    def _fits(self, actual: list[float], dtype: torch.dtype) -> bool:
        wanted = [*self.coefficients, *[0.0] * (HIGHEST_POWER + 1 - len(self.coefficients))]
        return all(nearly(a, w, dtype) for a, w in zip(actual, wanted, strict=True))


@dataclass(frozen=True, eq=False)
class Product(Pattern):
    """A product of a number and other factors, in any order and grouping.

    Attributes:
        coefficient: the product of all numbers in it; compared within rounding.
        factors: patterns for the others.
    """

    coefficient: float
    factors: tuple[Pattern, ...]

    def root_operators(self) -> tuple[str, ...]:
        return MULTIPLICATIONS + DIVISIONS

    def match(self, operand: Operand, found: Match, misses: Misses | None) -> Iterator[Match]:
        flat = _flatten(operand) if isinstance(operand, Value) else None
        if flat is None or len(flat[1]) != len(self.factors):
            if misses:
                count = len(self.factors)
                misses.add(found, lambda: f"{operand!r} is not a product of {count} factors")
            return
        coefficient, factors, nodes = flat
        if not nearly(coefficient, self.coefficient, operand.dtype):
            if misses:
                misses.add(found, lambda: f"{operand!r} has the factor {coefficient}", bonus=1)
            return
        found = _extend(found, nodes)
        for arrangement in dict.fromkeys(permutations(factors)):
            yield from _match_each(list(zip(self.factors, arrangement, strict=True)), found, misses)


def product(coefficient: float, *factors: Any) -> Product:
    """See `Product`."""
    return Product(coefficient, tuple(map(as_pattern, factors)))


def _extend(found: Match, nodes: Iterable[Node]) -> Match:
    """A match with more nodes in it, whose results nobody else may use."""
    new = [node for node in nodes if node not in found.nodes]
    outputs = [value for node in new for value in node.outputs]
    return replace(found, nodes=(*found.nodes, *new), exclusive=(*found.exclusive, *outputs))


def _match_each(
    pairs: list[tuple[Pattern, Operand]], found: Match, misses: Misses | None
) -> Iterator[Match]:
    if not pairs:
        yield found
        return
    pattern, first = pairs[0]
    for extended in pattern.match(first, found, misses):
        yield from _match_each(pairs[1:], extended, misses)


def _flatten(value: Value) -> tuple[float, list[Value], list[Node]] | None:
    """A product as a number, the other factors, and the nodes that multiply. Products that serve
    no other purpose are taken apart too; a divisor must be a number."""
    node = value.producer
    if node is None or node.op not in MULTIPLICATIONS + DIVISIONS:
        return None
    coefficient, factors, nodes = 1.0, list[Value](), [node]
    for name in ("self", "other"):
        operand, divides = node[name], node.op in DIVISIONS and name == "other"
        constant = number(operand)
        if constant is not None and SMALLEST <= abs(constant) <= LARGEST:
            coefficient *= 1 / constant if divides else constant
            continue
        if constant is not None or divides or not isinstance(operand, Value):
            return None
        serves = operand.only_user() is node and operand.types == value.types
        inner = _flatten(operand) if serves else None
        if inner is None:
            factors.append(operand)
        else:
            coefficient *= inner[0]
            factors += inner[1]
            nodes += inner[2]
    return coefficient, factors, nodes


def _variables(operand: Operand) -> list[Value]:
    """Values that an operand may be a polynomial of, itself first."""
    found: dict[Value, None] = {}
    pending = [operand]
    while pending:
        value = pending.pop(0)
        if not isinstance(value, Value) or value.is_constant or not value.is_tensor:
            continue
        if not value.dtype.is_floating_point or value in found:
            continue
        found[value] = None
        node = value.producer
        if node is not None and node.op in (*SUMS, *MULTIPLICATIONS, *DIVISIONS, *POWERS):
            pending += [node["self"], node["other"] if node.op not in POWERS else None]
    return list(found)


def _expand(operand: Operand, variable: Value) -> tuple[list[float], list[Node]] | None:
    """Coefficients of an operand as a polynomial in a variable, and the nodes that compute it."""
    constant = number(operand)
    if operand is variable:
        return [0.0, 1.0, 0.0, 0.0], []
    if constant is not None:
        moderate = SMALLEST <= abs(constant) <= LARGEST
        return ([constant, 0.0, 0.0, 0.0], []) if moderate else None
    if not isinstance(operand, Value) or operand.producer is None:
        return None
    node = operand.producer
    if operand.types != variable.types:
        return None
    if node.op in POWERS:
        return _expand_power(node, variable)
    if node.op not in (*SUMS, *MULTIPLICATIONS, *DIVISIONS):
        return None
    left, right = _expand(node["self"], variable), _expand(node["other"], variable)
    if left is None or right is None:
        return None
    coefficients = _combine(node, left[0], right[0])
    return None if coefficients is None else (coefficients, [node, *left[1], *right[1]])


def _expand_power(node: Node, variable: Value) -> tuple[list[float], list[Node]] | None:
    exponent = 2 if node.op == "aten.square" else node["exponent"]
    base = _expand(node["self"], variable)
    if base is None or not isinstance(exponent, (int, float)) or exponent not in (2, 3):
        return None
    result: list[float] | None = base[0]
    for _ in range(int(exponent) - 1):
        result = None if result is None else _multiply(result, base[0])
    return None if result is None else (result, [node, *base[1]])


def _combine(node: Node, left: list[float], right: list[float]) -> list[float] | None:
    if node.op in MULTIPLICATIONS:
        return _multiply(left, right)
    if node.op in DIVISIONS:
        return None if any(right[1:]) else [c / right[0] for c in left]
    alpha = node["alpha"]
    if not isinstance(alpha, (int, float)):
        return None
    name = node.op.split(".")[1]
    of_left, of_right = {"add": (1, alpha), "sub": (1, -alpha), "rsub": (-alpha, 1)}[name]
    terms = [(of_left * a, of_right * b) for a, b in zip(left, right, strict=True)]
    if any(a and b and abs(a + b) < max(abs(a), abs(b)) / 2 for a, b in terms):
        return None  # terms that cancel leave more than rounding behind
    return [a + b for a, b in terms]


def _multiply(left: list[float], right: list[float]) -> list[float] | None:
    """The product, or None if its degree is too high or more than one term adds up to a power,
    in which case it is not the way that anybody writes these functions."""
    result = [0.0] * (HIGHEST_POWER + 1)
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            if a and b:
                if i + j > HIGHEST_POWER or result[i + j]:
                    return None
                result[i + j] = a * b
    return result
