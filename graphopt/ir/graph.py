"""The graph: values and nodes in topological order, changed only through guarded methods."""

from __future__ import annotations

import heapq
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from graphopt.errors import GraphError
from graphopt.ir import sizes as free_sizes
from graphopt.ir.inference import infer, map_operand
from graphopt.ir.interface import Interface
from graphopt.ir.operators import Operator, resolve
from graphopt.ir.types import TensorType, Type
from graphopt.ir.value import Node, Operand, Origin, Value, substitute, values_in

if TYPE_CHECKING:
    import networkx

_LITERALS = (int, float, complex, bool, str, type(None))
_TORCH_LITERALS = (torch.dtype, torch.device, torch.layout, torch.memory_format)


class Graph:
    """A network as operators applied to values.

    Every value carries its type under the example's sizes and, where some sizes are free, under
    a second assignment of them, so that nothing is concluded from a size that only the example
    has. Changes go through the methods, which keep use-lists and types right and leave the graph
    as it was when they raise.

    Args:
        sizes: the free sizes by name, with the example's value.
        guards: conditions on the free sizes (Python expressions) under which the graph is valid.
    """

    def __init__(self, sizes: Mapping[str, int] | None = None, guards: Iterable[str] = ()) -> None:
        self.sizes = dict(sizes or {})
        self.guards = tuple(guards)
        if (guard := free_sizes.violated(self.guards, self.sizes)) is not None:
            raise GraphError(f"the example's sizes {self.sizes} violate the guard {guard}")
        other = free_sizes.other_assignment(self.sizes, self.guards)
        self.assignments = (self.sizes,) if other is None else (self.sizes, other)
        self.inputs: list[Value] = []
        self.interface: Interface | None = None
        self.made_by = ""
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

    # -- reading ---------------------------------------------------------------------------

    @property
    def nodes(self) -> list[Node]:
        """All nodes in topological order (a copy: the graph may change while one iterates)."""
        return list(self._walk())

    @property
    def constants(self) -> list[Value]:
        """All constants, in the order in which they came into the graph."""
        return [value for value in self.values if value.is_constant]

    @property
    def values(self) -> list[Value]:
        """Inputs, constants and results, in the order in which they came into the graph."""
        return sorted(self._names.values(), key=lambda value: value._serial)

    @property
    def outputs(self) -> tuple[Operand, ...]:
        """The flat outputs: values, or literals that the model returns as they are."""
        return tuple(self._outputs)

    def value(self, name: str) -> Value:
        """The value of a name. Raises GraphError if there is none."""
        if name not in self._names:
            raise GraphError(f"the graph has no value %{name}")
        return self._names[name]

    def __contains__(self, node: Node) -> bool:
        """Whether a node is part of the graph and not erased."""
        link = self._first if node._previous is None else node._previous._next
        return node.graph is self and link is node

    def _walk(self) -> Iterator[Node]:
        node = self._first
        while node is not None:
            yield node
            node = node._next

    def __len__(self) -> int:
        return sum(1 for _ in self._walk())

    def types_under(self, sizes: Mapping[str, int]) -> dict[Value, Type]:
        """The type of every value under an assignment of the free sizes.

        Raises:
            GraphError: a guard does not hold of the sizes, or an operator refuses them.
        """
        if (guard := free_sizes.violated(self.guards, sizes)) is not None:
            raise GraphError(f"the sizes {dict(sizes)} violate the guard {guard}")
        if dict(sizes) == self.sizes:
            return {value: value.type for value in self._names.values()}
        types: dict[Value, Type] = {}
        for value in self._names.values():
            if value.producer is None:
                types[value] = free_sizes.type_under(value.type, value.free, sizes)

        def type_of(leaf: Any) -> Any:
            return types[leaf] if isinstance(leaf, Value) else leaf

        for node in self._walk():
            operands = {name: map_operand(o, type_of) for name, o in node.operands.items()}
            for value, type in zip(node.outputs, infer(node.operator, operands), strict=True):
                types[value] = type
        return types

    # -- building --------------------------------------------------------------------------

    def add_input(self, name: str, type: Type, free: Mapping[int, str] | None = None) -> Value:
        """Add an input.

        Args:
            name: its name; a number is appended if it is taken.
            type: dtype and shape under the example's sizes.
            free: size expression per free dimension, such as ``{0: "batch"}``.
        """
        free = dict(free or {})
        types = [free_sizes.type_under(type, free, assignment) for assignment in self.assignments]
        if types[0] != type:
            raise GraphError(f"input {name}: {type} does not fit the example's sizes {self.sizes}")
        with self.edit():
            value = self._new_value(name, tuple(types))
            value.free = free
            self.inputs.append(value)
            self._record(self.inputs.pop)
        return value

    def constant(
        self, tensor: torch.Tensor, name: str = "constant", *, trainable: bool = False
    ) -> Value:
        """Add a constant. The tensor is neither copied nor ever written."""
        _check_tensor(tensor, name)
        with self.edit():
            types = (TensorType.of(tensor),) * len(self.assignments)
            value = self._new_value(name, types)
            value.constant = tensor.detach()
            value.trainable = trainable
        return value

    def add(
        self,
        op: str,
        /,
        *args: Operand,
        name: str | None = None,
        before: Node | None = None,
        origin: Origin | None = None,
        **kwargs: Operand,
    ) -> Value:
        """Apply an operator with one result, and return that.

        Args:
            op: the operator's text name.
            args: operands in the schema's order.
            name: name of the result; by default derived from the operator.
            before: the node before which to insert; by default at the end, or where `inserting`
                says.
            origin: where it comes from; by default the pass that runs.
            kwargs: operands by the schema's names.

        Raises:
            GraphError: the operator is unknown or refuses such operands.
        """
        with self.edit():
            node = self.add_node(op, *args, name=name, before=before, origin=origin, **kwargs)
            return node.output

    def add_node(
        self,
        op: str,
        /,
        *args: Operand,
        name: str | None = None,
        before: Node | None = None,
        origin: Origin | None = None,
        **kwargs: Operand,
    ) -> Node:
        """Apply an operator with any number of results, and return the node. See `add`."""
        operator = resolve(op)
        if operator.is_mutable:
            raise GraphError(f"{op} writes to its operands; add its functional form instead")
        before = before or self._before
        if before is not None:
            self._check_node(before)
        operands = operator.bind(args, kwargs)
        self._check_operands(op, operands)
        types = self._infer(operator, operands)
        origin = origin or Origin(made_by=self.made_by)
        with self.edit():
            node = Node(self, operator, {}, [], origin)
            base = name or re.sub(r"\W", "_", op.split(".")[1])
            for index, per_assignment in enumerate(types):
                value = self._new_value(base, per_assignment)
                value.producer, value.index = node, index
                node.outputs.append(value)
            self._insert(node, before)
            self._link(node, operands)
            self._note(self._dirty, node)
        if self._added is not None:
            self._added.append(node)
        return node

    def set_outputs(self, outputs: Sequence[Operand]) -> None:
        """Declare what the graph returns: values or literals."""
        self._check_operands("outputs", {"outputs": list(outputs)})
        with self.edit():
            old = self._outputs
            self._outputs = list(outputs)
            self._record(lambda: setattr(self, "_outputs", old))
            for value in values_in({"outputs": old}):
                self._note(self._unlinked, value)

    # -- changing --------------------------------------------------------------------------

    def set_operand(self, node: Node, name: str, operand: Operand) -> None:
        """Give a node another operand, by its schema name; types follow.

        Raises:
            GraphError: the operator, or one after it, refuses the operand.
        """
        self._check_node(node)
        operands = {**node.operands, name: operand}
        bound = node.operator.bind((), operands)
        self._check_operands(node.op, bound)
        with self.edit():
            self._link(node, bound)
            self._note(self._dirty, node)

    def replace(self, old: Value, new: Value) -> None:
        """Let everything that used one value use another, the producer of the new one excepted.

        Raises:
            GraphError: the types differ (outside `edit`), or a user precedes the new value.
        """
        self._check_operands("replace", {"old": old, "new": new})
        if old is new:
            return
        if self._depth == 0 and old.types != new.types:
            raise GraphError(
                f"%{old.name} cannot be replaced by %{new.name}: {_types(old)} is not {_types(new)}"
            )
        with self.edit():
            for user in list(old.users):
                if user is not new.producer:
                    self._link(user, substitute(user.operands, {old: new}))
                    self._note(self._dirty, user)
            if any(output is old for output in self._outputs):
                self.set_outputs([new if output is old else output for output in self._outputs])

    def erase(self, node: Node) -> None:
        """Remove a node whose results nobody uses, and the constants that it alone used.

        Raises:
            GraphError: a result has users (which are named) or is an output of the graph.
        """
        self._check_node(node)
        for value in node.outputs:
            if value.users:
                users = ", ".join(f"%{user.name}" for user in value.users)
                raise GraphError(f"%{value.name} cannot be erased: it is used by {users}")
            if value.is_output:
                raise GraphError(f"%{value.name} cannot be erased: the graph returns it")
        with self.edit():
            self._link(node, {})
            self._remove(node)
            for value in node.outputs:
                self._drop_name(value)

    def set_constant(self, value: Value, tensor: torch.Tensor) -> None:
        """Give a constant another tensor for all its users; types follow."""
        self._check_operands("set_constant", {"value": value})
        if not value.is_constant:
            raise GraphError(f"%{value.name} is not a constant")
        _check_tensor(tensor, value.name)
        with self.edit():
            old = value.constant
            value.constant = tensor.detach()
            self._record(lambda: setattr(value, "constant", old))
            self._set_types(value, (TensorType.of(tensor),) * len(self.assignments))

    def rename(self, value: Value, name: str) -> None:
        """Give a value another name. Raises GraphError if it is taken."""
        self._check_operands("rename", {"value": value})
        if name == value.name:
            return
        if name in self._names:
            raise GraphError(f"%{value.name} cannot be named {name}: that name is taken")
        with self.edit():
            self._drop_name(value)
            old, value.name = value.name, name
            self._record(lambda: setattr(value, "name", old))
            self._file(value)

    def drop_unused_constants(self) -> None:
        """Remove constants without users that the graph does not return."""
        with self.edit():
            for value in self.constants:
                if not value.users and not value.is_output:
                    self._drop_name(value)

    @contextmanager
    def edit(self) -> Iterator[Graph]:
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

    @contextmanager
    def making(self, pass_name: str) -> Iterator[None]:
        """Attribute the nodes that are added meanwhile to a pass."""
        before, self.made_by = self.made_by, pass_name
        try:
            yield
        finally:
            self.made_by = before

    @contextmanager
    def inserting(self, before: Node) -> Iterator[list[Node]]:
        """Put nodes that are added meanwhile before a node; yields the list of them."""
        outer = self._before, self._added
        added: list[Node] = []
        self._before, self._added = before, added
        try:
            yield added
        finally:
            self._before, self._added = outer

    # -- other forms -----------------------------------------------------------------------

    def clone(self) -> Graph:
        """A copy that shares nothing but the constants' tensors; names are the same."""
        copy = Graph(self.sizes, self.guards)
        copy.assignments = self.assignments
        copy.interface = self.interface
        mapping: dict[Value, Operand] = {}
        with copy.edit():
            for value in self.values:
                if value.producer is None:
                    mapping[value] = twin = copy._new_value(value.name, value.types)
                    twin.constant, twin.trainable = value.constant, value.trainable
                    twin.free = dict(value.free)
            copy.inputs = [mapping[value] for value in self.inputs]
            for node in self._walk():
                twin_node = Node(copy, node.operator, {}, [], node.origin)
                for value in node.outputs:
                    mapping[value] = twin = copy._new_value(value.name, value.types)
                    twin.producer, twin.index = twin_node, value.index
                    twin_node.outputs.append(twin)
                copy._insert(twin_node, None)
                copy._link(twin_node, substitute(node.operands, mapping))
            copy._outputs = substitute({"outputs": self._outputs}, mapping)["outputs"]
        copy._counters = dict(self._counters)
        copy.version = self.version
        return copy

    def restore(self, snapshot: Graph) -> None:
        """Become what a clone is, which is used up by it."""
        for value in snapshot._names.values():
            value.graph = self
        for node in snapshot._walk():
            node.graph = self
        self.__dict__.update(snapshot.__dict__)

    def verify(self) -> None:
        """Check everything that must hold of a graph. Raises GraphError, naming the node."""
        from graphopt.ir.verifier import verify

        verify(self)

    def to_text(self) -> str:
        """The graph as text that a person can read and `from_text` reads back."""
        from graphopt.ir.text import format_graph

        return format_graph(self)

    __str__ = to_text

    @staticmethod
    def from_text(text: str, constants: Mapping[str, torch.Tensor] | None = None) -> Graph:
        """The graph of a text; tensors of constants that the text does not spell out are given
        by name. Raises GraphError, naming the line, if the text is wrong."""
        from graphopt.ir.text_parser import parse_graph

        return parse_graph(text, constants or {})

    def __reduce__(self) -> tuple[Any, ...]:
        constants = {value.name: value.constant for value in self.constants}
        origins = [node.origin for node in self._walk()]
        return _restore, (self.to_text(), constants, self.interface, origins)

    def to_networkx(self) -> networkx.MultiDiGraph:
        """A view of the structure for questions about it; see `graphopt.ir.views`."""
        from graphopt.ir.views import to_networkx

        return to_networkx(self)

    def to_torch(self) -> torch.fx.GraphModule:
        """An ordinary module that computes the graph, with the source network's names."""
        from graphopt.ir.torch_form import to_torch

        return to_torch(self)

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
        value = Value(self, name, types, _serial=next(self._serials))
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


def _check_tensor(tensor: Any, name: str) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise GraphError(f"the constant %{name} is a {type(tensor).__name__}, not a tensor")
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise GraphError(f"the constant %{name} is {tensor.layout}; only dense tensors work")


def _restore(
    text: str,
    constants: dict[str, torch.Tensor],
    interface: Interface | None,
    origins: list[Origin],
) -> Graph:
    """A pickled graph; recursion through linked nodes would overflow the stack."""
    graph = Graph.from_text(text, constants)
    graph.interface = interface
    for node, origin in zip(graph.nodes, origins, strict=True):
        node.origin = origin
    return graph


def _types(value: Value) -> str:
    return " / ".join(map(str, dict.fromkeys(value.types)))
