"""The graph's methods: building, changing, refusing, and going back."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_graphs import Case, cases

from graphopt.errors import GraphError
from graphopt.ir import Graph, Node, Origin, ScalarType, TensorType, Value

F32 = torch.float32


def small() -> Graph:
    """conv -> relu, and relu + relu; both returned."""
    graph = Graph({"batch": 2})
    x = graph.add_input("x", TensorType(F32, (2, 3, 8, 8)), {0: "batch"})
    weight = graph.constant(torch.ones(4, 3, 3, 3), "conv.weight", trainable=True)
    conv = graph.add("aten.conv2d", x, weight, padding=[1, 1])
    relu = graph.add("aten.relu", conv)
    graph.set_outputs([relu, graph.add("aten.add.Tensor", relu, relu)])
    return graph


def node_of(value: Value) -> Node:
    assert value.producer is not None
    return value.producer


def state(graph: Graph) -> tuple:
    """All of a graph that a reader can see."""
    users = {v.name: {id(user) for user in v.users} for v in graph.values}
    types = {v.name: v.types for v in graph.values}
    nodes = [(id(n), n.op, str(n.operands), [id(v) for v in n.outputs]) for n in graph.nodes]
    constants = {v.name: id(v.constant) for v in graph.constants}
    order = [v.name for v in graph.values]
    return graph.to_text(), users, types, nodes, constants, graph.version, graph.outputs, order


# -- building -----------------------------------------------------------------------------------


def test_reading():
    graph = small()
    assert [node.op for node in graph.nodes] == ["aten.conv2d", "aten.relu", "aten.add.Tensor"]
    assert [v.name for v in graph.values] == ["x", "conv.weight", "conv2d", "relu", "add"]
    assert [v.name for v in graph.constants] == ["conv.weight"]
    assert len(graph) == 3
    conv, relu, add = graph.nodes
    assert graph.value("relu") is relu.output
    assert conv["weight"] is graph.value("conv.weight")
    assert conv["stride"] == [1, 1]
    assert conv["bias"] is None
    assert relu.output.users == {add: None}
    assert relu.output.only_user() is None  # an output has the caller as a user
    assert conv.output.only_user() is relu
    assert [v.name for v in add.input_values()] == ["relu", "relu"]
    assert conv.before(relu)
    assert not relu.before(conv)
    assert conv in graph
    assert conv not in small()
    graph.verify()


def test_types_under_both_assignments():
    graph = small()
    conv = graph.value("conv2d")
    assert conv.type == TensorType(F32, (2, 4, 8, 8))
    assert conv.types[1] == TensorType(F32, (5, 4, 8, 8))
    assert (conv.shape, conv.rank, conv.dtype) == ((2, 4, 8, 8), 4, F32)
    assert [conv.fixed_size(d) for d in range(4)] == [None, 4, 8, 8]
    assert conv.fixed_size(-1) == 8


def test_types_under_other_sizes():
    graph = small()
    assert graph.types_under({"batch": 7})[graph.value("add")] == TensorType(F32, (7, 4, 8, 8))
    assert graph.types_under({"batch": 2}) == {value: value.type for value in graph.values}
    guarded = Graph({"batch": 4}, ["batch % 2 == 0"])
    guarded.add_input("x", TensorType(F32, (4,)), {0: "batch"})
    with pytest.raises(GraphError, match="violate the guard batch % 2 == 0"):
        guarded.types_under({"batch": 3})


def test_sizes_are_scalars():
    graph = Graph({"batch": 2})
    x = graph.add_input("x", TensorType(F32, (2, 3)), {0: "batch"})
    size = graph.add("aten.sym_size.int", x, 0)
    assert size.types == (ScalarType(2), ScalarType(5))
    assert not size.is_tensor
    assert size.fixed_size(0) is None
    for read in (lambda: size.shape, lambda: size.dtype, lambda: size.rank):
        with pytest.raises(GraphError, match="%sym_size is a int, not a tensor"):
            read()
    flat = graph.add("aten.reshape", x, [graph.add("operator.mul", size, 3)])
    assert flat.types == (TensorType(F32, (6,)), TensorType(F32, (15,)))


def test_inputs_of_every_kind():
    graph = Graph({"batch": 4, "tokens": 3})
    both = graph.add_input("x", TensorType(F32, (8, 3)), {0: "2*batch", 1: "tokens"})
    number = graph.add_input("n", ScalarType(3))
    assert both.types[1].shape == (10, graph.assignments[1]["tokens"])
    assert number.types == (ScalarType(3), ScalarType(3))
    assert both.is_input
    assert not both.is_constant
    with pytest.raises(GraphError, match="does not fit the example's sizes"):
        graph.add_input("y", TensorType(F32, (5,)), {0: "batch"})
    with pytest.raises(GraphError, match="names 'batsch'"):
        graph.add_input("y", TensorType(F32, (4,)), {0: "batsch"})
    assert graph.inputs == [both, number]


def test_graphs_without_another_assignment():
    assert Graph().assignments == ({},)
    assert Graph({"batch": 4}, ["batch == 4"]).assignments == ({"batch": 4},)
    with pytest.raises(GraphError, match="violate the guard"):
        Graph({"batch": 4}, ["batch == 5"])


def test_names_are_unique_and_given_once():
    graph = Graph()
    x = graph.add_input("x", TensorType(F32, (2,)))
    names = [graph.add("aten.relu", x).name for _ in range(3)]
    assert names == ["relu", "relu_1", "relu_2"]
    graph.erase(graph.nodes[1])
    assert graph.add("aten.relu", x).name == "relu_3"
    assert graph.add("aten.relu", x, name="x").name == "x_1"
    with pytest.raises(GraphError, match="no value %nothing"):
        graph.value("nothing")


def test_constants_alias_their_source():
    graph = Graph()
    source = torch.nn.Parameter(torch.ones(3))
    value = graph.constant(source, "w", trainable=True)
    assert value.constant is not None
    assert value.constant.data_ptr() == source.data_ptr()
    assert not value.constant.requires_grad
    assert value.is_constant
    assert value.trainable


@pytest.mark.parametrize("wrong", [1.0, None, [1, 2]])
def test_constants_are_tensors(wrong):
    with pytest.raises(GraphError, match=r"the constant %w is a \w+, not a tensor"):
        Graph().constant(wrong, "w")
    with pytest.raises(GraphError, match="only dense tensors"):
        Graph().constant(torch.ones(3).to_sparse(), "w")


def test_several_results():
    graph = Graph()
    x = graph.add_input("x", TensorType(F32, (5, 2)))
    before = state(graph)
    with pytest.raises(GraphError, match="has 3 outputs"):
        graph.add("aten.split.Tensor", x, 2)
    assert state(graph)[:-2] == before[:-2]
    node = graph.add_node("aten.split.Tensor", x, 2)
    assert [v.shape for v in node.outputs] == [(2, 2), (2, 2), (1, 2)]
    assert [(v.producer, v.index) for v in node.outputs] == [(node, 0), (node, 1), (node, 2)]


def test_a_node_without_results():
    graph = Graph()
    x = graph.add_input("x", TensorType(F32, (2,)))
    node = graph.add_node("aten._assert_tensor_metadata", x, dtype=F32)
    assert node.outputs == []
    assert node.name == node.op
    graph.verify()
    graph.erase(node)
    assert not x.users


def test_insertion_places():
    graph = small()
    conv, relu, add = graph.nodes
    graph.add("aten.neg", conv.output, before=relu)
    with graph.inserting(add) as added:
        graph.add("aten.abs", relu.output)
        graph.add("aten.exp", relu.output)
    names = [node.op.split(".")[1] for node in graph.nodes]
    assert names == ["conv2d", "neg", "relu", "abs", "exp", "add"]
    assert [node.op for node in added] == ["aten.abs", "aten.exp"]
    graph.verify()


def test_a_thousand_insertions_at_one_place():
    """Order keys run out of precision after some fifty, and are made anew."""
    graph = small()
    conv, relu, _ = graph.nodes
    inserted = [graph.add("aten.neg", conv.output, before=relu).producer for _ in range(1000)]
    assert graph.nodes[1:-2] == inserted
    graph.verify()


def test_origins():
    graph = small()
    with graph.making("fold"):
        made = graph.add("aten.neg", graph.value("relu"))
    given_ = graph.add("aten.neg", made, origin=Origin("layer1.0", "ReLU"))
    assert made.producer.origin == Origin(made_by="fold")
    assert str(given_.producer.origin) == "layer1.0"
    assert graph.made_by == ""


@pytest.mark.parametrize(
    ("op", "args", "reason"),
    [
        ("aten.relu_", ("x",), "writes to its operands"),
        ("aten.conv3", ("x",), "unknown operator"),
        ("aten.linear", ("x",), "'weight' is missing"),
        ("aten.linear", ("x", "w"), "aten.linear.* is not valid"),
        ("aten.add.Tensor", ("x", torch.ones(1)), "a tensor is no operand"),
        ("aten.add.Tensor", ("x", object()), "neither a value nor a literal"),
        ("aten.reshape", ("x", [-1, "w"]), "is not valid"),
        ("aten.reshape", ("x", [2, 2, 4]), "is not valid"),
    ],
)
def test_what_cannot_be_added(op, args, reason):
    graph = Graph({"batch": 2})
    x = graph.add_input("x", TensorType(F32, (2, 8)), {0: "batch"})
    graph.add("aten.neg", x)
    known = {"x": x, "w": graph.constant(torch.ones(3, 3), "w")}
    before = state(graph)
    operands = [known.get(a, a) if isinstance(a, str) else a for a in args]
    with pytest.raises(GraphError, match=reason):
        graph.add(op, *operands)
    assert state(graph) == before


def test_a_shape_of_the_example_is_refused_under_the_other_sizes():
    graph = Graph({"batch": 2})
    x = graph.add_input("x", TensorType(F32, (2, 6)), {0: "batch"})
    with pytest.raises(GraphError, match=r"free sizes \{'batch': 5\}"):
        graph.add("aten.reshape", x, [12])
    with pytest.raises(GraphError, match="number of results depends on a free size"):
        graph.add_node("aten.split.Tensor", x, 1)


def test_values_of_other_graphs_are_refused():
    graph, other = small(), small()
    foreign = other.value("relu")
    for attempt in (
        lambda: graph.add("aten.neg", foreign),
        lambda: graph.set_operand(graph.nodes[1], "self", foreign),
        lambda: graph.replace(graph.value("relu"), foreign),
        lambda: graph.set_outputs([foreign]),
        lambda: graph.set_constant(other.value("conv.weight"), torch.ones(4, 3, 3, 3)),
        lambda: graph.rename(foreign, "y"),
        lambda: graph.add("aten.neg", graph.value("relu"), before=other.nodes[0]),
        lambda: graph.set_operand(other.nodes[0], "padding", [0, 0]),
        lambda: graph.erase(other.nodes[-1]),
    ):
        before = state(graph), state(other)
        with pytest.raises(GraphError, match="of this graph"):
            attempt()
        assert (state(graph), state(other)) == before


# -- changing -----------------------------------------------------------------------------------


def test_setting_an_operand_moves_types_on():
    graph = Graph()
    x = graph.add_input("x", TensorType(F32, (2, 6)))
    y = graph.add("aten.reshape", x, [3, 4])
    z = graph.add("aten.neg", y)
    graph.add("aten.relu", z)
    graph.set_operand(y.producer, "shape", [4, 3])
    assert [v.shape for v in (y, z)] == [(4, 3), (4, 3)]
    assert graph.value("relu").shape == (4, 3)
    graph.verify()


def test_setting_an_operand_to_its_default_leaves_it_out():
    graph = small()
    conv = graph.nodes[0]
    graph.set_operand(conv, "dilation", [1, 1])
    assert "dilation" not in conv.operands


def test_setting_an_operand_drops_a_constant_that_only_it_used():
    graph = small()
    graph.set_operand(graph.nodes[0], "weight", graph.constant(torch.zeros(4, 3, 3, 3), "zeros"))
    assert [v.name for v in graph.constants] == ["zeros"]
    graph.verify()


@pytest.mark.parametrize(
    ("name", "operand", "reason"),
    [
        ("padding", [0, 0], "output 0 was"),
        ("groups", 2, "is not valid"),
        ("kernel", 3, "no operand 'kernel'"),
        ("input", "add", "comes after it"),
        ("weight", None, "is not valid"),
    ],
)
def test_operands_that_are_refused(name, operand, reason):
    graph = small()
    before = state(graph)
    if isinstance(operand, str):
        operand = graph.value(operand)
    with pytest.raises(GraphError, match=reason):
        graph.set_operand(graph.nodes[0], name, operand)
    assert state(graph) == before


def test_replacing():
    graph = small()
    conv, relu, add = graph.nodes
    gelu = graph.add("aten.gelu", conv.output, before=relu)
    graph.replace(relu.output, gelu)
    assert relu.output.users == {}
    assert gelu.users == {add: None}
    assert graph.outputs == (gelu, add.output)
    assert [v.name for v in add.input_values()] == ["gelu", "gelu"]
    graph.verify()
    graph.erase(relu)
    graph.verify()


def test_replacing_spares_the_producer_of_the_new_value():
    graph = small()
    relu = graph.value("relu")
    clipped = graph.add("aten.clamp_max", relu, 6.0, before=graph.nodes[2])
    graph.replace(relu, clipped)
    assert clipped.producer["self"] is relu
    assert relu.users == {clipped.producer: None}
    graph.verify()


def test_replacing_by_itself_changes_nothing():
    graph = small()
    before = state(graph)
    graph.replace(graph.value("relu"), graph.value("relu"))
    assert state(graph) == before


def test_replacing_is_refused():
    graph = small()
    conv, relu, _ = graph.nodes
    late = graph.add("aten.gelu", conv.output)
    pooled = graph.add("aten.max_pool2d", conv.output, [2, 2], before=relu)
    before = state(graph)
    with pytest.raises(GraphError, match=r"%relu cannot be replaced by %max_pool2d: f32\[2, 4, 8"):
        graph.replace(relu.output, pooled)
    with pytest.raises(GraphError, match="%add uses %gelu, which comes after it"):
        graph.replace(relu.output, late)
    assert state(graph) == before


def test_equal_shapes_of_the_example_are_not_equal_types():
    graph = Graph({"batch": 2})
    x = graph.add_input("x", TensorType(F32, (2, 2)), {0: "batch"})
    turned = graph.add("aten.transpose.int", x, 0, 1)
    graph.set_outputs([graph.add("aten.relu", turned)])
    with pytest.raises(GraphError, match=r"f32\[2, 2\] / f32\[2, 5\] is not f32\[2, 2\]"):
        graph.replace(turned, x)


def test_erasing():
    graph = small()
    relu = graph.value("relu")
    spare = graph.add("aten.conv2d", relu, graph.constant(torch.ones(1, 4, 1, 1), "spare.weight"))
    for node, reason in (
        (graph.nodes[0], "%conv2d cannot be erased: it is used by %relu"),
        (graph.nodes[2], "%add cannot be erased: the graph returns it"),
    ):
        with pytest.raises(GraphError, match=reason):
            graph.erase(node)
    graph.erase(spare.producer)
    assert [v.name for v in graph.constants] == ["conv.weight"]
    assert len(relu.users) == 1
    graph.verify()


def test_erased_nodes_are_of_no_more_use():
    graph = small()
    node = graph.add_node("aten.neg", graph.value("relu"))
    graph.erase(node)
    assert node not in graph
    before = state(graph)
    for attempt in (
        lambda: graph.erase(node),
        lambda: graph.set_operand(node, "self", graph.value("conv2d")),
        lambda: graph.add("aten.abs", graph.value("relu"), before=node),
        lambda: graph.add("aten.abs", node.output),
        lambda: graph.replace(graph.value("relu"), node.output),
    ):
        with pytest.raises(GraphError, match="of this graph"):
            attempt()
    assert state(graph) == before


def test_setting_a_constant():
    graph = small()
    weight = graph.value("conv.weight")
    zeros = torch.zeros(4, 3, 3, 3)
    graph.set_constant(weight, zeros)
    assert weight.constant is not None
    assert weight.constant.data_ptr() == zeros.data_ptr()
    before = state(graph)
    with pytest.raises(GraphError, match="output 0 was"):
        graph.set_constant(weight, torch.zeros(5, 3, 3, 3))
    with pytest.raises(GraphError, match="%x is not a constant"):
        graph.set_constant(graph.value("x"), zeros)
    with pytest.raises(GraphError, match="not a tensor"):
        graph.set_constant(weight, 0.0)
    assert state(graph) == before


def test_renaming():
    graph = small()
    relu = graph.value("relu")
    graph.rename(relu, "hidden")
    assert graph.value("hidden") is relu
    with pytest.raises(GraphError, match="cannot be named add: that name is taken"):
        graph.rename(relu, "add")
    with pytest.raises(GraphError, match="no value %relu"):
        graph.value("relu")
    graph.rename(relu, "hidden")
    assert [v.name for v in graph.values] == ["x", "conv.weight", "conv2d", "hidden", "add"]
    graph.verify()


def test_unused_constants():
    graph = small()
    graph.constant(torch.ones(2), "spare")
    with pytest.raises(GraphError, match="the constant %spare is used by nobody"):
        graph.verify()
    graph.drop_unused_constants()
    assert [v.name for v in graph.constants] == ["conv.weight"]
    graph.verify()


def test_outputs_of_every_kind():
    graph = small()
    x, weight = graph.value("x"), graph.value("conv.weight")
    other = Graph()
    other.set_outputs([1, None, 2.5, "text"])
    assert other.outputs == (1, None, 2.5, "text")
    with pytest.raises(GraphError, match="returned 2 results, now 3"):
        graph.set_outputs([x, weight, 3])
    with pytest.raises(GraphError, match="output 0 was"):
        graph.set_outputs([x, graph.value("add")])
    plain = Graph()
    y = plain.add_input("y", TensorType(F32, ()))
    kept = plain.constant(torch.ones(2), "kept")
    plain.set_outputs([y, y, kept])
    plain.drop_unused_constants()
    assert kept.is_output
    plain.verify()


class Abandon(Exception):
    """The caller's own error in an edit."""


def abandoned(graph: Graph, *steps: Callable[[Graph], object]) -> None:
    """Run steps in an edit that then fails."""

    def fail() -> None:
        with graph.edit():
            for step in steps:
                step(graph)
            raise Abandon

    with pytest.raises(Abandon):
        fail()


# -- transactions -------------------------------------------------------------------------------


def test_an_edit_may_break_types_on_the_way():
    """Fewer channels in a convolution and in the next one's weight, as channel pruning does."""
    graph = Graph()
    x = graph.add_input("x", TensorType(F32, (1, 3, 8, 8)))
    first = graph.constant(torch.ones(6, 3, 1, 1), "first")
    second = graph.constant(torch.ones(2, 6, 1, 1), "second")
    hidden = graph.add("aten.relu", graph.add("aten.conv2d", x, first))
    graph.set_outputs([graph.add("aten.conv2d", hidden, second)])
    with pytest.raises(GraphError, match="is not valid"):
        graph.set_constant(first, torch.ones(4, 3, 1, 1))
    with graph.edit():
        graph.set_constant(first, torch.ones(4, 3, 1, 1))
        graph.set_constant(second, torch.ones(2, 4, 1, 1))
    assert hidden.shape == (1, 4, 8, 8)
    graph.verify()


def test_an_edit_is_undone_by_the_callers_own_error():
    graph = small()
    before = state(graph)

    def change(graph: Graph) -> None:
        gelu = graph.add("aten.gelu", graph.value("conv2d"), before=graph.nodes[1])
        graph.replace(graph.value("relu"), gelu)
        graph.erase(graph.nodes[2])
        graph.rename(gelu, "conv")
        graph.set_constant(graph.value("conv.weight"), torch.zeros(4, 3, 3, 3))

    abandoned(graph, change)
    assert state(graph) == before
    graph.verify()


def test_an_inner_edit_is_undone_alone():
    graph = small()

    def change(graph: Graph) -> None:
        kept = graph.value("neg")
        graph.add("aten.abs", kept)
        graph.set_operand(node_of(kept), "self", graph.value("conv2d"))
        graph.rename(kept, "lost")

    with graph.edit():
        kept = graph.add("aten.neg", graph.value("relu"))
        during = state(graph)
        abandoned(graph, change)
        assert state(graph) == during
    assert kept.name == "neg"
    assert kept.users == {}
    graph.verify()


def test_versions_count_changes():
    graph = small()
    version = graph.version
    with graph.edit():
        pass
    assert graph.version == version
    with graph.edit():
        graph.add("aten.neg", graph.value("relu"))
        graph.add("aten.abs", graph.value("relu"))
    assert graph.version == version + 1


def test_an_edit_must_not_leave_the_graph_in_disorder():
    graph = small()
    before = state(graph)

    def change() -> None:
        with graph.edit():
            late = graph.add("aten.gelu", graph.value("conv2d"))
            graph.replace(graph.value("relu"), late)

    with pytest.raises(GraphError, match="which comes after it"):
        change()
    assert state(graph) == before


def test_an_edit_must_not_change_what_the_graph_returns():
    graph = small()
    before = state(graph)
    with pytest.raises(GraphError, match=r"output 1 was f32\[2, 4, 8, 8\]"), graph.edit():
        graph.set_outputs([graph.value("relu"), graph.add("aten.sum", graph.value("add"))])
    assert state(graph) == before


@st.composite
def mutations(draw: st.DrawFn, graph: Graph) -> None:
    """A few changes at random, as far as the graph lets them."""
    for _ in range(draw(st.integers(1, 8))):
        nodes, values = graph.nodes, graph.values
        node: Node = draw(st.sampled_from(nodes)) if nodes else None  # type: ignore[assignment]
        value: Value = draw(st.sampled_from(values))
        other: Value = draw(st.sampled_from(values))
        kind = draw(st.sampled_from("add insert replace operand erase constant rename".split()))
        try:
            if kind == "add":
                graph.add("aten.add.Tensor", value, other)
            elif kind == "constant":
                fresh = graph.constant(torch.ones(2))
                if value.is_constant:
                    graph.set_constant(value, torch.zeros(3))
                graph.add("aten.neg", fresh)
            elif kind == "rename":
                graph.rename(value, f"other_{value.name}")
            elif kind == "replace":
                graph.replace(value, other)
            elif node is not None and kind == "insert":
                graph.add("aten.neg", value, before=node)
            elif node is not None and kind == "operand":
                names = [n for n, o in node.operands.items() if isinstance(o, Value)]
                if names:
                    graph.set_operand(node, draw(st.sampled_from(names)), value)
            elif node is not None:
                graph.erase(node)
        except GraphError:
            continue


@settings(max_examples=150)
@given(cases(), st.data())
def test_whatever_an_edit_did_is_undone(case: Case, data: st.DataObject):
    graph = case.graph
    before = state(graph)

    def change(graph: Graph) -> None:
        data.draw(mutations(graph))

    abandoned(graph, change, lambda graph: abandoned(graph, change), change)
    assert state(graph) == before
    graph.verify()


@settings(max_examples=100)
@given(cases(), st.data())
def test_whatever_is_let_through_keeps_the_graph_valid(case: Case, data: st.DataObject):
    data.draw(mutations(case.graph))
    case.graph.drop_unused_constants()
    case.graph.verify()


# -- copies -------------------------------------------------------------------------------------


def test_clones_share_only_tensors():
    graph = small()
    before = state(graph)
    twin = graph.clone()
    twin.verify()
    assert twin.to_text() == graph.to_text()
    assert twin.value("conv.weight").constant is graph.value("conv.weight").constant
    assert twin.value("x").free == {0: "batch"}
    gelu = twin.add("aten.gelu", twin.value("conv2d"), before=twin.nodes[1])
    twin.replace(twin.value("relu"), gelu)
    twin.erase(twin.nodes[2])
    assert state(graph) == before


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda g: pickle.loads(pickle.dumps(g))])
def test_copies_of_long_graphs(duplicate):
    """Nodes are chained, which a naive pickle would follow until the stack overflows."""
    graph = small()
    value = graph.value("relu")
    for _ in range(2000):
        value = graph.add("aten.neg", value, origin=Origin("layer", "Negation", "a pass"))
    twin = duplicate(graph)
    twin.verify()
    assert twin.to_text() == graph.to_text()
    assert twin.nodes[-1].origin == Origin("layer", "Negation", "a pass")
    assert twin.value("conv.weight").trainable


def test_values_and_nodes_show_themselves():
    graph = small()
    assert repr(graph.value("relu")) == "%relu: f32[2, 4, 8, 8]"
    assert repr(graph.nodes[1]) == "%relu: f32[2, 4, 8, 8] = aten.relu(%conv2d)"
    assert str(graph) == graph.to_text()
    with pytest.raises(GraphError, match="has no operand 'weights'"):
        graph.nodes[0]["weights"]
