"""What the tests of minimal filtering share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from layers import SETTINGS, Convolution, chain, check, numbers

from graphopt.kernels.operand import Operand
from graphopt.kernels.problem import ConvolutionProblem
from graphopt.kernels.registry import Candidate

Family = Callable[[ConvolutionProblem], list[Candidate]]
Magnitude = Callable[[Convolution, np.ndarray, np.ndarray], np.ndarray]
"""The results of the algorithm of absolute pixels and weights: its errors are proportional."""


def verify(
    case: Convolution,
    candidates: Family,
    magnitude: Magnitude,
    settings: Sequence[tuple[int, bool, int]] = SETTINGS,
) -> None:
    """Check a family's candidates with random numbers."""
    x, weight = numbers(case.x), numbers(case.weight, 1)
    expected = case.convolve(x, weight)
    problem = case.problem(expected.shape)
    found = candidates(problem)
    check(problem, [x, weight], expected, magnitude(case, x, weight), settings, found)


def verify_epilogue(case: Convolution, candidates: Family, magnitude: Magnitude) -> None:
    """The same with a bias, a gate for each channel of each image, a residual and relu."""
    x, weight = numbers(case.x), numbers(case.weight, 1)
    product = case.convolve(x, weight)
    shapes = ((case.outputs,), (*product.shape[:2], 1, 1), product.shape)
    bias, gate, residual = others = [numbers(shape, 2 + k) for k, shape in enumerate(shapes)]
    expected = np.maximum((product + bias[:, None, None]) * gate + residual, 0)
    steps = (("add", "e0"), ("mul", "e1"), ("add", "e2"), ("relu",))
    extras = [Operand.plain("float32", shape) for shape in shapes]
    problem = case.problem(product.shape, chain(*steps, extras=3), extras)
    bound = 4 * (1 + magnitude(case, x, weight))
    check(problem, [x, weight, *others], expected, bound, found=candidates(problem))
