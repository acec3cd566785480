"""Multiplications by a constant matrix as linear layers."""

from __future__ import annotations

import pytest
import torch
from pass_support import Net, assert_applies, assert_declines, ops

from graphopt.ir import Graph
from graphopt.passes import linear_canonicalization
from graphopt.passes.linear_canonicalization import CanonicalizeLinear
from graphopt.pipeline import Pipeline

MATMUL, ADDMM = linear_canonicalization._matmul, linear_canonicalization._addmm


def test_golden():
    graph = Graph.from_text("""
    graph(%x: f32[batch=2, 2]) {
      %fc.bias: f32[3] = parameter [7.0, 8.0, 9.0]
      %fc.weight: f32[2, 3] = parameter [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
      %y: f32[2, 3] = aten.addmm(%fc.bias, %x, %fc.weight)  # fc
      return %y
    }
    """)
    Pipeline([CanonicalizeLinear()]).run(graph)
    assert (
        graph.to_text()
        == """\
graph(%x: f32[batch=2, 2]) {
  %fc.weight: f32[3, 2] = parameter [[1.0, 4.0], [2.0, 5.0], [3.0, 6.0]]
  %fc.bias: f32[3] = parameter [7.0, 8.0, 9.0]
  %y: f32[2, 3] = aten.linear(%x, %fc.weight, %fc.bias)  # fc by canonicalize-linear
  return %y
}"""
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
def test_matmul(shape, dtype):
    net = Net(*shape, dtype=dtype)
    graph = net.done(net("aten.matmul", net.x, net.random(5, 4)))
    assert ops(assert_applies(graph, CanonicalizeLinear(), tolerance=1e-12)) == ["linear"]


def test_mm():
    net = Net(5)
    graph = net.done(net("aten.mm", net.x, net.random(5, 4)))
    assert ops(assert_applies(graph, CanonicalizeLinear(), tolerance=1e-12)) == ["linear"]


def test_a_vector():
    graph = Graph()
    net = Net(1)
    net.graph, net.x = graph, graph.add_input("x", net.random(5).type)
    graph = net.done(net("aten.matmul", net.x, net.random(5, 4)))
    assert ops(assert_applies(graph, CanonicalizeLinear(), tolerance=1e-12)) == ["linear"]


def test_a_computed_bias():
    net = Net(5)
    bias = net("aten.sin", net.graph.add_input("b", net.random(4).type))
    graph = net.done(net("aten.addmm", bias, net.x, net.random(5, 4)))
    assert ops(assert_applies(graph, CanonicalizeLinear(), tolerance=1e-12)) == ["sin", "linear"]


def _declining(name: str) -> tuple[Graph, object, str]:
    net = Net(5)
    weight, bias = net.random(5, 4), net.random(4)
    if name == "several matrices":
        net = Net(3, 5)
        return net.done(net("aten.matmul", net.x, net.random(1, 5, 4))), MATMUL, "3 dimensions"
    if name == "vector":
        return net.done(net("aten.matmul", net.x, net.random(5))), MATMUL, "1 dimensions"
    if name == "computed matrix":
        y = net("aten.matmul", net.x, net.graph.add_input("w", weight.type))
        return net.done(y), MATMUL, "is not a constant"
    if name == "constant on the left":
        y = net("aten.transpose.int", net.x, 0, 1)
        y = net("aten.matmul", net.random(3, 5), y)
        return net.done(y), MATMUL, "is not a constant"
    if name == "two constants":
        y = net("aten.matmul", net.random(3, 5), weight)
        return net.done(y), MATMUL, "is a constant too"
    if name == "tied":
        y = net("aten.matmul", net.x, weight)
        return net.done(y, net("aten.sin", weight)), MATMUL, "has 2 users"
    if name == "output":
        return net.done(net("aten.matmul", net.x, weight), weight), MATMUL, "output of the graph"
    if name == "integers":
        net = Net(5, dtype=torch.int64)
        y = net("aten.matmul", net.x, net.known([[1], [2], [3], [4], [5]]))
        return net.done(y), MATMUL, "computes in torch.int64"
    if name == "matrix as bias":
        return net.done(net("aten.addmm", net.random(1, 4), net.x, weight)), ADDMM, "per column"
    if name == "one number as bias":
        return net.done(net("aten.addmm", net.random(1), net.x, weight)), ADDMM, "per column"
    assert name == "scaled"
    return net.done(net("aten.addmm", bias, net.x, weight, beta=2)), ADDMM, "has beta=2"


@pytest.mark.parametrize(
    "name",
    [
        "several matrices", "vector", "computed matrix", "constant on the left",
        "two constants", "tied", "output", "integers", "matrix as bias",
        "one number as bias", "scaled",
    ],
)  # fmt: skip
def test_declines(name):
    graph, rule, reason = _declining(name)
    assert_declines(graph, CanonicalizeLinear(), rule, reason)
