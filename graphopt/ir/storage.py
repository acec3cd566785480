"""The storage of a graph: linked nodes, filed values, and a journal that undoes changes."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self, cast

import torch

from graphopt.errors import GraphError
from graphopt.ir.inference import infer, map_operand
from graphopt.ir.operators import Operator
from graphopt.ir.types import Type
from graphopt.ir.value import Node, Operand, Value, values_in

if TYPE_CHECKING:
    from graphopt.ir.graph import Graph

_LITERALS = (int, float, complex, bool, str, type(None))
_TORCH_LITERALS = (torch.dtype, torch.device, torch.layout, torch.memory_format)


class Storage:
    """What `Graph` stands on: primitives that record how to undo them, and `edit`, which makes
    several of them one change.

    Attributes:
        assignments: of the free sizes; types are inferred under each.
        version: grows with every change.
    """

    def __init__(self, assignments: tuple[dict[str, int], ...]) -> None:
        self.assignments = assignments
        self.inputs: list[Value] = []
        self.version = 0
        self._outputs: list[Operand] = []
        self._names: dict[str, Value] = {}
        self._counters: dict[str, int] = {}
        self._first: Node | None = None
        self._last: Node | None = None
        self._journal: list[Callable[[], None]] = []
        self._dirty: dict[Node, None] = {}
        self._unlinked: dict[Value, None] = {}
        self._serials = itertools.count()
        self._depth = 0
        self._before: Node | None = None
        self._added: list[Node] | None = None

    @contextmanager
    def edit(self) -> Iterator[Self]:
        """Make several changes one: types are inferred at the end, and on any error, the
        caller's own included, the graph is what it was before. Inside another edit, an error
        undoes the inner one; types wait for the end of the outer one.

        Raises:
            GraphError: an operator refuses its new operands, a user precedes what it uses, or the
                type of one of the graph's outputs has changed.
        """
        outermost, start = self._depth == 0, len(self._journal)
        outputs = self._outputs
        output_types = [v.types if isinstance(v, Value) else v for v in outputs]
        self._depth += 1
        try:
            yield self
            if outermost:
                self._settle()
                if outputs:
                    self._check_outputs(output_types)
                self.version += bool(self._journal)
        except BaseException:
            while len(self._journal) > start:
                self._journal.pop()()
            raise
        finally:
            self._depth -= 1
            if outermost:
                self._journal.clear()
                self._dirty.clear()
                self._unlinked.clear()

    def __contains__(self, node: Node) -> bool:
        """Whether a node is part of the graph and not erased."""
        link = self._first if node._previous is None else node._previous._next
        return node.graph is self and link is node

    def _walk(self) -> Iterator[Node]:
        node = self._first
        while node is not None:
            yield node
            node = node._next

    # -- primitives: each records how to undo it ---------------------------------------------

    def _record(self, undo: Callable[[], Any]) -> None:
        self._journal.append(undo)

    def _new_value(self, base: str, types: tuple[Type, ...]) -> Value:
        # A name is not given twice, even if its first bearer is gone: names of one graph and of
        # its clones can be compared.
        name = base
        while name in self._names or name in self._counters:
            self._counters[base] = count = self._counters.get(base, 0) + 1
            name = f"{base}_{count}"
        self._counters.setdefault(name, 0)
        value = Value(cast("Graph", self), name, types, _serial=next(self._serials))
        self._file(value)
        return value

    def _file(self, value: Value) -> None:
        self._names[value.name] = value
        self._record(lambda: self._names.pop(value.name))

    def _drop_name(self, value: Value) -> None:
        del self._names[value.name]
        self._record(lambda: self._names.__setitem__(value.name, value))

    def _note(self, pending: dict[Any, None], item: Node | Value) -> None:
        """Keep something in mind for the end of the edit."""
        if item not in pending:
            pending[item] = None
            self._record(lambda: pending.pop(item))

    def _set_types(self, value: Value, types: tuple[Type, ...]) -> None:
        old = value.types
        if old != types:
            value.types = types
            self._record(lambda: setattr(value, "types", old))
            for user in value.users:
                self._note(self._dirty, user)

    def _link(self, node: Node, operands: dict[str, Operand]) -> None:
        old = node.operands
        for value in values_in(old):
            self._note(self._unlinked, value)
        self._relink(node, operands)
        self._record(lambda: self._relink(node, old))

    def _relink(self, node: Node, operands: dict[str, Operand]) -> None:
        for value in values_in(node.operands):
            value.users.pop(node, None)
        node.operands = operands
        for value in values_in(operands):
            value.users[node] = None

    def _insert(self, node: Node, before: Node | None) -> None:
        previous = self._last if before is None else before._previous
        node._previous, node._next = previous, before
        if previous is None:
            self._first = node
        else:
            previous._next = node
        if before is None:
            self._last = node
        else:
            before._previous = node
        low = previous._key if previous else (before._key - 2.0 if before else 0.0)
        high = before._key if before else low + 2.0
        node._key = (low + high) / 2
        if not low < node._key < high:
            for position, other in enumerate(self._walk()):
                other._key = float(position)
        self._record(lambda: self._unlink(node))

    def _remove(self, node: Node) -> None:
        following = node._next
        self._unlink(node)
        self._record(lambda: self._reinsert(node, following))

    def _unlink(self, node: Node) -> None:
        if node._previous is None:
            self._first = node._next
        else:
            node._previous._next = node._next
        if node._next is None:
            self._last = node._previous
        else:
            node._next._previous = node._previous

    def _reinsert(self, node: Node, before: Node | None) -> None:
        self._insert(node, before)
        self._journal.pop()

    def _settle(self) -> None:
        """Infer types downstream of what changed, and drop constants that lost all users."""
        tie = itertools.count()
        queue = [(node._key, next(tie), node) for node in self._dirty if node in self]
        heapq.heapify(queue)
        done: dict[Node, None] = {}
        while queue:
            _, _, node = heapq.heappop(queue)
            if node in done:
                continue
            done[node] = None
            self._check_order(node)
            types = self._infer(node.operator, node.operands, node)
            if len(types) != len(node.outputs):
                raise GraphError(
                    f"{node} would have {len(types)} outputs instead of {len(node.outputs)}"
                )
            for value, per_assignment in zip(node.outputs, types, strict=True):
                if value.types != per_assignment:
                    self._set_types(value, per_assignment)
                    for user in value.users:
                        heapq.heappush(queue, (user._key, next(tie), user))
        for value in self._unlinked:
            known = self._names.get(value.name) is value
            if known and value.is_constant and not value.users and not value.is_output:
                self._drop_name(value)

    def _check_order(self, node: Node) -> None:
        for value in node.input_values():
            producer = value.producer
            if self._names.get(value.name) is not value:
                raise GraphError(f"%{node.name} uses %{value.name}, which the graph has not")
            if producer is not None and not producer.before(node):
                raise GraphError(
                    f"%{node.name} uses %{value.name}, which comes after it; insert the producer "
                    f"with before=<node of %{node.name}>"
                )

    def _check_outputs(self, before: list[Any]) -> None:
        after = [v.types if isinstance(v, Value) else v for v in self._outputs]
        if len(after) != len(before):
            raise GraphError(f"the graph returned {len(before)} results, now {len(after)}")
        for position, (old, new) in enumerate(zip(before, after, strict=True)):
            if isinstance(old, tuple) and old != new:
                raise GraphError(
                    f"output {position} was {old[0]} and would become "
                    f"{new[0] if isinstance(new, tuple) else new}; what a model returns is fixed"
                )
            same = old is new or (type(old) is type(new) and old == new)
            if not isinstance(old, tuple) and not same:
                raise GraphError(f"output {position} was {old!r} and would become {new!r}")
        for value in values_in({"outputs": self._outputs}):
            if self._names.get(value.name) is not value:
                raise GraphError(f"the graph returns %{value.name}, which it has not")

    def _check_node(self, node: Node) -> None:
        if node not in self:
            raise GraphError(f"%{node.name} is not a node of this graph; it may have been erased")

    def _check_operands(self, what: str, operands: dict[str, Operand]) -> None:
        def check(leaf: Any) -> None:
            if isinstance(leaf, Value):
                if self._names.get(leaf.name) is not leaf:
                    raise GraphError(f"{what}: %{leaf.name} is not a value of this graph")
            elif isinstance(leaf, torch.Tensor):
                raise GraphError(f"{what}: a tensor is no operand; add it with graph.constant()")
            elif not isinstance(leaf, _LITERALS + _TORCH_LITERALS):
                raise GraphError(f"{what}: {type(leaf).__name__} is neither a value nor a literal")

        for operand in operands.values():
            map_operand(operand, check)

    def _infer(
        self, operator: Operator, operands: dict[str, Operand], node: Node | None = None
    ) -> list[tuple[Type, ...]]:
        """Types of every result under every assignment of the free sizes."""
        per_assignment = []
        for k, sizes in enumerate(self.assignments):

            def type_of(leaf: Any, k: int = k) -> Any:
                return leaf.types[k] if isinstance(leaf, Value) else leaf

            typed = {name: map_operand(operand, type_of) for name, operand in operands.items()}
            try:
                per_assignment.append(infer(operator, typed))
            except GraphError as error:
                where = f"%{node.name}: " if node else ""
                under = f" (with the free sizes {sizes})" if sizes else ""
                raise GraphError(f"{where}{error}{under}") from error.__cause__
        if len({len(types) for types in per_assignment}) != 1:
            raise GraphError(f"{operator.name}: the number of results depends on a free size")
        return list(zip(*per_assignment, strict=True))
