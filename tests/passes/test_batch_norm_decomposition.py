"""Batch norm as a multiplication and an addition."""

from __future__ import annotations

import pytest
import torch
from pass_support import Net, assert_applies, assert_declines, ops

from graphopt.ir import Graph
from graphopt.passes import batch_norm_decomposition
from graphopt.passes.batch_norm_decomposition import DecomposeBatchNorm
from graphopt.pipeline import Pipeline

RULE = batch_norm_decomposition._decompose


def test_golden():
    graph = Graph.from_text("""
    graph(%x: f32[batch=2, 2, 3]) {
      %bn.weight: f32[2] = parameter [3.0, 4.0]
      %bn.bias: f32[2] = parameter [5.0, 6.0]
      %bn.running_mean: f32[2] = constant [1.0, 2.0]
      %bn.running_var: f32[2] = constant [3.0, 15.0]
      %bn: f32[2, 2, 3] = aten.batch_norm(%x, %bn.weight, %bn.bias, %bn.running_mean, %bn.running_var, False, 0.1, 1.0, True)  # bn
      return %bn
    }
    """)  # noqa: E501
    Pipeline([DecomposeBatchNorm()]).run(graph)
    assert (
        graph.to_text()
        == """\
graph(%x: f32[batch=2, 2, 3]) {
  %bn.scale: f32[2, 1] = constant [[1.5], [1.0]]
  %mul: f32[2, 2, 3] = aten.mul.Tensor(%x, %bn.scale)  # bn by decompose-batch-norm
  %bn.shift: f32[2, 1] = constant [[3.5], [4.0]]
  %bn: f32[2, 2, 3] = aten.add.Tensor(%mul, %bn.shift)  # bn by decompose-batch-norm
  return %bn
}"""
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(4,), (4, 5), (4, 5, 6), (4, 3, 4, 5)])
def test_ranks(shape, dtype):
    net = Net(*shape, dtype=dtype)
    graph = net.done(net("aten.relu", net.batch_norm(net.x)))
    assert ops(assert_applies(graph, DecomposeBatchNorm())) == ["mul", "add", "relu"]


def test_declines_half_precision():
    net = Net(4, 5, dtype=torch.float16)
    graph = net.done(net.batch_norm(net.x))
    assert_declines(graph, DecomposeBatchNorm(), RULE, "round twice")


def test_declines_what_does_not_fit_the_dtype():
    net = Net(2, 5)
    y = net.batch_norm(net.x)
    net.graph.set_constant(net.graph.value("bn.weight"), torch.tensor([1.0, 3e38]))
    net.graph.set_constant(net.graph.value("bn.running_var"), torch.tensor([1.0, 1e-9]))
    assert_declines(net.done(y), DecomposeBatchNorm(), RULE, "leaves the range")


def test_declines_statistics_of_the_batch():
    net = Net(4, 5)
    y = net("aten.batch_norm", net.x, None, None, None, None, True, 0.1, 1e-5, True)
    assert_declines(net.done(y), DecomposeBatchNorm(), RULE, "statistics of its batch")
