"""Rows of tables against NumPy's indexing."""

from __future__ import annotations

import numpy as np
import pytest
from layers import SETTINGS
from support import execute

from graphopt.kernels.operand import Layout, Operand
from graphopt.kernels.problem import GatherProblem
from graphopt.kernels.registry import candidates
from graphopt.kernels.simd import LANES


def gather_problem(table: np.ndarray, indices: np.ndarray, wraps: bool) -> GatherProblem:
    operands = [Operand.plain(array.dtype.name, array.shape) for array in (table, indices)]
    y = Operand.plain(table.dtype.name, (*indices.shape, *table.shape[1:]))
    return GatherProblem(tuple(operands), (y, Operand.plain("int64", (2,))), wraps)


def gather(
    table: np.ndarray, indices: np.ndarray, wraps: bool = False
) -> list[tuple[np.ndarray, list[int]]]:
    """The rows and the note, in every setting."""
    (candidate,) = candidates(gather_problem(table, indices, wraps))
    results = [execute(candidate, [table, indices], *setting) for setting in SETTINGS]
    return [(y, note.tolist()) for y, note in results]


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "int32"])
@pytest.mark.parametrize("row", [(), (1,), (LANES - 1,), (LANES,), (3, LANES + 1), (0,)])
@pytest.mark.parametrize("shape", [(), (1,), (4, 5), (0,)])
def test_rows(dtype: str, row: tuple[int, ...], shape: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    table = (random.standard_normal((7, *row)) * 100).astype(dtype)
    for kind in ("int64", "int32"):
        indices = random.integers(0, 7, shape).astype(kind)
        for y, note in gather(table, indices):
            np.testing.assert_array_equal(y, table[indices])
            assert note == [0, 0]


def test_bits_are_not_changed() -> None:
    bits = np.array([[0x7F800001, 0xFFC12345, 0x80000000, 1]], np.uint32)
    for y, _ in gather(bits.view(np.float32), np.zeros(3, np.int64)):
        np.testing.assert_array_equal(y.view(np.uint32), np.repeat(bits, 3, 0))


def test_negative_indices_wrap_where_they_should() -> None:
    table = np.arange(20, dtype=np.float32).reshape(5, 4)
    indices = np.array([-1, -5, 4, 0])
    for y, note in gather(table, indices, wraps=True):
        np.testing.assert_array_equal(y, table[indices])
        assert note == [0, 0]
    for _, note in gather(table, indices):
        assert note == [1, -1]


@pytest.mark.parametrize("index", [5, -6, 2**62, -(2**62)])
@pytest.mark.parametrize("wraps", [False, True])
def test_the_first_index_outside_is_noted_and_not_followed(index: int, wraps: bool) -> None:
    table = np.ones((5, 4), np.float32)
    for _, note in gather(table, np.array([0, 4, index, 99]), wraps):
        assert note == [1, index]


def test_a_table_without_rows() -> None:
    table = np.ones((0, 4), np.float32)
    assert gather(table, np.zeros(0, np.int64))[0][1] == [0, 0]
    assert gather(table, np.zeros(2, np.int64))[0][1] == [1, 0]


def test_what_is_left_to_others() -> None:
    assert not candidates(gather_problem(np.ones((3, 2), bool), np.zeros(2, np.int64), False))
    problem = gather_problem(np.ones((3, 2)), np.zeros(2, np.int64), False)
    table = Operand((3, 2), Layout("float64", (1, 0)))
    turned = GatherProblem((table, problem.inputs[1]), problem.outputs)
    assert not candidates(turned)


def test_malformed_problems_are_refused() -> None:
    problem = gather_problem(np.ones((3, 2)), np.zeros(2, np.int64), False)
    with pytest.raises(ValueError, match="should be"):
        candidates(GatherProblem(problem.inputs, (problem.inputs[0], problem.outputs[1])))
    with pytest.raises(ValueError, match="indices are"):
        candidates(gather_problem(np.ones((3, 2)), np.zeros(2), False))
