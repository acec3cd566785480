"""Convolutions that read the image where it lies, against torch in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import Convolution, chain, check, check_overwriting, numbers, with_padded
from support import execute
from test_convolution import EPILOGUES

from graphopt.kernels.direct_convolution import DirectCandidate
from graphopt.kernels.operand import Operand
from graphopt.kernels.registry import candidates
from graphopt.kernels.simd import LANES


def direct_candidates(case: Convolution) -> list[DirectCandidate]:
    shape = (case.x[0], case.outputs, *case.x[2:])
    return [one for one in candidates(case.problem(shape)) if isinstance(one, DirectCandidate)]


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
    case = Convolution((2, 5, *size), 11, (1, 1))
    x, weight, residual = numbers(case.x), numbers(case.weight, 1), numbers((2, 11, *size), 2)
    epilogue = chain(("add", "e0"), ("add", "e1"), extras=2)
    extras = [Operand.plain("float32", (11,)), Operand.plain("float32", residual.shape)]
    problem = with_padded(case.problem(residual.shape, epilogue, extras), places)
    bias = numbers((11,), 3)
    added = bias.reshape(-1, 1, 1) + residual.astype(np.float64)
    magnitude = case.convolve(np.abs(x), np.abs(weight)) + np.abs(bias).reshape(-1, 1, 1)
    assert any(isinstance(one, DirectCandidate) for one in candidates(problem))
    expected = case.convolve(x, weight) + added
    check(problem, [x, weight, bias, residual], expected, magnitude + np.abs(residual))


def test_a_residual_that_is_overwritten() -> None:
    # Whole panels of every tile; where the last one overlaps another, nothing may be overwritten.
    check_overwriting(Convolution((2, 5, 1, 84 * LANES), 13, (1, 1)), DirectCandidate)
    case = Convolution((1, 5, 1, 84 * LANES + 1), 13, (1, 1))
    y = Operand.plain("float32", (1, 13, *case.x[2:]))
    for one in candidates(case.problem(y.shape, chain(("add", "e0"), extras=1), [y])):
        assert not one.overwrites(), one.kernel


@pytest.mark.parametrize("name", EPILOGUES)
def test_epilogues(name: str) -> None:
    # What the packed kernels make of an epilogue is tested; these make the same.
    epilogue, shapes = EPILOGUES[name]
    wide = [(*shape[:2], 9, 15) if shape[2:] == (3, 7) else shape for shape in shapes]
    case = Convolution((2, 5, 9, 15), 11, (1, 1))
    x, weight = numbers(case.x), numbers(case.weight, 1)
    others = [numbers(shape, 2 + index) for index, shape in enumerate(wide)]
    extras = [Operand.plain("float32", shape) for shape in wide]
    found = candidates(case.problem((2, 11, 9, 15), epilogue, extras))
    direct = [one for one in found if isinstance(one, DirectCandidate)]
    packed = next(one for one in found if not isinstance(one, DirectCandidate))
    (expected,) = execute(packed, [x, weight, *others])
    magnitude = 20 * (1 + case.convolve(np.abs(x), np.abs(weight)))
    assert direct
    check(packed.problem, [x, weight, *others], expected, magnitude, found=direct)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_special_values_stay_where_they_belong(value: float) -> None:
    case = Convolution((2, 5, 9, 15), 11, (1, 1))
    x, weight = numbers(case.x), numbers(case.weight, 1)
    for place in (0, x.size // 2, x.size - 1):
        x.flat[place] = value
        with np.errstate(invalid="ignore"):
            expected = case.convolve(x, weight)
            finite = np.nan_to_num(x, posinf=0, neginf=0)
            magnitude = case.convolve(np.abs(finite), np.abs(weight))
        check(case.problem(expected.shape), [x, weight], expected, magnitude)


def test_what_is_left_to_others() -> None:
    assert not direct_candidates(Convolution((1, 5, 3, 3), 4, (1, 1)))
    assert not direct_candidates(Convolution((1, 5000, 9, 15), 4, (1, 1)))
    larger = Convolution((1, 5, 19, 15), 4, (3, 3), padding=((1, 1), (1, 1)))
    assert not direct_candidates(larger)
