"""Rewriting: rules that replace what a pattern matches, and the driver that applies them.

::

    @rule("transpose(transpose(x, a, b), a, b) => x",
          op("aten.transpose.int", op("aten.transpose.int", value("x"), literal("a"), literal("b")),
             literal("a"), literal("b")))
    def double_transpose(graph: Graph, match: Match) -> Value:
        return match["x"]

    rewrite(graph, [double_transpose])
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

from graphopt.errors import Error, GraphError, PassError
from graphopt.ir.graph import Graph
from graphopt.ir.patterns import (
    Decline,
    Match,
    Misses,
    Pattern,
    constant,
    constant_tensor,
    either,
    literal,
    op,
    operand,
    optional,
    value,
)
from graphopt.ir.text import excerpt
from graphopt.ir.value import Node, Origin, Value

__all__ = [
    "Decline",
    "Match",
    "Miss",
    "Rule",
    "closest_miss",
    "constant",
    "constant_tensor",
    "either",
    "limit_applications",
    "literal",
    "op",
    "operand",
    "optional",
    "rewrite",
    "rule",
    "value",
]

Replacement = Callable[[Graph, Match], Any]


@dataclass(frozen=True, eq=False)
class Rule:
    """A pattern and what replaces it.

    Attributes:
        name: the rule as an equation, such as ``relu(relu(x)) => relu(x)``.
        roots: the pattern of each node whose results are replaced. Roots after the first are
            searched among the users of what has been matched.
        replacement: makes the new value with ``graph`` and returns it; with several results, one
            per result of every root in order, None for those without users. New nodes are
            put before the roots. To decline, it returns a `Decline` (or None), whatever it has
            added is then undone. A replacement that changes the matched nodes in place returns
            their old results.
    """

    name: str
    roots: tuple[Pattern, ...]
    replacement: Replacement

    def __repr__(self) -> str:
        return f"Rule({self.name!r})"

    def match(self, node: Node, misses: Misses | None = None) -> Iterator[Match]:
        """The ways in which the rule's first root matches a node."""
        if node.op not in self.roots[0].root_operators() or not node.outputs:
            return
        for first in self.roots[0].match(node.outputs[0], Match(), misses):
            for found in _match_roots(self.roots[1:], replace(first, roots=(node,)), misses):
                obstacle = _obstacle(found)
                if obstacle is None:
                    yield found
                elif misses is not None:
                    misses.add(found, lambda reason=obstacle: reason, bonus=1)  # type: ignore[misc]


def rule(name: str, *roots: Pattern) -> Callable[[Replacement], Rule]:
    """Decorator: make a replacement function a `Rule`.

    Raises:
        GraphError: a root is not a pattern for operators.
    """
    if not roots:
        raise GraphError(f"the rule '{name}' has no pattern")
    for root in roots:
        root.root_operators()
    return lambda replacement: Rule(name, roots, replacement)


@dataclass
class _Budget:
    limit: int | None
    log: list[str]


_budget: ContextVar[_Budget | None] = ContextVar("applications", default=None)


@contextmanager
def limit_applications(limit: int | None) -> Iterator[list[str]]:
    """Let all drivers together apply rules at most so many times; yields the list of what was
    applied (rule and node), for bisection."""
    budget = _Budget(limit, [])
    token = _budget.set(budget)
    try:
        yield budget.log
    finally:
        _budget.reset(token)


def rewrite(graph: Graph, rules: Sequence[Rule], *, limit: int | None = None) -> bool:
    """Apply rules until none applies any more.

    The nodes are visited in topological order, again and again; at each node the first rule that
    fits is applied, and what it made is visited next.

    Args:
        graph: changed in place.
        rules: the earlier ones come first where several fit.
        limit: bound on the number of applications; by default 1000 and 20 per node.

    Returns:
        Whether anything was applied.

    Raises:
        PassError: the bound is reached (the message names the rules that undo each other), or a
            replacement fails.
    """
    by_operator: dict[str, list[Rule]] = {}
    for candidate in rules:
        for operator in dict.fromkeys(candidate.roots[0].root_operators()):
            by_operator.setdefault(operator, []).append(candidate)
    limit = max(1000, 20 * len(graph)) if limit is None else limit
    applied: list[str] = []
    budget = _budget.get()
    while True:
        before = len(applied)
        queue = graph.nodes[::-1]
        while queue:
            node = queue.pop()
            if node not in graph:
                continue
            for candidate in by_operator.get(node.op, ()):
                if budget is not None and len(budget.log) == budget.limit:
                    return bool(applied)
                added = _apply(graph, candidate, node)
                if added is not None:
                    applied.append(candidate.name)
                    if budget is not None:
                        budget.log.append(f"'{candidate.name}' at %{node.name}")
                    if len(applied) > limit:
                        raise _endless(applied)
                    queue += [node, *reversed(added)]
                    break
        if len(applied) == before:
            return bool(applied)


@dataclass(frozen=True)
class Miss:
    """Why a rule does not apply where it comes closest to it."""

    rule: Rule
    node: Node
    reason: str

    def __str__(self) -> str:
        return f"'{self.rule.name}' does not apply at %{self.node.name}: {self.reason}"


def closest_miss(rule: Rule, graph: Graph) -> Miss | None:
    """The place where a rule comes closest to applying, and what is in the way.

    Returns None where it applies somewhere, or where no node has an operator of its root.
    """
    best: tuple[int, Miss] | None = None
    for node in graph.nodes:
        misses = Misses()
        for found in rule.match(node, misses):
            trial = graph.clone()
            verdict = _try(trial, rule, _transfer(found, graph, trial))
            if not isinstance(verdict, Decline):
                return None
            misses.add(found, lambda reason=verdict.reason: reason, bonus=2)  # type: ignore[misc]
        if misses.progress > (best[0] if best else -1):
            best = misses.progress, Miss(rule, node, misses.reason)
    return best[1] if best else None


class _Declined(Exception):
    def __init__(self, decline: Decline) -> None:
        self.decline = decline


def _apply(graph: Graph, rule: Rule, node: Node) -> list[Node] | None:
    """Apply a rule at a node in the first way that it does not decline; the nodes it added."""
    for found in rule.match(node):
        result = _try(graph, rule, found)
        if not isinstance(result, Decline):
            return result
    return None


def _try(graph: Graph, rule: Rule, found: Match) -> list[Node] | Decline:
    place = _place(found)
    if isinstance(place, Decline):
        return place
    version, shown = graph.version, excerpt(found.roots[0])
    old = [result for root in found.roots for result in root.outputs]
    try:
        with graph.edit(), graph.inserting(place) as added:
            made = rule.replacement(graph, found)
            if made is None or isinstance(made, Decline):
                silent = Decline("the replacement declined without a reason")
                raise _Declined(silent if made is None else made)
            new = list(made) if isinstance(made, (list, tuple)) else [made]
            _substitute(graph, old, new)
            for node in added:
                node.origin = _origin(node, found, graph.made_by)
            _erase_unused(graph, found.nodes)
            _keep_names(old, new, added)
    except _Declined as declined:
        return declined.decline
    except GraphError as error:
        failure = PassError(f"the rule '{rule.name}' failed at %{found.roots[0].name}: {error}")
        failure.add_note(shown)
        raise failure from error
    if graph.version == version:
        raise PassError(f"the rule '{rule.name}' says that it applied, but changed nothing")
    return [node for node in added if node in graph]


def _substitute(graph: Graph, old: list[Value], new: list[Any]) -> None:
    if len(old) != len(new):
        raise GraphError(f"the replacement returned {len(new)} values for {len(old)} results")
    for before, after in zip(old, new, strict=True):
        if after is None:
            if before.users or before.is_output:
                raise GraphError(f"the replacement returned None for %{before.name}, which is used")
        elif not isinstance(after, Value):
            raise GraphError(f"the replacement returned {after!r}, which is no value")
        else:
            graph.replace(before, after)
    for before, after in zip(old, new, strict=True):
        if after is not None and before.types != after.types:
            raise GraphError(
                f"the replacement %{after.name} is {_types(after)}, not {_types(before)}"
            )


def _erase_unused(graph: Graph, nodes: Iterable[Node]) -> None:
    """Erase nodes whose results nobody uses, and those before them that this leaves unused."""
    pending = sorted(nodes, key=lambda node: node._key)
    while pending:
        node = pending.pop()
        if node in graph and not any(v.users or v.is_output for v in node.outputs):
            before = [v.producer for v in node.input_values() if v.producer is not None]
            graph.erase(node)
            pending += before


def _keep_names(old: list[Value], new: list[Any], added: list[Node]) -> None:
    """A made value that replaces another takes its name, so that equal names mean equal values."""
    for before, after in zip(old, new, strict=True):
        erased = before.producer is not None and before.producer not in before.graph
        if after is not None and after.producer in added and erased:
            after.graph.rename(after, before.name)


def _origin(node: Node, found: Match, made_by: str) -> Origin:
    """That of the matched node with the same operator, else of the first root."""
    source = next((old for old in found.nodes if old.op == node.op), found.roots[0])
    return replace(source.origin, made_by=made_by)


def _match_roots(
    patterns: Sequence[Pattern], found: Match, misses: Misses | None
) -> Iterator[Match]:
    if not patterns:
        yield found
        return
    operators = patterns[0].root_operators()
    near = [v for node in found.nodes for v in (*node.input_values(), *node.outputs)]
    candidates = {user for v in near for user in v.users if user.op in operators}
    for node in sorted(candidates - set(found.nodes), key=lambda node: node._key):
        for extended in patterns[0].match(node.outputs[0], found, misses):
            with_root = replace(extended, roots=(*extended.roots, node))
            yield from _match_roots(patterns[1:], with_root, misses)


def _obstacle(found: Match) -> str | None:
    """Why a match must not be replaced: a value that others use, or a way out and back in."""
    for v in found.exclusive:
        if v.producer in found.roots:
            continue
        outside = [user for user in v.users if user not in found.nodes]
        if v.is_output:
            return f"%{v.name} is an output of the graph"
        if outside:
            others = ", ".join(f"%{user.name}" for user in outside)
            return f"%{v.name} has {len(v.users)} users, outside of the match: {others}"
    if len(found.roots) > 1:
        return _way_back(found)
    return None


def _way_back(found: Match) -> str | None:
    last = max(found.nodes, key=lambda node: node._key)
    seen: set[Node] = set()
    pending = [user for root in found.roots for v in root.outputs for user in v.users]
    pending = [user for user in pending if user not in found.nodes]
    while pending:
        node = pending.pop()
        if node in found.nodes:
            return f"%{node.name} depends on another root through nodes outside of the match"
        if node in seen or not (node.before(last) or node is last):
            continue
        seen.add(node)
        pending += [user for v in node.outputs for user in v.users]
    return None


def _place(found: Match) -> Node | Decline:
    """Where new nodes go: after all that the match reads and before all that reads it."""
    first = min(found.roots, key=lambda node: node._key)
    if len(found.roots) == 1:
        return first
    sources = [v.producer for node in found.nodes for v in node.input_values()]
    late = [s for s in sources if s is not None and s not in found.nodes and first.before(s)]
    if not late:
        return first
    last = max(found.roots, key=lambda node: node._key)
    users = [user for root in found.roots for v in root.outputs for user in v.users]
    early = [user for user in users if user not in found.nodes and user.before(last)]
    if not early:
        return last
    return Decline(f"%{early[0].name} comes before %{late[0].name}, which the match reads")


def _transfer(found: Match, graph: Graph, copy: Graph) -> Match:
    """The same match in a clone of the graph."""
    nodes = dict(zip(graph.nodes, copy.nodes, strict=True))

    def twin(what: Any) -> Any:
        if isinstance(what, Value):
            return copy.value(what.name)
        if isinstance(what, Node):
            return nodes[what]
        return [twin(item) for item in what] if isinstance(what, (list, tuple)) else what

    return Match(
        {name: twin(what) for name, what in found.names.items()},
        tuple(twin(found.nodes)),
        tuple(twin(found.roots)),
        tuple(twin(found.exclusive)),
    )


def _endless(applied: list[str]) -> Error:
    tail = applied[len(applied) // 2 :]
    for period in range(1, len(tail) // 3 + 1):
        if all(tail[-k] == tail[-k - period] for k in range(1, 2 * period + 1)):
            cycle = tail[-period:]
            break
    else:
        cycle = list(dict.fromkeys(tail))
    names = ", ".join(f"'{name}'" for name in cycle)
    return PassError(
        f"rewriting does not end: after {len(applied)} applications these rules still fire in "
        f"turn: {names}"
    )


def _types(v: Value) -> str:
    return " / ".join(map(str, dict.fromkeys(v.types)))
