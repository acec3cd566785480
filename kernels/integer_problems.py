"""Problems of int8 networks: layers whose operands are quantized and whose sums are int32.

All that is said of how sums become results holds for each of them, bit for bit and on every CPU.
A sum of products of ``x - x_zero_point`` (uint8) and weights (int8), and the int32 ``bias``, is
exact. It becomes ``t = float32(sum) * multiplier[channel]``. A residual, uint8, is added as
``t + float32(residual - residual_zero_point) * residual_multiplier``. Every one of these float32
operations is rounded once. A uint8 result is ``round_half_even(t) + y_zero_point``, clamped to
``low`` and ``high``, by which an activation that clamps is expressed as well; a float32 result is
``t``.

Scales and zero points are contents of constants, not fields, so that layers of equal shapes are
equal problems. `NUMBERS` says where the input ``numbers``, float32, has them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from graphopt.kernels.operand import GROUP, ConstantOperand, Layout, Operand
from graphopt.kernels.problem import Problem

NUMBERS = (
    "x_zero_point",
    "y_zero_point",
    "low",
    "high",
    "residual_zero_point",
    "residual_multiplier",
)
"""What the elements of the input ``numbers`` are."""


def _constant(operand: Operand, dtype: str, shape: tuple[int, ...]) -> bool:
    plain = Layout.plain(dtype, len(shape))
    return (
        isinstance(operand, ConstantOperand) and operand.shape == shape and operand.layout == plain
    )


@dataclass(frozen=True)
class IntegerConvolutionProblem(Problem):
    """A convolution of uint8 images with int8 weights.

    Inputs are x (N, C, H, W), grouped uint8; the constants weight (O, C / groups, *kernel), int8,
    multiplier (O,), float32, bias (O,), int32, and numbers, see `NUMBERS`; and, where there is
    one, a residual with the output's shape, grouped uint8. The output (N, O, *) is grouped uint8,
    or plain float32 without a residual. Padding (before and after) is with x's zero point.
    """

    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    stride: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]
    dilation: tuple[int, int]
    groups: int = 1

    @property
    def has_residual(self) -> bool:
        return len(self.inputs) > 5

    @property
    def flops(self) -> int:
        return self.outputs[0].size * (2 * math.prod(self.inputs[1].shape[1:]) + 4)

    def check(self) -> None:
        """Raise ValueError where the operands do not belong together."""
        x, weight, multiplier, bias, numbers, *residual = self.inputs
        (y,) = self.outputs
        sizes = [
            (size + before + after - reach * (kernel - 1) - 1) // step + 1
            for size, kernel, step, (before, after), reach in zip(
                x.shape[2:], weight.shape[2:], self.stride, self.padding, self.dilation, strict=True
            )
        ]
        outputs = weight.shape[0]
        if outputs % self.groups or x.shape[1] != weight.shape[1] * self.groups:
            raise ValueError(f"{x.shape} does not divide into {self.groups} of {weight.shape}")
        if y.shape != (x.shape[0], outputs, *sizes):
            raise ValueError(f"the output is {y.shape}, not {(x.shape[0], outputs, *sizes)}")
        grouped = Layout.grouped("uint8", 4)
        plain = Layout.plain("float32", 4)
        if x.layout != grouped or y.layout not in (grouped, plain):
            raise ValueError(f"the layouts are {x.layout} and {y.layout}")
        if residual and (residual[0] != y or y.layout != grouped):
            raise ValueError(f"the residual is {residual[0]}, the output {y}")
        if not (
            _constant(weight, "int8", weight.shape)
            and _constant(multiplier, "float32", (outputs,))
            and _constant(bias, "int32", (outputs,))
            and _constant(numbers, "float32", (len(NUMBERS),))
        ):
            raise ValueError("the weight, or what finishes the sums, is no constant of its dtype")


@dataclass(frozen=True)
class QuantizeProblem(Problem):
    """A float32 image becomes bytes: ``clamp(round_half_even(x / scale) + zero_point, low, high)``.

    Inputs are x (N, C, *), plain float32, and the constant parameters (4,), float32: scale, zero
    point, low, high. The output is grouped uint8. NaN becomes ``low``.
    """

    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]

    @property
    def flops(self) -> int:
        return 5 * self.outputs[0].size


@dataclass(frozen=True)
class DequantizeProblem(Problem):
    """Bytes become a float32 image: ``(x - zero_point) * scale``.

    Inputs are x (N, C, *), grouped uint8, and the constant parameters (2,), float32: scale, zero
    point. The output is plain float32.
    """

    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]

    @property
    def flops(self) -> int:
        return 2 * self.outputs[0].size


@dataclass(frozen=True)
class IntegerSumProblem(Problem):
    """Images of one shape, or images side by side in their channels, with another scale.

    Inputs are images, grouped uint8, and the constant parameters, float32: y's zero point, low,
    high, and for each image its zero point and its multiplier. If not ``concatenates``, the one or
    two images are added: ``t`` is the sum, from left to right, of ``float32(x - zero_point) *
    multiplier``. Otherwise every image becomes the ``t`` of its channels, which are multiples of
    four for all but the last. The output is grouped uint8.
    """

    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    concatenates: bool = False

    @property
    def images(self) -> tuple[Operand, ...]:
        return self.inputs[:-1]

    @property
    def flops(self) -> int:
        return (3 + 3 * len(self.images)) * self.outputs[0].size

    def check(self) -> None:
        """Raise ValueError where the operands do not belong together."""
        (y,) = self.outputs
        shapes = [image.shape for image in self.images]
        parameters = (3 + 2 * len(shapes),)
        if not _constant(self.inputs[-1], "float32", parameters):
            raise ValueError(f"the parameters are {self.inputs[-1]}, not of shape {parameters}")
        if any(
            operand.layout != Layout.grouped("uint8", len(y.shape)) for operand in (*self.images, y)
        ):
            raise ValueError("the images are not all grouped uint8")
        if self.concatenates:
            channels = sum(shape[1] for shape in shapes)
            rests = {(shape[0], *shape[2:]) for shape in shapes}
            whole = all(shape[1] % GROUP == 0 for shape in shapes[:-1])
            if not whole or rests != {(y.shape[0], *y.shape[2:])} or channels != y.shape[1]:
                raise ValueError(f"{shapes} do not lie side by side in {y.shape}")
        elif set(shapes) != {y.shape} or len(shapes) > 2:
            raise ValueError(f"{shapes} do not add up to {y.shape}")


@dataclass(frozen=True)
class IntegerPoolingProblem(Problem):
    """The largest byte, or the average, of each window of an image.

    Inputs are x (N, C, H, W), grouped uint8, and for an average the constants multiplier (C,), bias
    (C,) and numbers as a convolution has them, whose weights are one; the output is grouped uint8.
    A maximum keeps the scale; its padding is never the largest. Windows may reach beyond the
    padding, where there is nothing, for a maximum. An average is padded with the zero point.
    """

    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]
    dilation: tuple[int, int] = (1, 1)

    @property
    def averages(self) -> bool:
        return len(self.inputs) > 1

    @property
    def flops(self) -> int:
        return self.outputs[0].size * (math.prod(self.kernel) + 4)


@dataclass(frozen=True)
class IntegerMatmulProblem(Problem):
    """A linear layer of uint8 rows with an int8 weight.

    Inputs are x (*, K), plain uint8; the constants weight (N, K), int8, multiplier (N,), float32,
    bias (N,), int32, and numbers, see `NUMBERS`. The output (*, N) is plain uint8 or float32.
    """

    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]

    @property
    def flops(self) -> int:
        return self.outputs[0].size * (2 * self.inputs[1].shape[1] + 4)

    def check(self) -> None:
        """Raise ValueError where the operands do not belong together."""
        x, weight, multiplier, bias, numbers = self.inputs
        (y,) = self.outputs
        outputs, depth = weight.shape
        if x.shape[-1] != depth or y.shape != (*x.shape[:-1], outputs):
            raise ValueError(f"{x.shape} times {weight.shape} is not {y.shape}")
        if x != Operand.plain("uint8", x.shape) or y.layout not in (
            Layout.plain("uint8", len(y.shape)),
            Layout.plain("float32", len(y.shape)),
        ):
            raise ValueError(f"the operands are {x} and {y}")
        if not (
            _constant(weight, "int8", weight.shape)
            and _constant(multiplier, "float32", (outputs,))
            and _constant(bias, "int32", (outputs,))
            and _constant(numbers, "float32", (len(NUMBERS),))
        ):
            raise ValueError("the weight, or what finishes the sums, is no constant of its dtype")


@dataclass(frozen=True)
class WeightOnlyMatmulProblem(Problem):
    """A linear layer of float32 rows with a quantized weight: ``x @ (weight * scale).T + bias``.

    Inputs are x (*, K), plain float32, and the constants weight (N, K), int8, of which only
    ``bits`` bits are used, scale (N, ceil(K / group)), float32, one for every ``group`` inputs, and
    bias (N,), float32. The output (*, N) is plain float32.
    """

    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    bits: int
    group: int

    @property
    def flops(self) -> int:
        return self.outputs[0].size * 2 * self.inputs[1].shape[1]

    def check(self) -> None:
        """Raise ValueError where the operands do not belong together."""
        x, weight, scale, bias = self.inputs
        (y,) = self.outputs
        outputs, depth = weight.shape
        if x != Operand.plain("float32", (*x.shape[:-1], depth)):
            raise ValueError(f"the rows are {x}, of a weight {weight.shape}")
        if y != Operand.plain("float32", (*x.shape[:-1], outputs)):
            raise ValueError(f"the output is {y}")
        if not (
            _constant(weight, "int8", weight.shape)
            and _constant(scale, "float32", (outputs, math.ceil(depth / self.group)))
            and _constant(bias, "float32", (outputs,))
        ):
            raise ValueError("the weight, its scales or the bias are no constants of their dtypes")


@dataclass(frozen=True)
class DynamicMatmulProblem(Problem):
    """A linear layer of float32 rows, each quantized with a scale of its own, and an int8 weight.

    A row's ``scale`` is its largest magnitude divided by 127, at least ``least_scale``, and its
    steps are ``round_half_even(x / scale)``, between -127 and 127. Inputs are x (*, K), plain
    float32, and the constants weight (N, K), int8, multiplier (N,), float32, the weight's scales,
    and bias (N,), float32. The output (*, N), plain float32, is ``float32(sum) * (multiplier *
    scale) + bias``, where every operation is rounded once.
    """

    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    least_scale: float

    @property
    def flops(self) -> int:
        return self.outputs[0].size * (2 * self.inputs[1].shape[1] + 4)

    def check(self) -> None:
        """Raise ValueError where the operands do not belong together."""
        x, weight, multiplier, bias = self.inputs
        (y,) = self.outputs
        outputs, depth = weight.shape
        if x != Operand.plain("float32", (*x.shape[:-1], depth)):
            raise ValueError(f"the rows are {x}, of a weight {weight.shape}")
        if y != Operand.plain("float32", (*x.shape[:-1], outputs)):
            raise ValueError(f"the output is {y}")
        if not (
            _constant(weight, "int8", weight.shape)
            and _constant(multiplier, "float32", (outputs,))
            and _constant(bias, "float32", (outputs,))
        ):
            raise ValueError("the weight, its scales or the bias are no constants of their dtypes")
