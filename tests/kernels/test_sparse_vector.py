"""Linear layers with zeros in their weights, for a few rows, against torch in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import SETTINGS, chain, check, numbers, pruned
from support import execute
from test_matmul import multiply, plain
from test_sparse_matmul import linear

from graphopt.kernels.problem import MatmulProblem, Operand
from graphopt.kernels.registry import candidates
from graphopt.kernels.simd import LANES
from graphopt.kernels.sparse_vector import MOST_ROWS, SparseVectorCandidate
from graphopt.kernels.zeros import zero_pattern


def vector_candidates(problem: MatmulProblem) -> list[SparseVectorCandidate]:
    return [one for one in candidates(problem) if isinstance(one, SparseVectorCandidate)]


def check_linear(
    a: Operand, weight: np.ndarray, transposed: tuple[bool, bool] = (False, True)
) -> None:
    problem = linear(a, weight, transposed)
    x = numbers(a.shape)
    found = vector_candidates(problem)
    assert found
    expected = multiply(x, weight, transposed)
    magnitude = multiply(np.abs(x), np.abs(weight), transposed)
    check(problem, [x, weight], expected, magnitude, found=found)


@pytest.mark.parametrize("columns", [1, LANES - 1, LANES, LANES + 1, 101])
@pytest.mark.parametrize("depth", [1, 7, 300])
def test_one_row(depth: int, columns: int) -> None:
    weight = pruned((columns, depth), 0.2)
    weight[0, 0] = 0
    check_linear(plain(1, depth), weight)


@given(
    st.integers(1, MOST_ROWS - 1),
    st.integers(1, 300),
    st.integers(2, 60),
    st.sampled_from([0.0, 0.1, 0.4]),
)
def test_any_size(rows: int, depth: int, columns: int, density: float) -> None:
    weight = pruned((columns, depth), density)
    if zero_pattern(weight) is not None:
        check_linear(plain(rows, depth), weight)


def test_layouts() -> None:
    check_linear(plain(1, 30), pruned((30, 50), 0.2), (False, False))
    check_linear(plain(30, 2), pruned((50, 30), 0.2), (True, True))
    check_linear(plain(1, 2, 1, 30), pruned((50, 30), 0.2))


def test_epilogue() -> None:
    x, weight = numbers((2, 40)), pruned((70, 40), 0.2)
    bias, residual, scale = numbers((70,), 2), numbers((2, 70), 3), numbers((2, 1), 4)
    product = multiply(x, weight, (False, True))
    activated = torch.nn.functional.gelu(torch.tensor(product + bias)).numpy()
    epilogue = chain(("add", "e0"), ("gelu",), ("add", "e1"), ("mul", "e2"), extras=3)
    extras = [plain(*other.shape) for other in (bias, residual, scale)]
    problem = linear(plain(2, 40), weight, epilogue=epilogue, extras=extras)
    magnitude = 10 * (1 + multiply(np.abs(x), np.abs(weight), (False, True)))
    found = vector_candidates(problem)
    assert found
    expected = (activated + residual) * scale
    check(problem, [x, weight, bias, residual, scale], expected, magnitude, found=found)


def test_a_zero_weight_multiplies_nothing() -> None:
    x, weight = numbers((2, 30)), pruned((20, 30), 0.1)
    x[0, 0], x[1, 3], x[1, 29] = np.inf, np.inf, np.nan
    seen = multiply(~np.isfinite(x), weight != 0, (False, True)) != 0
    expected = multiply(np.nan_to_num(x, posinf=0), weight, (False, True))
    (candidate,) = vector_candidates(linear(plain(2, 30), weight))
    for setting in SETTINGS:
        (y,) = execute(candidate, [x, weight], *setting)
        np.testing.assert_array_equal(~np.isfinite(y), seen)
        np.testing.assert_allclose(y[~seen], expected[~seen], rtol=1e-4, atol=1e-5)


def test_what_is_left_to_others() -> None:
    assert not vector_candidates(linear(plain(1, 30), numbers((20, 30))))
    assert not vector_candidates(linear(plain(MOST_ROWS, 30), pruned((20, 30), 0.1)))
