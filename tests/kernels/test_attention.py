"""Attention against its definition in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from layers import SETTINGS, numbers
from support import execute, solve

from graphopt.kernels import attention
from graphopt.kernels.operand import Layout, Operand
from graphopt.kernels.problem import AttentionProblem
from graphopt.kernels.registry import candidates
from graphopt.kernels.simd import LANES
from graphopt.kernels.tile import DEPTH


@pytest.fixture(autouse=True)
def _always_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small problems are divided among threads too."""
    monkeypatch.setattr(attention, "WORTH_SHARING", 0.0)


def problem_of(arrays: list[np.ndarray], scale: float, causal: bool = False) -> AttentionProblem:
    inputs = tuple(Operand.plain(str(array.dtype), array.shape) for array in arrays)
    query, _, value = (operand.shape for operand in inputs[:3])
    return AttentionProblem(
        inputs, (Operand.plain("float32", (*query[:-1], value[-1])),), scale, causal
    )


def exact(
    arrays: list[np.ndarray], scale: float, causal: bool = False, dtype: type = np.float64
) -> np.ndarray:
    """The definition; a query that sees nothing yields zeros."""
    query, key, value = (array.astype(dtype) for array in arrays[:3])
    scores = query @ np.swapaxes(key, -1, -2) * scale
    if len(arrays) == 4:
        mask = arrays[3]
        scores = scores + (np.where(mask, 0, -np.inf) if mask.dtype == bool else mask)
    if causal:
        scores = np.where(np.tri(*scores.shape[-2:], dtype=bool), scores, -np.inf)
    peak = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(peak == -np.inf, 0, peak))
    total = weights.sum(-1, keepdims=True)
    return (weights / np.where(total == 0, 1, total)) @ value


def check(arrays: list[np.ndarray], causal: bool = False) -> None:
    """Every setting is about as good as numpy in float32."""
    scale = 1 / math.sqrt(arrays[0].shape[-1])
    expected = exact(arrays, scale, causal)
    theirs = np.abs(exact(arrays, scale, causal, np.float32) - expected).max(initial=0)
    bound = 2 * theirs + 4 * 2.0**-24 * np.abs(arrays[2]).max(initial=0)
    for threads, at_end, offset in SETTINGS:
        problem = problem_of(arrays, scale, causal)
        (result,) = solve(problem, arrays, threads, at_end, offset)
        assert (np.abs(result - expected) <= bound).all()


def heads(
    batch: tuple[int, ...], length: int, size: int, inner: int, outer: int
) -> list[np.ndarray]:
    shapes = (*batch, length, inner), (*batch, size, inner), (*batch, size, outer)
    return [numbers(shape, seed) for seed, shape in enumerate(shapes)]


SHAPES = [
    ((), 1, 1, 1, 1),
    ((), 5, 7, 3, 2),
    ((2, 3), 17, 17, 8, 8),
    ((1, 2), 97, 4 * LANES + 1, LANES, 5 * LANES + 3),
    ((3,), 1, 6 * LANES, 2 * LANES, LANES),
    ((2,), 8 * LANES, 1, 4, 4),
    ((1,), 7, DEPTH + 3, DEPTH + 1, 3),
    ((0, 2), 3, 3, 4, 4),
    ((2,), 0, 3, 4, 4),
]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention(shape: tuple, causal: bool) -> None:
    check(heads(*shape), causal)


@pytest.mark.parametrize(
    "mask", [(2, 3, 9, 21), (9, 21), (2, 1, 1, 21), (3, 1, 21), (1, 1, 9, 21), (1, 21)]
)
@pytest.mark.parametrize("dtype", ["float32", "bool"])
def test_masks(mask: tuple[int, ...], dtype: str) -> None:
    drawn = numbers(mask, 7)
    check([*heads((2, 3), 9, 21, 8, 8), drawn > -0.5 if dtype == "bool" else drawn])


def test_keys_shared_by_heads() -> None:
    query = numbers((2, 3, 4, 9, 8))
    key, value = numbers((2, 3, 1, 11, 8), 1), numbers((2, 3, 1, 11, 8), 2)
    check([query, key, value])


def test_other_layouts() -> None:
    arrays = heads((2, 3), 9, 21, 8, 8)
    # Heads lie inside tokens, as a linear layer leaves them.
    layout = Layout("float32", (0, 2, 1, 3))
    inputs = tuple(Operand(array.shape, layout) for array in arrays)
    problem = AttentionProblem(inputs, (Operand(arrays[0].shape, layout),), 0.5)
    (result,) = solve(problem, arrays, 2)
    np.testing.assert_allclose(result, exact(arrays, 0.5), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bool"])
def test_special_values(dtype: str) -> None:
    arrays = heads((1, 4), 6, LANES + 5, 8, 8)
    arrays[0][0, 0, 0, 0] = np.nan
    arrays[1][0, 1, LANES, 3] = np.inf
    arrays[2][0, 2, 4, 0] = np.nan
    mask = np.ones((6, LANES + 5), bool)
    mask[1], mask[2, 3:] = False, False
    mask = mask if dtype == "bool" else np.where(mask, 0, -np.inf).astype(np.float32)
    (result,) = solve(problem_of([*arrays, mask], 0.5), [*arrays, mask], 2)
    tensors = [torch.tensor(array, dtype=torch.float64) for array in arrays]
    seen = torch.tensor(mask).double() if dtype == "float32" else torch.tensor(mask)
    expected = torch.nn.functional.scaled_dot_product_attention(*tensors, seen, scale=0.5)
    np.testing.assert_allclose(result, expected.numpy(), rtol=1e-5, atol=1e-6)
    assert not result[0, 3, 1].any()


@pytest.mark.parametrize("queries", [1, 13])
def test_blocks_of_queries(queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_QUERIES", queries)
    arrays = heads((2,), 41, 19, 8, 8)
    for causal in (False, True):
        (candidate,) = candidates(problem_of(arrays, 0.3, causal))
        for threads in (1, 3):
            (result,) = execute(candidate, arrays, threads)
            expected = exact(arrays, 0.3, causal)
            np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


def test_what_is_not_this_familys_is_declined_or_refused() -> None:
    empty = heads((2,), 3, 0, 4, 4)
    assert candidates(problem_of(empty, 1.0)) == []
    column = [*heads((2,), 3, 5, 4, 4), numbers((3, 1))]
    assert candidates(problem_of(column, 1.0)) == []
    with pytest.raises(ValueError, match="attention of"):
        candidates(problem_of([numbers((3, 4)), numbers((3, 5)), numbers((3, 4))], 1.0))
