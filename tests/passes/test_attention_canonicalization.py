"""Scaled dot-product attention written out, recognised."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from pass_support import Net, assert_applies, assert_declines, ops
from random_graphs import Case, cases, check

from graphopt.ir import Graph, Value
from graphopt.passes import attention_canonicalization
from graphopt.passes.attention_canonicalization import CanonicalizeAttention
from graphopt.pipeline import Pipeline

RULE = attention_canonicalization._attention
HEADS, LENGTH, KEYS, WIDTH, OUT = 3, 5, 7, 4, 6


class Attention(Net):
    """Inputs query [batch, 3, 5, 4], key [batch, 3, 7, 4] and value [batch, 3, 7, 6]."""

    def __init__(self, dtype: torch.dtype = torch.float32, heads: bool = True) -> None:
        outer = (HEADS,) if heads else ()
        super().__init__(*outer, LENGTH, WIDTH, dtype=dtype)
        self.query = self.x
        self.key = self.input("key", *outer, KEYS, WIDTH)
        self.value = self.input("value", *outer, KEYS, OUT)

    def scores(self, query: Value | None = None, transposed: Value | None = None) -> Value:
        if transposed is None:
            transposed = self("aten.transpose.int", self.key, -2, -1)
        return self("aten.matmul", self.query if query is None else query, transposed)

    def weigh(self, scores: Value, dim: int = -1, **kwargs: Any) -> Value:
        return self("aten.matmul", self("aten.softmax.int", scores, dim, **kwargs), self.value)

    def masked(self, mask: Value) -> Graph:
        return self.done(self.weigh(self("aten.add.Tensor", self.scores(), mask)))


def test_golden():
    graph = Graph.from_text("""
    graph(%q: f32[batch=2, 3, 4], %k: f32[batch=2, 5, 4], %v: f32[batch=2, 5, 4]) {
      %t: f32[2, 4, 5] = aten.transpose.int(%k, 1, 2)  # attention
      %s: f32[2, 3, 5] = aten.matmul(%q, %t)  # attention
      %d: f32[2, 3, 5] = aten.div.Tensor(%s, 2.0)  # attention
      %mask: f32[1, 5] = constant [[0.0, 0.0, -inf, 0.0, 1.0]]
      %m: f32[2, 3, 5] = aten.add.Tensor(%d, %mask)  # attention
      %p: f32[2, 3, 5] = aten.softmax.int(%m, -1)  # attention
      %o: f32[2, 3, 4] = aten.matmul(%p, %v)  # attention
      return %o
    }
    """)
    Pipeline([CanonicalizeAttention()]).run(graph)
    assert (
        graph.to_text()
        == """\
graph(%q: f32[batch=2, 3, 4], %k: f32[batch=2, 5, 4], %v: f32[batch=2, 5, 4]) {
  %mask: f32[1, 5] = constant [[0.0, 0.0, -inf, 0.0, 1.0]]
  %o: f32[2, 3, 4] = aten.scaled_dot_product_attention(%q, %k, %v, %mask, scale=0.5)\
  # attention by canonicalize-attention
  return %o
}"""
    )


def _mul(net: Net, x: Value, c: Any) -> Value:
    return net("aten.mul.Tensor", x, c)


def _div(net: Net, x: Value, c: Any) -> Value:
    return net("aten.div.Tensor", x, c)


def _transposed(net: Attention, key: Value) -> Value:
    return net("aten.transpose.int", key, -2, -1)


SCORES: dict[str, tuple[float, Any]] = {
    "no scale": (1.0, lambda n: n.scores()),
    "scores times": (0.5, lambda n: _mul(n, n.scores(), 0.5)),
    "scores divided": (0.5, lambda n: _div(n, n.scores(), 2)),
    "constant": (0.25, lambda n: _div(n, n.scores(), n.known(4.0))),
    "query times": (0.5, lambda n: n.scores(_mul(n, n.query, 0.5))),
    "query divided": (0.5, lambda n: n.scores(_div(n, n.query, 2.0))),
    "key times": (
        0.5, lambda n: n.scores(None, _transposed(n, _mul(n, n.key, 0.5)))),
    "transposed key times": (
        0.5, lambda n: n.scores(None, _mul(n, _transposed(n, n.key), 0.5))),
    "query and key": (
        0.5,
        lambda n: n.scores(
            _mul(n, n.query, math.sqrt(0.5)), _transposed(n, _mul(n, n.key, math.sqrt(0.5))))),
    "all": (
        0.5,
        lambda n: _div(
            n, n.scores(_mul(n, n.query, 4), _transposed(n, _div(n, n.key, 2))), 4)),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("form", SCORES)
def test_scales(form, masked, dtype):
    net = Attention(dtype)
    scale, build = SCORES[form]
    scores = build(net)
    if masked:
        scores = net("aten.add.Tensor", net.random(1, 1, LENGTH, KEYS, name="mask"), scores)
    graph = assert_applies(net.done(net.weigh(scores)), CanonicalizeAttention(), tolerance=1e-12)
    (node,) = graph.nodes
    assert node.op == "aten.scaled_dot_product_attention"
    assert node["scale"] == pytest.approx(scale, rel=1e-15)


@pytest.mark.parametrize(
    "shape",
    [(1, KEYS), (LENGTH, KEYS), (LENGTH, 1), (HEADS, 1, 1), (1, 1, 1, KEYS), (1, HEADS, LENGTH, 1)],
)
def test_masks_are_broadcast(shape):
    net = Attention()
    mask = torch.randn(shape)
    mask[..., 0] = 0.0
    if shape[-1] > 1:
        mask[..., 1] = -math.inf
    graph = net.masked(net.graph.constant(mask, "mask"))
    assert len(ops(assert_applies(graph, CanonicalizeAttention(), tolerance=1e-12))) == 1


def test_masks_made_of_conditions():
    lowest = torch.finfo(torch.float32).min
    net = Attention()
    keep = net.input("keep", 1, LENGTH, KEYS, dtype=torch.bool)
    as_float = net("aten.to.dtype", keep, torch.float32)
    mask = net("aten.mul.Tensor", net("aten.rsub.Scalar", as_float, 1.0), lowest)
    graph = assert_applies(net.masked(mask), CanonicalizeAttention(), tolerance=1e-12)
    assert ops(graph)[-1] == "scaled_dot_product_attention"
    net = Attention()
    keep = net.input("keep", 1, KEYS, dtype=torch.bool)
    mask = net("aten.where.self", keep, net.known(0.0), net.known(-1e4))
    graph = assert_applies(
        net.masked(net("aten.unsqueeze", mask, 1)), CanonicalizeAttention(), tolerance=1e-12
    )
    assert ops(graph)[-1] == "scaled_dot_product_attention"
    net = Attention()
    drop = net.input("drop", 1, LENGTH, KEYS, dtype=torch.bool)
    mask = net("aten.masked_fill.Scalar", net.known([[0.0] * KEYS] * LENGTH), drop, lowest)
    graph = assert_applies(net.masked(mask), CanonicalizeAttention(), tolerance=1e-12)
    assert ops(graph)[-1] == "scaled_dot_product_attention"


def test_key_that_comes_transposed():
    net = Attention()
    rows = net.input("rows", KEYS, HEADS, WIDTH)
    key = net("aten.permute", rows, [0, 2, 3, 1])
    graph = net.done(net.weigh(net.scores(None, key)))
    assert_applies(graph, CanonicalizeAttention(), tolerance=1e-12)
    assert ops(graph) == ["permute", "transpose", "scaled_dot_product_attention"]


def test_key_transposed_in_other_dimensions():
    net = Attention()
    net.key = net.input("other", WIDTH, HEADS, KEYS)
    transposed = net("aten.transpose.int", net.key, 1, 2)
    graph = net.done(net.weigh(net.scores(None, transposed)))
    assert_applies(graph, CanonicalizeAttention(), tolerance=1e-12)
    assert ops(graph) == ["transpose", "transpose", "scaled_dot_product_attention"]


def test_three_dimensions():
    net = Attention(heads=False)
    scores = net("aten.bmm", net.query, net("aten.transpose.int", net.key, 2, 1))
    weights = net("aten._softmax", _mul(net, scores, 0.3), 2, False)
    graph = net.done(net("aten.bmm", weights, net.value))
    assert ops(assert_applies(graph, CanonicalizeAttention(), tolerance=1e-12)) == [
        "scaled_dot_product_attention"
    ]


def test_softmax_dtype():
    net = Attention()
    graph = net.done(net.weigh(net.scores(), dtype=torch.float32))
    assert len(ops(assert_applies(graph, CanonicalizeAttention(), tolerance=1e-12))) == 1
    net = Attention()
    wide = net("aten.softmax.int", net.scores(), -1, torch.float64)
    narrow = net("aten.to.dtype", wide, torch.float32)
    graph = net.done(net("aten.matmul", narrow, net.value))
    assert_declines(graph, CanonicalizeAttention(), RULE, "softmax")


def test_large_scores():
    net = Attention()
    graph = net.done(net.weigh(_mul(net, net.scores(), 100.0)))
    assert len(ops(assert_applies(graph, CanonicalizeAttention(), tolerance=1e-12))) == 1


def _declining(name: str) -> tuple[Graph, str]:
    net = Attention()
    if name == "another dimension":
        net.value = net.input("square", HEADS, KEYS, OUT)
        return net.done(net.weigh(net.scores(), -2)), "along dimension -2"
    if name == "mask that is one row of infinities":
        mask = torch.zeros(LENGTH, KEYS)
        mask[2] = -math.inf
        return net.masked(net.graph.constant(mask)), "a row of minus infinities"
    if name == "mask with NaN":
        mask = torch.zeros(LENGTH, KEYS)
        mask[2, 1] = math.nan
        return net.masked(net.graph.constant(mask)), "NaN"
    if name == "mask with plus infinity":
        mask = torch.zeros(LENGTH, KEYS)
        mask[2, 1] = math.inf
        return net.masked(net.graph.constant(mask)), "NaN"
    if name == "mask from outside":
        return net.masked(net.input("mask", 1, LENGTH, KEYS)), "may have a row"
    if name == "mask filled with infinity":
        drop = net.input("drop", 1, LENGTH, KEYS, dtype=torch.bool)
        mask = net("aten.masked_fill.Scalar", net.known([[0.0]]), drop, -math.inf)
        return net.masked(mask), "may have a row"
    if name == "mask that overflows":
        mask = net("aten.to.dtype", net.input("m", 1, 1, KEYS, dtype=torch.bool), torch.float32)
        mask = _mul(net, net("aten.add.Tensor", mask, 1), torch.finfo(torch.float32).min)
        return net.masked(mask), "may have a row"
    if name == "mask of one dimension":
        return net.masked(net.random(KEYS)), "is no mask"
    if name == "mask that enlarges":
        return net.masked(net.random(2, 1, HEADS, LENGTH, KEYS)), "larger"
    if name == "mask of integers":
        return net.masked(net.known([[1] * KEYS], dtype=torch.int64)), "is no mask"
    if name == "number as mask":
        return net.masked(1.0), "is not a value"
    if name == "mask before the scale":
        scores = net("aten.add.Tensor", net.scores(), net.random(1, KEYS))
        return net.done(net.weigh(_mul(net, scores, 0.5))), "is aten.add.Tensor, not"
    if name == "scale per head":
        return net.done(net.weigh(_mul(net, net.scores(), net.random(HEADS, 1, 1)))), "not"
    if name == "negative scale":
        return net.done(net.weigh(_mul(net, net.scores(), -0.5))), "the scale -0.5"
    if name == "scale of nothing":
        return net.done(net.weigh(_mul(net, net.scores(), 0.0))), "the scale 0.0"
    if name == "infinite scale":
        return net.done(net.weigh(_div(net, net.scores(), 0.0))), "the scale nan"
    if name == "shared key":
        key = net("aten.select.int", net.key, 1, 0)
        transposed = net("aten.unsqueeze", net("aten.transpose.int", key, -2, -1), 1)
        return net.done(net.weigh(net.scores(None, transposed))), "no common leading"
    if name == "matrices":
        net = Net(4)
        other = net.random(3, 4)
        scores = net("aten.matmul", net.x, net("aten.transpose.int", other, 0, 1))
        y = net("aten.matmul", net("aten.softmax.int", scores, -1), other)
        return net.done(y), "no common leading"
    if name == "half precision":
        net = Attention(torch.float16)
        return net.done(net.weigh(net.scores())), "torch.float16"
    if name == "weights are returned":
        y = net.weigh(net.scores())
        (weights,) = (node for node in net.graph.nodes if node.op == "aten.softmax.int")
        return net.done(y, weights.output), "output of the graph"
    assert name == "dropout that is active"
    weights = net("aten.dropout", net("aten.softmax.int", net.scores(), -1), 0.1, True)
    return net.done(net("aten.matmul", weights, net.value)), "aten.softmax.int"


@pytest.mark.parametrize(
    "name",
    [
        "mask that is one row of infinities", "mask with NaN",
        "mask with plus infinity", "mask from outside", "mask filled with infinity",
        "mask that overflows", "mask of one dimension", "mask that enlarges", "mask of integers",
        "number as mask", "mask before the scale", "scale per head", "negative scale",
        "scale of nothing", "infinite scale", "shared key", "matrices", "half precision",
        "weights are returned", "dropout that is active", "another dimension",
    ],
)  # fmt: skip
def test_declines(name):
    graph, reason = _declining(name)
    assert_declines(graph, CanonicalizeAttention(), RULE, reason)


@settings(max_examples=60)
@given(cases(["attention"]))
def test_random_graphs(case: Case):
    after = case.graph.clone()
    Pipeline([CanonicalizeAttention()]).run(after)
    check(case.graph, after, case.inputs)
