"""Layer and RMS normalisation written out, recognised."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from pass_support import Net, assert_applies, assert_declines, ops
from random_graphs import Case, cases, check

from graphopt.ir import Graph, TensorType, Value
from graphopt.ir.rewriting import closest_miss
from graphopt.passes import layer_norm_canonicalization
from graphopt.passes.layer_norm_canonicalization import CanonicalizeLayerNorm
from graphopt.pipeline import Pipeline

LAYER, RMS, WEIGHT, BIAS, RMS_WEIGHT = layer_norm_canonicalization.RULES


def _mean(net: Net, x: Value, dims: list[int]) -> Value:
    return net("aten.mean.dim", x, dims, True)


def _centered(net: Net, x: Value, dims: list[int]) -> Value:
    return net("aten.sub.Tensor", x, _mean(net, x, dims))


def _square(net: Net, x: Value) -> Value:
    return net("aten.pow.Tensor_Scalar", x, 2)


VARIANCES: dict[str, Any] = {
    "pow": lambda net, x, c, dims: _mean(net, _square(net, c), dims),
    "pow 2.0": lambda net, x, c, dims: _mean(net, net("aten.pow.Tensor_Scalar", c, 2.0), dims),
    "square": lambda net, x, c, dims: _mean(net, net("aten.square", c), dims),
    "product": lambda net, x, c, dims: _mean(net, net("aten.mul.Tensor", c, c), dims),
    "computed again": lambda net, x, c, dims: _mean(
        net, _square(net, _centered(net, x, dims)), dims
    ),
    "var.dim": lambda net, x, c, dims: net("aten.var.dim", x, dims, False, True),
    "correction": lambda net, x, c, dims: net(
        "aten.var.correction", x, dims, correction=0, keepdim=True
    ),
    "correction 0.0": lambda net, x, c, dims: net(
        "aten.var.correction", x, dims, correction=0.0, keepdim=True
    ),
}
QUOTIENTS: dict[str, Any] = {
    "sqrt": lambda net, c, v: net("aten.div.Tensor", c, net("aten.sqrt", v)),
    "rsqrt": lambda net, c, v: net("aten.mul.Tensor", c, net("aten.rsqrt", v)),
    "rsqrt first": lambda net, c, v: net("aten.mul.Tensor", net("aten.rsqrt", v), c),
    "power": lambda net, c, v: net("aten.div.Tensor", c, net("aten.pow.Tensor_Scalar", v, 0.5)),
    "inverse power": lambda net, c, v: net(
        "aten.mul.Tensor", c, net("aten.pow.Tensor_Scalar", v, -0.5)
    ),
    "reciprocal": lambda net, c, v: net(
        "aten.mul.Tensor", c, net("aten.reciprocal", net("aten.sqrt", v))
    ),
}


def _layer_norm(
    net: Net,
    x: Value,
    *,
    dims: tuple[int, ...] = (-1,),
    variance: str = "pow",
    quotient: str = "sqrt",
    eps: Any = 1e-5,
) -> Value:
    centered = _centered(net, x, list(dims))
    raised = net("aten.add.Tensor", VARIANCES[variance](net, x, centered, list(dims)), eps)
    return QUOTIENTS[quotient](net, centered, raised)


def _rms_norm(net: Net, x: Value, quotient: str = "rsqrt", eps: Any = 1e-6) -> Value:
    raised = net("aten.add.Tensor", _mean(net, _square(net, x), [-1]), eps)
    return QUOTIENTS[quotient](net, x, raised)


def test_golden():
    graph = Graph.from_text("""
    graph(%x: f32[batch=2, 3, 4]) {
      %mean: f32[2, 3, 1] = aten.mean.dim(%x, [-1], True)  # norm
      %sub: f32[2, 3, 4] = aten.sub.Tensor(%x, %mean)  # norm
      %pow: f32[2, 3, 4] = aten.pow.Tensor_Scalar(%sub, 2)  # norm
      %mean_1: f32[2, 3, 1] = aten.mean.dim(%pow, [-1], True)  # norm
      %add: f32[2, 3, 1] = aten.add.Tensor(%mean_1, 1e-12)  # norm
      %sqrt: f32[2, 3, 1] = aten.sqrt(%add)  # norm
      %div: f32[2, 3, 4] = aten.div.Tensor(%sub, %sqrt)  # norm
      %norm.weight: f32[4] = parameter [1.0, 2.0, 3.0, 4.0]
      %mul: f32[2, 3, 4] = aten.mul.Tensor(%norm.weight, %div)  # norm
      %norm.bias: f32[1, 1, 4] = parameter [[[5.0, 6.0, 7.0, 8.0]]]
      %add_1: f32[2, 3, 4] = aten.add.Tensor(%mul, %norm.bias)  # norm
      %pow_1: f32[2, 3, 4] = aten.pow.Tensor_Scalar(%add_1, 2)  # rms
      %mean_2: f32[2, 3, 1] = aten.mean.dim(%pow_1, [-1], True)  # rms
      %add_2: f32[2, 3, 1] = aten.add.Tensor(%mean_2, 1e-06)  # rms
      %rsqrt: f32[2, 3, 1] = aten.rsqrt(%add_2)  # rms
      %mul_1: f32[2, 3, 4] = aten.mul.Tensor(%add_1, %rsqrt)  # rms
      %mul_2: f32[2, 3, 4] = aten.mul.Tensor(%norm.weight, %mul_1)  # rms
      return %mul_2
    }
    """)
    Pipeline([CanonicalizeLayerNorm()]).run(graph)
    assert (
        graph.to_text()
        == """\
graph(%x: f32[batch=2, 3, 4]) {
  %norm.weight: f32[4] = parameter [1.0, 2.0, 3.0, 4.0]
  %norm.bias: f32[4] = parameter [5.0, 6.0, 7.0, 8.0]
  %add_1: f32[2, 3, 4] = aten.layer_norm(%x, [4], %norm.weight, %norm.bias, 1e-12)\
  # norm by canonicalize-layer-norm
  %mul_2: f32[2, 3, 4] = aten.rms_norm(%add_1, [4], %norm.weight, 1e-06)\
  # rms by canonicalize-layer-norm
  return %mul_2
}"""
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("quotient", QUOTIENTS)
def test_every_form(quotient, variance, dtype):
    net = Net(3, 8, dtype=dtype)
    y = _layer_norm(net, net.x, variance=variance, quotient=quotient)
    y = net("aten.mul.Tensor", y, net.random(8, name="weight"))
    y = net("aten.add.Tensor", net.random(8), y)
    graph = assert_applies(net.done(y), CanonicalizeLayerNorm(), tolerance=1e-12)
    assert ops(graph) == ["layer_norm"]


def test_variance_and_mean_at_once():
    net = Net(3, 8)
    node = net.graph.add_node("aten.var_mean.correction", net.x, [-1], correction=0, keepdim=True)
    variance, mean = node.outputs
    centered = net("aten.sub.Tensor", net.x, mean)
    y = QUOTIENTS["rsqrt"](net, centered, net("aten.add.Tensor", variance, 1e-5))
    graph = assert_applies(net.done(y), CanonicalizeLayerNorm(), tolerance=1e-12)
    assert ops(graph) == ["layer_norm"]


@pytest.mark.parametrize("dims", [(2,), (-1,), (1, 2), (-1, -2)])
def test_dimensions(dims):
    net = Net(3, 8)
    graph = net.done(_layer_norm(net, net.x, dims=dims, variance="var.dim"))
    assert_applies(graph, CanonicalizeLayerNorm(), tolerance=1e-12)
    (node,) = graph.nodes
    assert node["normalized_shape"] == ([8] if len(dims) == 1 else [3, 8])


def test_eps_is_taken_literally():
    net = Net(8)
    eps = net.known(1e-3, "eps")
    graph = net.done(_layer_norm(net, net.x, eps=eps), _rms_norm(net, net.x, eps=0.25))
    assert_applies(graph, CanonicalizeLayerNorm(), tolerance=1e-9)
    layer, rms = graph.nodes
    assert layer["eps"] == torch.tensor(1e-3).item()
    assert rms["eps"] == 0.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("quotient", QUOTIENTS)
def test_rms_norm(quotient, dtype):
    net = Net(3, 8, dtype=dtype)
    y = net("aten.mul.Tensor", net.random(8, name="weight"), _rms_norm(net, net.x, quotient))
    graph = assert_applies(net.done(y), CanonicalizeLayerNorm(), tolerance=1e-12)
    assert ops(graph) == ["rms_norm"]


def test_a_large_mean_and_small_deviations():
    net = Net(3, 8)
    x = net("aten.add.Tensor", net.x, 100.0)
    x = net("aten.mul.Tensor", x, 1e3)
    graph = net.done(_layer_norm(net, x))
    assert ops(assert_applies(graph, CanonicalizeLayerNorm(), tolerance=1e-9))[-1] == "layer_norm"


def test_bfloat16_stays_within_its_rounding():
    net = Net(3, 64, dtype=torch.bfloat16)
    graph = net.done(_layer_norm(net, net.x))
    before = graph.clone()
    assert Pipeline([CanonicalizeLayerNorm()]).run(graph)
    inputs = [[torch.randn(v.types[k].shape).bfloat16() for v in graph.inputs] for k in (0, 1)]
    check(before, graph, inputs, tolerance=1e-9)


def _declining(name: str) -> tuple[Graph, object, str]:
    net = Net(3, 8)
    if name == "unbiased":
        centered = _centered(net, net.x, [-1])
        variance = net("aten.var.dim", net.x, [-1], True, True)
        raised = net("aten.add.Tensor", variance, 1e-5)
        return net.done(QUOTIENTS["sqrt"](net, centered, raised)), LAYER, "True is not False"
    if name == "eps outside":
        root = net("aten.sqrt", net("aten.var.dim", net.x, [-1], False, True))
        y = net("aten.div.Tensor", _centered(net, net.x, [-1]), net("aten.add.Tensor", root, 1e-5))
        return net.done(y), LAYER, "is aten.add.Tensor, not"
    if name == "eps is computed":
        eps = net.graph.add_input("eps", TensorType(torch.float32, ()))
        return net.done(_layer_norm(net, net.x, eps=eps)), LAYER, "is not the number `eps`"
    if name == "eps per channel":
        eps = net.known([[1e-5], [1e-4], [1e-3]])
        return net.done(_layer_norm(net, net.x, eps=eps)), LAYER, "is not the number `eps`"
    if name == "not the last dimension":
        return net.done(_layer_norm(net, net.x, dims=(1,))), LAYER, "not the last"
    if name == "not all from one on":
        net = Net(3, 4, 5)
        return net.done(_layer_norm(net, net.x, dims=(1, 3))), LAYER, "not the last"
    if name == "batch":
        return net.done(_layer_norm(net, net.x, dims=(0, 1, 2))), LAYER, "over a free dimension"
    if name == "cube":
        centered = _centered(net, net.x, [-1])
        raised = net("aten.pow.Tensor_Scalar", centered, 3)
        raised = net("aten.add.Tensor", _mean(net, raised, [-1]), 1e-5)
        return net.done(QUOTIENTS["sqrt"](net, centered, raised)), LAYER, "not the number 2"
    if name == "mean of another":
        other = _mean(net, net("aten.sin", net.x), [-1])
        centered = net("aten.sub.Tensor", net.x, other)
        raised = net("aten.add.Tensor", net("aten.var.dim", net.x, [-1], False, True), 1e-5)
        return net.done(QUOTIENTS["sqrt"](net, centered, raised)), LAYER, "elsewhere"
    if name == "other users":
        y = _layer_norm(net, net.x, variance="var.dim")
        (mean,) = (node for node in net.graph.nodes if node.op == "aten.mean.dim")
        return net.done(y, mean.output), LAYER, "is an output of the graph"
    if name == "half precision":
        net = Net(3, 8, dtype=torch.float16)
        return net.done(_rms_norm(net, net.x)), RMS, "torch.float16"
    if name == "rms over a free dimension":
        raised = net("aten.add.Tensor", _mean(net, _square(net, net.x), [0, 1, 2]), 1e-5)
        return net.done(QUOTIENTS["sqrt"](net, net.x, raised)), RMS, "over a free dimension"
    if name == "modulated":
        y = net("aten.layer_norm", net.x, [8])
        scale = net.input("scale", 1, 8)
        return net.done(net("aten.mul.Tensor", y, scale)), WEIGHT, r"not of the shape \[8\]"
    if name == "weight per token":
        y = net("aten.layer_norm", net.x, [8])
        return net.done(net("aten.mul.Tensor", y, net.random(3, 1))), WEIGHT, "not of the shape"
    if name == "weight of another dtype":
        y = net("aten.layer_norm", net.x, [8])
        weight = net.graph.constant(torch.ones(8, dtype=torch.float64))
        return net.done(net("aten.mul.Tensor", y, weight)), WEIGHT, "not of the type"
    if name == "weight of integers":
        y = net("aten.layer_norm", net.x, [8])
        weight = net.known([1] * 8, dtype=torch.int64)
        return net.done(net("aten.mul.Tensor", y, weight)), WEIGHT, "is torch.int64"
    if name == "weight after bias":
        y = net("aten.layer_norm", net.x, [8], None, net.random(8))
        return net.done(net("aten.mul.Tensor", y, net.random(8))), WEIGHT, "not None"
    if name == "bias times alpha":
        y = net("aten.layer_norm", net.x, [8])
        return net.done(net("aten.add.Tensor", y, net.random(8), alpha=2)), BIAS, "has alpha=2"
    assert name == "second weight"
    y = net("aten.rms_norm", net.x, [8], net.random(8))
    return net.done(net("aten.mul.Tensor", y, net.random(8))), RMS_WEIGHT, "is not None"


@pytest.mark.parametrize(
    "name",
    [
        "unbiased", "eps outside", "eps is computed", "eps per channel", "not the last dimension",
        "not all from one on", "batch", "cube", "mean of another",
        "other users", "half precision", "rms over a free dimension", "modulated",
        "weight per token", "weight of another dtype", "weight of integers", "weight after bias",
        "bias times alpha", "second weight",
    ],
)  # fmt: skip
def test_declines(name):
    graph, rule, reason = _declining(name)
    assert_declines(graph, CanonicalizeLayerNorm(), rule, reason)


def test_mean_and_variance_over_different_dimensions():
    net = Net(3, 8)
    centered = _centered(net, net.x, [-1])
    raised = net("aten.add.Tensor", _mean(net, _square(net, centered), [1, 2]), 1e-5)
    graph = net.done(QUOTIENTS["sqrt"](net, centered, raised))
    assert "different dimensions" in str(closest_miss(LAYER, graph))
    assert_applies(graph, CanonicalizeLayerNorm(), tolerance=1e-12)
    assert ops(graph) == ["mean", "sub", "rms_norm"]


def test_a_shared_weight_of_another_rank_is_not_changed_for_others():
    net = Net(3, 8)
    weight = net.random(1, 1, 8, name="weight")
    norm = net("aten.layer_norm", net.x, [8])
    y = net("aten.mul.Tensor", norm, weight)
    graph = net.done(net("aten.add.Tensor", y, net("aten.sin", weight)))
    assert_applies(graph, CanonicalizeLayerNorm(), tolerance=1e-12)
    assert graph.value("weight").shape == (1, 1, 8)


@settings(max_examples=60)
@given(cases(["layer_norm_written_out", "layer_norm", "with_constant"]))
def test_random_graphs(case: Case):
    after = case.graph.clone()
    Pipeline([CanonicalizeLayerNorm()]).run(after)
    check(case.graph, after, case.inputs)
