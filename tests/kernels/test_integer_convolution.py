"""int8 convolutions, bit for bit against int32 sums and the arithmetic that is specified."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from integer_layers import IntegerConvolution, ungrouped
from support import execute

from graphopt.kernels.registry import candidates

SETTINGS = [(1, True, 0), (2, False, 0), (3, True, 64)]


def check(case: IntegerConvolution, everywhere: bool = True) -> None:
    """Every candidate gives the exact result."""
    problem, inputs, expected = case.case()
    found = candidates(problem)
    assert found
    for candidate in found:
        for threads, at_end, offset in SETTINGS if everywhere else SETTINGS[:1]:
            (result,) = execute(candidate, inputs, threads, at_end, offset)
            own = result if case.floating else ungrouped(result, expected.shape)
            np.testing.assert_array_equal(own, expected, candidate.kernel)


SHAPES = {
    "single pixels": {"x": (2, 16, 5, 7), "outputs": 12},
    "channels that fill no word": {"x": (1, 3, 9, 9), "outputs": 5},
    "many pixels": {"x": (1, 8, 17, 19), "outputs": 9},
    "3x3": {"x": (2, 8, 9, 7), "outputs": 8, "kernel": (3, 3), "padding": ((1, 1), (1, 1))},
    "stride": {"x": (1, 8, 9, 14), "outputs": 4, "stride": (2, 2)},
    "stride of 3": {"x": (1, 4, 9, 14), "outputs": 4, "stride": (3, 3), "kernel": (2, 2)},
    "padding that makes up for a stride": {
        "x": (2, 10, 2, 1),
        "outputs": 4,
        "stride": (2, 2),
        "padding": ((0, 1), (0, 0)),
    },
    "first layer": {
        "x": (1, 3, 20, 22),
        "outputs": 8,
        "kernel": (7, 7),
        "stride": (2, 2),
        "padding": ((3, 3), (3, 3)),
    },
    "dilation": {
        "x": (1, 8, 11, 12),
        "outputs": 8,
        "kernel": (3, 3),
        "dilation": (2, 3),
        "padding": ((2, 1), (3, 4)),
    },
    "groups": {"x": (2, 16, 6, 5), "outputs": 24, "groups": 2, "kernel": (3, 3)},
    "narrow groups": {"x": (1, 12, 6, 5), "outputs": 24, "groups": 6, "kernel": (3, 3)},
    "depthwise": {"x": (1, 12, 9, 9), "outputs": 12, "groups": 12, "kernel": (3, 3)},
    "odd depthwise": {"x": (1, 6, 9, 9), "outputs": 6, "groups": 6, "kernel": (3, 3)},
    "one pixel of many": {"x": (2, 8, 5, 5), "outputs": 8, "kernel": (5, 5)},
    "one pixel of one": {"x": (3, 8, 1, 1), "outputs": 8},
    "deep": {"x": (1, 512, 4, 4), "outputs": 8, "kernel": (3, 3), "padding": ((1, 1), (1, 1))},
}


@pytest.mark.parametrize("finish", ["bytes", "residual", "floating"])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str, finish: str) -> None:
    case = IntegerConvolution(
        **SHAPES[name], residual=finish == "residual", floating=finish == "floating"
    )
    check(case)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["single pixels", "3x3", "depthwise", "deep"])
def test_nothing_saturates_in_between(name: str, seed: int) -> None:
    check(IntegerConvolution(**SHAPES[name], extreme=True, seed=seed), everywhere=False)


@pytest.mark.parametrize("name", ["single pixels", "3x3", "depthwise"])
@pytest.mark.parametrize("residual", [True, False])
def test_halves_round_to_even(name: str, residual: bool) -> None:
    case = IntegerConvolution(**SHAPES[name], residual=residual)
    case.weight = np.sign(case.weight)
    case.bias[...] = 0
    case.multiplier[...] = 0.5
    case.numbers.residual_multiplier = 0.25
    assert (case.sums() % 2 == 1).any()
    check(case, everywhere=False)


@st.composite
def convolutions(draw: st.DrawFn) -> IntegerConvolution:
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    pads = st.tuples(st.integers(0, 3), st.integers(0, 3))
    padding = draw(st.tuples(pads, pads))
    least = [
        max(1, reach * (size - 1) + 1 - sum(pad))
        for size, reach, pad in zip(kernel, dilation, padding, strict=True)
    ]
    size = [n + draw(st.integers(0, 20)) for n in least]
    groups = draw(st.sampled_from([1, 1, 2, 3, 4, 8]))
    channels, outputs = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    finish = draw(st.sampled_from(["bytes", "residual", "floating"]))
    return IntegerConvolution(
        (draw(st.integers(1, 2)), groups * channels, size[0], size[1]),
        groups * outputs,
        kernel,
        draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        padding,
        dilation,
        groups,
        residual=finish == "residual",
        floating=finish == "floating",
        extreme=draw(st.booleans()),
        seed=draw(st.integers(0, 2**20)),
    )


@settings(max_examples=100)
@given(convolutions())
def test_any_convolution(case: IntegerConvolution) -> None:
    check(case, everywhere=False)
