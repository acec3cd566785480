"""Convolutions that read the image where it lies, against torch in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import Convolution, chain, check_overwriting, of_kind
from test_convolution import EPILOGUES, check_epilogue

from graphopt.kernels.direct_convolution import DirectCandidate
from graphopt.kernels.operand import Operand
from graphopt.kernels.registry import Candidate, candidates
from graphopt.kernels.simd import LANES


def direct_candidates(case: Convolution) -> list[Candidate]:
    shape = (case.x[0], case.outputs, *case.x[2:])
    return of_kind(case.problem(shape), DirectCandidate)


@pytest.mark.parametrize("outputs", [1, 3, 8, 13, 24])
@pytest.mark.parametrize(
    "pixels", [3 * LANES, 3 * LANES + 1, 4 * LANES, 7 * LANES - 1, 7 * LANES, 15 * LANES + 5]
)
def test_sizes(outputs: int, pixels: int) -> None:
    case = Convolution((2, 5, 1, pixels), outputs, (1, 1))
    assert direct_candidates(case)
    case.check()


@settings(max_examples=settings().max_examples // 2)
@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 30), st.integers(1, 30), st.data())
def test_any_size(
    batch: int, groups: int, channels: int, outputs: int, data: st.DataObject
) -> None:
    size = data.draw(st.tuples(st.integers(1, 20), st.integers(1, 20)))
    x = (batch, groups * channels, *size)
    Convolution(x, groups * outputs, (1, 1), groups=groups).check()


@pytest.mark.parametrize("places", [(0, -1), (0,), (-1,), (0, 3)])
@pytest.mark.parametrize("size", [(9, 15), (1, 7 * LANES), (14, 14)])
def test_padded_planes(places: tuple[int, ...], size: tuple[int, int]) -> None:
    Convolution((2, 5, *size), 11, (1, 1)).check_residual(places, DirectCandidate)


def test_a_residual_that_is_overwritten() -> None:
    # Whole panels of every tile; where the last one overlaps another, nothing may be overwritten.
    check_overwriting(Convolution((2, 5, 1, 84 * LANES), 13, (1, 1)), DirectCandidate)
    case = Convolution((1, 5, 1, 84 * LANES + 1), 13, (1, 1))
    y = Operand.plain("float32", (1, 13, *case.x[2:]))
    for one in candidates(case.problem(y.shape, chain(("add", "e0"), extras=1), [y])):
        assert not one.overwrites(), one.kernel


@pytest.mark.parametrize("name", EPILOGUES)
def test_epilogues(name: str) -> None:
    check_epilogue(name, Convolution((2, 5, 9, 15), 11, (1, 1)), DirectCandidate)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_special_values_stay_where_they_belong(value: float) -> None:
    Convolution((2, 5, 9, 15), 11, (1, 1)).check_special(value)


def test_what_is_left_to_others() -> None:
    assert not direct_candidates(Convolution((1, 5, 3, 3), 4, (1, 1)))
    assert not direct_candidates(Convolution((1, 5000, 9, 15), 4, (1, 1)))
    larger = Convolution((1, 5, 19, 15), 4, (3, 3), padding=((1, 1), (1, 1)))
    assert not direct_candidates(larger)
