"""Checks that a graph is what a graph must be; run after every pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from graphopt.errors import GraphError
from graphopt.ir import sizes as free_sizes
from graphopt.ir.interface import TENSOR
from graphopt.ir.text import excerpt
from graphopt.ir.types import TensorType
from graphopt.ir.value import Node, Value, values_in

if TYPE_CHECKING:
    from graphopt.ir.graph import Graph


def verify(graph: Graph) -> None:
    """Check order, use-lists, types under every assignment of the free sizes, constants, inputs,
    outputs and the calling convention.

    Raises:
        GraphError: naming the node, with an excerpt of the graph as a note.
    """
    _verify_sources(graph)
    defined = {*graph.inputs, *graph.constants}
    uses: dict[Value, dict[Node, None]] = {value: {} for value in graph.values}
    previous: Node | None = None
    for node in graph.nodes:
        if node.graph is not graph or node._previous is not previous:
            _fail(node, "is not linked to its predecessor")
        if previous is not None and not previous.before(node):
            _fail(node, "has an order key that is not above its predecessor's")
        previous = node
        for value in node.input_values():
            if value not in uses:
                _fail(node, f"uses %{value.name}, which is not a value of the graph")
            if value not in defined:
                _fail(node, f"uses %{value.name} before it is computed")
            uses[value][node] = None
        for index, value in enumerate(node.outputs):
            if value.producer is not node or value.index != index or value not in uses:
                _fail(node, f"has an output %{value.name} that belongs elsewhere")
            defined.add(value)
        _verify_types(graph, node)
    if graph._last is not previous:
        raise GraphError("the graph's last node is not the end of its list")
    _verify_uses(graph, uses, defined)
    _verify_interface(graph)


def _verify_sources(graph: Graph) -> None:
    for assignment in graph.assignments:
        guard = free_sizes.violated(graph.guards, assignment)
        if guard is not None:
            raise GraphError(f"the sizes {assignment} violate the guard {guard}")
    for name, value in graph._names.items():
        if value.name != name or value.graph is not graph:
            raise GraphError(f"%{value.name} is filed under the name {name}")
        if len(value.types) != len(graph.assignments):
            raise GraphError(f"%{name} has {len(value.types)} types, not one per assignment")
        if value.constant is not None:
            actual = TensorType.of(value.constant)
            if any(t != actual for t in value.types):
                raise GraphError(f"the constant %{name} is {actual}, its type says {value.type}")
    borne = {name for value in graph.inputs for name in value.free.values()}
    for name in graph.sizes:
        if name not in borne:
            raise GraphError(f"the free size '{name}' is the size of no input's dimension")
    if len(set(graph.inputs)) != len(graph.inputs):
        raise GraphError("an input is listed twice")
    for value in graph.inputs:
        if graph._names.get(value.name) is not value or not value.is_input:
            raise GraphError(f"%{value.name} is listed as an input and is none")
        expected = tuple(
            free_sizes.type_under(value.type, value.free, sizes) for sizes in graph.assignments
        )
        if value.types != expected:
            raise GraphError(f"the input %{value.name} should be {_describe([expected])}")


def _verify_types(graph: Graph, node: Node) -> None:
    try:
        types = graph._infer(node.operator, node.operands, node)
    except GraphError as error:
        error.add_note(excerpt(node))
        raise
    if [value.types for value in node.outputs] != types:
        _fail(node, f"should have the types {_describe(types)}")


def _verify_uses(graph: Graph, uses: dict[Value, dict[Node, None]], defined: set[Value]) -> None:
    outputs = set(values_in({"outputs": list(graph.outputs)}))
    for value, users in uses.items():
        if set(value.users) != set(users):
            listed = ", ".join(user.name for user in value.users) or "nobody"
            actual = ", ".join(user.name for user in users) or "nobody"
            message = f"lists {listed} as users; it is used by {actual}"
            if value.producer is not None:
                _fail(value.producer, message)
            raise GraphError(f"%{value.name} {message}")
        if value not in defined:
            raise GraphError(f"%{value.name} has a name in the graph and no place in it")
        if value.is_constant and not users and value not in outputs:
            raise GraphError(f"the constant %{value.name} is used by nobody")
    for value in outputs:
        if value not in defined:
            raise GraphError(f"the graph returns %{value.name}, which nothing computes")


def _verify_interface(graph: Graph) -> None:
    if graph.interface is None:
        return
    tensors = sum(leaf is TENSOR for leaf in graph.interface.leaves)
    if tensors != len(graph.inputs):
        raise GraphError(f"the model takes {tensors} tensors, the graph {len(graph.inputs)} inputs")
    results = graph.interface.out_spec.num_leaves
    if results != len(graph.outputs):
        raise GraphError(f"the model returns {results} leaves, the graph {len(graph.outputs)}")


def _describe(types: Any) -> str:
    return ", ".join(" / ".join(map(str, dict.fromkeys(t))) for t in types)


def _fail(node: Node, message: str) -> NoReturn:
    error = GraphError(f"%{node.name} {message}")
    error.add_note(excerpt(node))
    raise error
