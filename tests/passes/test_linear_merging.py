"""Linear layers that share their input, merged."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from pass_support import Net, assert_applies, assert_declines, ops
from random_graphs import Case, cases, check

from graphopt.ir import Graph
from graphopt.passes import linear_merging
from graphopt.passes.linear_merging import MergeLinears
from graphopt.pipeline import Pipeline

RULE = linear_merging._merge


def test_golden():
    graph = Graph.from_text("""
    graph(%x: f32[batch=2, 2]) {
      %attention.query.weight: f32[1, 2] = parameter [[1.0, 2.0]]
      %attention.query.bias: f32[1] = parameter [3.0]
      %query: f32[2, 1] = aten.linear(%x, %attention.query.weight, %attention.query.bias)  # query
      %relu: f32[2, 1] = aten.relu(%query)
      %attention.key.weight: f32[2, 2] = parameter [[4.0, 5.0], [6.0, 7.0]]
      %key: f32[2, 2] = aten.linear(%x, %attention.key.weight)
      return %relu, %key
    }
    """)
    Pipeline([MergeLinears()]).run(graph)
    assert (
        graph.to_text()
        == """\
graph(%x: f32[batch=2, 2]) {
  %attention.query_key.weight: f32[3, 2] = parameter [[1.0, 2.0], [4.0, 5.0], [6.0, 7.0]]
  %attention.query_key.bias: f32[3] = parameter [3.0, 0.0, 0.0]
  %linear: f32[2, 3] = aten.linear(%x, %attention.query_key.weight, %attention.query_key.bias)\
  # query by merge-linears
  %query: f32[2, 1], %key: f32[2, 2] = \
aten.split_with_sizes(%linear, [1, 2], 1)  # query by merge-linears
  %relu: f32[2, 1] = aten.relu(%query)
  return %relu, %key
}"""
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "biases", [(True, True, True), (False, True, False), (False, False, False)]
)
@pytest.mark.parametrize("shape", [(5,), (4, 5), (3, 4, 5)])
def test_query_key_value(shape, biases, dtype):
    net = Net(*shape, dtype=dtype)
    outputs = [
        net("aten.relu", net.linear(net.x, out, bias=bias, name=f"m.{name}"))
        for out, bias, name in zip((4, 1, 6), biases, "qkv", strict=True)
    ]
    graph = assert_applies(net.done(*outputs), MergeLinears())
    assert ops(graph) == ["linear", "split_with_sizes", "relu", "relu", "relu"]
    assert graph.nodes[0]["weight"].name == "m.q_k_v.weight"
    assert (graph.nodes[0]["bias"] is not None) == any(biases)


def test_a_vector():
    graph = Graph()
    net = Net(1)
    net.graph, net.x = graph, graph.add_input("x", net.random(5).type)
    graph = net.done(net.linear(net.x, 2), net.linear(net.x, 3))
    assert ops(assert_applies(graph, MergeLinears())) == ["linear", "split_with_sizes"]


def test_two_groups_and_a_use_between():
    net = Net(5)
    first = net.linear(net.x, 5)
    y = net("aten.relu", first)
    a, b, c = net.linear(y, 2), net.linear(net.x, 3), net.linear(y, 4)
    graph = assert_applies(net.done(a, b, c), MergeLinears())
    assert ops(graph) == ["linear", "split_with_sizes", "relu", "linear", "split_with_sizes"]


def test_what_cannot_be_merged_stays_beside_the_others():
    net = Net(5)
    weight = net.graph.add_input("w", net.random(2, 5).type)
    outputs = [net("aten.linear", net.x, weight), net.linear(net.x, 3), net.linear(net.x, 4)]
    graph = assert_applies(net.done(*outputs), MergeLinears())
    assert ops(graph) == ["linear", "linear", "split_with_sizes"]


def test_declines_tied_weights():
    net = Net(5)
    weight = net.random(5, 5, name="weight")
    y = net("aten.linear", net.x, weight)
    y = net("aten.add.Tensor", y, net.linear(net.x, 5))
    graph = net.done(net("aten.linear", y, weight))
    assert_declines(graph, MergeLinears(), RULE, "no other linear layer|other users")


def test_declines_tied_biases():
    net = Net(5)
    bias = net.random(5, name="bias")
    outputs = [net("aten.linear", net.x, net.random(5, 5), bias) for _ in range(2)]
    assert_declines(net.done(*outputs), MergeLinears(), RULE, "%bias has other users")


def test_declines_different_inputs():
    net = Net(5)
    y = net("aten.relu", net.x)
    graph = net.done(net.linear(net.x, 2), net.linear(y, 2))
    assert_declines(graph, MergeLinears(), RULE, "no other linear layer reads %x")


def test_declines_computed_weights():
    net = Net(5)
    weights = [net.graph.add_input(n, net.random(2, 5).type) for n in "vw"]
    graph = net.done(*(net("aten.linear", net.x, weight) for weight in weights))
    assert_declines(graph, MergeLinears(), RULE, "is not a constant")


def test_a_convolution_of_the_same_input_is_none():
    net = Net(5, 6)
    graph = net.done(net.linear(net.x, 2), net.convolution(net.x, 3))
    assert_declines(graph, MergeLinears(), RULE, "no other linear layer")


@settings(max_examples=40)
@given(cases(["parallel_linears", "linear", "unary"]))
def test_random_graphs(case: Case):
    after = case.graph.clone()
    Pipeline([MergeLinears()]).run(after)
    check(case.graph, after, case.inputs)
