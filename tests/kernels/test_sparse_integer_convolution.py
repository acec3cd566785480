"""int8 convolutions that skip zeros, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from integer_layers import IntegerConvolution, ungrouped
from support import execute
from test_integer_convolution import SETTINGS, check

from graphopt.kernels.registry import candidates
from graphopt.kernels.sparse_integer_convolution import (
    Schedule,
    SparseIntegerConvolutionCandidate,
)

SHAPES = {
    "single pixels": {"x": (2, 32, 9, 15), "outputs": 12},
    "few pixels": {"x": (1, 32, 4, 3), "outputs": 9},
    "many pixels": {"x": (1, 16, 17, 19), "outputs": 8},
    "words in part": {"x": (1, 30, 7, 7), "outputs": 10},
    "3x3": {"x": (2, 16, 9, 9), "outputs": 8, "kernel": (3, 3), "padding": ((1, 1), (1, 1))},
    "stride": {"x": (1, 16, 21, 20), "outputs": 8, "stride": (2, 2)},
    "groups": {"x": (2, 32, 8, 6), "outputs": 16, "groups": 2, "kernel": (3, 3)},
}


def sparse_candidate(case: IntegerConvolution) -> SparseIntegerConvolutionCandidate:
    (found,) = (
        one
        for one in candidates(case.case()[0])
        if isinstance(one, SparseIntegerConvolutionCandidate)
    )
    return found


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("finish", ["bytes", "residual", "floating"])
@pytest.mark.parametrize("name", SHAPES)
def test_schedules(name: str, finish: str, rows: int) -> None:
    case = IntegerConvolution(
        **SHAPES[name], residual=finish == "residual", floating=finish == "floating", density=0.2
    )
    _, inputs, expected = case.case()
    chosen = sparse_candidate(case)
    width = 4 if chosen.image.vectors >= 4 else 1
    candidate = replace(chosen, schedule=Schedule(rows, width))
    for threads, at_end, offset in SETTINGS:
        (result,) = execute(candidate, inputs, threads, at_end, offset)
        own = result if case.floating else ungrouped(result, expected.shape)
        np.testing.assert_array_equal(own, expected)


@pytest.mark.parametrize("block", [1, 2, 4])
def test_blocks_are_recognised(block: int) -> None:
    case = IntegerConvolution((1, 256, 8, 8), 64, density=0.2, block=block)
    assert sparse_candidate(case).schedule.rows == block
    check(case)


def test_weights_with_few_zeros_are_left_to_others() -> None:
    case = IntegerConvolution((1, 256, 8, 8), 64, density=0.9)
    found = candidates(case.case()[0])
    assert not any(isinstance(one, SparseIntegerConvolutionCandidate) for one in found)


def test_a_weight_of_nothing_but_zeros() -> None:
    check(IntegerConvolution((1, 16, 9, 9), 8, density=0.0))


@settings(max_examples=60)
@given(
    st.integers(1, 40), st.integers(1, 20), st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.sampled_from([(1, 1), (3, 3), (2, 1)]), st.floats(0.0, 0.6), st.sampled_from([1, 2, 4]),
    st.integers(0, 2**20),
)  # fmt: skip
def test_any_convolution(
    channels: int,
    outputs: int,
    size: tuple[int, int],
    kernel: tuple[int, int],
    density: float,
    block: int,
    seed: int,
) -> None:
    x = (1, channels, size[0] + 2, size[1] + 2)
    case = IntegerConvolution(
        x, outputs, kernel, padding=((0, 1), (1, 0)), density=density, block=block, seed=seed
    )
    check(case, everywhere=False)
