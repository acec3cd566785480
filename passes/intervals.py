"""Intervals that hold the elements of a value, as far as the operators before it tell."""

from __future__ import annotations

import itertools
import math

import torch

from graphopt.ir import Node, Operand, Value
from graphopt.passes.channels import is_view

Interval = tuple[float, float]
UNKNOWN: Interval = (-math.inf, math.inf)
DEPTH = 12  # how many operators back is looked

# Operators whose results lie in an interval whatever their operands.
_RANGES: dict[str, Interval] = {
    "sigmoid": (0.0, 1.0),
    "hardsigmoid": (0.0, 1.0),
    "softmax": (0.0, 1.0),
    "relu6": (0.0, 6.0),
    "tanh": (-1.0, 1.0),
    "exp": (0.0, math.inf),
    "abs": (0.0, math.inf),
    "square": (0.0, math.inf),
}
# Operators whose results are elements of their operand ``self``.
_CHOICES = frozenset("expand slice select to max_pool1d max_pool2d max_pool3d".split())
_LIMITS: dict[str, tuple[str | float | None, str | None]] = {
    "relu": (0.0, None),
    "clamp_min": ("min", None),
    "clamp_max": (None, "max"),
    "clamp": ("min", "max"),
    "hardtanh": ("min_val", "max_val"),
}


def bounds(operand: Operand, depth: int = DEPTH) -> Interval:
    """An interval that holds every element that is not NaN; `UNKNOWN` where nothing tells.

    A result that may overflow its dtype has an infinite bound.
    """
    if isinstance(operand, (bool, int, float)):
        return UNKNOWN if math.isnan(operand) else (float(operand), float(operand))
    if not isinstance(operand, Value) or not operand.is_tensor or operand.dtype.is_complex:
        return UNKNOWN
    if operand.dtype == torch.bool:
        return 0.0, 1.0
    if operand.constant is not None:
        elements = operand.constant.double()
        elements = elements[~elements.isnan()]
        return (elements.min().item(), elements.max().item()) if elements.numel() else UNKNOWN
    if depth == 0 or operand.producer is None or not operand.dtype.is_floating_point:
        return UNKNOWN
    low, high = _of_result(operand.producer, depth - 1)
    largest = torch.finfo(operand.dtype).max
    return (low if low >= -largest else -math.inf, high if high <= largest else math.inf)


def _of_result(node: Node, depth: int) -> Interval:
    name = node.op.split(".")[1]
    if name in _RANGES:
        return _RANGES[name]
    if is_view(node) or name in _CHOICES:
        return bounds(node["self"], depth)
    if name in _LIMITS:
        return _limited(node, depth, *_LIMITS[name])
    if name in ("where", "masked_fill"):
        one, other = (
            bounds(node["self"], depth),
            bounds(node["other" if name == "where" else "value"], depth),
        )
        return min(one[0], other[0]), max(one[1], other[1])
    if name == "mul":
        products = [
            a * b
            for a, b in itertools.product(bounds(node["self"], depth), bounds(node["other"], depth))
        ]
        return UNKNOWN if any(map(math.isnan, products)) else (min(products), max(products))
    if name in ("add", "sub", "rsub") and node["alpha"] == 1:
        (a, b), (c, d) = bounds(node["self"], depth), bounds(node["other"], depth)
        return {"add": (a + c, b + d), "sub": (a - d, b - c), "rsub": (c - b, d - a)}[name]
    return UNKNOWN


def _limited(
    node: Node, depth: int, lower: str | float | None, upper: str | float | None
) -> Interval:
    """The bounds of min(max(x, lower), upper); names stand for the node's operands."""
    low, high = bounds(node["self"], depth)
    least, most = (node[limit] if isinstance(limit, str) else limit for limit in (lower, upper))
    if least is not None:
        limit = bounds(least, depth)
        low, high = max(low, limit[0]), max(high, limit[1])
    if most is not None:
        limit = bounds(most, depth)
        low, high = min(low, limit[0]), min(high, limit[1])
    return low, high
