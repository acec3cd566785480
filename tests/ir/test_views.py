"""The networkx view."""

from __future__ import annotations

import networkx
import torch

from graphopt.ir import Graph, TensorType


def test_every_use_is_an_edge():
    graph = Graph()
    x = graph.add_input("x", TensorType(torch.float32, (2, 3)))
    weight = graph.constant(torch.ones(4, 3), "weight")
    linear = graph.add("aten.linear", x, weight)
    doubled = graph.add("aten.add.Tensor", linear, linear)
    graph.set_outputs([doubled, linear, 1, x])
    view = graph.to_networkx()
    assert isinstance(view, networkx.MultiDiGraph)
    assert set(view.nodes) == {x, weight, *graph.nodes, "outputs"}
    edges = [(a, b, data["value"].name, data["operand"]) for a, b, data in view.edges(data=True)]
    first, second = graph.nodes
    assert edges == [
        (x, first, "x", "input"),
        (x, "outputs", "x", "outputs"),
        (weight, first, "weight", "weight"),
        (first, second, "linear", "self"),
        (first, second, "linear", "other"),
        (first, "outputs", "linear", "outputs"),
        (second, "outputs", "add", "outputs"),
    ]


def test_items_of_a_list_are_edges_of_their_own():
    graph = Graph()
    x = graph.add_input("x", TensorType(torch.float32, (2, 3)))
    y = graph.add("aten.relu", x)
    graph.add("aten.cat", [x, y, x], 1)
    view = graph.to_networkx()
    cat = graph.nodes[1]
    assert view.number_of_edges(x, cat) == 2
    assert view.number_of_edges(y.producer, cat) == 1


def test_questions_of_structure():
    graph = Graph()
    x = graph.add_input("x", TensorType(torch.float32, (2, 4)))
    parts = graph.add_node("aten.split.Tensor", x, 2, 1)
    left = graph.add("aten.relu", parts.outputs[0])
    right = graph.add("aten.neg", parts.outputs[1])
    joined = graph.add("aten.cat", [left, right], 1)
    graph.set_outputs([joined])
    view = graph.to_networkx()
    assert networkx.is_directed_acyclic_graph(view)
    split, relu, neg, cat = graph.nodes
    assert networkx.descendants(view, relu) == {cat, "outputs"}
    dominators = networkx.immediate_dominators(view, x)
    assert dominators[cat] is split
    waves = [set(wave) for wave in networkx.topological_generations(view)]
    assert waves == [{x}, {split}, {relu, neg}, {cat}, {"outputs"}]


def test_the_view_is_a_copy():
    graph = Graph()
    x = graph.add_input("x", TensorType(torch.float32, (2,)))
    graph.set_outputs([graph.add("aten.relu", x)])
    graph.to_networkx().clear()
    graph.verify()
    assert len(graph) == 1
