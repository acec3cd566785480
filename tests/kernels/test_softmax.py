"""Softmax and its logarithm against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from layers import SETTINGS, numbers
from support import solve

from graphopt.kernels import softmax
from graphopt.kernels.operand import Layout, Operand
from graphopt.kernels.problem import SoftmaxProblem
from graphopt.kernels.registry import candidates
from graphopt.kernels.simd import LANES


@pytest.fixture(autouse=True)
def _always_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small problems are divided among threads too."""
    monkeypatch.setattr(softmax, "WORTH_SHARING", 0.0)


def problem_of(
    shape: tuple[int, ...], dimension: int, logarithm: bool = False, layout: Layout | None = None
) -> SoftmaxProblem:
    operand = Operand(shape, layout or Layout.plain("float32", len(shape)))
    return SoftmaxProblem((operand,), (operand,), dimension, logarithm)


def exact(x: np.ndarray, dimension: int, logarithm: bool) -> np.ndarray:
    wide = torch.tensor(x, dtype=torch.float64)
    function = torch.log_softmax if logarithm else torch.softmax
    return function(wide, dimension).numpy()


CASES = [
    ((), 0),
    ((1,), 0),
    ((7,), -1),
    ((5 * LANES + 3,), 0),
    ((3, LANES), 1),
    ((3, 4 * LANES + 1), -1),
    ((2, 3, 129 * LANES + 5), 2),
    ((7, 3), 0),
    ((5, 4 * LANES), 0),
    ((2, 130, 9 * LANES + 1), 1),
    ((2, 3, 5, 7), 1),
    ((2, 3, 5, 7), 2),
    ((3, 4, 1), 1),
    ((3, 1, 4), 1),
    ((0, 4), 1),
    ((4, 0), 1),
]


@pytest.mark.parametrize("logarithm", [False, True])
@pytest.mark.parametrize(("shape", "dimension"), CASES)
def test_softmax(shape: tuple[int, ...], dimension: int, logarithm: bool) -> None:
    x = 4 * numbers(shape)
    expected = exact(x, dimension, logarithm)
    # The difference to the largest element is rounded before its exponential is taken; a sum is
    # good to a dozen roundings, as in the tests of reductions.
    difference = 2 * np.abs(x).max(initial=0)
    bound = 12 + 2 * np.abs(expected) if logarithm else (12 + difference) * expected
    for threads, at_end, offset in SETTINGS:
        problem = problem_of(shape, dimension, logarithm)
        (result,) = solve(problem, [x], threads, at_end, offset)
        assert (np.abs(result - expected) <= 2.0**-24 * bound).all()


@pytest.mark.parametrize("logarithm", [False, True])
@pytest.mark.parametrize("dimension", [0, 1])
def test_special_values(dimension: int, logarithm: bool) -> None:
    size = 2 * LANES + 5
    x = np.zeros((7, size), np.float32)
    x[0] = -np.inf
    x[1, 3] = -np.inf
    x[2, -1] = np.inf
    x[3, LANES] = np.nan
    x[4] = np.linspace(-3e38, 3e38, size)
    x[5, :2] = 200.0, -200.0
    x = x if dimension == 1 else np.ascontiguousarray(x.T)
    (result,) = solve(problem_of(x.shape, dimension, logarithm), [x], 2)
    function = torch.log_softmax if logarithm else torch.softmax
    expected = function(torch.tensor(x), dimension).numpy()
    np.testing.assert_allclose(result, expected, rtol=1e-6)


@pytest.mark.parametrize("dimension", [0, 1])
def test_long_sums_stay_as_accurate_as_torchs(dimension: int) -> None:
    x = numbers((100_003, 3) if dimension == 0 else (3, 100_003))
    expected = exact(x, dimension, False)
    (result,) = solve(problem_of(x.shape, dimension), [x], 2)
    torchs = torch.softmax(torch.tensor(x), dimension).numpy()
    ours, theirs = np.abs(result / expected - 1).max(), np.abs(torchs / expected - 1).max()
    assert ours <= 2 * theirs


@pytest.mark.parametrize("dimension", [0, 1, 2, 3])
def test_other_layouts(dimension: int) -> None:
    x = numbers((2, LANES + 3, 5, 6))
    for layout in (Layout("float32", (0, 2, 3, 1)), Layout("float32", (0, 1, 2, 3), pitch=16)):
        problem = problem_of(x.shape, dimension, layout=layout)
        if candidates(problem):
            (result,) = solve(problem, [x], 2)
            np.testing.assert_allclose(result, exact(x, dimension, False), rtol=2e-6)
        else:
            # A dimension that is neither contiguous itself nor leaves contiguous ones.
            assert layout.pitch == 0
            assert dimension in (2, 3)


def test_what_is_not_this_familys_is_declined_or_refused() -> None:
    wide = Operand.plain("float64", (2, 3))
    assert candidates(SoftmaxProblem((wide,), (wide,), 1)) == []
    with pytest.raises(ValueError, match="is not the softmax"):
        candidates(problem_of((2, 3), 2))
