"""Linear layers with zeros in their weights against torch in float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import SETTINGS, chain, check, constant, numbers, pruned
from support import execute
from test_matmul import multiply, plain

from graphopt.kernels.expression import Expression
from graphopt.kernels.operand import Layout, Operand
from graphopt.kernels.problem import MatmulProblem
from graphopt.kernels.registry import Candidate, candidates
from graphopt.kernels.simd import LANES
from graphopt.kernels.sparse_matmul import SparseMatmulCandidate
from graphopt.kernels.zeros import zero_pattern


def linear(
    a: Operand,
    weight: np.ndarray,
    transposed: tuple[bool, bool] = (False, True),
    epilogue: Expression | None = None,
    extras: Sequence[Operand] = (),
) -> MatmulProblem:
    rows = a.shape[-1] if transposed[0] else a.shape[-2]
    y = (*a.shape[:-2], rows, weight.shape[0 if transposed[1] else 1])
    operand = constant(weight.shape, zero_pattern(weight))
    return MatmulProblem((a, operand, *extras), (plain(*y),), transposed, epilogue)


def sparse_candidates(
    problem: MatmulProblem, kind: type[Candidate] = SparseMatmulCandidate
) -> list[Candidate]:
    return [one for one in candidates(problem) if isinstance(one, kind)]


def check_linear(
    a: Operand,
    weight: np.ndarray,
    transposed: tuple[bool, bool] = (False, True),
    kind: type[Candidate] = SparseMatmulCandidate,
) -> None:
    problem = linear(a, weight, transposed)
    x = numbers(a.shape)
    found = sparse_candidates(problem, kind)
    assert found
    expected = multiply(x, weight, transposed)
    magnitude = multiply(np.abs(x), np.abs(weight), transposed)
    check(problem, [x, weight], expected, magnitude, found=found)


def check_epilogue(shape: tuple[int, ...], kind: type[Candidate] = SparseMatmulCandidate) -> None:
    """Everything that an epilogue may read, after a linear layer of an input of that shape."""
    *rows, depth = shape
    x, weight = numbers(shape), pruned((70, depth), 0.2)
    bias, residual, scale = numbers((70,), 2), numbers((*rows, 70), 3), numbers((rows[-1], 1), 4)
    product = multiply(x, weight, (False, True))
    activated = torch.nn.functional.gelu(torch.tensor(product + bias)).numpy()
    epilogue = chain(("add", "e0"), ("gelu",), ("add", "e1"), ("mul", "e2"), extras=3)
    extras = [plain(*other.shape) for other in (bias, residual, scale)]
    problem = linear(plain(*shape), weight, epilogue=epilogue, extras=extras)
    magnitude = 10 * (1 + multiply(np.abs(x), np.abs(weight), (False, True)))
    found = sparse_candidates(problem, kind)
    assert found
    expected = (activated + residual) * scale
    check(problem, [x, weight, bias, residual, scale], expected, magnitude, found=found)


def check_hidden(
    x: np.ndarray, weight: np.ndarray, kind: type[Candidate] = SparseMatmulCandidate
) -> None:
    """What is not finite in ``x`` reaches only the results whose weights for it are not zero."""
    seen = multiply(~np.isfinite(x), weight != 0, (False, True)) != 0
    expected = multiply(np.nan_to_num(x, posinf=0), weight, (False, True))
    found = sparse_candidates(linear(plain(*x.shape), weight), kind)
    assert found
    for candidate in found:
        for setting in SETTINGS:
            (y,) = execute(candidate, [x, weight], *setting)
            np.testing.assert_array_equal(~np.isfinite(y), seen)
            np.testing.assert_allclose(y[~seen], expected[~seen], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [50, 3 * 16 + 8, 197])
@pytest.mark.parametrize("transposed", [(False, True), (True, True)])
def test_rows_behind_whole_vectors(rows: int, transposed: tuple[bool, bool]) -> None:
    # As many as a narrower vector holds, where vectors have 16 lanes.
    shape = (2, 300, rows) if transposed[0] else (1, rows, 300)
    weight = pruned((70, 300), 0.2)
    found = sparse_candidates(linear(plain(*shape), weight, transposed))
    assert LANES != 16 or all(one.schedule.tail for one in found)  # type: ignore[attr-defined]
    check_linear(plain(*shape), weight, transposed)


@pytest.mark.parametrize("rows", [LANES // 2, LANES, 3 * LANES + 1, 7 * LANES, 10 * LANES - 1])
@pytest.mark.parametrize(("depth", "columns"), [(7, 2), (33, LANES + 1), (300, 70)])
def test_sizes(rows: int, depth: int, columns: int) -> None:
    check_linear(plain(rows, depth), pruned((columns, depth), 0.2))


@settings(max_examples=settings().max_examples // 2)
@given(
    st.integers(LANES // 2, 150),
    st.integers(1, 400),
    st.integers(2, 60),
    st.sampled_from([0.0, 0.1, 0.4]),
    st.sampled_from([1, 2, 4]),
)
def test_any_size(rows: int, depth: int, columns: int, density: float, shared: int) -> None:
    weight = pruned((columns, depth), density, shared)
    if zero_pattern(weight) is not None:
        check_linear(plain(rows, depth), weight)


def test_layouts() -> None:
    check_linear(plain(40, 30), pruned((30, 50), 0.2), (False, False))
    check_linear(plain(30, 40), pruned((50, 30), 0.2), (True, True))
    check_linear(plain(2, 3, 20, 30), pruned((50, 30), 0.2))
    permuted = Operand((2, 20, 30), Layout("float32", (1, 0, 2)))
    check_linear(permuted, pruned((50, 30), 0.2))


@pytest.mark.parametrize("shared", [1, 2, 4])
def test_rows_that_share_their_zeros(shared: int) -> None:
    weight = pruned((37, 60), 0.2, shared)
    found = sparse_candidates(linear(plain(50, 60), weight))
    assert any(one.kernel.startswith(f"sparse matmul {shared}x") for one in found)
    check_linear(plain(50, 60), weight)


@pytest.mark.parametrize("depth", [40, 300])
def test_epilogue(depth: int) -> None:
    check_epilogue((2, 25, depth))


def test_a_zero_weight_multiplies_nothing() -> None:
    x = numbers((40, 30))
    x[7, 3], x[39, 29] = np.inf, np.nan
    check_hidden(x, pruned((20, 30), 0.1))


def test_what_is_left_to_dense_kernels() -> None:
    assert not sparse_candidates(linear(plain(40, 30), numbers((20, 30))))
    assert not sparse_candidates(linear(plain(1, 30), pruned((20, 30), 0.1)))
    unsupported = chain(("no such operator",))
    assert not candidates(linear(plain(40, 30), pruned((20, 30), 0.1), epilogue=unsupported))
