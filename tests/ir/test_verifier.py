"""The verifier, against graphs that were damaged by hand in every way it must notice."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils import _pytree as pytree

from graphopt.errors import GraphError
from graphopt.ir import TENSOR, Graph, Interface, Node, ScalarType, TensorType, Value
from graphopt.ir.operators import resolve
from graphopt.ir.value import Origin

F32 = torch.float32


def chain() -> Graph:
    """linear -> relu -> neg, with a split beside them."""
    graph = Graph({"batch": 2}, ["batch >= 2"])
    x = graph.add_input("x", TensorType(F32, (2, 4)), {0: "batch"})
    weight = graph.constant(torch.ones(6, 4), "weight")
    relu = graph.add("aten.relu", graph.add("aten.linear", x, weight))
    neg = graph.add("aten.neg", relu)
    parts = graph.add_node("aten.split.Tensor", neg, 4, 1).outputs
    graph.set_outputs([neg, *parts])
    return graph


Damage = Callable[[Graph], object]
DAMAGES: dict[str, tuple[Damage, str]] = {}


def damage(message: str) -> Callable[[Damage], Damage]:
    def add(function: Damage) -> Damage:
        DAMAGES[function.__name__] = function, message
        return function

    return add


def node(graph: Graph, name: str) -> Node:
    producer = graph.value(name).producer
    assert producer is not None
    return producer


@damage("%relu lists nobody as users; it is used by neg")
def missing_user(graph: Graph) -> None:
    graph.value("relu").users.clear()


@damage("%linear lists relu, neg as users; it is used by relu")
def additional_user(graph: Graph) -> None:
    graph.value("linear").users[node(graph, "neg")] = None


@damage("%weight lists nobody as users; it is used by linear")
def missing_user_of_a_constant(graph: Graph) -> None:
    graph.value("weight").users.clear()


@damage("%relu has an order key")
def equal_keys(graph: Graph) -> None:
    node(graph, "relu")._key = node(graph, "linear")._key


@damage("%neg uses %relu before it is computed")
def swapped_nodes(graph: Graph) -> None:
    linear, relu, neg, split = graph.nodes
    linear._next, neg._previous = neg, linear
    neg._next, relu._previous = relu, neg
    relu._next, split._previous = split, relu
    relu._key, neg._key = neg._key, relu._key


@damage("%neg is not linked to its predecessor")
def broken_link(graph: Graph) -> None:
    node(graph, "neg")._previous = None


@damage("last node is not the end")
def wrong_end(graph: Graph) -> None:
    graph._last = node(graph, "neg")


@damage("%relu should have the types")
def wrong_shape(graph: Graph) -> None:
    value = graph.value("relu")
    value.types = (TensorType(F32, (2, 5)), TensorType(F32, (5, 5)))


@damage("%relu should have the types")
def wrong_dtype(graph: Graph) -> None:
    value = graph.value("relu")
    value.types = tuple(TensorType(torch.float64, t.shape) for t in value.types)  # type: ignore[union-attr]


@damage("%relu should have the types")
def wrong_shape_under_the_other_sizes_only(graph: Graph) -> None:
    value = graph.value("relu")
    value.types = (value.types[0], value.types[0])


@damage("%relu has 1 types")
def types_for_one_assignment(graph: Graph) -> None:
    value = graph.value("relu")
    value.types = value.types[:1]


@damage("aten.linear.* is not valid")
def refused_operand(graph: Graph) -> None:
    node(graph, "linear").operands["bias"] = graph.value("x")


@damage("%neg uses %stranger, which is not a value of the graph")
def stranger(graph: Graph) -> None:
    foreign = Value(graph, "stranger", graph.value("relu").types)
    node(graph, "neg").operands["self"] = foreign


@damage("%neg has an output %neg that belongs elsewhere")
def stolen_output(graph: Graph) -> None:
    node(graph, "relu").outputs[0] = graph.value("neg")


@damage("%split has an output %split that belongs elsewhere")
def exchanged_outputs(graph: Graph) -> None:
    split = node(graph, "split")
    split.outputs[0].index, split.outputs[1].index = 1, 0


@damage("%linear uses %weight, which is not a value")
def constant_without_a_name(graph: Graph) -> None:
    del graph._names["weight"]


@damage("filed under the name relu")
def wrong_name(graph: Graph) -> None:
    graph.value("relu").name = "gelu"


@damage("the constant %weight is f32.6, 3., its type says f32.6, 4.")
def constant_of_another_shape(graph: Graph) -> None:
    graph.value("weight").constant = torch.ones(6, 3)


@damage("the constant %spare is used by nobody")
def dangling_constant(graph: Graph) -> None:
    graph.constant(torch.ones(2), "spare")


@damage("uses %x before it is computed")
def input_that_is_not_listed(graph: Graph) -> None:
    graph.add_input("y", TensorType(F32, (2,)), {0: "batch"})
    del graph.inputs[0]


@damage("the free size 'batch' is the size of no input's dimension")
def free_size_that_no_input_has(graph: Graph) -> None:
    x = graph.value("x")
    x.free = {}
    x.types = (x.types[0], x.types[0])


@damage("an input is listed twice")
def input_listed_twice(graph: Graph) -> None:
    graph.inputs.append(graph.inputs[0])


@damage("%weight is listed as an input and is none")
def constant_as_an_input(graph: Graph) -> None:
    graph.inputs.append(graph.value("weight"))


@damage("the input %x should be f32.2, 4. / f32.5, 4.")
def input_that_ignores_its_free_size(graph: Graph) -> None:
    x = graph.value("x")
    x.types = (x.types[0], x.types[0])


@damage("%forgotten has a name in the graph and no place")
def value_without_a_place(graph: Graph) -> None:
    forgotten = Node(graph, resolve("aten.neg"), {}, [], Origin())
    types = graph.value("relu").types
    graph._names["forgotten"] = Value(graph, "forgotten", types, producer=forgotten)


@damage("the graph returns %gone, which nothing computes")
def output_that_is_gone(graph: Graph) -> None:
    gone = Value(graph, "gone", graph.value("neg").types)
    graph._outputs[0] = gone


@damage("violate the guard batch >= 2")
def example_beyond_its_guard(graph: Graph) -> None:
    graph.sizes["batch"] = 1


@damage("violate the guard batch < 5")
def guard_against_the_other_sizes(graph: Graph) -> None:
    graph.guards = (*graph.guards, "batch < 5")


@damage("the model takes 2 tensors, the graph 1")
def another_interface(graph: Graph) -> None:
    _, arguments = pytree.tree_flatten(((0, 0), {}))
    _, results = pytree.tree_flatten([0, 0, 0])
    graph.interface = Interface(arguments, (TENSOR, TENSOR), results)


@damage("the model returns 2 leaves, the graph 3")
def another_result(graph: Graph) -> None:
    _, arguments = pytree.tree_flatten(((0,), {}))
    _, results = pytree.tree_flatten([0, 0])
    graph.interface = Interface(arguments, (TENSOR,), results)


def test_the_undamaged_graph_is_valid():
    chain().verify()


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_noticed(name: str):
    function, message = DAMAGES[name]
    graph = chain()
    function(graph)
    with pytest.raises(GraphError, match=message):
        graph.verify()


def test_a_scalars_value_counts():
    graph = Graph()
    x = graph.add_input("x", TensorType(F32, (2, 4)))
    size = graph.add("aten.sym_size.int", x, 1)
    graph.set_outputs([size])
    size.types = (ScalarType(5),)
    with pytest.raises(GraphError, match="%sym_size should have the types int=4"):
        graph.verify()


def test_the_error_shows_where():
    graph = chain()
    value = graph.value("relu")
    value.types = (TensorType(F32, (1,)), TensorType(F32, (1,)))
    with pytest.raises(GraphError) as caught:
        graph.verify()
    (note,) = caught.value.__notes__
    assert note.splitlines() == [
        "    %linear: f32[2, 6] = aten.linear(%x, %weight)",
        "--> %relu: f32[1] = aten.relu(%linear)",
        "    %neg: f32[2, 6] = aten.neg(%relu)",
        "    %split: f32[2, 4], %split_1: f32[2, 2] = aten.split.Tensor(%neg, 4, 1)",
    ]
