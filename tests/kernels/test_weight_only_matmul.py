"""Linear layers with weights of eight and four bits, against float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from integer_layers import constant
from layers import EPSILON
from support import execute

from graphopt.kernels.integer_problems import WeightOnlyMatmulProblem
from graphopt.kernels.operand import Operand
from graphopt.kernels.registry import candidates


def problem_of(
    rows: tuple[int, ...], depth: int, outputs: int, bits: int, group: int
) -> tuple[WeightOnlyMatmulProblem, list[np.ndarray]]:
    random = np.random.default_rng(depth)
    limit = 2 ** (bits - 1)
    x = random.standard_normal((*rows, depth)).astype(np.float32)
    weight = random.integers(-limit, limit, (outputs, depth), np.int8)
    scale = random.uniform(0.5, 1.5, (outputs, -(-depth // group))).astype(np.float32)
    bias = random.standard_normal(outputs).astype(np.float32)
    constants = [weight, scale, bias]
    problem = WeightOnlyMatmulProblem(
        (Operand.plain("float32", x.shape), *map(constant, constants)),
        (Operand.plain("float32", (*rows, outputs)),),
        bits,
        group,
    )
    return problem, [x, *constants]


def check(rows: tuple[int, ...], depth: int, outputs: int, bits: int, group: int) -> None:
    problem, inputs = problem_of(rows, depth, outputs, bits, group)
    x, weight, scale, bias = (array.astype(np.float64) for array in inputs)
    whole = weight * scale.repeat(group, 1)[:, :depth]
    expected = x @ whole.T + bias
    magnitude = np.abs(x) @ np.abs(whole).T + np.abs(bias)
    (candidate,) = candidates(problem)
    for threads, at_end, offset in [(1, True, 0), (2, False, 4), (3, True, 8)]:
        (result,) = execute(candidate, inputs, threads, at_end, offset)
        assert (np.abs(result - expected) <= 4 * EPSILON * magnitude).all()


@pytest.mark.parametrize("rows", [(1,), (3,), (2, 2)])
@pytest.mark.parametrize(
    ("depth", "outputs", "bits", "group"),
    [
        (64, 64, 4, 32),
        (40, 70, 4, 32),
        (8, 3, 4, 8),
        (96, 130, 4, 96),
        (64, 64, 8, 32),
        (41, 70, 8, 41),
        (1, 1, 8, 1),
        (50, 17, 8, 16),
    ],
)
def test_sizes(rows: tuple[int, ...], depth: int, outputs: int, bits: int, group: int) -> None:
    check(rows, depth, outputs, bits, group)


@settings(max_examples=40)
@given(
    st.integers(1, 4), st.integers(1, 40), st.integers(1, 150), st.sampled_from([4, 8]),
    st.sampled_from([8, 16, 32]),
)  # fmt: skip
def test_any_linear(rows: int, words: int, outputs: int, bits: int, group: int) -> None:
    check((rows,), 8 * words, outputs, bits, group)


def test_what_is_left_to_others() -> None:
    assert not candidates(problem_of((5,), 64, 8, 8, 64)[0])
    assert not candidates(problem_of((1,), 63, 8, 4, 63)[0])
