"""Linear layers with zeros in their weights, for a few rows, against torch in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layers import numbers, pruned
from test_matmul import plain
from test_sparse_matmul import check_epilogue, check_hidden, check_linear, linear, sparse_candidates

from graphopt.kernels.simd import LANES
from graphopt.kernels.sparse_vector import MOST_ROWS, SparseVectorCandidate
from graphopt.kernels.zeros import zero_pattern

KIND = SparseVectorCandidate


@pytest.mark.parametrize("columns", [1, LANES - 1, LANES, LANES + 1, 101])
@pytest.mark.parametrize("depth", [1, 7, 300])
def test_one_row(depth: int, columns: int) -> None:
    weight = pruned((columns, depth), 0.2)
    weight[0, 0] = 0
    check_linear(plain(1, depth), weight, kind=KIND)


@given(
    st.integers(1, MOST_ROWS - 1),
    st.integers(1, 300),
    st.integers(2, 60),
    st.sampled_from([0.0, 0.1, 0.4]),
)
def test_any_size(rows: int, depth: int, columns: int, density: float) -> None:
    weight = pruned((columns, depth), density)
    if zero_pattern(weight) is not None:
        check_linear(plain(rows, depth), weight, kind=KIND)


def test_layouts() -> None:
    check_linear(plain(1, 30), pruned((30, 50), 0.2), (False, False), KIND)
    check_linear(plain(30, 2), pruned((50, 30), 0.2), (True, True), KIND)
    check_linear(plain(1, 2, 1, 30), pruned((50, 30), 0.2), kind=KIND)


def test_epilogue() -> None:
    check_epilogue((2, 40), KIND)


def test_a_zero_weight_multiplies_nothing() -> None:
    x = numbers((2, 30))
    x[0, 0], x[1, 3], x[1, 29] = np.inf, np.inf, np.nan
    check_hidden(x, pruned((20, 30), 0.1), KIND)


def test_what_is_left_to_others() -> None:
    assert not sparse_candidates(linear(plain(1, 30), numbers((20, 30))), KIND)
    assert not sparse_candidates(linear(plain(MOST_ROWS, 30), pruned((20, 30), 0.1)), KIND)
