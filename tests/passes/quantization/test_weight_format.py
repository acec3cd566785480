"""Scales and steps: zero is exact, halves round to even, no scale is zero or subnormal."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.ir.quantization import dequantize, quantize
from graphopt.passes.quantization.weights import (
    BIAS_LIMIT,
    ActivationFormat,
    WeightFormat,
    bias_steps,
    scales_with_room,
)

TINY = torch.finfo(torch.float32).tiny
WIDE = st.floats(-(2.0**100), 2.0**100, width=32)


@settings(max_examples=200)
@given(WIDE, WIDE, st.sampled_from([torch.uint8, torch.int8]))
def test_zero_is_exact_and_ranges_are_covered(a: float, b: float, dtype: torch.dtype) -> None:
    low, high = min(a, b), max(a, b)
    format = ActivationFormat(dtype)
    scale, zero = format.parameters((low, high))
    assert scale >= TINY
    assert (scale.dtype, zero.dtype, scale.shape) == (torch.float32, dtype, ())
    assert format.low <= zero <= format.high
    tail = (scale, zero, None, format.low, format.high, dtype)
    x = torch.tensor([0.0, low, high])
    back = dequantize(quantize(x, *tail), *tail)
    assert back[0] == 0
    assert (back - x).abs().max() <= 0.501 * scale  # half a step, and rounding in float32


def test_a_clamp_before_it_covers_all_steps() -> None:
    for high in (6.0, 1.0, 0.1, 3.3333333):
        scale, zero = ActivationFormat().parameters((0.0, high))
        assert zero == 0
        assert (scale * 255).item() <= torch.tensor(high).item()
        assert quantize(torch.tensor([high]), scale, zero, None, 0, 255, torch.uint8).item() == 255


def test_halves_round_to_even() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])
    steps = WeightFormat().nearest(x[None], torch.tensor([1.0]))
    assert steps.tolist() == [[0, 2, 2, 0, -2]]


@pytest.mark.parametrize("format", [WeightFormat(), WeightFormat(4), WeightFormat(8, False),
                                    WeightFormat(4, group_size=4)])  # fmt: skip
def test_dead_and_tiny_channels(format: WeightFormat) -> None:
    weight = torch.zeros(3, 8)
    weight[1] = 1e-42
    weight[2, 0] = 3.0
    scale = format.scales(weight)
    assert (scale >= TINY).all()
    back = format.nearest(weight, scale).float() * format.expand(scale, weight)
    assert (back[0] == 0).all()
    assert back[2, 0] == pytest.approx(3.0)
    assert back.isfinite().all()


def test_scales_of_eight_bits_are_the_largest_magnitude() -> None:
    weight = torch.tensor([[1.0, -2.54], [0.127, 0.0]])
    torch.testing.assert_close(WeightFormat().scales(weight), torch.tensor([0.02, 0.001]))
    torch.testing.assert_close(WeightFormat(8, False).scales(weight), torch.tensor(0.02))


def test_groups_of_four_bits_have_their_own_scales() -> None:
    weight = torch.cat([torch.ones(2, 3), 7 * torch.ones(2, 2)], 1)
    format = WeightFormat(4, group_size=3)
    scale = format.scales(weight)
    assert scale.shape == (2, 2)
    back = dequantize(format.nearest(weight, scale), scale, None, 1, -7, 7, torch.int8, 3)
    torch.testing.assert_close(back, weight, rtol=1e-6, atol=0)


def test_clipping_four_bits_is_no_worse_than_the_whole_range() -> None:
    weight = torch.randn(16, 200, generator=torch.Generator().manual_seed(0)) ** 3
    format = WeightFormat(4)

    def error(scale: torch.Tensor) -> torch.Tensor:
        back = format.nearest(weight, scale) * scale[:, None]
        return (back - weight).square().sum(1)

    whole = weight.abs().amax(1) / 7
    assert (error(format.scales(weight)) <= error(whole) + 1e-6).all()
    assert error(format.scales(weight)).sum() < 0.95 * error(whole).sum()


def test_a_bias_always_fits() -> None:
    scale, bias = torch.tensor([1e-12, 0.1]), torch.tensor([5.0, -1.0])
    x = torch.tensor(0.01)
    widened = scales_with_room(scale, bias, x)
    assert widened[1] == scale[1]
    steps = bias_steps(bias, widened * x)
    assert steps.abs().max() <= BIAS_LIMIT
    torch.testing.assert_close(steps * (widened * x), bias, rtol=1e-6, atol=0)
