"""What the tests of convolutions, matrix products and pooling share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from support import execute

from graphopt.kernels.expression import Builder, Expression
from graphopt.kernels.operand import ConstantOperand, Layout, Operand
from graphopt.kernels.problem import ConvolutionProblem, Problem
from graphopt.kernels.registry import Candidate, candidates
from graphopt.kernels.zeros import ZeroPattern, zero_pattern

SETTINGS = [(1, True, 0), (2, False, 4), (3, True, 8)]
"""Threads, and where the operands lie between the guard pages."""

EPSILON = float(np.finfo(np.float32).eps)


def constant(shape: tuple[int, ...], zeros: ZeroPattern | None = None) -> ConstantOperand:
    return ConstantOperand(shape, Layout.plain("float32", len(shape)), zeros)


def numbers(shape: Sequence[int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def pruned(shape: tuple[int, ...], density: float, rows: int = 1, seed: int = 1) -> np.ndarray:
    """A random weight of which groups of ``rows`` neighbours share their zeros."""
    groups = -(-shape[0] // rows)
    kept = np.random.default_rng(seed).random((groups, *shape[1:])) < density
    return numbers(shape, seed) * np.repeat(kept, rows, 0)[: shape[0]]


def chain(*steps: tuple, extras: int = 0) -> Expression:
    """``steps`` are (operator, further operands): "extra i" as "ei", or numbers."""
    builder = Builder()
    value = builder.input()
    others = {f"e{index}": builder.input() for index in range(extras)}
    for op, *rest in steps:
        value = builder.apply(op, value, *(others.get(operand, operand) for operand in rest))
    return builder.finish(value)


def with_padded(
    problem: ConvolutionProblem, places: Sequence[int], halves: bool = False
) -> ConvolutionProblem:
    """A convolution with padded planes, or halves, of the inputs at ``places``, and at -1 of its
    result."""

    def chosen(place: int, operand: Operand) -> Operand:
        if place not in places:
            return operand
        return operand.halved if halves else operand.padded

    inputs = tuple(chosen(place, operand) for place, operand in enumerate(problem.inputs))
    return replace(problem, inputs=inputs, outputs=(chosen(-1, problem.outputs[0]),))


def check(
    problem: Problem,
    inputs: Sequence[np.ndarray],
    expected: np.ndarray,
    magnitude: np.ndarray | float,
    settings: Sequence[tuple[int, bool, int]] = SETTINGS,
    found: Sequence[Candidate] | None = None,
) -> None:
    """Every candidate, or those given, is within a few roundings of ``expected`` in every setting.

    ``magnitude`` is the same result of all absolute values, to which errors are proportional.
    """
    found = candidates(problem) if found is None else found
    assert found, f"no candidate for {problem.key()}"
    for candidate in found:
        for threads, at_end, offset in settings:
            (result,) = execute(candidate, inputs, threads, at_end, offset)
            assert result.shape == expected.shape
            np.testing.assert_array_equal(np.isfinite(result), np.isfinite(expected))
            finite = np.isfinite(expected)
            np.testing.assert_array_equal(result[~finite], expected[~finite].astype(np.float32))
            error = np.abs(np.where(finite, result, 0) - np.where(finite, expected, 0))
            bound = np.where(finite, magnitude, 1) * 4 * EPSILON
            assert (error <= bound).all(), f"{candidate.kernel}: {(error / bound).max()} too large"


@dataclass(frozen=True)
class Convolution:
    """A convolution's sizes; what is not given is as torch has it by default."""

    x: tuple[int, ...]
    outputs: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    @property
    def rank(self) -> int:
        return len(self.kernel)

    @property
    def weight(self) -> tuple[int, ...]:
        return (self.outputs, self.x[1] // self.groups, *self.kernel)

    def convolve(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """torch's result in float64."""
        pairs = [size for pair in reversed(self.padding) for size in pair]
        padded = torch.nn.functional.pad(torch.tensor(x).double(), pairs)
        convolution = (torch.conv1d, torch.conv2d)[self.rank - 1]
        return convolution(
            padded,
            torch.tensor(weight).double(),
            None,
            self.stride or 1,
            0,
            self.dilation or 1,
            self.groups,
        ).numpy()

    def problem(
        self,
        shape: tuple[int, ...],
        epilogue: Expression | None = None,
        extras: Sequence[Operand] = (),
        zeros: ZeroPattern | None = None,
    ) -> ConvolutionProblem:
        return ConvolutionProblem(
            (Operand.plain("float32", self.x), constant(self.weight, zeros), *extras),
            (Operand.plain("float32", shape),),
            self.stride or (1,) * self.rank,
            self.padding or ((0, 0),) * self.rank,
            self.dilation or (1,) * self.rank,
            self.groups,
            epilogue,
        )

    def check(
        self,
        weight: np.ndarray | None = None,
        places: Sequence[int] = (),
        kind: type[Candidate] = Candidate,
    ) -> None:
        """Check all candidates, or those of a kind, with random weights unless others are given,
        and padded planes at ``places`` (`with_padded`)."""
        x = numbers(self.x)
        weight = numbers(self.weight, 1) if weight is None else weight
        expected = self.convolve(x, weight)
        magnitude = self.convolve(np.abs(x), np.abs(weight))
        problem = with_padded(self.problem(expected.shape, zeros=zero_pattern(weight)), places)
        check(problem, [x, weight], expected, magnitude, found=of_kind(problem, kind))

    def check_special(self, value: float) -> None:
        """Check all candidates with a value as more and more of the image's elements."""
        x, weight = numbers(self.x), numbers(self.weight, 1)
        for place in (0, x.size // 2, x.size - 1):
            x.flat[place] = value
            with np.errstate(invalid="ignore"):
                expected = self.convolve(x, weight)
                finite = np.nan_to_num(x, posinf=0, neginf=0)
                magnitude = self.convolve(np.abs(finite), np.abs(weight))
            check(self.problem(expected.shape), [x, weight], expected, magnitude)

    def check_residual(self, places: Sequence[int], kind: type[Candidate]) -> None:
        """Check all candidates, some of which are of a kind, with a bias, something of the shape of
        the result that is added, and padded planes at ``places``."""
        x, weight = numbers(self.x), numbers(self.weight, 1)
        product = self.convolve(x, weight)
        bias, residual = numbers(product.shape[1:2], 3), numbers(product.shape, 2)
        epilogue = chain(("add", "e0"), ("add", "e1"), extras=2)
        extras = [Operand.plain("float32", other.shape) for other in (bias, residual)]
        problem = with_padded(self.problem(product.shape, epilogue, extras), places)
        added = bias.reshape(-1, 1, 1) + residual.astype(np.float64)
        magnitude = self.convolve(np.abs(x), np.abs(weight)) + np.abs(bias).reshape(-1, 1, 1)
        assert of_kind(problem, kind)
        inputs = [x, weight, bias, residual]
        check(problem, inputs, product + added, magnitude + np.abs(residual))


def of_kind(problem: Problem, kind: type[Candidate]) -> list[Candidate]:
    """The candidates of a kind."""
    return [one for one in candidates(problem) if isinstance(one, kind)]


def check_overwriting(
    case: Convolution, kind: type[Candidate], density: float = 1.0, rows: int = 1
) -> None:
    """A convolution's result is the same where it takes the place of what is added to it."""
    x, weight = numbers(case.x), pruned(case.weight, density, rows)
    y = case.convolve(x, weight)
    residual, bias = numbers(y.shape, 2), numbers(y.shape[1:2], 3)
    problem = case.problem(
        y.shape,
        chain(("add", "e0"), ("add", "e1"), ("relu",), extras=2),
        [Operand.plain("float32", bias.shape), Operand.plain("float32", residual.shape)],
        zero_pattern(weight),
    )
    overwriting = [one for one in of_kind(problem, kind) if one.overwrites()]
    assert overwriting
    for candidate in overwriting:
        assert candidate.overwrites() == (3,)
        inputs = [x, weight, bias, residual]
        for threads, at_end, offset in SETTINGS:
            (apart,) = execute(candidate, inputs, threads, at_end, offset)
            (over,) = execute(candidate, inputs, threads, at_end, offset, overwritten=3)
            np.testing.assert_array_equal(over, apart)
