"""The operators that ATen lacks: quantize, dequantize, and their trainable twin.

All take ``(x, scale, zero_point, axis, quant_min, quant_max, dtype, block_size)``. With ``axis``
None, scale and zero point have one element; else they run along that dimension of ``x``, and with
a ``block_size`` they have x's rank and one element per block of that many along ``axis``
(the conventions of ONNX QuantizeLinear, opset 21).
"""

from __future__ import annotations

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
    if block_size is not None:
        repeated = parameter.repeat_interleave(block_size, dim=axis)
        return repeated.narrow(axis, 0, x.shape[axis])
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


class _FakeQuantize(torch.autograd.Function):
    """Straight-through estimator: the gradient passes where the value is not clamped."""

    @staticmethod
    def forward(ctx, x, *parameters):  # type: ignore[no-untyped-def]
        scale, zero_point, axis, quant_min, quant_max, _, block_size = parameters
        steps = torch.round(x / _along(scale, x, axis, block_size))
        if zero_point is not None:
            steps = steps + _along(zero_point, x, axis, block_size).to(steps.dtype)
        ctx.save_for_backward((steps >= quant_min) & (steps <= quant_max))
        return dequantize(quantize(x, *parameters), *parameters)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
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
    """``dequantize(quantize(x))``, float to float, with a straight-through gradient for x."""
    result: torch.Tensor = _FakeQuantize.apply(
        x, scale, zero_point, axis, quant_min, quant_max, dtype, block_size
    )
    return result


_library.impl("quantize", quantize, "CompositeExplicitAutograd")
_library.impl("dequantize", dequantize, "CompositeExplicitAutograd")
_library.impl("fake_quantize", fake_quantize, "Autograd")
_library.impl("fake_quantize", lambda x, *p: dequantize(quantize(x, *p), *p), "CPU")


@torch.library.register_fake(f"{NAMESPACE}::quantize")
def _(x, scale, zero_point, axis, quant_min, quant_max, dtype, block_size=None):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape, dtype=dtype)


@torch.library.register_fake(f"{NAMESPACE}::dequantize")
def _(x, scale, zero_point, axis, quant_min, quant_max, dtype, block_size=None):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape, dtype=scale.dtype)


@torch.library.register_fake(f"{NAMESPACE}::fake_quantize")
def _(x, scale, zero_point, axis, quant_min, quant_max, dtype, block_size=None):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)
