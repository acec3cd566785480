"""Reductions against numpy in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support import solve

from graphopt.kernels import reduction
from graphopt.kernels.expression import Builder, Expression
from graphopt.kernels.operand import Layout, Operand
from graphopt.kernels.problem import ReductionProblem
from graphopt.kernels.registry import candidates
from graphopt.kernels.simd import LANES

NUMPY = {"sum": np.sum, "mean": np.mean, "prod": np.prod, "amax": np.max, "amin": np.min}
SETTINGS = [(1, True, 0), (2, False, 8), (3, True, 24)]


@pytest.fixture(autouse=True)
def _always_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small problems are divided among threads too."""
    monkeypatch.setattr(reduction, "WORTH_SHARING", 0.0)


def unary(op: str, *rest: float, source: str = "float32", dtype: str = "float32") -> Expression:
    builder = Builder()
    return builder.finish(builder.apply(op, builder.input(source), *rest, dtype=dtype))


def problem_of(
    operator: str, x: np.ndarray, dimensions: tuple[int, ...], dtype: str = "", **rest: object
) -> ReductionProblem:
    shape = tuple(1 if axis in dimensions else size for axis, size in enumerate(x.shape))
    operand, result = (
        Operand.plain(str(x.dtype), x.shape),
        Operand.plain(dtype or str(x.dtype), shape),
    )
    return ReductionProblem(operator, dimensions, (operand,), (result,), **rest)


CASES = [
    ((1,), (0,)),
    ((LANES - 1,), (0,)),
    ((5 * LANES + 3,), (0,)),
    ((64 * LANES + 5,), (0,)),
    ((3, 7), (1,)),
    ((3, 7), (0,)),
    ((2, 5, 7, 7), (2, 3)),
    ((2, 3, 5, 7), (0, 2)),
    ((2, 3, 5, 7), (1, 3)),
    ((2, 3, 5, 7), (0, 1, 2, 3)),
    ((300, 4 * LANES), (0,)),
    ((2, 130, 9 * LANES + 1), (1,)),
    ((4, 3, 2, 6 * LANES), (0, 2)),
    ((3, 4), ()),
    ((0, 4), (1,)),
]


@pytest.mark.parametrize("operator", NUMPY)
@pytest.mark.parametrize(("shape", "dimensions"), CASES)
def test_reductions(operator: str, shape: tuple, dimensions: tuple) -> None:
    generator = np.random.default_rng(0)
    x = generator.standard_normal(shape).astype(np.float32)
    if operator == "prod":
        x = (1 + 0.01 * x).astype(np.float32)
    exact = NUMPY[operator](x.astype(np.float64), axis=dimensions, keepdims=True)
    count = math.prod(shape[axis] for axis in dimensions)
    scale = np.sum(np.abs(x.astype(np.float64)), axis=dimensions, keepdims=True)
    scale = {"sum": scale, "mean": scale / count, "prod": np.abs(exact) * count}.get(operator, 0)
    for threads, at_end, offset in SETTINGS:
        (result,) = solve(problem_of(operator, x, dimensions), [x], threads, at_end, offset)
        # Rounding of sums: one unit for each of the terms that meet in one lane, at most.
        assert (np.abs(result - exact) <= 12 * 2.0**-24 * scale).all()


def test_long_sums_stay_as_accurate_as_torchs() -> None:
    x = np.random.default_rng(0).uniform(0, 1, (3, 1_000_003)).astype(np.float32)
    exact = x.sum(1, dtype=np.float64, keepdims=True)
    along = solve(problem_of("sum", x, (1,)), [x])[0]
    across = solve(problem_of("sum", x.T.copy(), (0,)), [x.T.copy()])[0].T
    torchs = torch.tensor(x).sum(1, keepdim=True).numpy()
    allowed = 2 * np.abs(torchs - exact).max() + exact * 2.0**-23
    assert (np.abs(along - exact) <= allowed).all()
    assert (np.abs(across - exact) <= allowed).all()


@pytest.mark.parametrize("dimension", [0, 1])
@pytest.mark.parametrize("operator", ["amax", "amin", "sum"])
def test_special_values(operator: str, dimension: int) -> None:
    x = np.full((3, 2 * LANES + 5), -0.0, np.float32)
    x[0, 3], x[1, -1], x[2, 1], x[2, 2] = np.nan, np.inf, -np.inf, 1e-45
    (result,) = solve(problem_of(operator, x, (dimension,)), [x], 2)
    function = getattr(torch, operator)
    expected = function(torch.tensor(x), dimension, keepdim=True).numpy()
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("dtype", ["int64", "int32", "int8", "uint8", "bool", "float64"])
@pytest.mark.parametrize("operator", ["amax", "amin"])
def test_extrema_of_other_dtypes(operator: str, dtype: str) -> None:
    x = np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 120, (5, 2 * LANES + 1))
    x = x.astype(dtype) if dtype in ("uint8", "bool") else (x - 60).astype(dtype)
    for dimension in (0, 1):
        (result,) = solve(problem_of(operator, x, (dimension,)), [x])
        np.testing.assert_array_equal(result, NUMPY[operator](x, dimension, keepdims=True))


def test_integers_are_summed_in_the_prologues_dtype() -> None:
    x = np.random.default_rng(0).integers(0, 2, (7, 2 * LANES + 1)).astype(bool)
    widen = unary("to", source="bool", dtype="int64")
    for dimension in (0, 1):
        problem = problem_of("sum", x, (dimension,), "int64", prologue=widen)
        (result,) = solve(problem, [x])
        np.testing.assert_array_equal(result, x.sum(dimension, keepdims=True))


def test_empty_reductions() -> None:
    x = np.empty((3, 0), np.float32)
    np.testing.assert_array_equal(solve(problem_of("sum", x, (1,)), [x])[0], np.zeros((3, 1)))
    np.testing.assert_array_equal(solve(problem_of("prod", x, (1,)), [x])[0], np.ones((3, 1)))
    assert np.isnan(solve(problem_of("mean", x, (1,)), [x])[0]).all()
    assert candidates(problem_of("amax", x, (1,))) == []


@pytest.mark.parametrize("dimensions", [(1,), (2,), (1, 2)])
def test_a_norm_is_one_kernel(dimensions: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).standard_normal((3, 5, 2 * LANES + 3)).astype(np.float32)
    root = Builder()
    shifted = root.apply("add", root.input(), 1e-6)
    epilogue = root.finish(root.apply("rsqrt", shifted))
    problem = problem_of("mean", x, dimensions, prologue=unary("square"), epilogue=epilogue)
    exact = 1 / np.sqrt(np.mean(x.astype(np.float64) ** 2, axis=dimensions, keepdims=True) + 1e-6)
    for threads in (1, 2):
        np.testing.assert_allclose(solve(problem, [x], threads)[0], exact, rtol=5e-7)


def test_lanes_beyond_the_end_are_not_seen_by_the_prologue() -> None:
    x = np.zeros(LANES + 1, np.float32)
    (result,) = solve(problem_of("sum", x, (0,), prologue=unary("cos")), [x])
    assert result[0] == LANES + 1


def test_dropped_dimensions_and_other_layouts() -> None:
    x = np.random.default_rng(0).standard_normal((2, 19, 5, 6)).astype(np.float32)
    for layout in (
        Layout.plain("float32", 4),
        Layout("float32", (0, 2, 3, 1)),
        Layout("float32", (0, 1, 2, 3), pitch=16),
    ):
        operand, result = Operand(x.shape, layout), Operand.plain("float32", (2, 19))
        problem = ReductionProblem("mean", (-1, -2), (operand,), (result,))
        (pooled,) = solve(problem, [x], 2)
        np.testing.assert_allclose(pooled, x.mean((2, 3), np.float64), rtol=1e-5, atol=1e-7)


def test_what_is_not_this_familys_is_declined_or_refused() -> None:
    x = np.zeros((2, 3), np.int64)
    assert candidates(problem_of("mean", x, (1,))) == []
    assert candidates(problem_of("median", x, (1,))) == []
    assert candidates(problem_of("sum", x, (1,), prologue=unary("lgamma"))) == []
    operand = Operand.plain("float32", (2, 3))
    with pytest.raises(ValueError, match="reduced over"):
        candidates(ReductionProblem("sum", (1,), (operand,), (operand,)))
