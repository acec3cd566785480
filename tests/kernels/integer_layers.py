"""What the tests of int8 kernels share: layouts, and int32 references."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch

from graphopt.kernels.integer_problems import IntegerConvolutionProblem
from graphopt.kernels.operand import GROUP, ConstantOperand, Layout, Operand
from graphopt.kernels.zeros import word_pattern


def grouped(array: np.ndarray, fill: int = 0xA5) -> np.ndarray:
    """An image (N, C, *) in the memory of `Layout.grouped`, with ``fill`` where nothing is."""
    batch, channels = array.shape[:2]
    shape = Layout.grouped("uint8", array.ndim).memory(array.shape)
    pixels = math.prod(array.shape[2:])
    memory = np.full(shape, fill, array.dtype).transpose(0, 1, 3, 2)
    rows = memory.reshape(batch, shape[1] * GROUP, shape[2])
    rows[:, :channels, :pixels] = array.reshape(batch, channels, pixels)
    return np.ascontiguousarray(rows.reshape(batch, shape[1], GROUP, -1).transpose(0, 1, 3, 2))


def ungrouped(memory: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The image in the memory of `Layout.grouped`."""
    batch, channels = shape[:2]
    rows = memory.transpose(0, 1, 3, 2).reshape(batch, -1, memory.shape[2])
    return rows[:, :channels, : math.prod(shape[2:])].reshape(shape)


def constant(array: np.ndarray) -> ConstantOperand:
    zeros = word_pattern(array) if array.dtype == np.int8 else None
    return ConstantOperand(array.shape, Layout.plain(str(array.dtype), array.ndim), zeros)


@dataclass
class Numbers:
    """Scales and zero points, as `integer_problems` names them."""

    x_zero_point: int = 0
    y_zero_point: int = 0
    low: int = 0
    high: int = 255
    residual_zero_point: int = 0
    residual_multiplier: float = 0.0

    @property
    def array(self) -> np.ndarray:
        return np.array(list(vars(self).values()), np.float32)


def requantized(
    sums: np.ndarray,
    multiplier: np.ndarray,
    numbers: Numbers,
    residual: np.ndarray | None = None,
    floating: bool = False,
) -> np.ndarray:
    """int32 sums (N, O, *) as results, step by step as `integer_problems` has it."""
    t = sums.astype(np.float32) * multiplier.reshape(-1, *[1] * (sums.ndim - 2))
    if floating:
        return t
    if residual is not None:
        r = residual.astype(np.float32) - np.float32(numbers.residual_zero_point)
        t = t + r * np.float32(numbers.residual_multiplier)
    with np.errstate(over="ignore"):
        steps = np.rint(t.astype(np.float64)) + numbers.y_zero_point
    return np.clip(steps, numbers.low, numbers.high).astype(np.uint8)


@dataclass
class IntegerConvolution:
    """A convolution with random operands; what is not given is as torch has it by default."""

    x: tuple[int, int, int, int]
    outputs: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    residual: bool = False
    floating: bool = False
    extreme: bool = False
    density: float = 1.0
    block: int = 1
    seed: int = 0
    numbers: Numbers = field(default_factory=Numbers)

    def __post_init__(self) -> None:
        random = np.random.default_rng(self.seed)
        weight = (self.outputs, self.x[1] // self.groups, *self.kernel)
        if self.extreme:
            # The largest sums there are, of either sign: pairs of products exceed int16.
            self.image = random.choice(np.array([0, 255, 255, 255], np.uint8), self.x)
            sign = random.choice([-1, 1], (self.outputs, 1, 1, 1))
            self.weight = np.broadcast_to(sign * 127, weight).astype(np.int8)
        else:
            self.image = random.integers(0, 256, self.x, np.uint8)
            self.weight = random.integers(-127, 128, weight, np.int8)
        if self.density < 1:
            self.weight = self._pruned(random)
        depth = math.prod(weight[1:])
        self.bias = random.integers(-20000, 20000, self.outputs).astype(np.int32)
        spread = 100 / (127 * 128 * math.sqrt(depth)) * random.uniform(0.2, 1.5, self.outputs)
        self.multiplier = spread.astype(np.float32)
        self.numbers = Numbers(
            int(random.integers(256)), int(random.integers(256)),
            *sorted(random.integers(0, 256, 2).tolist()) if random.random() < 0.3 else (0, 255),
            int(random.integers(256)), float(np.float32(random.uniform(0.1, 2))),
        )  # fmt: skip

    def _pruned(self, random: np.random.Generator) -> np.ndarray:
        """The weight, of which blocks of output channels by four input channels are zero."""
        outputs, channels = self.weight.shape[:2]
        shape = (-(-outputs // self.block), -(-channels // GROUP), *self.kernel)
        kept = random.random(shape) < self.density
        kept = kept.repeat(self.block, 0)[:outputs].repeat(GROUP, 1)[:, :channels]
        return self.weight * kept

    def sums(self) -> np.ndarray:
        """The int32 sums: exact, since torch convolves in float64 what is below 2**53."""
        x = torch.tensor(self.image).double() - self.numbers.x_zero_point
        (top, bottom), (left, right) = self.padding
        padded = torch.nn.functional.pad(x, (left, right, top, bottom))
        result = torch.conv2d(
            padded,
            torch.tensor(self.weight).double(),
            torch.tensor(self.bias).double(),
            self.stride,
            0,
            self.dilation,
            self.groups,
        )
        return result.numpy().astype(np.int64).astype(np.int32)

    def case(self) -> tuple[IntegerConvolutionProblem, list[np.ndarray], np.ndarray]:
        """The problem, its inputs, and its result (N, O, *)."""
        sums = self.sums()
        inputs = [
            grouped(self.image), self.weight, self.multiplier, self.bias, self.numbers.array
        ]  # fmt: skip
        operands = [Operand.grouped("uint8", self.x), *map(constant, inputs[1:])]
        residual = None
        if self.residual:
            random = np.random.default_rng(self.seed + 1)
            residual = random.integers(0, 256, sums.shape, np.uint8)
            inputs.append(grouped(residual))
            operands.append(Operand.grouped("uint8", sums.shape))
        y = Operand.grouped("uint8", sums.shape)
        if self.floating:
            y = Operand.plain("float32", sums.shape)
        problem = IntegerConvolutionProblem(
            tuple(operands), (y,), self.stride, self.padding, self.dilation, self.groups
        )
        expected = requantized(sums, self.multiplier, self.numbers, residual, self.floating)
        return problem, inputs, expected
