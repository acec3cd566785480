"""Patterns of zeros against counting by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.kernels.zeros import NEIGHBOURS, group_rows, zero_pattern


@given(st.integers(1, 9), st.integers(1, 5), st.sampled_from(NEIGHBOURS), st.integers(0, 99))
def test_groups_of_rows(count: int, columns: int, rows: int, seed: int) -> None:
    nonzero = np.random.default_rng(seed).random((count, columns)) < 0.3
    expected = [nonzero[first : first + rows].any(0) for first in range(0, count, rows)]
    np.testing.assert_array_equal(group_rows(nonzero, rows), expected)


def test_blocks_of_rows_show_in_the_densities() -> None:
    weight = np.zeros((8, 3, 2), np.float32)
    weight[4:8, 1, 0] = -1
    pattern = zero_pattern(weight)
    assert pattern is not None
    assert pattern.densities == (4 / 48, 2 / 24, 1 / 12)
    weight[4, 1, 0] = 0
    other = zero_pattern(weight)
    assert other is not None
    assert other.digest != pattern.digest
    assert other.densities == (3 / 48, 2 / 24, 1 / 12)


def test_values_do_not_matter() -> None:
    weight = np.eye(5, dtype=np.float32)
    assert zero_pattern(weight) == zero_pattern(-3 * weight)
    assert zero_pattern(-0.0 * weight) == zero_pattern(0 * weight)


def test_few_zeros_are_no_pattern() -> None:
    assert zero_pattern(np.tile(np.float32([0, 1]), (4, 4))) is not None
    assert zero_pattern(np.float32([[0, 1, 1]] * 3)) is None
    assert zero_pattern(np.zeros(4, np.float32)) is None
    assert zero_pattern(np.zeros((0, 4), np.float32)) is None


def test_what_patterns_have_in_common() -> None:
    def densities(density: float, rows: int = 1, seed: int = 1) -> tuple[float, ...]:
        groups = np.zeros((256 // rows, 90), np.float32)
        order = np.random.default_rng(seed).permutation(groups.size)
        groups.flat[order[: round(density * groups.size)]] = 1
        pattern = zero_pattern(np.repeat(groups, rows, axis=0))
        assert pattern is not None
        assert pattern.typical().digest == ""
        return pattern.typical().densities

    assert densities(0.1) == densities(0.1, seed=2) == densities(0.101)
    assert densities(0.1) == pytest.approx((0.1, 0.2, 0.3))
    assert densities(0.1, rows=2) == pytest.approx((0.1, 0.1, 0.2))
    assert densities(0.1, rows=4) == pytest.approx((0.1, 0.1, 0.1))
    assert densities(0.13) == pytest.approx((0.13, 0.26, 0.39))
    assert densities(0) == (0, 0, 0)
