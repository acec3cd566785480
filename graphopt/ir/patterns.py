"""Patterns over graphs, in plain Python.

::

    conv = op("aten.conv2d", value("x"), constant("w"), optional(constant("b")), ..., name="conv")
    pattern = op("aten.mul.Tensor", conv, constant("scale"))

Operands are given in the schema's order or by its names. An operand that the pattern leaves out
must have its default, unless the pattern says ``...``: then the remaining operands may be anything
(a forgotten ``alpha`` cannot match by accident). A plain number, string, dtype, None or list of
such is a pattern for itself; its type counts (``1`` is neither ``1.0`` nor ``True``). A list of
patterns matches a list operand item by item. The same name twice stands for the same value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import EllipsisType
from typing import Any

from graphopt.errors import GraphError
from graphopt.ir.operators import resolve
from graphopt.ir.text import format_operand
from graphopt.ir.value import Node, Operand, Value, values_in

# Operators whose first two operands may change places, where all others have their defaults.
COMMUTATIVE = frozenset(
    """
    aten.add.Tensor aten.mul.Tensor aten.maximum aten.minimum aten.eq.Tensor aten.ne.Tensor
    aten.logical_and aten.logical_or aten.logical_xor aten.bitwise_and.Tensor
    aten.bitwise_or.Tensor aten.bitwise_xor.Tensor aten.max.other aten.min.other
    operator.add operator.mul torch.sym_max torch.sym_min
    """.split()
)


@dataclass(frozen=True)
class Decline:
    """Says why a predicate does not hold or a replacement is not made; false as a condition."""

    reason: str

    def __bool__(self) -> bool:
        return False


Predicate = Callable[[Any], Any]  # truth, or a Decline


@dataclass(frozen=True)
class Match:
    """What a pattern has matched.

    ``match["x"]`` is what the name stands for: a Value, a literal, None for an absent optional
    operand, or the Node of a named `op`.

    Attributes:
        names: what the pattern's names stand for.
        nodes: the matched nodes, the roots included.
        roots: the nodes whose results are to be replaced.
        exclusive: values that must have no user outside of the match.
    """

    names: Mapping[str, Any] = field(default_factory=dict)
    nodes: tuple[Node, ...] = ()
    roots: tuple[Node, ...] = ()
    exclusive: tuple[Value, ...] = ()

    def __getitem__(self, name: str) -> Any:
        if name not in self.names:
            raise GraphError(f"the pattern has no name '{name}'; it has: {', '.join(self.names)}")
        return self.names[name]

    @property
    def root(self) -> Node:
        """The only root. Raises GraphError if there are several."""
        if len(self.roots) != 1:
            raise GraphError(f"the match has {len(self.roots)} roots")
        return self.roots[0]

    def bind(self, name: str | None, what: Any) -> Match | None:
        """This match with a name bound; None if it already stands for something else."""
        if name is None:
            return self
        if name in self.names:
            return self if _same(self.names[name], what) else None
        return replace(self, names={**self.names, name: what})


class Misses:
    """Remembers the attempt that came furthest, counted in names and nodes matched."""

    def __init__(self) -> None:
        self.progress = -1
        self.reason = ""

    def add(self, found: Match, reason: Callable[[], str], bonus: int = 0) -> None:
        progress = len(found.names) + len(found.nodes) + bonus
        if progress > self.progress:
            self.progress, self.reason = progress, reason()


class Pattern:
    """Base of all patterns."""

    def match(self, operand: Operand, found: Match, misses: Misses | None) -> Iterator[Match]:
        """All ways in which an operand fits, each as the match extended by it."""
        raise NotImplementedError

    def root_operators(self) -> tuple[str, ...]:
        """The operators of the nodes that the pattern can be rooted at."""
        raise GraphError("the root of a pattern must be op(...), or either(...) of such")


@dataclass(frozen=True, eq=False)
class Leaf(Pattern):
    """An operand as it is, if it is of the right kind and the predicate holds."""

    kind: str
    accepts: Callable[[Operand], bool]
    name: str | None = None
    where: Predicate | None = None
    single_use: bool = False

    def match(self, operand: Operand, found: Match, misses: Misses | None) -> Iterator[Match]:
        called = f"`{self.name}` ({format_operand(operand)})" if misses and self.name else None
        called = called or (format_operand(operand) if misses else "")
        if not self.accepts(operand):
            if misses:
                misses.add(found, lambda: f"{called} is not {self.kind}")
            return
        if not _holds(self.where, operand, found, misses, called):
            return
        bound = found.bind(self.name, operand)
        if bound is None:
            if misses:
                other = format_operand(found[self.name or ""])
                misses.add(found, lambda: f"{called} is {other} elsewhere in the pattern")
            return
        if self.single_use and isinstance(operand, Value):
            bound = replace(bound, exclusive=(*bound.exclusive, operand))
        yield bound


@dataclass(frozen=True, eq=False)
class Op(Pattern):
    """A result of a node with one of some operators; see `op`."""

    operators: tuple[str, ...]
    operands: Mapping[str, tuple[tuple[str, Pattern], ...]]
    open: bool
    name: str | None = None
    where: Predicate | None = None
    single_use: bool = True
    index: int | None = 0

    def output(self, index: int) -> Op:
        """The pattern for another result of the same node; the op must have a name."""
        if self.name is None:
            raise GraphError("a pattern for several results of one node needs a name")
        return replace(self, index=index)

    def root_operators(self) -> tuple[str, ...]:
        return self.operators

    def match(self, operand: Operand, found: Match, misses: Misses | None) -> Iterator[Match]:
        expected = " or ".join(self.operators) if misses else ""
        if not isinstance(operand, Value) or operand.producer is None:
            if misses:
                misses.add(found, lambda: f"{format_operand(operand)} is no result of {expected}")
            return
        if self.index is not None and operand.index != self.index:
            if misses:
                misses.add(found, lambda: f"%{operand.name} is not result {self.index}")
            return
        yield from self.match_node(operand.producer, found, misses)

    def match_node(self, node: Node, found: Match, misses: Misses | None) -> Iterator[Match]:
        """All ways in which a node fits."""
        if node.op not in self.operators:
            if misses:
                expected = " or ".join(self.operators)
                misses.add(found, lambda: f"%{node.name} is {node.op}, not {expected}")
            return
        patterns = self.operands[node.op]
        if not self.open:
            mentioned = {name for name, _ in patterns}
            for name in node.operands:
                if name not in mentioned:
                    if misses:
                        given = format_operand(node[name])
                        misses.add(found, lambda n=name, g=given: f"%{node.name} has {n}={g}")  # type: ignore[misc]
                    return
        if not _holds(self.where, node, found, misses, f"%{node.name}"):
            return
        bound = found.bind(self.name, node)
        if bound is None:
            if misses:
                misses.add(found, lambda: f"`{self.name}` is another node than %{node.name}")
            return
        if node not in bound.nodes:
            bound = replace(bound, nodes=(*bound.nodes, node))
        if self.single_use:
            bound = replace(bound, exclusive=(*bound.exclusive, *node.outputs))
        pairs = [(pattern, node[name]) for name, pattern in patterns]
        yield from _match_all(pairs, bound, misses)
        if node.op in COMMUTATIVE and not self.open and len(patterns) == 2:
            swapped = [(patterns[0][1], pairs[1][1]), (patterns[1][1], pairs[0][1])]
            yield from _match_all(swapped, bound, misses)


@dataclass(frozen=True, eq=False)
class Either(Pattern):
    """The first of some patterns that fits, then the others."""

    patterns: tuple[Pattern, ...]

    def root_operators(self) -> tuple[str, ...]:
        return tuple(name for pattern in self.patterns for name in pattern.root_operators())

    def match(self, operand: Operand, found: Match, misses: Misses | None) -> Iterator[Match]:
        for pattern in self.patterns:
            yield from pattern.match(operand, found, misses)


@dataclass(frozen=True, eq=False)
class Optional(Pattern):
    """A pattern, or None; then all of the pattern's names stand for None."""

    pattern: Pattern

    def match(self, operand: Operand, found: Match, misses: Misses | None) -> Iterator[Match]:
        if operand is not None:
            yield from self.pattern.match(operand, found, misses)
            return
        bound: Match | None = found
        for name in _names(self.pattern):
            bound = bound.bind(name, None) if bound else None
        if bound is not None:
            yield bound


@dataclass(frozen=True, eq=False)
class Items(Pattern):
    """A list operand, item by item."""

    items: tuple[Pattern, ...]

    def match(self, operand: Operand, found: Match, misses: Misses | None) -> Iterator[Match]:
        if not isinstance(operand, (list, tuple)) or len(operand) != len(self.items):
            if misses:
                given = format_operand(operand)
                misses.add(found, lambda: f"{given} is not a list of {len(self.items)}")
            return
        yield from _match_all(list(zip(self.items, operand, strict=True)), found, misses)


def op(
    operators: str | Sequence[str],
    /,
    *operands: Any,
    name: str | None = None,
    where: Predicate | None = None,
    single_use: bool = True,
    output: int | None = 0,
    **named_operands: Any,
) -> Op:
    """A result of an operator.

    Args:
        operators: one operator or several alternatives, by text name.
        operands: patterns in the schema's order; ``...`` at the end lets all that are not
            mentioned be anything. For commutative operators both orders are tried.
        name: binds the node.
        where: a condition on the node.
        single_use: refuse a node below the root whose results have users outside of the match.
            With False the node may stay behind for them.
        output: which result; None for any.
        named_operands: patterns by the schema's names.

    Raises:
        GraphError: an operator is unknown or has no such operand.
    """
    names = (operators,) if isinstance(operators, str) else tuple(operators)
    opened = bool(operands) and isinstance(operands[-1], EllipsisType)
    positional = operands[:-1] if opened else operands
    by_operator: dict[str, tuple[tuple[str, Pattern], ...]] = {}
    for operator_name in names:
        operator = resolve(operator_name)
        if len(positional) > len(operator.parameters):
            raise GraphError(f"{operator_name} has only {len(operator.parameters)} operands")
        pairs = [
            (parameter.name, pattern)
            for parameter, pattern in zip(operator.parameters, positional, strict=False)
        ]
        pairs += [(operator.parameter(key).name, pat) for key, pat in named_operands.items()]
        by_operator[operator_name] = tuple((key, as_pattern(pat)) for key, pat in pairs)
    return Op(names, by_operator, opened, name, where, single_use, output)


def value(
    name: str | None = None, where: Predicate | None = None, *, single_use: bool = False
) -> Leaf:
    """Any value. With `single_use` it must have no user outside of the match."""
    return Leaf("a value", lambda x: isinstance(x, Value), name, where, single_use)


def constant(
    name: str | None = None,
    where: Predicate | None = None,
    *,
    single_use: bool = False,
    dequantized: bool = False,
) -> Leaf:
    """A constant tensor; with `dequantized` also the dequantize of one (see `constant_tensor`)."""

    def accepts(operand: Operand) -> bool:
        if not isinstance(operand, Value):
            return False
        return operand.is_constant or (dequantized and constant_tensor(operand) is not None)

    return Leaf("a constant", accepts, name, where, single_use)


def literal(name: str | None = None, where: Predicate | None = None) -> Leaf:
    """A number, string, dtype or None, or a list of such, that no value is part of."""

    def accepts(operand: Operand) -> bool:
        return next(values_in({"": operand}), None) is None

    return Leaf("a literal", accepts, name, where)


def operand(name: str | None = None, where: Predicate | None = None) -> Leaf:
    """Any operand: a value, a literal, None, or a list."""
    return Leaf("an operand", lambda _: True, name, where)


def optional(pattern: Any) -> Optional:
    """The pattern, or nothing; the names in it then stand for None."""
    return Optional(as_pattern(pattern))


def either(*patterns: Any) -> Either:
    """Alternatives; all that fit are tried, in this order."""
    return Either(tuple(map(as_pattern, patterns)))


def as_pattern(given: Any) -> Pattern:
    """Patterns as they are, lists as patterns of their items, literals as themselves."""
    if isinstance(given, Pattern):
        return given
    if isinstance(given, (list, tuple)):
        return Items(tuple(map(as_pattern, given)))
    return Leaf(format_operand(given), lambda operand: _same(operand, given))


def constant_tensor(operand: Operand) -> Any:
    """The tensor that a constant, or the dequantize of constants, stands for; else None."""
    if not isinstance(operand, Value):
        return None
    if operand.constant is not None:
        return operand.constant
    node = operand.producer
    if node is None or node.op != "graphopt.dequantize":
        return None
    tensors = {v: v.constant for v in node.input_values()}
    if any(tensor is None for tensor in tensors.values()):
        return None
    operands = {n: tensors[o] if isinstance(o, Value) else o for n, o in node.operands.items()}
    return node.operator.call(operands)


def _match_all(
    pairs: list[tuple[Pattern, Operand]], found: Match, misses: Misses | None
) -> Iterator[Match]:
    if not pairs:
        yield found
        return
    (pattern, first), rest = pairs[0], pairs[1:]
    for extended in pattern.match(first, found, misses):
        yield from _match_all(rest, extended, misses)


def _holds(
    where: Predicate | None, what: Any, found: Match, misses: Misses | None, called: str
) -> bool:
    verdict = where is None or where(what)
    if not verdict and misses:
        if isinstance(verdict, Decline):
            misses.add(found, lambda: verdict.reason)
        else:
            condition = getattr(where, "__name__", "predicate")
            condition = "the predicate" if condition == "<lambda>" else condition
            misses.add(found, lambda: f"{condition} does not hold for {called}")
    return bool(verdict)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, (Value, Node)) or isinstance(b, (Value, Node)):
        return a is b
    return type(a) is type(b) and bool(a == b)


def _names(pattern: Pattern) -> Iterator[str]:
    if isinstance(pattern, (Leaf, Op)) and pattern.name is not None:
        yield pattern.name
    inner: Sequence[Pattern] = ()
    if isinstance(pattern, Op):
        inner = [child for pairs in pattern.operands.values() for _, child in pairs]
    elif isinstance(pattern, Either):
        inner = pattern.patterns
    elif isinstance(pattern, Optional):
        inner = [pattern.pattern]
    elif isinstance(pattern, Items):
        inner = pattern.items
    for child in inner:
        yield from _names(child)
