"""Batch norm into the layer before or after it, against the graph as it was."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from pass_support import Net, assert_applies, assert_declines, ops
from random_graphs import Case, cases, check

from graphopt.ir import Graph
from graphopt.passes import batch_norm_folding
from graphopt.passes.batch_norm_folding import FoldBatchNorm
from graphopt.pipeline import Pipeline

BEFORE, AFTER = batch_norm_folding._into_producer, batch_norm_folding._into_consumers
SHAPES = {1: (6, 9), 2: (6, 7, 8), 3: (6, 5, 6, 5)}


def test_golden_before():
    text = """
    graph(%x: f32[batch=2, 1, 4, 4]) {
      %conv.weight: f32[2, 1, 1, 1] = parameter [[[[1.0]]], [[[2.0]]]]
      %conv: f32[2, 2, 4, 4] = aten.conv2d(%x, %conv.weight)  # conv
      %bn.weight: f32[2] = parameter [3.0, 4.0]
      %bn.bias: f32[2] = parameter [5.0, 6.0]
      %bn.running_mean: f32[2] = constant [1.0, 2.0]
      %bn.running_var: f32[2] = constant [3.0, 15.0]
      %bn: f32[2, 2, 4, 4] = aten.batch_norm(%conv, %bn.weight, %bn.bias, %bn.running_mean, %bn.running_var, False, 0.1, 1.0, True)  # bn
      return %bn
    }
    """  # noqa: E501
    graph = Graph.from_text(text)
    Pipeline([FoldBatchNorm()]).run(graph)
    assert (
        graph.to_text()
        == """\
graph(%x: f32[batch=2, 1, 4, 4]) {
  %conv.weight: f32[2, 1, 1, 1] = parameter [[[[1.5]]], [[[2.0]]]]
  %conv.bias: f32[2] = parameter [3.5, 4.0]
  %conv: f32[2, 2, 4, 4] = aten.conv2d(%x, %conv.weight, %conv.bias)  # conv
  return %conv
}"""
    )


def test_golden_after():
    text = """
    graph(%x: f32[batch=2, 2]) {
      %bn.running_mean: f32[2] = constant [1.0, 2.0]
      %bn.running_var: f32[2] = constant [3.0, 15.0]
      %bn: f32[2, 2] = aten.batch_norm(%x, None, None, %bn.running_mean, %bn.running_var, False, 0.1, 1.0, True)
      %fc.weight: f32[1, 2] = parameter [[8.0, 4.0]]
      %fc.bias: f32[1] = parameter [1.0]
      %fc: f32[2, 1] = aten.linear(%bn, %fc.weight, %fc.bias)
      return %fc
    }
    """  # noqa: E501
    graph = Graph.from_text(text)
    Pipeline([FoldBatchNorm()]).run(graph)
    assert (
        graph.to_text()
        == """\
graph(%x: f32[batch=2, 2]) {
  %fc.weight: f32[1, 2] = parameter [[4.0, 1.0]]
  %fc.bias: f32[1] = parameter [-5.0]
  %fc: f32[2, 1] = aten.linear(%x, %fc.weight, %fc.bias)
  return %fc
}"""
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_into_the_convolution_before(dimensions, transposed, groups, bias, affine, dtype):
    net = Net(*SHAPES[dimensions], dtype=dtype)
    build = net.transposed if transposed else net.convolution
    y = build(net.x, 12, groups=groups, bias=bias, stride=[2], padding=[1])
    graph = net.done(net.batch_norm(y, affine=affine))
    assert len(ops(assert_applies(graph, FoldBatchNorm()))) == 1


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_into_the_convolution_after(dimensions, shift, groups):
    net = Net(*SHAPES[dimensions])
    y = net.batch_norm(net.x, shift=shift)
    padding = [0] if shift else [1]
    graph = net.done(net.convolution(y, 12, groups=groups, padding=padding, dilation=[2]))
    assert ops(assert_applies(graph, FoldBatchNorm())) == [f"conv{dimensions}d"]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_into_the_transposed_convolution_after(dimensions, groups):
    net = Net(*SHAPES[dimensions])
    y = net.batch_norm(net.x, shift=False)
    graph = net.done(net.transposed(y, 4, groups=groups, stride=[2], output_padding=[1]))
    assert ops(assert_applies(graph, FoldBatchNorm())) == [f"conv_transpose{dimensions}d"]


def test_a_shift_into_a_pointwise_transposed_convolution():
    net = Net(6, 5, 5)
    graph = net.done(net.transposed(net.batch_norm(net.x), 4, 1))
    assert ops(assert_applies(graph, FoldBatchNorm())) == ["conv_transpose2d"]


@pytest.mark.parametrize("padding", ["valid", "same"])
def test_padding_by_name(padding):
    net = Net(4, 6, 6)
    y = net.batch_norm(net.x)
    y = net.convolution(y, 5, 3 if padding == "valid" else 1, padding=padding)
    graph = net.done(net.batch_norm(y))
    assert ops(assert_applies(graph, FoldBatchNorm())) == ["conv2d"]


def test_generic_convolution():
    net = Net(4, 6, 6)
    for transposed in (False, True):
        w = net.random(4, 4, 3, 3, name="w")
        settings = ([1, 1], [0, 0], [1, 1], transposed, [0, 0], 1)
        y = net.batch_norm(net("aten.convolution", net.x, w, None, *settings))
        net.x = y
    assert ops(assert_applies(net.done(y), FoldBatchNorm())) == ["convolution", "convolution"]


def test_linear_on_both_sides():
    net = Net(5)
    y = net.batch_norm(net.linear(net.x, 7, bias=False))
    y = net("aten.relu", y)
    graph = net.done(net.linear(net.batch_norm(y), 3))
    assert ops(assert_applies(graph, FoldBatchNorm())) == ["linear", "relu", "linear"]


def test_linear_through_views():
    net = Net(4, 5)
    y = net.linear(net.x, 6)
    flat = net("aten.flatten.using_ints", y, 0, 1)
    graph = net.done(net("aten.reshape_as", net.batch_norm(flat), y))
    assert ops(assert_applies(graph, FoldBatchNorm())) == ["linear", "flatten", "reshape_as"]
    net = Net(4, 5)
    flat = net("aten.flatten.using_ints", net.linear(net.x, 6), 0, 1)
    graph = net.done(net("aten.reshape", net.batch_norm(flat), [-1, 4, 6]))
    assert ops(assert_applies(graph, FoldBatchNorm())) == ["linear", "flatten", "reshape"]
    net = Net(4, 5)
    graph = net.done(net.batch_norm(net("aten.transpose.int", net.linear(net.x, 6), 1, 2)))
    assert ops(assert_applies(graph, FoldBatchNorm())) == ["linear", "transpose"]


def test_several_consumers():
    net = Net(4)
    y = net.batch_norm(net.x)
    graph = net.done(net.linear(y, 3), net.linear(y, 2, bias=False))
    assert ops(assert_applies(graph, FoldBatchNorm())) == ["linear", "linear"]


def test_functionalised_operator():
    net = Net(4, 6, 6)
    mean, variance = net.random(3), net.random(3, positive=True)
    y = net.convolution(net.x, 3)
    op = "aten._native_batch_norm_legit_no_training"
    node = net.graph.add_node(op, y, None, None, mean, variance, 0.1, 1e-5)
    graph = net.done(node.outputs[0])
    assert ops(assert_applies(graph, FoldBatchNorm())) == ["conv2d"]


def test_tied_weight_is_not_rewritten():
    net = Net(4, 6, 6)
    weight = net.random(4, 4, 3, 3, name="weight")
    y = net.batch_norm(net("aten.conv2d", net.x, weight))
    graph = net.done(net("aten.conv2d", y, weight, None, [1, 1], [1, 1]))
    shared = weight.constant.clone()
    assert_applies(graph, FoldBatchNorm())
    assert torch.equal(graph.value("weight").constant, shared)
    assert graph.nodes[0]["weight"] is not graph.nodes[1]["weight"]


def test_source_tensors_are_never_written():
    net = Net(4, 6, 6)
    y = net.convolution(net.x, 3)
    tensor = y.producer["weight"].constant
    copy = tensor.clone()
    assert_applies(net.done(net.batch_norm(y)), FoldBatchNorm())
    assert torch.equal(tensor, copy)


def test_vanishing_weights_do_not_stand_in_the_way():
    net = Net(4, 6, 6)
    y = net.batch_norm(net.convolution(net.x, 3))
    net.graph.set_constant(net.graph.value("bn.weight"), torch.tensor([1.0, 1e-41, 0.0]))
    assert ops(assert_applies(net.done(y), FoldBatchNorm())) == ["conv2d"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    net = Net(4, 6, 6, dtype=dtype)
    graph = net.done(net.batch_norm(net.convolution(net.x, 3)))
    eps = torch.finfo(dtype).eps
    before = graph.clone()
    assert Pipeline([FoldBatchNorm()]).run(graph)
    assert graph.nodes[0]["weight"].dtype == dtype
    inputs = [[torch.randn(v.types[k].shape).to(dtype) for v in graph.inputs] for k in (0, 1)]
    check(before, graph, inputs, tolerance=4 * eps)


def _declining(name: str) -> tuple[Graph, object, str]:
    net = Net(4, 6, 6)
    if name == "other users":
        y = net.convolution(net.x, 4)
        return net.done(net("aten.add.Tensor", net.batch_norm(y), y)), BEFORE, "other users"
    if name == "output":
        y = net.convolution(net.x, 4)
        return net.done(net.batch_norm(y), y), BEFORE, "output of the graph"
    if name == "no layer":
        y = net.batch_norm(net("aten.relu", net.x))
        return net.done(y), BEFORE, "neither a convolution nor a linear layer"
    if name == "input":
        return net.done(net.batch_norm(net.x)), BEFORE, "not the result of a layer"
    if name == "padding":
        y = net.convolution(net.batch_norm(net.x), 3, padding=[0, 1])
        return net.done(y), AFTER, "pads with zeros"
    if name == "padding same":
        y = net.convolution(net.batch_norm(net.x), 3, padding="same")
        return net.done(y), AFTER, "pads with zeros"
    if name == "transposed":
        y = net.transposed(net.batch_norm(net.x), 3)
        return net.done(y), AFTER, "pads with zeros"
    if name == "transposed stride":
        y = net.transposed(net.batch_norm(net.x), 3, 1, stride=[2])
        return net.done(y), AFTER, "pads with zeros"
    if name == "training":
        y = net.convolution(net.x, 4)
        y = net("aten.batch_norm", y, None, None, None, None, True, 0.1, 1e-5, True)
        return net.done(y), BEFORE, "statistics of its batch"
    if name == "statistics":
        mean = net.graph.add_input("mean", net.random(4).type)
        y, var = net.convolution(net.x, 4), net.random(4, positive=True)
        y = net("aten.batch_norm", y, None, None, mean, var, False, 0.1, 1e-5, True)
        return net.done(y), BEFORE, "%mean is not a constant"
    if name == "weight":
        weight = net.graph.add_input("w", net.random(4, 4, 1, 1).type)
        return net.done(net.batch_norm(net("aten.conv2d", net.x, weight))), BEFORE, "%w .* is not"
    if name == "as weight":
        y = net.batch_norm(net.random(4, 4, 3, 3))
        return net.done(net("aten.conv2d", net.x, y)), AFTER, "the weight .* is not a constant"
    if name == "last dimension":
        net = Net(4, 4)
        return net.done(net.batch_norm(net.linear(net.x, 4))), BEFORE, "does not hold its channels"
    if name == "last dimension after":
        net = Net(4, 4)
        return net.done(net.linear(net.batch_norm(net.x), 4)), AFTER, "not the channels'"
    if name == "broken view":
        y = net("aten.reshape", net.convolution(net.x, 4, 1), [-1, 2, 72])
        return net.done(net.batch_norm(y)), BEFORE, "does not keep the channels together"
    if name == "not finite":
        y = net.batch_norm(net.convolution(net.x, 2))
        net.graph.set_constant(net.graph.value("bn.running_var"), torch.tensor([1.0, -1.0]))
        return net.done(y), BEFORE, "not finite"
    if name == "overflow":
        y = net.batch_norm(net.convolution(net.x, 2))
        net.graph.set_constant(net.graph.value("bn.weight"), torch.tensor([1.0, 3e38]))
        return net.done(y), BEFORE, "leave the range"
    if name == "half underflow":
        net = Net(4, 6, 6, dtype=torch.float16)
        y = net.batch_norm(net.convolution(net.x, 2))
        tensor = torch.tensor([1.0, 1e-5], dtype=torch.float16)
        net.graph.set_constant(net.graph.value("bn.weight"), tensor)
        return net.done(y), BEFORE, "leave the range"
    assert name == "several consumers"
    y = net.batch_norm(net.x)
    return net.done(net.convolution(y, 3), net("aten.relu", y)), AFTER, "neither a convolution"


@pytest.mark.parametrize(
    "name",
    [
        "other users", "output", "no layer", "input", "padding", "padding same", "transposed",
        "transposed stride", "training", "statistics", "weight", "as weight", "last dimension",
        "last dimension after", "broken view", "not finite", "overflow", "half underflow",
        "several consumers",
    ],
)  # fmt: skip
def test_declines(name):
    graph, rule, reason = _declining(name)
    assert_declines(graph, FoldBatchNorm(), rule, reason)


@settings(max_examples=60)
@given(
    cases(
        [
            "convolution_then_batch_norm", "batch_norm_then_convolution", "linear_then_batch_norm",
            "transposed_convolution_then_batch_norm", "residual",
        ]
    )
)  # fmt: skip
def test_random_graphs(case: Case):
    case = case.in_double()
    after = case.graph.clone()
    Pipeline([FoldBatchNorm()]).run(after)
    check(case.graph, after, case.inputs)
