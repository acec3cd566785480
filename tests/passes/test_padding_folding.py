"""Padding into the convolution or pooling after it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from pass_support import Net, assert_applies, assert_declines, ops
from random_graphs import Case, cases, check

from graphopt.ir import Graph, TensorType
from graphopt.passes import padding_folding
from graphopt.passes.padding_folding import FoldPadding
from graphopt.pipeline import Pipeline

CONVOLUTION = padding_folding._into_convolution
MAXIMUM = padding_folding._into_max_pool
AVERAGE = padding_folding._into_average_pool
INF = math.inf


def test_golden():
    graph = Graph.from_text("""
    graph(%x: f32[batch=2, 1, 4, 4]) {
      %pad: f32[2, 1, 6, 8] = aten.pad(%x, [2, 2, 1, 1])
      %weight: f32[1, 1, 1, 2] = parameter [[[[1.0, 2.0]]]]
      %conv: f32[2, 1, 8, 7] = aten.conv2d(%pad, %weight, padding=[1, 0])  # conv
      return %conv
    }
    """)
    Pipeline([FoldPadding()]).run(graph)
    assert (
        graph.to_text()
        == """\
graph(%x: f32[batch=2, 1, 4, 4]) {
  %weight: f32[1, 1, 1, 2] = parameter [[[[1.0, 2.0]]]]
  %conv: f32[2, 1, 8, 7] = aten.conv2d(%x, %weight, padding=[2, 2])  # conv by fold-padding
  return %conv
}"""
    )


@pytest.mark.parametrize("padding", [[0], [1], "valid", "same"])
@pytest.mark.parametrize("op", ["aten.pad", "aten.constant_pad_nd"])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_convolutions(dimensions, op, padding):
    net = Net(4, *(6, 5, 7)[:dimensions])
    y = net(op, net.x, [1, 1, 2, 2, 3, 3][: 2 * dimensions])
    graph = net.done(net.convolution(y, 6, groups=2, padding=padding, dilation=[2]))
    assert ops(assert_applies(graph, FoldPadding(), tolerance=1e-12)) == [f"conv{dimensions}d"]


def test_settings_stay():
    net = Net(4, 9, 9)
    y = net("aten.pad", net.x, [1, 1, 1, 1])
    graph = net.done(net.convolution(y, 8, groups=4, stride=[2, 3], dilation=[1, 2], padding=[2]))
    assert_applies(graph, FoldPadding(), tolerance=1e-12)
    (node,) = graph.nodes
    assert (node["stride"], node["padding"], node["dilation"]) == ([2, 3], [3, 3], [1, 2])


@pytest.mark.parametrize(
    "amounts", [[1, 1], [0, 0, 2, 2], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]]
)
def test_fewer_or_more_dimensions(amounts):
    net = Net(4, 9, 9)
    graph = net.done(net.convolution(net("aten.pad", net.x, amounts), 3))
    assert ops(assert_applies(graph, FoldPadding(), tolerance=1e-12)) == ["conv2d"]


@pytest.mark.parametrize(
    ("size", "before", "after", "folds"),
    [
        (8, 1, 0, True),  # what is missing after is reached by no window
        (7, 1, 0, False),
        (7, 0, 1, True),  # what is padded after is reached by no window
        (8, 0, 1, False),
        (7, 1, 2, True),
        (8, 2, 0, False),
    ],
)
def test_asymmetric(size, before, after, folds):
    net = Net(3, size)
    y = net("aten.pad", net.x, [before, after])
    graph = net.done(net.convolution(y, 4, stride=[2]))
    if folds:
        assert ops(assert_applies(graph, FoldPadding(), tolerance=1e-12)) == ["conv1d"]
    else:
        assert_declines(graph, FoldPadding(), CONVOLUTION, f"pads {before} before and {after}")


def test_asymmetric_along_a_free_dimension():
    graph = Graph({"length": 8})
    x = graph.add_input("x", TensorType(torch.float32, (2, 3, 8)), {2: "length"})
    weight = graph.constant(torch.randn(4, 3, 3))
    graph.set_outputs([graph.add("aten.conv1d", graph.add("aten.pad", x, [1, 0]), weight)])
    assert_declines(graph, FoldPadding(), CONVOLUTION, "along a free dimension")


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_max_pools(dimensions):
    net = Net(4, *(6, 5, 7)[:dimensions])
    y = net("aten.pad", net.x, [1, 1, 0, 0, 1, 1][: 2 * dimensions], "constant", -INF)
    y = net(f"aten.max_pool{dimensions}d", y, [3], [2])
    graph = assert_applies(net.done(y), FoldPadding(), tolerance=0)
    assert ops(graph) == [f"max_pool{dimensions}d"]


@pytest.mark.parametrize(
    "positive",
    [
        ("aten.relu",), ("aten.sigmoid",), ("aten.hardtanh", 0, 6), ("aten.clamp", 0.5),
        ("aten.clamp", 0, 2), ("aten.clamp_min", 0),
    ],
)  # fmt: skip
def test_max_pool_of_what_is_not_negative(positive):
    net = Net(4, 7, 7)
    y = net("aten.pad", net(positive[0], net.x, *positive[1:]), [0, 1, 0, 1])
    graph = net.done(net("aten.max_pool2d", y, [3, 3], [3, 3]))
    assert "pad" not in ops(assert_applies(graph, FoldPadding(), tolerance=0))


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_average_pools(dimensions, counted):
    net = Net(4, *(6, 5, 7)[:dimensions])
    y = net("aten.pad", net.x, [1, 1, 0, 0, 1, 1][: 2 * dimensions])
    y = net(f"aten.avg_pool{dimensions}d", y, [3], count_include_pad=counted)
    graph = assert_applies(net.done(y), FoldPadding(), tolerance=1e-12)
    assert ops(graph) == [f"avg_pool{dimensions}d"]


def test_average_pool_with_padding_and_divisor():
    net = Net(4, 9, 9)
    y = net("aten.pad", net.x, [1, 1, 1, 1])
    y = net("aten.avg_pool2d", y, [4, 4], [2, 2], [1, 1], divisor_override=3)
    graph = assert_applies(net.done(y), FoldPadding(), tolerance=1e-12)
    assert graph.nodes[0]["padding"] == [2, 2]


def _declining(name: str) -> tuple[Graph, object, str]:
    net = Net(4, 6, 6)

    def pad(amounts=(1, 1, 1, 1), *rest):
        return net("aten.pad", net.x, list(amounts), *rest)

    def maximum(y, *rest, **kw):
        return net("aten.max_pool2d", y, [2, 2], *rest, **kw)

    def average(y, *rest, **kw):
        return net("aten.avg_pool2d", y, [2, 2], *rest, **kw)

    if name == "mode":
        return net.done(net.convolution(pad((1,) * 4, "reflect"), 3)), CONVOLUTION, "reflect"
    if name == "value":
        return net.done(net.convolution(pad((1,) * 4, "constant", 1.0), 3)), CONVOLUTION, "1.0"
    if name == "crop":
        return net.done(net.convolution(pad((-1, -1)), 3)), CONVOLUTION, "crops"
    if name == "free":
        size = net("aten.sym_size.int", net.x, 0)
        return net.done(net.convolution(pad((size, size)), 3)), CONVOLUTION, "not fixed"
    if name == "channels":
        return net.done(net.convolution(pad((1, 1, 1, 1, 2, 2)), 3)), CONVOLUTION, "channels"
    if name == "other users":
        y = pad()
        return net.done(net.convolution(y, 3), y), CONVOLUTION, "output of the graph"
    if name == "same":
        y = net.convolution(pad(), 3, 2, padding="same")
        return net.done(y), CONVOLUTION, "one more after than before"
    if name == "as weight":
        weight = net("aten.pad", net.random(4, 4, 2, 2), [1, 1])
        return net.done(net("aten.conv2d", net.x, weight)), CONVOLUTION, "is no result of"
    if name == "maximum of zeros":
        return net.done(maximum(pad())), MAXIMUM, "a maximum can be the padding's"
    if name == "maximum of clamped":
        net.x = net("aten.clamp", net.x, 0, -1)
        return net.done(maximum(pad())), MAXIMUM, "a maximum can be the padding's"
    if name == "dilated":
        net.x = net("aten.relu", net.x)
        return net.done(maximum(pad(), dilation=[2, 2])), MAXIMUM, "nothing but padding"
    if name == "ceil":
        y = pad((1,) * 4, "constant", -INF)
        return net.done(maximum(y, ceil_mode=True)), MAXIMUM, "rounds its size up"
    if name == "more than half":
        y = pad((1,) * 4, "constant", -INF)
        return net.done(maximum(y, [1], [1])), MAXIMUM, "more than half"
    if name == "average of ones":
        return net.done(average(pad((1,) * 4, "constant", 1.0))), AVERAGE, "own padding is 0"
    if name == "not counted":
        y = net("aten.avg_pool2d", pad(), [4, 4], [1], [1], count_include_pad=False)
        return net.done(y), AVERAGE, "does not count its own"
    if name == "average ceil":
        return net.done(average(pad(), ceil_mode=True)), AVERAGE, "rounds its size up"
    if name == "average asymmetric":
        return net.done(average(pad((0, 1)), [1, 1])), AVERAGE, "0 before and 1 after"
    assert name == "transposed convolution"
    y = net.transposed(pad(), 3)
    return net.done(net.convolution(y, 3)), CONVOLUTION, "conv_transpose2d.input, not aten.pad"


@pytest.mark.parametrize(
    "name",
    [
        "mode", "value", "crop", "free", "channels", "other users", "same", "as weight",
        "maximum of zeros", "maximum of clamped", "dilated", "ceil", "more than half",
        "average of ones", "not counted", "average ceil", "average asymmetric",
        "transposed convolution",
    ],
)  # fmt: skip
def test_declines(name):
    graph, rule, reason = _declining(name)
    assert_declines(graph, FoldPadding(), rule, reason)


@settings(max_examples=60)
@given(cases(["pad_then_convolution", "pooling", "pad", "convolution"]))
def test_random_graphs(case: Case):
    after = case.graph.clone()
    Pipeline([FoldPadding()]).run(after)
    check(case.graph, after, case.inputs)
