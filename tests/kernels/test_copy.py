"""Copies against numpy's and torch's views."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import solve

from graphopt.kernels import copy
from graphopt.kernels.operand import ITEM_BYTES, Layout, Operand
from graphopt.kernels.problem import CopyProblem, Piece
from graphopt.kernels.registry import candidates
from graphopt.kernels.simd import LANES

SETTINGS = [(1, True, 0), (2, False, 8), (3, True, 24)]


@pytest.fixture(autouse=True)
def _always_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small problems are divided among threads too."""
    monkeypatch.setattr(copy, "WORTH_SHARING", 0.0)


def numbered(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    values = np.arange(int(np.prod(shape))).reshape(shape)
    return values % 2 == 1 if dtype == "bool" else values.astype(dtype)


def check(problem: CopyProblem, inputs: list[np.ndarray], expected: np.ndarray) -> None:
    assert problem.outputs[0].shape == expected.shape
    for threads, at_end, offset in SETTINGS:
        (result,) = solve(problem, inputs, threads, at_end, offset)
        np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("dtype", ITEM_BYTES)
@pytest.mark.parametrize("shape", [(LANES, LANES), (LANES + 1, 3 * LANES - 1), (5, 4), (3, 70)])
def test_transposition(dtype: str, shape: tuple[int, int]) -> None:
    x = numbered(shape, dtype)
    check(copy.permute(Operand.plain(dtype, shape), (1, 0)), [x], x.T)


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_every_permutation(order: tuple[int, ...]) -> None:
    x = numbered((3, 5, LANES + 2, 7), "float32")
    check(copy.permute(Operand.plain("float32", x.shape), order), [x], x.transpose(order))


@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (3, 0), (1, 1, 1)])
def test_small_and_empty(shape: tuple[int, ...]) -> None:
    x = numbered(shape, "int64")
    order = tuple(reversed(range(len(shape))))
    check(copy.permute(Operand.plain("int64", shape), order), [x], x.transpose(order))


@given(
    st.lists(
        st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(0, 20), st.integers(1, 3)),
        min_size=1,
        max_size=3,
    )
)
def test_slices(dimensions: list[tuple[int, int, int, int]]) -> None:
    x = numbered(tuple(size for size, *_ in dimensions), "int32")
    bounds = [slice(min(a, n), max(min(b, n), min(a, n)), step) for n, a, b, step in dimensions]
    problem = copy.narrow(
        Operand.plain("int32", x.shape),
        [bound.start for bound in bounds],
        [bound.stop for bound in bounds],
        [bound.step for bound in bounds],
    )
    (result,) = solve(problem, [x])
    np.testing.assert_array_equal(result, x[tuple(bounds)])


def test_reversal() -> None:
    x = numbered((4, 37), "float64")
    problem = copy.narrow(Operand.plain("float64", x.shape), (0, 36), (4, -1), (1, -1))
    check(problem, [x], x[:, ::-1])


@pytest.mark.parametrize(
    ("shape", "target"),
    [((1,), (5,)), ((3, 1), (3, 33)), ((1, 33), (2, 4, 33)), ((), (2, 2)), ((2, 1, 1), (2, 0, 3))],
)
def test_expansion(shape: tuple[int, ...], target: tuple[int, ...]) -> None:
    x = numbered(shape, "uint8")
    check(copy.expand(Operand.plain("uint8", shape), target), [x], np.broadcast_to(x, target))


@pytest.mark.parametrize("dimension", [0, 1, 2])
@pytest.mark.parametrize("sizes", [(1,), (3, 5), (2, 0, 1), (LANES, 1, LANES + 1)])
def test_concatenation(dimension: int, sizes: tuple[int, ...]) -> None:
    arrays = []
    for size in sizes:
        shape = [3, 4, 5]
        shape[dimension] = size
        arrays.append(numbered(tuple(shape), "float32") + 1000 * len(arrays))
    operands = [Operand.plain("float32", array.shape) for array in arrays]
    check(copy.concatenate(operands, dimension), arrays, np.concatenate(arrays, dimension))


@pytest.mark.parametrize(
    ("padding", "dtype", "value"),
    [
        ((1, 2), "float32", -np.inf),
        ((0, 0, 3, 1), "float32", -0.0),
        ((1, 0, 0, 2, 3, 4), "int64", -7),
        ((-1, 2, 1, -2), "float64", 2.5),
        ((2, 2), "bool", True),
        ((0, 0), "uint8", 200),
    ],
)
def test_padding(padding: tuple[int, ...], dtype: str, value: float) -> None:
    x = numbered((3, 5, LANES + 1), dtype)
    pairs = [(0, 0)] * (3 - len(padding) // 2) + [
        padding[i : i + 2] for i in reversed(range(0, len(padding), 2))
    ]
    before, after = zip(*pairs, strict=True)
    problem = copy.pad(Operand.plain(dtype, x.shape), before, after, value)
    expected = torch.constant_pad_nd(torch.tensor(x), padding, value).numpy()
    check(problem, [x], expected)
    if value == 0:
        assert np.signbit(solve(problem, [x])[0][:, 0]).all()


@pytest.mark.parametrize("shift", [0, 1, -3, 7, 12])
def test_roll(shift: int) -> None:
    x = numbered((3, 7, 5), "int16")
    check(copy.roll(Operand.plain("int16", x.shape), shift, 1), [x], np.roll(x, shift, 1))


def test_layouts() -> None:
    x = numbered((2, 19, 6, 7), "float32")
    plain = Layout.plain("float32", 4)
    last = Layout("float32", (0, 2, 3, 1))
    pitched = Layout("float32", (0, 1, 2, 3), pitch=16)
    for source, target in itertools.permutations((plain, last, pitched), 2):
        check(copy.convert(Operand(x.shape, source), target), [x], x)


def test_bits_are_kept() -> None:
    patterns = np.array([0x7FC12345, 0xFFA00001, 0x00000001, 0x80000000] * 9, np.uint32)
    x = patterns.view(np.float32).reshape(6, 6)
    (result,) = solve(copy.permute(Operand.plain("float32", (6, 6)), (1, 0)), [x])
    np.testing.assert_array_equal(result.view(np.uint32), x.view(np.uint32).T)


def test_malformed_problems_are_refused() -> None:
    four, wide = Operand.plain("float32", (4,)), Operand.plain("float64", (4,))
    whole, part = (Piece(0, (size,), (1,), 0, (1,), 0) for size in (4, 3))
    with pytest.raises(ValueError, match="does not convert"):
        candidates(CopyProblem((whole,), (four,), (wide,)))
    with pytest.raises(ValueError, match="do not cover"):
        candidates(CopyProblem((part,), (four,), (four,)))
