"""The operators that ATen lacks: quantize, dequantize, and their trainable twin.

All take ``(x, scale, zero_point, axis, quant_min, quant_max, dtype, block_size)``. With ``axis``
None, scale and zero point have one element; else they run along that dimension of ``x``, and with
a ``block_size`` they have x's rank and one element per block of that many along ``axis``
(the conventions of ONNX QuantizeLinear, opset 21).
"""

from __future__ import annotations

from typing import Any

import torch

_SCHEMA = (
    "(Tensor x, Tensor scale, Tensor? zero_point, int? axis, int quant_min, int quant_max, "
    "ScalarType dtype, int? block_size=None) -> Tensor"
)
NAMESPACE = "graphopt"

_library = torch.library.Library(NAMESPACE, "DEF")
for _name in ("quantize", "dequantize", "fake_quantize"):
    _library.define(_name + _SCHEMA)


def _along(
    parameter: torch.Tensor, x: torch.Tensor, axis: int | None, block_size: int | None
) -> torch.Tensor:
    """A scale or zero point, broadcastable to x."""
    if axis is None:
        return parameter.reshape(())
    size = x.shape[axis]
    wanted = list(x.shape) if block_size is not None else [size]
    if block_size is not None:
        wanted[axis] = -(-size // block_size)
    if list(parameter.shape) != wanted:
        raise ValueError(
            f"a scale or zero point of shape {list(parameter.shape)} does not fit a tensor of "
            f"shape {list(x.shape)} along axis {axis}; it must be {wanted}"
        )
    if block_size is not None:
        return parameter.repeat_interleave(block_size, dim=axis).narrow(axis, 0, size)
    shape = [1] * x.dim()
    shape[axis] = -1
    return parameter.reshape(shape)


def quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    axis: int | None,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
    block_size: int | None = None,
) -> torch.Tensor:
    """``clamp(round_half_even(x / scale) + zero_point, quant_min, quant_max)`` as ``dtype``."""
    steps = torch.round(x / _along(scale, x, axis, block_size))
    if zero_point is not None:
        steps = steps + _along(zero_point, x, axis, block_size).to(steps.dtype)
    return steps.clamp(quant_min, quant_max).to(dtype)


def dequantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    axis: int | None,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
    block_size: int | None = None,
) -> torch.Tensor:
    """``(x - zero_point) * scale`` in the scale's dtype; ``dtype`` is that of ``x``."""
    steps = x.to(torch.int32)
    if zero_point is not None:
        steps = steps - _along(zero_point, x, axis, block_size).to(torch.int32)
    return steps.to(scale.dtype) * _along(scale, x, axis, block_size)


def _fake_quantize(x: torch.Tensor, *parameters: Any) -> torch.Tensor:
    return dequantize(quantize(x, *parameters), *parameters)


def _remember_clamped(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, scale, zero_point, axis, quant_min, quant_max, _, block_size = inputs
    steps = torch.round(x / _along(scale, x, axis, block_size))
    if zero_point is not None:
        steps = steps + _along(zero_point, x, axis, block_size).to(steps.dtype)
    ctx.save_for_backward((steps >= quant_min) & (steps <= quant_max))


def _straight_through(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    (inside,) = ctx.saved_tensors
    return gradient * inside, *[None] * 7


def fake_quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    axis: int | None,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
    block_size: int | None = None,
) -> torch.Tensor:
    """``dequantize(quantize(x))``, float to float; the gradient passes where x is not clamped."""
    result: torch.Tensor = torch.ops.graphopt.fake_quantize(
        x, scale, zero_point, axis, quant_min, quant_max, dtype, block_size
    )
    return result


for _name, _function in (
    ("quantize", quantize),
    ("dequantize", dequantize),
    ("fake_quantize", _fake_quantize),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    # Running the function itself on fake tensors checks the operands' shapes too.
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _function, lib=_library)
torch.library.register_autograd(
    f"{NAMESPACE}::fake_quantize", _straight_through, setup_context=_remember_clamped, lib=_library
)
