"""Normalisation against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from layers import SETTINGS, chain, constant, numbers
from support import solve

from graphopt.kernels import normalization
from graphopt.kernels.expression import Builder, Expression
from graphopt.kernels.operand import Layout, Operand
from graphopt.kernels.problem import NormalizationProblem
from graphopt.kernels.registry import candidates
from graphopt.kernels.simd import LANES


@pytest.fixture(autouse=True)
def _always_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small problems are divided among threads too."""
    monkeypatch.setattr(normalization, "WORTH_SHARING", 0.0)


def problem_of(
    shape: tuple[int, ...],
    dimensions: int,
    epsilon: float = 1e-5,
    centered: bool = True,
    epilogue: Expression | None = None,
    extra: tuple[Operand, ...] = (),
) -> NormalizationProblem:
    x = Operand.plain("float32", shape)
    return NormalizationProblem((x, *extra), (x,), dimensions, epsilon, centered, epilogue)


def exact(x: np.ndarray, dimensions: int, epsilon: float, centered: bool) -> np.ndarray:
    wide, axes = x.astype(np.float64), tuple(range(-dimensions, 0))
    if centered:
        wide = wide - wide.mean(axes, keepdims=True)
    return wide / np.sqrt(np.mean(wide * wide, axes, keepdims=True) + epsilon)


CASES = [
    ((1,), 1),
    ((7,), 1),
    ((3, LANES), 1),
    ((5, 4 * LANES + 1), 1),
    ((3, 129 * LANES + 5), 1),
    ((2, 3, 5, 7), 1),
    ((2, 3, 5, 7), 2),
    ((2, 3, 5, 7), 3),
    ((2, 3, 5, 7), 4),
    ((0, 4), 1),
    ((4, 0), 1),
]


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize(("shape", "dimensions"), CASES)
def test_without_epilogue(shape: tuple[int, ...], dimensions: int, centered: bool) -> None:
    x = numbers(shape) + 0.5
    expected = exact(x, dimensions, 1e-5, centered) if x.size else x
    for threads, at_end, offset in SETTINGS:
        problem = problem_of(shape, dimensions, centered=centered)
        (result,) = solve(problem, [x], threads, at_end, offset)
        bound = 4 * 2.0**-24 * (1 + np.abs(expected))
        assert (np.abs(result - expected) <= bound).all()


AFFINE = chain(("mul", "e0"), ("add", "e1"), extras=2)
LONG = 2 * LANES + 3


@pytest.mark.parametrize(
    ("shape", "dimensions", "extra"),
    [
        ((3, 5, LONG), 1, (LONG,)),
        ((3, 5, LONG), 2, (5, LONG)),
        ((3, 5, LONG), 2, (LONG,)),
        ((2, 3, 4, LONG), 2, (3, 4, 1)),
        ((2, 3, 4, 5, 7), 3, (3, 4, 1, 1)),
        ((2, 3, 4, 5, 7), 3, (3, 1, 5, 1)),
        ((2, 3, 4, 5, 7), 3, (2, 1, 4, 5, 7)),
        ((2, 3, LONG), 1, (2, 3, LONG)),
        ((2, 3, LONG), 1, (2, 1, 1)),
        ((2, 3, LONG), 1, (1,)),
        ((2, 3, LONG, 1), 2, (3, LONG, 1)),
    ],
)
def test_epilogues(shape: tuple[int, ...], dimensions: int, extra: tuple[int, ...]) -> None:
    x, weight, shift = numbers(shape), numbers(extra, 1), numbers(extra, 2)
    normal = exact(x, dimensions, 1e-3, True)
    expected = normal * weight.astype(np.float64) + shift
    operands = (constant(extra), Operand.plain("float32", extra))
    problem = problem_of(shape, dimensions, 1e-3, epilogue=AFFINE, extra=operands)
    magnitude = (1 + np.abs(normal)) * np.abs(weight) + np.abs(shift)
    for threads, at_end, offset in SETTINGS:
        (result,) = solve(problem, [x, weight, shift], threads, at_end, offset)
        assert (np.abs(result - expected) <= 4 * 2.0**-24 * magnitude).all()


def test_operands_of_other_dtypes_and_strides() -> None:
    x, mask = numbers((3, 4, LONG)), numbers((3, 1, LONG), 1) > 0
    weight = numbers((4, LONG), 2)
    builder = Builder()
    value, kept, factor = builder.input(), builder.input("bool"), builder.input()
    scaled = builder.apply("mul", value, factor)
    epilogue = builder.finish(builder.apply("where", kept, scaled, 0.0))
    strided = Operand((4, LONG), Layout("float32", (1, 0)))
    extra = (Operand.plain("bool", mask.shape), strided)
    problem = problem_of(x.shape, 2, epilogue=epilogue, extra=extra)
    expected = np.where(mask, exact(x, 2, 1e-5, True) * weight, 0)
    (result,) = solve(problem, [x, mask, weight], 2)
    np.testing.assert_allclose(result, expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("centered", [False, True])
def test_special_values(centered: bool) -> None:
    size = 2 * LANES + 5
    x = numbers((7, size))
    x[0, 3], x[1, -1], x[2, LANES], x[3, :] = np.inf, -np.inf, np.nan, 0.0
    x[4, :] = 7.3
    x[5, ::2] = 1e25
    (result,) = solve(problem_of(x.shape, 1, 0.0, centered), [x], 2)
    if centered:
        expected = torch.layer_norm(torch.tensor(x), [size], eps=0.0).numpy()
        # The variance of equal numbers is nothing but rounding.
        result[4] = expected[4] = 0
    else:
        expected = torch.rms_norm(torch.tensor(x), [size], eps=0.0).numpy()
    np.testing.assert_allclose(result, expected, rtol=2e-6, atol=1e-6)


def test_equal_numbers_become_zero() -> None:
    x = np.full((3, 129 * LANES + 3), 1234.567, np.float32)
    (result,) = solve(problem_of(x.shape, 1), [x])
    assert (np.abs(result) <= 1e-6).all()


@pytest.mark.parametrize(
    ("mean", "deviation"), [(0.0, 1.0), (1e4, 1.0), (-1e6, 10.0), (1e-3, 1e-6)]
)
def test_a_large_mean_costs_no_accuracy(mean: float, deviation: float) -> None:
    x = (mean + deviation * np.random.default_rng(0).standard_normal((4, 70_001))).astype("float32")
    expected = exact(x, 1, 1e-5, True)
    (result,) = solve(problem_of(x.shape, 1), [x])
    theirs = np.abs(torch.layer_norm(torch.tensor(x), [70_001]).numpy() - expected).max()
    ours = np.abs(result - expected).max()
    assert ours <= 2 * theirs
    assert ours <= 8 * 2.0**-24 * np.abs(expected).max()


def test_what_is_not_this_familys_is_declined_or_refused() -> None:
    wide = Operand.plain("float64", (2, 3))
    swapped = Operand((2, 3), Layout("float32", (1, 0)))
    identity = chain()
    assert candidates(NormalizationProblem((swapped,), (swapped,), 1, 1e-5, True, identity)) == []
    assert candidates(problem_of((2, 3), 1, epilogue=chain(("lgamma",)))) == []
    with pytest.raises(ValueError, match="dtypes"):
        candidates(NormalizationProblem((wide,), (wide,), 1, 1e-5))
    with pytest.raises(ValueError, match="normalised over"):
        candidates(problem_of((2, 3), 3))
