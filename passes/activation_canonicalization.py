"""Activation functions that an exporter has written out become one operator each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from graphopt.ir import Graph
from graphopt.ir.patterns import Pattern
from graphopt.ir.rewriting import Decline, Match, Rule, either, op, rewrite, value
from graphopt.passes.arithmetic import Number, Polynomial, product
from graphopt.pipeline import Context, register_pass


def _clamped(inner: Any, least: float, most: float) -> Pattern:
    """An operand limited to an interval, in each way that ATen has for it."""
    low, high = Number(least), Number(most)
    from_below = [op("aten.clamp_min", inner, low), op("aten.clamp", inner, low)]
    if least == 0:
        from_below.append(op("aten.relu", inner))
    forms = [op(("aten.hardtanh", "aten.clamp"), inner, low, high)]
    if (least, most) == (0, 6):
        forms.append(op("aten.relu6", inner))
    forms.append(op("aten.clamp_max", either(*from_below), high))
    forms.append(op("aten.clamp", either(*from_below), None, high))
    return either(*forms)


def _one_plus(term: Pattern) -> Pattern:
    return op(("aten.add.Tensor", "aten.add.Scalar"), term, Number(1))


def _becomes(name: str, pattern: Pattern, operator: str, **attributes: Any) -> Rule:
    """A rule that replaces what a pattern over `x` matches by one operator applied to x."""

    def replacement(graph: Graph, match: Match) -> Any:
        x = match["x"]
        if x.types != match.root.output.types or not x.dtype.is_floating_point:
            return Decline(f"%{match.root.name} is not of the floating-point type of %{x.name}")
        return graph.add(operator, x, **attributes)

    return Rule(name, (pattern,), replacement)


_X = value("x")
_X_PLUS_3 = Polynomial("x", (3, 1))
_ERF = op("aten.erf", Polynomial("x", (0, math.sqrt(1 / 2))))
# Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016.
_SLOPE = math.sqrt(2 / math.pi)
_TANH = op("aten.tanh", Polynomial("x", (0, _SLOPE, 0, _SLOPE * 0.044715)))

RULES = [
    _becomes("relu6(x + 3) / 6 => hardsigmoid(x)",
             product(1 / 6, _clamped(_X_PLUS_3, 0, 6)), "aten.hardsigmoid"),
    _becomes("clamp(x / 6 + 1 / 2, 0, 1) => hardsigmoid(x)",
             _clamped(Polynomial("x", (1 / 2, 1 / 6)), 0, 1), "aten.hardsigmoid"),
    _becomes("x * relu6(x + 3) / 6 => hardswish(x)",
             product(1 / 6, _X, _clamped(_X_PLUS_3, 0, 6)), "aten.hardswish"),
    _becomes("x * hardsigmoid(x) => hardswish(x)",
             product(1, _X, op("aten.hardsigmoid", _X)), "aten.hardswish"),
    _becomes("x * sigmoid(x) => silu(x)", product(1, _X, op("aten.sigmoid", _X)), "aten.silu"),
    _becomes("x * tanh(softplus(x)) => mish(x)",
             product(1, _X, op("aten.tanh", op("aten.softplus", _X))), "aten.mish"),
    _becomes("x / 2 * (1 + erf(x / sqrt(2))) => gelu(x)",
             product(1 / 2, _X, _one_plus(_ERF)), "aten.gelu"),
    _becomes("x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x ** 3))) => gelu(x, 'tanh')",
             product(1 / 2, _X, _one_plus(_TANH)), "aten.gelu", approximate="tanh"),
]  # fmt: skip


@register_pass("canonicalize-activations")
@dataclass(frozen=True)
class CanonicalizeActivations:
    """Recognises hard-sigmoid, hard-swish, SiLU, Mish and GELU where they are written out."""

    def run(self, graph: Graph, ctx: Context) -> bool:
        return rewrite(graph, RULES)
