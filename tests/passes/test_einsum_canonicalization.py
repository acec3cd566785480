"""Einstein sums as matrix products."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from pass_support import Net, assert_applies, assert_declines, ops

from graphopt.ir import Graph, TensorType
from graphopt.passes import einsum_canonicalization
from graphopt.passes.attention_canonicalization import CanonicalizeAttention
from graphopt.passes.einsum_canonicalization import CanonicalizeEinsum
from graphopt.pipeline import Pipeline

RULE = einsum_canonicalization._einsum
SIZES = {"b": 2, "h": 3, "i": 4, "j": 5, "k": 6}


def _graph(equation: str) -> Graph:
    """The einsum of two inputs; the size of the index b is free."""
    graph = Graph({"b": 2} if "b" in equation else {})
    for name, term in zip("xy", equation.partition("->")[0].split(","), strict=True):
        indices = term.strip(".")
        kind = TensorType(torch.float32, tuple(SIZES[index] for index in indices))
        free = {position: "b" for position, index in enumerate(indices) if index == "b"}
        graph.add_input(name, kind, free)
    graph.set_outputs([graph.add("aten.einsum", equation, list(graph.inputs))])
    return graph


def test_golden():
    graph = Graph.from_text("""
    graph(%x: f32[batch=2, 3, 4], %y: f32[batch=2, 5, 4]) {
      %einsum: f32[5, 3, 2] = aten.einsum("B I D, B J D -> J I B", [%x, %y])  # e
      return %einsum
    }
    """)
    Pipeline([CanonicalizeEinsum()]).run(graph)
    assert (
        graph.to_text()
        == """\
graph(%x: f32[batch=2, 3, 4], %y: f32[batch=2, 5, 4]) {
  %transpose: f32[2, 4, 5] = aten.transpose.int(%y, -2, -1)  # e by canonicalize-einsum
  %matmul: f32[2, 3, 5] = aten.matmul(%x, %transpose)  # e by canonicalize-einsum
  %einsum: f32[5, 3, 2] = aten.permute(%matmul, [2, 1, 0])  # e by canonicalize-einsum
  return %einsum
}"""
    )


@pytest.mark.parametrize("result", ["".join(p) for p in permutations("bij")])
@pytest.mark.parametrize("second", ["".join(p) for p in permutations("bjk")])
@pytest.mark.parametrize("first", ["bik", "kbi"])
def test_every_order(first, second, result):
    graph = _graph(f"{first},{second}->{result}")
    assert "matmul" in ops(assert_applies(graph, CanonicalizeEinsum(), tolerance=1e-12))


@pytest.mark.parametrize("equation", ["ik,kj->ij", "bhik,bhjk->bhij", "hbik,bhkj->bhij"])
def test_any_number_of_batch_dimensions(equation):
    assert "matmul" in ops(assert_applies(_graph(equation), CanonicalizeEinsum(), tolerance=1e-12))


def test_attention_by_einsum():
    net = Net(3, 4, 6)
    key, weighed = net.input("key", 3, 5, 6), net.input("value", 3, 5, 7)
    scores = net("aten.einsum", "b h i d, b h j d -> b h i j", [net.x, key])
    weights = net("aten.softmax.int", scores, -1)
    graph = net.done(net("aten.einsum", "b h i j, b h j d -> b h i d", [weights, weighed]))
    assert_applies(graph, CanonicalizeEinsum(), CanonicalizeAttention(), tolerance=1e-12)
    assert ops(graph) == ["scaled_dot_product_attention"]


@pytest.mark.parametrize(
    ("equation", "reason"),
    [
        ("bii,bij->bij", "repeated within one operand"),
        ("bik,bj->bij", "summed on its own"),
        ("bik,bik->bik", "sums over ''"),
        ("bi,bj->bij", "sums over ''"),
        ("bik,bk->bi", "columns ''"),
        ("bihk,bjhk->bij", "sums over 'hk'"),
        ("bik,bjk", "no result"),
        ("...ik,...kj->...ij", "an ellipsis"),
    ],
)
def test_declines(equation, reason):
    assert_declines(_graph(equation), CanonicalizeEinsum(), RULE, reason)


def test_declines_broadcast_sizes():
    net = Net(4, 1)
    graph = net.done(net("aten.einsum", "bik,bjk->bij", [net.x, net.input("y", 5, 6)]))
    assert_declines(graph, CanonicalizeEinsum(), RULE, "a size of 1 is broadcast")


def test_declines_integers_and_three_operands():
    net = Net(4, 6, dtype=torch.int64)
    graph = net.done(net("aten.einsum", "bik,bjk->bij", [net.x, net.input("y", 5, 6)]))
    assert_declines(graph, CanonicalizeEinsum(), RULE, "torch.int64")
    net = Net(4, 6)
    y, z = net.input("y", 6, 5), net.input("z", 5, 3)
    graph = net.done(net("aten.einsum", "bik,bkj,bjd->bid", [net.x, y, z]))
    assert_declines(graph, CanonicalizeEinsum(), RULE, "not a list of 2")
