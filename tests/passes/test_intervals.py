"""Bounds on elements, against what is computed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pass_support import Net

from graphopt import reference
from graphopt.passes.intervals import UNKNOWN, bounds

INF = math.inf
# Operators applied to elements between 1 and 2.
NARROW: dict[str, tuple[tuple[float, float], list[Any]]] = {
    "relu": ((1, 2), ["aten.relu"]),
    "clamp_min": ((1.5, 2), ["aten.clamp_min", 1.5]),
    "clamp_max": ((1, 1.5), ["aten.clamp_max", 1.5]),
    "clamp above": ((3, 3), ["aten.clamp", 3.0]),
    "clamp crossed": ((-1, -1), ["aten.clamp", 0, -1]),
    "hardtanh": ((1, 1), ["aten.hardtanh"]),
    "sigmoid": ((0, 1), ["aten.sigmoid"]),
    "relu6": ((0, 6), ["aten.relu6"]),
    "tanh": ((-1, 1), ["aten.tanh"]),
    "exp": ((0, INF), ["aten.exp"]),
    "abs": ((0, INF), ["aten.abs"]),
    "softmax": ((0, 1), ["aten.softmax.int", -1]),
    "add": ((4, 5), ["aten.add.Tensor", 3]),
    "sub": ((-2, -1), ["aten.sub.Tensor", 3]),
    "rsub": ((1, 2), ["aten.rsub.Scalar", 3.0]),
    "mul": ((-4, -2), ["aten.mul.Tensor", -2.0]),
    "add alpha": (UNKNOWN, ["aten.add.Scalar", 3, 2]),
    "view": ((1, 2), ["aten.unsqueeze", 0]),
    "slice": ((1, 2), ["aten.slice.Tensor", 1, 0, 2]),
    "max pool": ((1, 2), ["aten.max_pool1d", [2]]),
    "overflow": ((1e39, INF), ["aten.mul.Tensor", 1e39]),
    "unknown": (UNKNOWN, ["aten.sin"]),
}


@pytest.mark.parametrize("name", NARROW)
def test_operators(name):
    expected, (op, *rest) = NARROW[name]
    net = Net(4, 6)
    y = net(op, net("aten.clamp", net.x, 1, 2), *rest)
    low, high = bounds(y)
    (result,) = reference.run(net.done(y), [torch.linspace(-3, 5, 48).reshape(2, 4, 6)])
    assert low <= result.min().item()
    assert result.max().item() <= high
    assert (low, high) == expected


def test_two_operands():
    net = Net(4)
    a, b = net("aten.clamp", net.x, -1, 2), net("aten.clamp", net.x, -3, 5)
    assert bounds(net("aten.mul.Tensor", a, b)) == (-6, 10)
    assert bounds(net("aten.add.Tensor", a, b)) == (-4, 7)
    assert bounds(net("aten.sub.Tensor", a, b)) == (-6, 5)
    assert bounds(net("aten.rsub.Tensor", a, b)) == (-5, 6)
    condition = net("aten.gt.Scalar", net.x, 0)
    assert bounds(net("aten.where.self", condition, a, b)) == (-3, 5)
    assert bounds(net("aten.masked_fill.Scalar", a, condition, -INF)) == (-INF, 2)
    assert bounds(net("aten.to.dtype", condition, torch.float32)) == (0, 1)
    assert bounds(net("aten.mul.Tensor", net.x, 0.0)) == UNKNOWN


def test_constants_and_numbers():
    net = Net(4)
    assert bounds(net.known([1.0, math.nan, -2.0])) == (-2, 1)
    assert bounds(net.known([[]])) == UNKNOWN
    assert bounds(3) == (3, 3)
    assert bounds(math.nan) == UNKNOWN
    assert bounds(None) == UNKNOWN
    assert bounds(net.x) == UNKNOWN
    assert bounds(net("aten.to.dtype", net.x, torch.int64)) == UNKNOWN


def test_long_ways_back_are_not_gone():
    net = Net(4)
    y = net("aten.clamp", net.x, 0, 1e-9)
    for _ in range(40):
        y = net("aten.add.Tensor", y, y)
    assert bounds(y) == UNKNOWN
