"""The graph: values and nodes in topological order, changed only through guarded methods."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from graphopt.errors import GraphError
from graphopt.ir import sizes as free_sizes
from graphopt.ir.inference import infer, map_operand
from graphopt.ir.interface import Interface
from graphopt.ir.operators import resolve
from graphopt.ir.storage import Storage
from graphopt.ir.types import TensorType, Type
from graphopt.ir.value import Node, Operand, Origin, Value, substitute, values_in

if TYPE_CHECKING:
    import networkx

    from graphopt.ir.weights import Weight


class Graph(Storage):
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
        super().__init__((self.sizes,) if other is None else (self.sizes, other))
        self.interface: Interface | None = None
        self.made_by = ""

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

    def weight(self, node: Node) -> Weight:
        """A layer's weight, to read and to rewrite, also through a dequantize.

        Raises:
            GraphError: the node has no weight, or it is not a constant.
        """
        from graphopt.ir.weights import weight_of

        return weight_of(self, node)

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
