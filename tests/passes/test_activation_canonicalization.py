"""Activations written out, recognised in every arrangement."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from pass_support import Net, assert_applies, assert_declines
from random_graphs import Case, cases, check

from graphopt import reference
from graphopt.ir import Graph, Value
from graphopt.passes import activation_canonicalization
from graphopt.passes.activation_canonicalization import CanonicalizeActivations
from graphopt.pipeline import Pipeline

Build = Callable[["Write", Value], Value]
K = math.sqrt(2 / math.pi)


class Write:
    """Operators by short names, applied in a graph."""

    def __init__(self, net: Net) -> None:
        self.net = net

    def __call__(self, op: str, *args: Any, **kwargs: Any) -> Value:
        return self.net(f"aten.{op}", *args, **kwargs)

    def mul(self, *factors: Any) -> Value:
        result = factors[0]
        for factor in factors[1:]:
            result = self("mul.Tensor", result, factor)
        return result

    def add(self, x: Any, y: Any, **kwargs: Any) -> Value:
        return self("add.Tensor", x, y, **kwargs)

    def div(self, x: Any, y: Any) -> Value:
        return self("div.Tensor", x, y)

    def relu6_plus_3(self, x: Value) -> Value:
        return self("relu6", self.add(x, 3))

    def one_plus_erf(self, x: Value) -> Value:
        return self.add(self("erf", self.div(x, math.sqrt(2))), 1)

    def tanh_term(self, x: Value, k: float = K, a: float = 0.044715) -> Value:
        inner = self.add(x, self("mul.Tensor", self("pow.Tensor_Scalar", x, 3), a))
        return self.add(self("tanh", self.mul(inner, k)), 1.0)


def _clamped(clamp: Callable[[Write, Value], Value]) -> Build:
    return lambda w, x: w.div(clamp(w, w.add(x, 3)), 6)


FORMS: dict[str, dict[str, Build]] = {
    "aten.hardsigmoid": {
        "relu6": lambda w, x: w.div(w.relu6_plus_3(x), 6),
        "times 1/6": lambda w, x: w.mul(w.relu6_plus_3(x), 1 / 6),
        "times a constant": lambda w, x: w.mul(w.relu6_plus_3(x), w.net.known(1 / 6)),
        "hardtanh": _clamped(lambda w, y: w("hardtanh", y, 0, 6)),
        "clamp": _clamped(lambda w, y: w("clamp", y, 0.0, 6.0)),
        "clamp twice": _clamped(lambda w, y: w("clamp_max", w("clamp_min", y, 0), 6)),
        "relu and clamp": _clamped(lambda w, y: w("clamp", w("relu", y), None, 6)),
        "relu and clamp_max": _clamped(lambda w, y: w("clamp_max", w("relu", y), 6.0)),
        "constant tensor": lambda w, x: w.div(w("relu6", w.add(w.net.known(3.0), x)), 6.0),
        "Scalar": lambda w, x: w("div.Scalar", w("relu6", w("add.Scalar", x, 3)), 6),
        "minus -3": lambda w, x: w.div(w("relu6", w("sub.Tensor", x, -3)), 6),
        "alpha": lambda w, x: w.div(w("relu6", w.add(x, 1.5, alpha=2)), 6),
        "of a polynomial": lambda w, x: w.div(w.relu6_plus_3(w.mul(x, 2)), 6),
        "inside": lambda w, x: w("clamp", w.add(w.mul(x, 1 / 6), 0.5), 0, 1),
        "hardtanh inside": lambda w, x: w("hardtanh", w.add(w.net.known(0.5), w.div(x, 6)), 0, 1),
    },
    "aten.hardswish": {
        "at the end": lambda w, x: w.div(w.mul(x, w.relu6_plus_3(x)), 6),
        "at the factor": lambda w, x: w.mul(w.div(w.relu6_plus_3(x), 6), x),
        "at x": lambda w, x: w.mul(w.mul(x, 1 / 6), w.relu6_plus_3(x)),
        "hardsigmoid": lambda w, x: w.mul(x, w("hardsigmoid", x)),
        "written out in it": lambda w, x: w.mul(w("clamp", w.add(w.div(x, 6), 0.5), 0, 1), x),
    },
    "aten.silu": {
        "x first": lambda w, x: w.mul(x, w("sigmoid", x)),
        "sigmoid first": lambda w, x: w.mul(w("sigmoid", x), x),
    },
    "aten.mish": {"": lambda w, x: w.mul(x, w("tanh", w("softplus", x)))},
    "aten.gelu": {
        "half of x": lambda w, x: w.mul(w.mul(x, 0.5), w.one_plus_erf(x)),
        "half of the rest": lambda w, x: w.mul(w.mul(w.one_plus_erf(x), 0.5), x),
        "half of all": lambda w, x: w.mul(x, w.one_plus_erf(x), 0.5),
        "divided by 2": lambda w, x: w.div(w.mul(w.one_plus_erf(x), x), 2),
        "times sqrt(1/2)": lambda w, x: w.mul(
            x, 0.5, w("add.Scalar", w("erf", w.mul(x, 0.7071067811865476)), 1.0)
        ),
        "constants": lambda w, x: w.mul(
            w.net.known([0.5]), x, w.add(w.net.known(1.0), w("erf", w.div(x, w.net.known(2**0.5))))
        ),
    },
    "aten.gelu tanh": {
        "as in the paper": lambda w, x: w.mul(w.mul(x, 0.5), w.tanh_term(x)),
        "cube by hand": lambda w, x: w.mul(
            x,
            w.add(w("tanh", w.mul(w.add(w.mul(x, x, x, 0.044715), x), K)), 1),
            0.5,
        ),
        "factored": lambda w, x: w.mul(
            w.mul(x, 0.5),
            w.add(w("tanh", w.mul(w.mul(x, K), w.add(w.mul(w("square", x), 0.044715), 1))), 1),
        ),
    },
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("expected", "form"), [(op, form) for op, forms in FORMS.items() for form in forms]
)
def test_every_form(expected, form, dtype):
    net = Net(3, 5, dtype=dtype)
    y = FORMS[expected][form](Write(net), net("aten.sin", net.x))
    tolerance = 1e-7 if dtype == torch.float32 else 1e-12
    graph = assert_applies(net.done(y), CanonicalizeActivations(), tolerance=tolerance)
    *rest, node = graph.nodes
    assert node.op + (" tanh" if node.operands.get("approximate") else "") == expected
    assert {n.op for n in rest} <= {"aten.sin", "aten.mul.Tensor"}


def test_golden():
    graph = Graph.from_text("""
    graph(%x: f32[batch=2, 3]) {
      %add: f32[2, 3] = aten.add.Tensor(%x, 3)  # act
      %relu6: f32[2, 3] = aten.relu6(%add)  # act
      %mul: f32[2, 3] = aten.mul.Tensor(%x, %relu6)  # act
      %div: f32[2, 3] = aten.div.Tensor(%mul, 6)  # act
      %pow: f32[2, 3] = aten.pow.Tensor_Scalar(%div, 3.0)
      %mul_1: f32[2, 3] = aten.mul.Tensor(%pow, 0.044715)
      %add_1: f32[2, 3] = aten.add.Tensor(%div, %mul_1)
      %mul_2: f32[2, 3] = aten.mul.Tensor(%add_1, 0.7978845608)
      %tanh: f32[2, 3] = aten.tanh(%mul_2)
      %add_2: f32[2, 3] = aten.add.Tensor(%tanh, 1.0)
      %mul_3: f32[2, 3] = aten.mul.Tensor(%div, 0.5)
      %mul_4: f32[2, 3] = aten.mul.Tensor(%mul_3, %add_2)  # gelu
      return %mul_4
    }
    """)
    Pipeline([CanonicalizeActivations()]).run(graph)
    assert (
        graph.to_text()
        == """\
graph(%x: f32[batch=2, 3]) {
  %div: f32[2, 3] = aten.hardswish(%x)  # act by canonicalize-activations
  %mul_4: f32[2, 3] = aten.gelu(%div, approximate="tanh")  # gelu by canonicalize-activations
  return %mul_4
}"""
    )


SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, -1e-40, 3.0, -3.0, 60.0, -60.0, 1e4]


@pytest.mark.parametrize("op", FORMS)
def test_special_values(op):
    # torch's own gelu is NaN at infinity, where x * (1 + erf(x)) / 2 is not.
    values = [v for v in SPECIAL if "gelu" not in op or v != math.inf]
    net = Net(len(values))
    net.graph.set_outputs([next(iter(FORMS[op].values()))(Write(net), net.x)])
    before, graph = net.graph.clone(), net.graph
    assert Pipeline([CanonicalizeActivations()]).run(graph)
    x = torch.tensor([values, values[::-1]])
    (wanted,), (result,) = reference.run(before, [x]), reference.run(graph, [x])
    torch.testing.assert_close(result, wanted, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("op", FORMS)
def test_half_precision(op, dtype):
    net = Net(5, dtype=dtype)
    net.graph.set_outputs([next(iter(FORMS[op].values()))(Write(net), net.x)])
    before, graph = net.graph.clone(), net.graph
    assert Pipeline([CanonicalizeActivations()]).run(graph)
    inputs = [[torch.randn(v.types[k].shape).to(dtype) for v in graph.inputs] for k in (0, 1)]
    check(before, graph, inputs, tolerance=1e-6)


HARDSIGMOID, INSIDE, HARDSWISH, _, SILU, MISH, GELU, TANH = activation_canonicalization.RULES
DECLINING: dict[str, tuple[Any, str, Build]] = {
    "another divisor": (
        HARDSIGMOID, "has the factor 0.2", lambda w, x: w.div(w.relu6_plus_3(x), 5)),
    "nearly the divisor": (
        HARDSIGMOID, "has the factor 0.1667", lambda w, x: w.mul(w.relu6_plus_3(x), 0.1667)),
    "another offset": (
        HARDSIGMOID, "not a polynomial", lambda w, x: w.div(w("relu6", w.add(x, 2)), 6)),
    "another slope": (
        HARDSIGMOID, "not a polynomial", lambda w, x: w.div(w("relu6", w.add(x, 3, alpha=2)), 6)),
    "another bound": (
        HARDSIGMOID, "not the number 6", lambda w, x: w.div(w("clamp", w.add(x, 3), 0, 5), 6)),
    "relu alone": (
        HARDSIGMOID, "aten.relu, not", lambda w, x: w.div(w("relu", w.add(x, 3)), 6)),
    "rounding that only cancels": (
        HARDSIGMOID, "not a polynomial",
        lambda w, x: w.div(w("relu6", w.add(w.add(x, 100), -97)), 6)),
    "numbers that overflow": (
        HARDSIGMOID, "not a product",
        lambda w, x: w.div(w.mul(w.relu6_plus_3(x), 1e38), 6e38)),
    "Keras": (INSIDE, "not a polynomial", lambda w, x: w("clamp", w.add(w.mul(x, 0.2), 0.5), 0, 1)),
    "of another value": (
        HARDSWISH, "not a polynomial|elsewhere",
        lambda w, x: w.div(w.mul(w("sin", x), w.relu6_plus_3(x)), 6)),
    "sigmoid of another value": (
        SILU, "elsewhere in the pattern", lambda w, x: w.mul(w("sin", x), w("sigmoid", x))),
    "sigmoid of a multiple": (
        SILU, "elsewhere in the pattern|factor",
        lambda w, x: w.mul(x, w("sigmoid", w.mul(x, 1.702)))),
    "three factors": (
        SILU, "elsewhere in the pattern",
        lambda w, x: w.mul(x, w.mul(w("sigmoid", x), w("sin", x)))),
    "quotient": (SILU, "product of 2", lambda w, x: w.div(x, w("sigmoid", x))),
    "softplus with a slope": (
        MISH, "has beta=2", lambda w, x: w.mul(x, w("tanh", w("softplus", x, 2)))),
    "no half": (GELU, "has the factor 1.0", lambda w, x: w.mul(x, w.one_plus_erf(x))),
    "erf of x itself": (
        GELU, "not a polynomial", lambda w, x: w.mul(x, w.add(w("erf", x), 1), 0.5)),
    "rounded square root": (
        GELU, "not a polynomial",
        lambda w, x: w.mul(x, w.add(w("erf", w.div(x, 1.4142)), 1), 0.5)),
    "plus two": (
        GELU, "not the number 1",
        lambda w, x: w.mul(x, w.add(w("erf", w.div(x, math.sqrt(2))), 2), 0.5)),
    "another cubic term": (
        TANH, "not a polynomial", lambda w, x: w.mul(x, 0.5, w.tanh_term(x, a=0.0447))),
    "fourth power": (
        TANH, "not a polynomial",
        lambda w, x: w.mul(x, 0.5, w.tanh_term(w("pow.Tensor_Scalar", x, 4)))),
}  # fmt: skip


@pytest.mark.parametrize("name", DECLINING)
def test_declines(name):
    rule, reason, build = DECLINING[name]
    net = Net(3, 5)
    graph = net.done(build(Write(net), net.x))
    assert_declines(graph, CanonicalizeActivations(), rule, reason)


def test_declines_in_float64_what_is_rounded_to_float32():
    net = Net(5, dtype=torch.float64)
    graph = net.done(Write(net).mul(net.x, 0.5, Write(net).tanh_term(net.x, k=0.7978845608)))
    assert_declines(graph, CanonicalizeActivations(), TANH, "not a polynomial")


def test_declines_where_something_else_reads_an_intermediate():
    net = Net(5)
    gate = net("aten.sigmoid", net.x)
    graph = net.done(net("aten.mul.Tensor", net.x, gate), net("aten.sin", gate))
    assert_declines(graph, CanonicalizeActivations(), SILU, "outside of the match: %sin")
    net = Net(5)
    y = net("aten.relu6", net("aten.add.Tensor", net.x, 3))
    graph = net.done(net("aten.div.Tensor", y, 6), y)
    assert_declines(graph, CanonicalizeActivations(), HARDSIGMOID, "output of the graph")


def test_declines_another_type():
    net = Net(5, dtype=torch.int64)
    graph = net.done(net("aten.mul.Tensor", net.x, net("aten.sigmoid", net.x)))
    assert_declines(graph, CanonicalizeActivations(), SILU, "not of the floating-point type")
    net = Net(5)
    y = net("aten.div.Tensor", net("aten.relu6", net("aten.add.Tensor", net.x, 3)), 6)
    graph = net.done(net("aten.mul.Tensor", y, net.known([[[1.0]]])))
    assert Pipeline([CanonicalizeActivations()]).run(graph)  # but not beyond the broadcast
    assert [node.op for node in graph.nodes] == ["aten.hardsigmoid", "aten.mul.Tensor"]


@settings(max_examples=60)
@given(cases(["hard_swish_written_out", "silu_written_out", "gelu_written_out", "unary"]))
def test_random_graphs(case: Case):
    after = case.graph.clone()
    Pipeline([CanonicalizeActivations()]).run(after)
    check(case.graph, after, case.inputs, tolerance=1e-6)
