"""Images as bytes, and bytes of another scale: bit for bit what torch's operators make of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from integer_layers import constant, grouped, ungrouped
from support import execute

from graphopt.ir.quantization import dequantize, quantize
from graphopt.kernels.integer_problems import (
    DequantizeProblem,
    IntegerSumProblem,
    QuantizeProblem,
)
from graphopt.kernels.operand import Operand
from graphopt.kernels.registry import candidates

SHAPES = [(1, 3, 5, 7), (2, 8, 4, 4), (1, 5, 1, 1), (3, 6, 17), (2, 7)]
SETTINGS = [(1, True, 0), (2, False, 0), (3, True, 64)]


def solutions(problem: object, inputs: list[np.ndarray]) -> list[np.ndarray]:
    (candidate,) = candidates(problem)
    return [execute(candidate, inputs, *setting)[0] for setting in SETTINGS]


@pytest.mark.parametrize("shape", SHAPES)
def test_quantize_is_that_of_the_operator(shape: tuple[int, ...]) -> None:
    scale, zero_point = np.float32(0.037), 131
    x = 4 * np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    # Halves, numbers far outside, and what is no number.
    x.flat[:6] = scale * np.array([0.5, 1.5, -2.5, np.inf, -np.inf, 1e30], np.float32)
    parameters = np.array([scale, zero_point, 3, 250], np.float32)
    problem = QuantizeProblem(
        (Operand.plain("float32", shape), constant(parameters)), (Operand.grouped("uint8", shape),)
    )
    wanted = quantize(
        torch.tensor(x), torch.tensor(scale), torch.tensor(131), None, 3, 250, torch.uint8
    )
    for result in solutions(problem, [x, parameters]):
        np.testing.assert_array_equal(ungrouped(result, shape), wanted.numpy())


def test_nan_is_the_least_byte_and_stays_alone() -> None:
    shape = (1, 4, 3, 3)
    x = np.ones(shape, np.float32)
    x[0, 1, 1, 1] = np.nan
    parameters = np.array([0.1, 7, 2, 255], np.float32)
    problem = QuantizeProblem(
        (Operand.plain("float32", shape), constant(parameters)), (Operand.grouped("uint8", shape),)
    )
    expected = np.full(shape, 17)
    expected[0, 1, 1, 1] = 2
    for result in solutions(problem, [x, parameters]):
        np.testing.assert_array_equal(ungrouped(result, shape), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_dequantize_is_that_of_the_operator(shape: tuple[int, ...]) -> None:
    scale, zero_point = np.float32(0.037), 131
    x = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    parameters = np.array([scale, zero_point], np.float32)
    problem = DequantizeProblem(
        (Operand.grouped("uint8", shape), constant(parameters)), (Operand.plain("float32", shape),)
    )
    wanted = dequantize(
        torch.tensor(x), torch.tensor(scale), torch.tensor(131), None, 0, 255, torch.uint8
    )
    for result in solutions(problem, [grouped(x), parameters]):
        np.testing.assert_array_equal(result, wanted.numpy())


def scaled(x: np.ndarray, zero_point: float, multiplier: float) -> np.ndarray:
    return (x.astype(np.float32) - np.float32(zero_point)) * np.float32(multiplier)


def rounded(t: np.ndarray, zero_point: float, low: float, high: float) -> np.ndarray:
    return np.clip(np.rint(t.astype(np.float64)) + zero_point, low, high)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 2])
def test_sums(shape: tuple[int, ...], count: int) -> None:
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, shape, np.uint8) for _ in range(count)]
    own = [(17, 0.61), (200, 1.7)][:count]
    parameters = np.array([101, 20, 240, *(n for pair in own for n in pair)], np.float32)
    operand = Operand.grouped("uint8", shape)
    problem = IntegerSumProblem((*[operand] * count, constant(parameters)), (operand,))
    t = np.float32(0)
    for image, pair in zip(images, own, strict=True):
        t = t + scaled(image, *pair)
    inputs = [*map(grouped, images), parameters]
    for result in solutions(problem, inputs):
        np.testing.assert_array_equal(ungrouped(result, shape), rounded(t, 101, 20, 240))


def test_halves_of_a_sum_round_to_even() -> None:
    random = np.random.default_rng(0)
    shape = (1, 8, 5, 5)
    images = [random.integers(0, 256, shape, np.uint8) for _ in range(2)]
    parameters = np.array([100, 0, 255, 128, 0.5, 120, 0.25], np.float32)
    operand = Operand.grouped("uint8", shape)
    problem = IntegerSumProblem((operand, operand, constant(parameters)), (operand,))
    t = scaled(images[0], 128, 0.5) + scaled(images[1], 120, 0.25)
    assert (t % 1 == 0.5).any()
    for result in solutions(problem, [*map(grouped, images), parameters]):
        np.testing.assert_array_equal(ungrouped(result, shape), rounded(t, 100, 0, 255))


@pytest.mark.parametrize("channels", [(4, 8), (8, 4, 3), (12,)])
@pytest.mark.parametrize("size", [(1, 1), (3, 9)])
def test_concatenation(channels: tuple[int, ...], size: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    shapes = [(2, count, *size) for count in channels]
    images = [random.integers(0, 256, shape, np.uint8) for shape in shapes]
    # The first keeps its scale, so its bytes do not change.
    own = [(101, 1.0), (3, 0.4), (250, 1.3)][: len(channels)]
    parameters = np.array([101, 0, 255, *(n for pair in own for n in pair)], np.float32)
    y = (2, sum(channels), *size)
    problem = IntegerSumProblem(
        (*(Operand.grouped("uint8", shape) for shape in shapes), constant(parameters)),
        (Operand.grouped("uint8", y),),
        concatenates=True,
    )
    parts = [
        rounded(scaled(image, *pair), 101, 0, 255) for image, pair in zip(images, own, strict=True)
    ]
    np.testing.assert_array_equal(parts[0], images[0])
    for result in solutions(problem, [*map(grouped, images), parameters]):
        np.testing.assert_array_equal(ungrouped(result, y), np.concatenate(parts, 1))


def test_what_does_not_belong_together_is_refused() -> None:
    operand = Operand.grouped("uint8", (1, 6, 2, 2))
    parameters = constant(np.zeros(7, np.float32))
    with pytest.raises(ValueError, match="side by side"):
        candidates(
            IntegerSumProblem(
                (operand, operand, parameters),
                (Operand.grouped("uint8", (1, 12, 2, 2)),),
                concatenates=True,
            )
        )
