"""Convolutions of few channels by copied rows, against torch in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import Convolution, of_kind
from test_convolution import EPILOGUES, check_epilogue

from graphopt.kernels.registry import Candidate
from graphopt.kernels.row_convolution import RowCandidate
from graphopt.kernels.simd import LANES

SAME = ((1, 1), (1, 1))
WIDE = ((3, 3), (3, 3))
CASES = {
    "first of ResNet": Convolution((1, 3, 40, 8 * LANES), 13, (7, 7), (2, 2), WIDE),
    "first of MobileNet": Convolution((2, 3, 19, 8 * LANES + 3), 9, (3, 3), (2, 2), SAME),
    "patches": Convolution((1, 3, 12, 16 * LANES), 7, (4, 4), (4, 4)),
    "without a stride": Convolution((2, 2, 7, 3 * LANES), 5, (3, 3), padding=SAME),
    "a pixel more": Convolution((1, 2, 5, 3 * LANES + 1), 4, (3, 3), padding=SAME),
    "uneven strides": Convolution((1, 3, 17, 10 * LANES), 5, (3, 3), (1, 3), SAME),
    "dilated": Convolution((1, 2, 13, 5 * LANES), 3, (3, 3), (), ((2, 2), (3, 3)), (2, 3)),
    "dilated and strided": Convolution((1, 2, 30, 9 * LANES), 3, (3, 5), (3, 2), WIDE, (2, 3)),
    "uneven padding": Convolution((1, 3, 11, 7 * LANES), 4, (3, 3), (2, 2), ((0, 1), (0, 1))),
    "a wide tile": Convolution((1, 2, 5, 7 * LANES), 4, (3, 3), padding=SAME),
    "more padding than image": Convolution((1, 1, 2, 3 * LANES), 2, (5, 5), (), ((9, 4), (4, 9))),
    "one output row": Convolution((1, 3, 3, 4 * LANES), 6, (3, 3)),
    "a row of a kernel": Convolution((1, 4, 5, 4 * LANES), 6, (1, 7)),
    "a column of a kernel": Convolution((1, 4, 9, 4 * LANES), 6, (7, 1)),
    "sequence": Convolution((2, 4, 7 * LANES), 6, (5,), (2,), ((4, 0),)),
    "one output": Convolution((1, 3, 9, 4 * LANES), 1, (3, 3)),
}


@pytest.mark.parametrize("name", CASES)
def test_shapes(name: str) -> None:
    CASES[name].check(kind=RowCandidate)


# What the text of a kernel depends on, and so what is compiled: columns, stride, dilation.
ACROSS = [(3, 1, 1), (3, 2, 1), (7, 2, 1), (4, 3, 2)]


@settings(max_examples=settings().max_examples // 2)
@given(st.sampled_from(ACROSS), st.data())
def test_any_shape(across: tuple[int, int, int], data: st.DataObject) -> None:
    down = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 2)))
    kernel, stride, dilation = zip(down, across, strict=True)
    reach = [(size - 1) * step for size, step in zip(kernel, dilation, strict=True)]
    padding = tuple(data.draw(st.tuples(st.integers(0, r), st.integers(0, r))) for r in reach)
    # At least as wide as the least wide tile of any CPU's.
    least = 3 * LANES * stride[1] + reach[1]
    height, width = (data.draw(st.integers(low + 1, low + 20)) for low in (reach[0], least))
    x = (data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3)), height, width)
    outputs = data.draw(st.integers(1, 17))
    Convolution(x, outputs, kernel, stride, padding, dilation).check(kind=RowCandidate)


@pytest.mark.parametrize("places", [(0, -1), (0,), (-1,), (0, 3)])
def test_padded_planes(places: tuple[int, ...]) -> None:
    CASES["first of MobileNet"].check_residual(places, RowCandidate)


@pytest.mark.parametrize("name", EPILOGUES)
def test_epilogues(name: str) -> None:
    case = Convolution((2, 5, 3, 3 * LANES + 2), 11, (3, 3), padding=SAME)
    check_epilogue(name, case, RowCandidate)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_special_values_stay_where_they_belong(value: float) -> None:
    CASES["first of MobileNet"].check_special(value)


def row_candidates(case: Convolution) -> list[Candidate]:
    shape = case.convolve(np.zeros(case.x), np.zeros(case.weight)).shape
    return of_kind(case.problem(shape), RowCandidate)


def test_what_is_left_to_others() -> None:
    wide = 8 * LANES
    assert not row_candidates(Convolution((1, 3, 9, wide), 4, (1, 1)))
    assert not row_candidates(Convolution((1, 3, 9, 9), 4, (3, 3)))
    assert not row_candidates(Convolution((1, 17, 9, wide), 4, (3, 3)))
    assert not row_candidates(Convolution((1, 4, 9, wide), 4, (3, 3), groups=2))
    assert not row_candidates(Convolution((1, 3, 9, wide), 4, (3, 8)))
    assert not row_candidates(Convolution((1, 3, 9, 4000), 4, (3, 3)))
