"""What the tests of convolutions, matrix products and pooling share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from support import execute

from graphopt.kernels.expression import Builder, Expression, Ref
from graphopt.kernels.problem import ConstantOperand, Layout, Problem
from graphopt.kernels.registry import candidates

SETTINGS = [(1, True, 0), (2, False, 4), (3, True, 8)]
"""Threads, and where the operands lie between the guard pages."""

EPSILON = float(np.finfo(np.float32).eps)


def constant(shape: tuple[int, ...]) -> ConstantOperand:
    return ConstantOperand(shape, Layout.plain("float32", len(shape)))


def numbers(shape: Sequence[int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def chain(*steps: tuple, extras: int = 0) -> Expression:
    """``steps`` are (operator, further operands): "extra i" as "ei", or numbers."""
    builder = Builder()
    value = builder.input()
    others = {f"e{index}": builder.input() for index in range(extras)}
    for op, *rest in steps:
        value = builder.apply(op, value, *(others.get(operand, operand) for operand in rest))
    return builder.finish(value)


def identity() -> Expression:
    return Expression(("float32",), (), (Ref(0),))


def check(
    problem: Problem,
    inputs: Sequence[np.ndarray],
    expected: np.ndarray,
    magnitude: np.ndarray | float,
    settings: Sequence[tuple[int, bool, int]] = SETTINGS,
) -> None:
    """Every candidate, in every setting, is within a few roundings of ``expected``.

    ``magnitude`` is the same result of all absolute values, to which errors are proportional.
    """
    found = candidates(problem)
    assert found, f"no candidate for {problem.key()}"
    for candidate in found:
        for threads, at_end, offset in settings:
            (result,) = execute(candidate, inputs, threads, at_end, offset)
            assert result.shape == expected.shape
            np.testing.assert_array_equal(np.isfinite(result), np.isfinite(expected))
            finite = np.isfinite(expected)
            np.testing.assert_array_equal(result[~finite], expected[~finite].astype(np.float32))
            error = np.abs(np.where(finite, result, 0) - np.where(finite, expected, 0))
            bound = np.where(finite, magnitude, 1) * 4 * EPSILON
            assert (error <= bound).all(), f"{candidate.kernel}: {(error / bound).max()} too large"
