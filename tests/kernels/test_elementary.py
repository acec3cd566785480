"""Elementary functions over all of float32 against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import solve

from graphopt.kernels.expression import Builder
from graphopt.kernels.operand import Operand
from graphopt.kernels.problem import PointwiseProblem

FUNCTIONS = {
    # name: (reference in float64, units in the last place)
    "exp": (np.exp, 1.1),
    "expm1": (np.expm1, 1.6),
    "log": (np.log, 1.0),
    "log1p": (np.log1p, 1.6),
    "sigmoid": (lambda x: torch.sigmoid(torch.tensor(x)).numpy(), 2.4),
    "tanh": (np.tanh, 1.5),
    "erf": (lambda x: torch.erf(torch.tensor(x)).numpy(), 1.2),
    "sin": (np.sin, 0.51),
    "cos": (np.cos, 0.51),
}


@pytest.fixture(scope="module")
def points() -> np.ndarray:
    """Every 20011th float32, and dense points where functions bend."""
    bits = np.arange(0, 2**32, 20011, dtype=np.uint64).astype(np.uint32)
    near = np.random.default_rng(0).uniform(-2, 2, 200_000)
    far = np.random.default_rng(1).uniform(-110, 110, 200_000)
    edges = [0.0, -0.0, np.inf, -np.inf, np.nan, 88.722839, 88.72284, -103.97208, 2.0**28, -1.0]
    others = np.concatenate([near, far, edges]).astype(np.float32)
    return np.concatenate([bits.view(np.float32), others])


@pytest.fixture(scope="module")
def results(points: np.ndarray) -> dict[str, np.ndarray]:
    builder = Builder()
    x = builder.input()
    expression = builder.finish(*(builder.apply(name, x) for name in FUNCTIONS))
    operand = Operand.plain("float32", points.shape)
    problem = PointwiseProblem(expression, (operand,), (operand,) * len(FUNCTIONS))
    return dict(zip(FUNCTIONS, solve(problem, [points]), strict=True))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_within_its_units_everywhere(
    name: str, points: np.ndarray, results: dict[str, np.ndarray]
) -> None:
    reference, ulps = FUNCTIONS[name]
    with np.errstate(all="ignore"):
        exact = reference(points.astype(np.float64))
        rounded = exact.astype(np.float32)
        finite = np.isfinite(rounded)
        unit = np.spacing(np.abs(rounded)).astype(np.float64)
        error = np.abs(results[name].astype(np.float64) - exact) / unit
    np.testing.assert_array_equal(results[name][~finite], rounded[~finite])
    worst = int(np.argmax(np.where(finite, error, 0)))
    assert (error[finite] <= ulps).all(), (points[worst], results[name][worst], exact[worst])


@pytest.mark.parametrize("name", ["expm1", "log1p", "tanh", "erf", "sin"])
def test_odd_functions_keep_the_sign_of_zero(
    name: str, points: np.ndarray, results: dict[str, np.ndarray]
) -> None:
    zero = points == 0
    np.testing.assert_array_equal(np.signbit(results[name][zero]), np.signbit(points[zero]))
