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

from graphopt.kernels.problem import ConstantOperand, Layout, Operand, Problem

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
