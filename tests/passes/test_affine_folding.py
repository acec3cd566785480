"""Arithmetic with a constant per channel into the layer before or after it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from pass_support import Net, assert_applies, assert_declines, ops
from random_graphs import Case, cases, check

from graphopt.ir import Graph
from graphopt.passes import affine_folding
from graphopt.passes.affine_folding import FoldChannelAffine
from graphopt.pipeline import Pipeline

BEFORE, AFTER = affine_folding._into_producer, affine_folding._into_consumers


def test_golden_before():
    graph = Graph.from_text("""
    graph(%x: f32[batch=2, 2]) {
      %fc.weight: f32[2, 2] = parameter [[1.0, 2.0], [3.0, 4.0]]
      %fc.bias: f32[2] = parameter [5.0, 6.0]
      %linear: f32[2, 2] = aten.linear(%x, %fc.weight, %fc.bias)  # fc
      %gamma: f32[2] = parameter [2.0, -1.0]
      %mul: f32[2, 2] = aten.mul.Tensor(%gamma, %linear)
      %sub: f32[2, 2] = aten.sub.Tensor(%mul, 1.5, alpha=2)
      return %sub
    }
    """)
    Pipeline([FoldChannelAffine()]).run(graph)
    assert (
        graph.to_text()
        == """\
graph(%x: f32[batch=2, 2]) {
  %fc.weight: f32[2, 2] = parameter [[2.0, 4.0], [-3.0, -4.0]]
  %fc.bias: f32[2] = parameter [7.0, -9.0]
  %linear: f32[2, 2] = aten.linear(%x, %fc.weight, %fc.bias)  # fc
  return %linear
}"""
    )


def test_golden_after():
    graph = Graph.from_text("""
    graph(%x: f32[batch=2, 2, 3, 3]) {
      %mean: f32[2, 1, 1] = constant [[[1.0]], [[2.0]]]
      %sub: f32[2, 2, 3, 3] = aten.sub.Tensor(%x, %mean)
      %std: f32[2, 1, 1] = constant [[[0.5]], [[0.25]]]
      %div: f32[2, 2, 3, 3] = aten.div.Tensor(%sub, %std)
      %weight: f32[1, 2, 1, 1] = parameter [[[[3.0]], [[4.0]]]]
      %conv2d: f32[2, 1, 3, 3] = aten.conv2d(%div, %weight)
      return %conv2d
    }
    """)
    Pipeline([FoldChannelAffine()]).run(graph)
    assert (
        graph.to_text()
        == """\
graph(%x: f32[batch=2, 2, 3, 3]) {
  %weight: f32[1, 2, 1, 1] = parameter [[[[6.0]], [[16.0]]]]
  %bias: f32[1] = parameter [-38.0]
  %conv2d: f32[2, 1, 3, 3] = aten.conv2d(%x, %weight, %bias)
  return %conv2d
}"""
    )


ARITHMETIC = {
    "mul": lambda net, y, c: net("aten.mul.Tensor", y, c),
    "constant * x": lambda net, y, c: net("aten.mul.Tensor", c, y),
    "div": lambda net, y, c: net("aten.div.Tensor", y, c),
    "add": lambda net, y, c: net("aten.add.Tensor", y, c),
    "add alpha": lambda net, y, c: net("aten.add.Tensor", y, c, alpha=3),
    "constant + alpha * x": lambda net, y, c: net("aten.add.Tensor", c, y, alpha=-0.5),
    "sub": lambda net, y, c: net("aten.sub.Tensor", y, c, alpha=2),
    "constant - alpha * x": lambda net, y, c: net("aten.sub.Tensor", c, y, alpha=2),
    "rsub": lambda net, y, c: net("aten.rsub.Tensor", y, c, alpha=3),
    "x - alpha * constant": lambda net, y, c: net("aten.rsub.Tensor", c, y, alpha=3),
    "neg": lambda net, y, c: net("aten.neg", y),
    "mul number": lambda net, y, c: net("aten.mul.Tensor", y, 3),
    "number - x": lambda net, y, c: net("aten.rsub.Scalar", y, 1.5, alpha=2),
    "add Scalar": lambda net, y, c: net("aten.add.Scalar", y, 1.5, 2),
    "div Scalar": lambda net, y, c: net("aten.div.Scalar", y, -4),
    "addcmul": lambda net, y, c: net("aten.addcmul", c, y, net.random(c.shape[-3], 1, 1), value=2),
    "addcmul swapped": lambda net, y, c: net("aten.addcmul", net.known(0.5), c, y),
    "0-dim float64": lambda net, y, c: net(
        "aten.mul.Tensor", y, net.known(0.3, "c", torch.float64)
    ),
    "integers": lambda net, y, c: net("aten.add.Tensor", y, net.known([7], "c", torch.int64)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("arithmetic", ARITHMETIC)
def test_every_arithmetic_before_and_after(arithmetic, dtype):
    net = Net(4, 6, 6, dtype=dtype)
    y = ARITHMETIC[arithmetic](net, net.x, net.random(4, 1, 1, positive=True))
    y = net("aten.relu", net.convolution(y, 6))
    y = net.transposed(y, 8, groups=2, bias=False)
    y = ARITHMETIC[arithmetic](net, y, net.random(1, 8, 1, 1, positive=True))
    graph = assert_applies(net.done(y), FoldChannelAffine())
    assert ops(graph) == ["conv2d", "relu", "conv_transpose2d"]


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_groups_and_dimensions(dimensions, groups):
    net = Net(6, *(5, 6, 4)[:dimensions])
    shape = [6, *[1] * dimensions]
    y = net("aten.mul.Tensor", net.x, net.random(*shape))
    y = net.convolution(y, 6, groups=groups, padding=[1])
    y = net("aten.add.Tensor", y, net.random(*shape))
    y = net.transposed(y, 12, groups=groups, padding=[1])
    y = net("aten.div.Tensor", y, net.random(12, *shape[1:], positive=True))
    graph = assert_applies(net.done(y), FoldChannelAffine())
    assert ops(graph) == [f"conv{dimensions}d", f"conv_transpose{dimensions}d"]


def test_layer_scale_through_a_permutation():
    net = Net(7, 7, 4)
    y = net("aten.permute", net.linear(net.x, 6), [0, 3, 1, 2])
    y = net("aten.mul.Tensor", net.random(6, 1, 1, name="layer_scale"), y)
    graph = assert_applies(net.done(y), FoldChannelAffine())
    assert ops(graph) == ["linear", "permute"]


def test_through_views_to_the_layer_after():
    net = Net(4, 6, 6)
    y = net("aten.mul.Tensor", net.x, net.random(4, 1, 1))
    y = net("aten.flatten.using_ints", y, 2)
    y = net("aten.transpose.int", y, 1, 2)
    graph = assert_applies(net.done(net.linear(y, 3), net.linear(y, 5)), FoldChannelAffine())
    assert ops(graph) == ["flatten", "transpose", "linear", "linear"]


def test_one_number_passes_views_that_divide_the_channels():
    net = Net(5, 8)
    y = net("aten.reshape", net.linear(net.x, 8), [-1, 5, 2, 4])
    y = net("aten.mul.Tensor", net("aten.transpose.int", y, 1, 2), 0.5)
    graph = assert_applies(net.done(y), FoldChannelAffine())
    assert ops(graph) == ["linear", "reshape", "transpose"]


def test_users_of_the_shape_alone_do_not_count():
    net = Net(5, 8)
    y = net.linear(net.x, 8)
    size = net("aten.sym_size.int", y, 0)
    y = net("aten.mul.Tensor", y, 2.0)
    graph = assert_applies(net.done(net("aten.reshape", y, [size, 40])), FoldChannelAffine())
    assert ops(graph) == ["linear", "sym_size", "reshape"]


def test_unbatched_convolution():
    graph = Graph()
    net = Net(1)
    net.graph, net.x = graph, graph.add_input("x", net.random(4, 6, 6).type)
    y = net("aten.conv2d", net.x, net.random(3, 4, 3, 3))
    y = net("aten.mul.Tensor", y, net.random(3, 1, 1))
    assert ops(assert_applies(net.done(y), FoldChannelAffine())) == ["conv2d"]


def test_long_chain():
    net = Net(4, 6, 6)
    y = net.convolution(net.x, 4)
    for _ in range(3):
        y = net("aten.add.Tensor", net("aten.mul.Tensor", y, net.random(4, 1, 1)), 0.5)
    assert ops(assert_applies(net.done(y), FoldChannelAffine())) == ["conv2d"]


def _declining(name: str) -> tuple[Graph, object, str]:
    net = Net(4, 6, 6)
    if name == "two varying dimensions":
        y = net.convolution(net.x, 4, 1)
        return net.done(net("aten.mul.Tensor", y, net.random(4, 6, 1))), BEFORE, "more than one"
    if name == "another dimension":
        y = net.convolution(net.x, 6, 1)
        return net.done(net("aten.mul.Tensor", y, net.random(6))), BEFORE, "not hold its channels"
    if name == "another dimension after":
        y = net("aten.mul.Tensor", net.x, net.random(6))
        return net.done(net.convolution(y, 6, 1)), AFTER, "is not the channels'"
    if name == "broadcast":
        y = net("aten.conv2d", net.x, net.random(1, 4, 1, 1))
        return net.done(net("aten.mul.Tensor", y, net.random(5, 1, 1))), BEFORE, "same type"
    if name == "rank":
        y = net("aten.mul.Tensor", net.convolution(net.x, 4), net.random(1, 1, 1, 1, 1))
        return net.done(y), BEFORE, "same type"
    if name == "promotion":
        y = net.convolution(net.x, 4)
        c = net.graph.constant(torch.ones(4, 1, 1, dtype=torch.float64))
        return net.done(net("aten.mul.Tensor", y, c)), BEFORE, "same type"
    if name == "no constant":
        y = net.convolution(net.x, 4, 1)
        return net.done(net("aten.mul.Tensor", y, net.x)), BEFORE, "not a constant"
    if name == "free size":
        y = net.convolution(net.x, 4, 1)
        size = net("aten.sym_size.int", net.x, 0)
        return net.done(net("aten.mul.Tensor", y, size)), BEFORE, "not a constant"
    if name == "division by the layer":
        y = net.convolution(net.x, 4)
        return net.done(net("aten.div.Tensor", net.random(4, 1, 1), y)), BEFORE, "divides by"
    if name == "division by zero":
        y = net.convolution(net.x, 4)
        return net.done(net("aten.div.Tensor", y, 0.0)), BEFORE, "no finite scale"
    if name == "infinite":
        y = net.convolution(net.x, 4)
        return net.done(net("aten.add.Tensor", y, float("inf"))), BEFORE, "no finite scale"
    if name == "scaled and shifted elsewhere":
        y = net.convolution(net.x, 4, 1)
        y = net("aten.addcmul", net.random(6), y, net.random(4, 1, 1))
        return net.done(y), BEFORE, "scales one dimension and shifts another"
    if name == "shifted by no constant":
        y = net.convolution(net.x, 4, 1)
        return net.done(net("aten.addcmul", net.x, y, net.random(4, 1, 1))), BEFORE, "not a const"
    if name == "padding":
        y = net("aten.add.Tensor", net.x, 1.0)
        return net.done(net.convolution(y, 4, padding=[1, 1])), AFTER, "pads with zeros"
    if name == "channels torn apart":
        y = net("aten.mul.Tensor", net.x, net.random(4, 1, 1))
        y = net("aten.flatten.using_ints", y, 1)
        return net.done(net.linear(y, 3)), AFTER, "does not keep the channels together"
    assert name == "other users"
    y = net.convolution(net.x, 4)
    return net.done(net("aten.mul.Tensor", y, 2.0), net("aten.relu", y)), BEFORE, "other users"


@pytest.mark.parametrize(
    "name",
    [
        "two varying dimensions", "another dimension", "another dimension after", "broadcast",
        "rank", "promotion", "no constant", "free size", "division by the layer",
        "division by zero", "infinite", "padding", "scaled and shifted elsewhere",
        "shifted by no constant", "channels torn apart", "other users",
    ],
)  # fmt: skip
def test_declines(name):
    graph, rule, reason = _declining(name)
    assert_declines(graph, FoldChannelAffine(), rule, reason)


def test_integers_are_left_alone():
    net = Net(4, dtype=torch.int64)
    y = net("aten.linear", net.x, net.known([[1, 2, 3, 4]]))
    graph = net.done(net("aten.mul.Tensor", y, 2))
    assert_declines(graph, FoldChannelAffine(), BEFORE, "computes in torch.int64")


@settings(max_examples=60)
@given(
    cases(
        [
            "convolution_then_arithmetic", "arithmetic_then_convolution", "linear_then_arithmetic",
            "arithmetic_then_linear",
        ]
    )
)  # fmt: skip
def test_random_graphs(case: Case):
    case = case.in_double()
    after = case.graph.clone()
    Pipeline([FoldChannelAffine()]).run(after)
    check(case.graph, after, case.inputs)
