"""Convolutions with zeros in their weights against torch in float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from layers import (
    SETTINGS,
    Convolution,
    chain,
    check,
    check_overwriting,
    numbers,
    pruned,
    with_padded,
)
from support import execute
from test_convolution import CASES as DENSE_CASES
from test_convolution import EPILOGUES, SAME, cases

from graphopt.kernels import nonzeros
from graphopt.kernels.operand import Operand
from graphopt.kernels.problem import ConvolutionProblem
from graphopt.kernels.registry import Candidate, candidates
from graphopt.kernels.simd import LANES
from graphopt.kernels.sparse_convolution import SparseConvolutionCandidate
from graphopt.kernels.zeros import zero_pattern


def sparse_candidates(case: Convolution, weight: np.ndarray) -> list[Candidate]:
    y = case.convolve(np.zeros(case.x), weight)
    found = candidates(case.problem(y.shape, zeros=zero_pattern(weight)))
    return [one for one in found if isinstance(one, SparseConvolutionCandidate)]


CASES = DENSE_CASES | {
    "tall": Convolution((1, 9, 5, 5), 70, (3, 3), padding=SAME),
    "as many pixels as a panel": Convolution((1, 9, 1, 5 * LANES), 6, (1, 1)),
    "a pixel more than a panel": Convolution((1, 9, 1, 5 * LANES + 1), 6, (1, 1)),
    "blocks of depth": Convolution((1, 300, 4, 5), 10, (1, 1)),
    "uneven blocks of depth": Convolution((1, 211, 4, 5), 10, (3, 3), padding=SAME),
}

TAILS = {
    "7 x 7": Convolution((2, 300, 7, 7), 21, (1, 1)),
    "14 x 14": Convolution((1, 60, 14, 14), 19, (3, 3), padding=SAME),
    "eight lanes": Convolution((1, 150, 1, 6 * 16 + 7), 9, (1, 1)),
    "two panels, stride 2": Convolution((1, 40, 14, 35), 5, (3, 3), stride=(2, 2)),
    "stride 3, groups": Convolution((1, 40, 20, 20), 18, (2, 2), groups=2, stride=(3, 3)),
}
"""Convolutions whose last pixels are in a narrower vector where vectors have 16 lanes."""


@pytest.mark.parametrize("name", CASES)
def test_shapes(name: str) -> None:
    case = CASES[name]
    weight = pruned(case.weight, 0.2)
    weight.flat[1::2] = 0  # small weights are not left without a zero
    if case.x[0]:
        assert sparse_candidates(case, weight) or weight.size == 1
    case.check(weight)


@settings(max_examples=settings().max_examples // 2)
@given(cases(), st.sampled_from([0.0, 0.1, 0.4]), st.sampled_from([1, 2, 4]))
def test_any_shape(case: Convolution, density: float, rows: int) -> None:
    case.check(pruned(case.weight, density, rows))


def with_residual(
    case: Convolution, rows: int
) -> tuple[ConvolutionProblem, list[np.ndarray], np.ndarray, np.ndarray]:
    """A pruned convolution to which something is added, then relu: the problem, its inputs, the
    result and its magnitude."""
    x, weight = numbers(case.x), pruned(case.weight, 0.2, rows)
    y = case.convolve(x, weight)
    added = numbers(y.shape, 2)
    problem = case.problem(
        y.shape,
        chain(("add", "e0"), ("relu",), extras=1),
        [Operand.plain("float32", y.shape)],
        zero_pattern(weight),
    )
    magnitude = 20 * (1 + case.convolve(np.abs(x), np.abs(weight)))
    return problem, [x, weight, added], np.maximum(y + added, 0), magnitude


def check_arranged(
    case: Convolution,
    rows: int,
    places: Sequence[int],
    kind: type[SparseConvolutionCandidate],
    halves: bool = False,
) -> list[SparseConvolutionCandidate]:
    """Check all candidates of a kind, of which there must be some, for `with_residual` and layouts
    of `with_padded`; the candidates."""
    problem, inputs, expected, magnitude = with_residual(case, rows)
    problem = with_padded(problem, places, halves)
    found = [one for one in candidates(problem) if isinstance(one, kind)]
    assert found
    check(problem, inputs, expected, magnitude, found=found)
    return found


def extremes(found: Sequence[SparseConvolutionCandidate]) -> list[Candidate]:
    """The one with the most rows at once and, of these, the most blocks; and the last."""
    most = max(one.schedule.rows for one in found)
    blocked = min(found, key=lambda one: (one.schedule.rows != most, one.schedule.depth))
    return [blocked, found[-1]]


@pytest.mark.parametrize("name", TAILS)
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_tails(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nonzeros, "_TAIL_COST", 0.5)
    problem, inputs, expected, magnitude = with_residual(TAILS[name], rows)
    found = [one for one in candidates(problem) if type(one) is SparseConvolutionCandidate]
    assert LANES != 16 or all(one.schedule.tail for one in found)
    check(problem, inputs, expected, magnitude, found=extremes(found))


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("x", [(2, 300, 7, 7), (1, 40, 9, 13)])
def test_a_residual_that_is_overwritten(x: tuple[int, ...], rows: int) -> None:
    check_overwriting(Convolution(x, 21, (1, 1)), SparseConvolutionCandidate, 0.2, rows)


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("groups", [1, 2])
def test_panels_that_stay_in_the_image(rows: int, groups: int) -> None:
    case = Convolution((2, 300, 3, 4 * LANES), 22, (1, 1), groups=groups)
    weight = pruned(case.weight, 0.2, rows)
    stay = {one.schedule.pitch > 0 for one in sparse_candidates(case, weight)}  # type: ignore[attr-defined]
    assert stay == {True} or LANES < 16, "narrow panels of short vectors are copied"
    case.check(weight)


PADDED = {
    "14 x 14": (Convolution((1, 300, 14, 14), 21, (1, 1)), True),
    "7 x 7": (Convolution((2, 60, 7, 7), 18, (1, 1), groups=2), True),
    "16 x 16": (Convolution((1, 60, 16, 16), 9, (1, 1)), True),
    "11 pixels": (Convolution((1, 60, 4 * LANES - 5), 9, (1,)), True),
    "under a 3x3 kernel": (Convolution((1, 40, 7, 9), 19, (3, 3), padding=SAME), False),
    "stride 2": (Convolution((2, 40, 14, 13), 10, (3, 3), stride=(2, 2), padding=SAME), False),
}
"""Convolutions, and whether their panels are not copied where planes are padded."""


@pytest.mark.parametrize("name", PADDED)
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("places", [(0, 2, -1), (0,), (-1,)])
def test_padded_planes(name: str, rows: int, places: tuple[int, ...]) -> None:
    case, stays = PADDED[name]
    found = check_arranged(case, rows, places, SparseConvolutionCandidate)
    if 0 in places and stays and LANES == 16:
        assert all(one.schedule.pitch for one in found)


HALVES = {
    "14 x 14": Convolution((1, 300, 14, 14), 21, (1, 1)),
    "28 x 28": Convolution((1, 70, 28, 28), 9, (1, 1)),
    "two pixels": Convolution((1, 60, 2, 1), 9, (1, 1)),
    "groups": Convolution((1, 60, 6, 19), 18, (1, 1), groups=2),
    "copied": Convolution((1, 40, 8, 2 * LANES), 9, (1, 1)),
    "under a 3x3 kernel": Convolution((1, 40, 8, 9), 19, (3, 3), padding=SAME),
    "stride 2": Convolution((1, 40, 28, 13), 10, (3, 3), stride=(2, 2), padding=SAME),
    "only one pixel of four": Convolution((1, 60, 20, 22), 12, (1, 1), stride=(2, 2)),
    "dilation": Convolution(
        (1, 30, 12, 11), 9, (3, 2), dilation=(3, 2), padding=((3, 3), (1, 2)), groups=3
    ),
    "stride 3": Convolution((1, 40, 22, 20), 9, (3, 3), stride=(3, 3), padding=((1, 1), (0, 0))),
}
"""Convolutions of images with evenly many rows, as are their results."""


@pytest.mark.parametrize("name", HALVES)
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("places", [(0, 2, -1), (0,), (2, -1)])
def test_halves(name: str, rows: int, places: tuple[int, ...]) -> None:
    found = check_arranged(HALVES[name], rows, places, SparseConvolutionCandidate, halves=True)
    assert len(found) == len(candidates(found[0].problem)), "no other kernel knows of halves"


@settings(max_examples=settings().max_examples // 2)
@given(
    st.tuples(*(st.integers(1, most) for most in (20, 9, 7, 21))),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(*(st.integers(1, most) for most in (3, 3, 2, 3))),
    st.tuples(*(st.integers(0, 2) for _ in range(4))),
    st.sampled_from([(0, -1), (0,), (-1,)]),
)
def test_any_halves(
    size: tuple[int, int, int, int],
    kernel: tuple[int, int],
    steps: tuple[int, int, int, int],
    around: tuple[int, int, int, int],
    places: tuple[int, ...],
) -> None:
    channels, outputs, rows, columns = size
    case = Convolution(
        (1, channels, 2 * rows, columns),
        outputs,
        kernel,
        steps[:2],
        (around[:2], around[2:]),
        steps[2:],
    )
    spans = [(k - 1) * d for k, d in zip(kernel, steps[2:], strict=True)]
    reach = [2 * rows + sum(around[:2]) - spans[0], columns + sum(around[2:]) - spans[1]]
    assume(min(reach) > 0)
    assume(-1 not in places or -(-reach[0] // steps[0]) % 2 == 0)
    weight = pruned(case.weight, 0.3)
    assume(zero_pattern(weight) is not None)
    x = numbers(case.x)
    expected = case.convolve(x, weight)
    magnitude = case.convolve(np.abs(x), np.abs(weight))
    problem = with_padded(
        case.problem(expected.shape, zeros=zero_pattern(weight)), places, halves=True
    )
    found = candidates(problem)
    check(problem, [x, weight], expected, magnitude, found=found[:3])


def test_what_is_added_to_halves_is_in_halves() -> None:
    problem, *_ = with_residual(HALVES["14 x 14"], 1)
    assert not candidates(with_padded(problem, (-1,), halves=True))
    assert not candidates(with_padded(problem, (2,), halves=True))


def test_panels_that_are_copied() -> None:
    # Rows of panels that lie in the same sets of the first cache, or not on its lines.
    for width in (1024, 12 * LANES + 1, 3 * LANES):
        case = Convolution((1, 40, 1, width), 9, (1, 1))
        weight = pruned(case.weight, 0.2)
        found = sparse_candidates(case, weight)
        assert not any(one.schedule.pitch for one in found)  # type: ignore[attr-defined]
        case.check(weight)


def test_pixels_of_two_rows_are_no_tail() -> None:
    # A tail is copied as one piece. Both have one to eight pixels behind three whole vectors.
    column = Convolution((1, 60, 51, 2), 9, (1, 2))
    pairs = Convolution((1, 60, 28, 5), 9, (3, 3), stride=(1, 2))
    for case in (column, pairs):
        weight = pruned(case.weight, 0.2)
        found = sparse_candidates(case, weight)
        assert {one.schedule.tail for one in found} == {0}  # type: ignore[attr-defined]
        case.check(weight)


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("outputs", [1, 3, 8, 37])
def test_rows_that_share_their_zeros(rows: int, outputs: int) -> None:
    case = Convolution((2, 60, 5, 9), outputs, (1, 1))
    weight = pruned(case.weight, 0.2, rows)
    heights = {one.schedule.rows for one in sparse_candidates(case, weight)}  # type: ignore[attr-defined]
    assert rows in heights
    case.check(weight)


@pytest.mark.parametrize("name", EPILOGUES)
@pytest.mark.parametrize("rows", [1, 4])
def test_epilogues(name: str, rows: int) -> None:
    # What the dense kernels make of an epilogue is tested; the sparse ones make the same.
    epilogue, shapes = EPILOGUES[name]
    case = Convolution((2, 400, 3, 7), 11, (1, 1))
    x, weight = numbers(case.x), pruned(case.weight, 0.2, rows)
    others = [numbers(shape, 2 + index) for index, shape in enumerate(shapes)]
    extras = [Operand.plain("float32", shape) for shape in shapes]
    problem = case.problem((2, 11, 3, 7), epilogue, extras, zero_pattern(weight))
    found = candidates(problem)
    dense = next(one for one in found if not isinstance(one, SparseConvolutionCandidate))
    (expected,) = execute(dense, [x, weight, *others])
    magnitude = 20 * (1 + case.convolve(np.abs(x), np.abs(weight)))
    sparse = [one for one in found if isinstance(one, SparseConvolutionCandidate)]
    check(problem, [x, weight, *others], expected, magnitude, found=[sparse[0], sparse[-1]])


def test_a_zero_weight_multiplies_nothing() -> None:
    case = Convolution((1, 30, 6, 7), 9, (3, 3), padding=SAME)
    x, weight = numbers(case.x), pruned(case.weight, 0.1)
    x[0, 7, 2, 3], x[0, 11, 5, 0] = np.inf, np.nan
    seen = case.convolve(np.isfinite(x) == 0, weight != 0) != 0
    expected = case.convolve(np.nan_to_num(x, posinf=0), weight)
    for candidate in sparse_candidates(case, weight):
        for setting in SETTINGS:
            (y,) = execute(candidate, [x, weight], *setting)
            np.testing.assert_array_equal(~np.isfinite(y), seen)
            np.testing.assert_allclose(y[~seen], expected[~seen], rtol=1e-4, atol=1e-5)


def test_what_is_left_to_dense_kernels() -> None:
    case = Convolution((1, 30, 6, 7), 9, (3, 3), padding=SAME)
    assert not sparse_candidates(case, numbers(case.weight))
    unsupported = case.problem((1, 9, 6, 7), chain(("no such operator",)))
    assert not candidates(unsupported)
