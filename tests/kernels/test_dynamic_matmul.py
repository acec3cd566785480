"""Linear layers whose rows are quantized on the way, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from integer_layers import constant
from support import execute

from graphopt.kernels.integer_problems import DynamicMatmulProblem
from graphopt.kernels.operand import Operand
from graphopt.kernels.registry import candidates

LEAST = 2.0**-100


def expected_result(
    x: np.ndarray, weight: np.ndarray, multiplier: np.ndarray, bias: np.ndarray
) -> np.ndarray:
    """As the problem has it, operation by operation in float32."""
    largest = np.abs(x).max(-1, keepdims=True)
    scale = np.maximum(largest / np.float32(127), np.float32(LEAST))
    steps = np.clip(np.rint(x / scale), -127, 127).astype(np.int64)
    sums = (steps @ weight.T.astype(np.int64)).astype(np.float32)
    result: np.ndarray = sums * (multiplier * scale) + bias
    return result


@pytest.mark.parametrize("rows", [(1,), (3,), (2, 5), (9,)])
@pytest.mark.parametrize(("depth", "outputs"), [(4, 16), (7, 3), (130, 65), (1, 1), (64, 200)])
def test_sizes(rows: tuple[int, ...], depth: int, outputs: int) -> None:
    random = np.random.default_rng(depth)
    x = random.standard_normal((*rows, depth)).astype(np.float32)
    x[..., 0] *= 10 ** random.uniform(-3, 3, rows)
    x.reshape(-1, depth)[-1] *= 0 if len(rows) == 2 else 1
    weight = random.integers(-127, 128, (outputs, depth), np.int8)
    multiplier = random.uniform(0.01, 0.1, outputs).astype(np.float32)
    bias = random.standard_normal(outputs).astype(np.float32)
    expected = expected_result(x, weight, multiplier, bias)
    constants = [weight, multiplier, bias]
    problem = DynamicMatmulProblem(
        (Operand.plain("float32", x.shape), *map(constant, constants)),
        (Operand.plain("float32", expected.shape),),
        LEAST,
    )
    (candidate,) = candidates(problem)
    for threads, at_end, offset in [(1, True, 0), (2, False, 4), (3, True, 8)]:
        (result,) = execute(candidate, [x, *constants], threads, at_end, offset)
        np.testing.assert_array_equal(result, expected)
