"""Depthwise convolutions and pooling of bytes, bit for bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from integer_layers import (
    IntegerConvolution,
    Numbers,
    constant,
    grouped,
    requantized,
    ungrouped,
)
from support import execute
from test_integer_convolution import check

from graphopt.kernels.integer_problems import IntegerPoolingProblem
from graphopt.kernels.integer_windows import IntegerDepthwiseCandidate
from graphopt.kernels.operand import Operand
from graphopt.kernels.registry import candidates

SETTINGS = [(1, True, 0), (2, False, 0), (3, True, 64)]
Pair = tuple[int, int]


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", [(7, 7), (14, 9), (5, 40)])
@pytest.mark.parametrize("channels", [8, 6])
def test_depthwise(channels: int, size: Pair, stride: int) -> None:
    case = IntegerConvolution(
        (2, channels, *size),
        channels,
        (3, 3),
        (stride, stride),
        ((1, 1), (1, 1)),
        groups=channels,
        extreme=stride == 2,
    )
    found = candidates(case.case()[0])
    assert any(isinstance(one, IntegerDepthwiseCandidate) for one in found)
    check(case)


# Code is generated for a kernel's size and horizontal stride: few of them, so that tests are fast.
@settings(max_examples=40)
@given(
    st.sampled_from([(3, 3), (2, 3)]),
    st.tuples(st.integers(1, 3), st.integers(1, 2)),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.data(),
)
def test_any_depthwise(kernel: Pair, stride: Pair, dilation: Pair, data: st.DataObject) -> None:
    pads = st.tuples(st.integers(0, 2), st.integers(0, 2))
    size = [
        reach * (length - 1) + 1 + data.draw(st.integers(0, 20))
        for length, reach in zip(kernel, dilation, strict=True)
    ]
    channels = data.draw(st.integers(1, 9))
    x = (data.draw(st.integers(1, 2)), channels, size[0], size[1])
    padding = data.draw(st.tuples(pads, pads))
    check(
        IntegerConvolution(x, channels, kernel, stride, padding, dilation, groups=channels),
        everywhere=False,
    )


POOLS = [
    ((2, 8, 9, 7), (3, 3), (2, 2), 1),
    ((1, 6, 12, 40), (2, 2), (2, 2), 0),
    ((1, 4, 6, 6), (3, 2), (1, 1), 1),
    ((1, 4, 7, 7), (5, 5), (1, 1), 2),
]


@pytest.mark.parametrize(("shape", "kernel", "stride", "padding"), POOLS)
def test_maximum(shape: tuple[int, ...], kernel: Pair, stride: Pair, padding: int) -> None:
    x = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    expected = torch.max_pool2d(torch.tensor(x).float(), kernel, stride, padding).numpy()
    problem = IntegerPoolingProblem(
        (Operand.grouped("uint8", shape),),
        (Operand.grouped("uint8", expected.shape),),
        kernel,
        stride,
        ((padding, padding),) * 2,
    )
    (candidate,) = candidates(problem)
    for setting in SETTINGS:
        (result,) = execute(candidate, [grouped(x)], *setting)
        np.testing.assert_array_equal(ungrouped(result, expected.shape), expected)


@pytest.mark.parametrize(
    ("shape", "kernel", "stride", "padding"),
    [
        *POOLS,
        ((2, 6, 7, 7), (7, 7), (1, 1), 0),
        ((1, 8, 20, 11), (20, 11), (1, 1), 0),
        ((1, 4, 1, 1), (1, 1), (1, 1), 0),
    ],
)
def test_average(shape: tuple[int, ...], kernel: Pair, stride: Pair, padding: int) -> None:
    x = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    numbers = Numbers(90, 120, 5, 250)
    steps = torch.tensor(x).double() - numbers.x_zero_point
    divided = torch.nn.functional.avg_pool2d(steps, kernel, stride, padding, divisor_override=1)
    sums = divided.round().numpy().astype(np.int32)
    multiplier = np.full(shape[1], 1.3 / math.prod(kernel), np.float32)
    expected = requantized(sums, multiplier, numbers)
    constants = [multiplier, np.zeros(shape[1], np.int32), numbers.array]
    problem = IntegerPoolingProblem(
        (Operand.grouped("uint8", shape), *map(constant, constants)),
        (Operand.grouped("uint8", expected.shape),),
        kernel,
        stride,
        ((padding, padding),) * 2,
    )
    (candidate,) = candidates(problem)
    for setting in SETTINGS:
        (result,) = execute(candidate, [grouped(x), *constants], *setting)
        np.testing.assert_array_equal(ungrouped(result, expected.shape), expected)
