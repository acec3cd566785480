"""Pooling against torch in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import EPSILON, SETTINGS, chain, numbers
from support import execute
from torch.nn import functional

from graphopt.kernels import pooling
from graphopt.kernels.operand import Layout, Operand
from graphopt.kernels.problem import AdaptivePoolingProblem, PoolingProblem
from graphopt.kernels.registry import candidates
from graphopt.kernels.simd import LANES


@pytest.fixture(autouse=True, scope="module")
def _always_share() -> object:
    """Small problems are divided among threads too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pooling, "WORTH_SHARING", 0.0)
        yield


@dataclass(frozen=True)
class Pool:
    """A pooling with torch's own options; padding is the same on both sides."""

    x: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...] = ()
    ceil: bool = False
    count_padding: bool = True
    divisor: int | None = None

    @property
    def rank(self) -> int:
        return len(self.kernel)

    def exact(self, operator: str, x: np.ndarray) -> np.ndarray:
        wide = torch.tensor(x).double()
        if operator == "max":
            pool = (functional.max_pool1d, functional.max_pool2d)[self.rank - 1]
            dilation = self.dilation or 1
            y = pool(wide, self.kernel, self.stride, self.padding, dilation, self.ceil)
        elif self.rank == 1:
            y = functional.avg_pool1d(
                wide, self.kernel, self.stride, self.padding, self.ceil, self.count_padding
            )
        else:
            y = functional.avg_pool2d(
                wide,
                self.kernel,
                self.stride,
                self.padding,
                self.ceil,
                self.count_padding,
                self.divisor,
            )
        return y.numpy()

    def problem(self, operator: str, shape: tuple[int, ...]) -> PoolingProblem:
        return PoolingProblem(
            (Operand.plain("float32", self.x),),
            (Operand.plain("float32", shape),),
            operator,
            self.kernel,
            self.stride,
            tuple((n, n) for n in self.padding),
            self.dilation or (1,) * self.rank,
            self.count_padding,
            self.divisor,
        )

    def check(self, operator: str, x: np.ndarray) -> None:
        expected = self.exact(operator, x)
        found = candidates(self.problem(operator, expected.shape))
        assert found
        magnitude = np.abs(self.exact("mean", np.abs(x))) if operator == "mean" else 0
        for candidate in found:
            for setting in SETTINGS:
                (y,) = execute(candidate, [x], *setting)
                assert_near(y, expected, magnitude, np.prod(self.kernel))


def assert_near(
    y: np.ndarray, expected: np.ndarray, magnitude: np.ndarray | float, terms: int
) -> None:
    """An average is within as many roundings as its sum has terms; a maximum (0) is exact."""
    np.testing.assert_array_equal(np.isnan(y), np.isnan(expected))
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(y[~finite], expected[~finite].astype(np.float32))
    error = np.abs(np.where(finite, y, 0) - np.where(finite, expected, 0))
    bound = np.where(finite, magnitude, 1) * EPSILON * (2 + terms / 2)
    assert (error <= bound).all()


CASES = {
    "2 x 2": Pool((2, 3, 8, 10), (2, 2), (2, 2), (0, 0)),
    "3 x 3, stride 2": Pool((1, 3, 15, 3 * LANES + 1), (3, 3), (2, 2), (1, 1)),
    "3 x 3, stride 1": Pool((1, 2, 9, 2 * LANES), (3, 3), (1, 1), (1, 1)),
    "rounded up": Pool((1, 2, 6, 8), (3, 3), (2, 2), (0, 0), ceil=True),
    "rounded up, padded": Pool((1, 2, 7, 9), (3, 2), (3, 3), (1, 1), ceil=True),
    "padding not counted": Pool((1, 2, 7, 9), (3, 3), (2, 2), (1, 1), count_padding=False),
    "rounded up, padding not counted": Pool(
        (1, 2, 6, 8), (3, 3), (2, 3), (1, 1), ceil=True, count_padding=False
    ),
    "other divisor": Pool((1, 2, 7, 9), (3, 3), (2, 2), (1, 1), divisor=-5),
    "whole image": Pool((2, 3, 7, 7), (7, 7), (1, 1), (0, 0)),
    "gaps": Pool((1, 2, 12, 13), (1, 2), (3, 5), (0, 0)),
    "wide": Pool((1, 1, 3, 40 * LANES + 3), (3, 5), (1, 2), (1, 2)),
    "tall": Pool((1, 2, 300, 3), (5, 3), (1, 1), (2, 1)),
    "one element": Pool((1, 1, 1, 1), (1, 1), (1, 1), (0, 0)),
    "no image": Pool((0, 3, 8, 8), (2, 2), (2, 2), (0, 0)),
    "sequence": Pool((2, 3, 50), (3,), (2,), (1,)),
    "sequence, rounded up": Pool((1, 3, 3 * LANES + 2), (4,), (3,), (2,), ceil=True),
}


@pytest.mark.parametrize("operator", ["max", "mean"])
@pytest.mark.parametrize("name", CASES)
def test_shapes(name: str, operator: str) -> None:
    CASES[name].check(operator, numbers(CASES[name].x))


@pytest.mark.parametrize("dilation", [(2, 3), (1, 4)])
def test_dilated(dilation: tuple[int, int]) -> None:
    for ceil in (False, True):
        pool = Pool((1, 2, 13, 2 * LANES + 3), (3, 2), (2, 3), (1, 1), dilation, ceil)
        pool.check("max", numbers(pool.x))


@st.composite
def pools(draw: st.DrawFn) -> Pool:
    def pair(low: int, high: int) -> tuple[int, int]:
        return (draw(st.integers(low, high)), draw(st.integers(low, high)))

    kernel = pair(1, 5)
    padding = (draw(st.integers(0, kernel[0] // 2)), draw(st.integers(0, kernel[1] // 2)))
    size = tuple(k + draw(st.integers(0, 40)) for k in kernel)
    flags = draw(st.booleans()), draw(st.booleans())
    planes = pair(1, 3)
    return Pool((*planes, *size), kernel, pair(1, 6), padding, (), *flags)


@given(pools(), st.sampled_from(["max", "mean"]))
def test_any_shape(pool: Pool, operator: str) -> None:
    pool.check(operator, numbers(pool.x))


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_special_values_stay_in_their_windows(value: float) -> None:
    for name in ("3 x 3, stride 2", "rounded up, padding not counted", "sequence"):
        pool = CASES[name]
        x = numbers(pool.x)
        for place in (0, x.size // 2, x.size - 1):
            x.flat[place] = value
        for operator in ("max", "mean"):
            pool.check(operator, x)
    lowest = Pool((1, 1, 4, 4), (3, 3), (2, 2), (1, 1))
    lowest.check("max", np.full(lowest.x, -np.inf, np.float32))


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 1, 1), (1, 1, 4, 5), (3,), ()])
def test_epilogue(shape: tuple[int, ...]) -> None:
    pool = CASES["2 x 2"]
    x, other = numbers(pool.x), numbers(shape, 1)
    wide = torch.tensor(other).double()
    wide = wide[:, None, None] if wide.dim() == 1 else wide
    pooled = torch.tensor(pool.exact("max", x))
    epilogue = chain(("mul", "e0"), ("relu",), extras=1)
    problem = pool.problem("max", tuple(pooled.shape))
    inputs = (*problem.inputs, Operand.plain("float32", shape))
    problem = replace(problem, inputs=inputs, epilogue=epilogue)
    for candidate in candidates(problem):
        (y,) = execute(candidate, [x, other], 2)
        np.testing.assert_allclose(y, (pooled * wide).relu().numpy(), rtol=EPSILON)


ADAPTIVE = {
    "equal bins": ((2, 3, 8, 12), (4, 6)),
    "overlapping bins": ((2, 3, 7, 2 * LANES + 5), (5, 6)),
    "every size": ((1, 2, 10, 11), (1, 11)),
    "more bins than elements": ((1, 2, 3, 4), (7, 6)),
    "one": ((1, 2, 5, 7), (1, 1)),
    "sequence": ((2, 3, 17), (5,)),
    "sequence, equal bins": ((2, 3, 18), (6,)),
    "no bins": ((2, 3, 5, 5), (0, 2)),
    "no image": ((0, 3, 5, 5), (2, 2)),
}


@pytest.mark.parametrize("name", ADAPTIVE)
def test_adaptive(name: str) -> None:
    shape, bins = ADAPTIVE[name]
    pool = (functional.adaptive_avg_pool1d, functional.adaptive_avg_pool2d)[len(bins) - 1]
    for special in (None, np.nan, np.inf):
        x = numbers(shape)
        if special is not None and x.size:
            x.flat[x.size // 2] = special
        expected = pool(torch.tensor(x).double(), bins).numpy()
        magnitude = pool(torch.tensor(np.abs(x)).double(), bins).numpy()
        found = candidates(adaptive_problem(shape, expected.shape))
        assert found
        for candidate in found:
            for setting in SETTINGS:
                (y,) = execute(candidate, [x], *setting)
                assert_near(y, expected, magnitude, 20)


def adaptive_problem(x: tuple[int, ...], y: tuple[int, ...]) -> AdaptivePoolingProblem:
    return AdaptivePoolingProblem((Operand.plain("float32", x),), (Operand.plain("float32", y),))


def test_what_is_left_to_others() -> None:
    pool = CASES["2 x 2"]
    problem = pool.problem("max", (2, 3, 4, 5))
    assert candidates(problem)
    assert not candidates(pool.problem("median", (2, 3, 4, 5)))
    last = Operand(pool.x, Layout("float32", (0, 2, 3, 1)))
    double = Operand.plain("float64", pool.x)
    for operand in (last, double):
        assert not candidates(replace(problem, inputs=(operand,)))
    assert not candidates(replace(problem, epilogue=chain(("no such operator",))))
    assert not candidates(adaptive_problem((1, 2, 3, 4, 5), (1, 2, 1, 1, 1)))


def test_malformed_problems_are_refused() -> None:
    pool = CASES["2 x 2"]
    for shape in ((2, 3, 4, 7), (2, 3, 3, 5), (2, 3, 5, 5)):
        with pytest.raises(ValueError, match="do not pool to"):
            candidates(pool.problem("max", shape))
    with pytest.raises(ValueError, match="pooled"):
        candidates(pool.problem("max", (2, 4, 4, 5)))
    with pytest.raises(ValueError, match="pooled"):
        candidates(adaptive_problem((2, 3, 4, 5), (2, 4, 2, 2)))
