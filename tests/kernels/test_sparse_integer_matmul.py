"""Linear layers of bytes that skip zeros, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_integer_matmul import check

from graphopt.kernels.registry import Candidate
from graphopt.kernels.sparse_integer_convolution import Schedule
from graphopt.kernels.sparse_integer_matmul import SparseIntegerMatmulCandidate


def sparse(found: list[Candidate]) -> list[Candidate]:
    return [one for one in found if isinstance(one, SparseIntegerMatmulCandidate)]


def scheduled(rows: int, width: int, found: list[Candidate]) -> list[Candidate]:
    """The sparse candidate with another schedule."""
    (one,) = sparse(found)
    assert isinstance(one, SparseIntegerMatmulCandidate)
    return [replace(one, schedule=Schedule(rows, min(width, one.image.vectors)))]


@pytest.mark.parametrize("schedule", [(1, 1), (1, 2), (2, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("floating", [True, False])
@pytest.mark.parametrize(
    ("rows", "depth", "outputs"),
    [((40,), 64, 72), ((2, 9), 20, 8), ((1,), 32, 12), ((130,), 100, 20), ((3,), 4, 4)],
)
def test_schedules(
    rows: tuple[int, ...], depth: int, outputs: int, floating: bool, schedule: tuple[int, int]
) -> None:
    def choose(found: list[Candidate]) -> list[Candidate]:
        return scheduled(*schedule, found)

    check(rows, depth, outputs, floating, density=0.2, choose=choose)


def test_features_that_fill_no_word_are_floats_alone() -> None:
    check((40,), 64, 30, floating=True, density=0.2, choose=sparse)
    check((40,), 64, 30, floating=False, density=0.2, choose=lambda found: found[:2])
    with pytest.raises(AssertionError):
        check((40,), 64, 30, floating=False, density=0.2, choose=sparse)


@pytest.mark.parametrize("block", [1, 2, 4])
def test_blocks_are_recognised(block: int) -> None:
    def of_blocks(found: list[Candidate]) -> list[Candidate]:
        return [one for one in found if f"sparse integer matmul {block}x" in one.kernel]

    check((128,), 256, 64, floating=False, density=0.2, block=block, choose=of_blocks)


@pytest.mark.parametrize("density", [0.0, 0.2])
def test_nothing_saturates_in_between(density: float) -> None:
    check((20,), 1000, 40, floating=True, extreme=True, density=density, choose=sparse)


def test_halves_round_to_even() -> None:
    check((20,), 40, 72, floating=False, halves=True, density=0.3, choose=sparse)


@settings(max_examples=50)
@given(
    st.integers(1, 150), st.integers(1, 60), st.integers(1, 20), st.booleans(),
    st.floats(0.0, 0.6), st.sampled_from([1, 2, 4]),
)  # fmt: skip
def test_any_linear(
    rows: int, words: int, tiles: int, floating: bool, density: float, block: int
) -> None:
    check((rows,), 4 * words, 4 * tiles, floating, density=density, block=block)
