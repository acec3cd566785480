"""Scales of weights and activations, and rounding to the nearest step.

A weight is handled as [channels, inputs, ...]; with a group size, each run of so many inputs of a
channel has its own scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.passes.quantization.observers import Range

LEAST_SCALE = 2.0**-100
"""Scales are never zero or subnormal, and neither is the product of two."""

BIAS_LIMIT = 2**30
"""Largest magnitude of a bias in steps: the sum of products fits into int32 beside it."""


_AT_A_TIME = 2**16
"""Weights for which scales are searched at a time, so that what is computed stays in a cache."""


@dataclass(frozen=True)
class WeightFormat:
    """How weights are stored.

    Attributes:
        bits: 8 or 4; symmetric, so from -127 to 127 or from -7 to 7.
        per_channel: a scale per output channel, or one for all.
        group_size: a scale per so many inputs of a channel; None for all of them.
    """

    bits: int = 8
    per_channel: bool = True
    group_size: int | None = None

    @property
    def limit(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def scales(self, weight: Tensor, importance: Tensor | None = None) -> Tensor:
        """Steps for a weight of rank 2 or more: float32 [channels], [] for all channels, or
        [channels, groups].

        Eight bits cover the largest magnitude. With fewer, clipping it may lose less than it
        wins: then the step has the least squared error, weighted by ``importance`` [inputs].
        """
        if self.group_size is not None:
            rows = _groups(weight, self.group_size)
        else:
            rows = weight.flatten(1) if self.per_channel else weight.reshape(1, -1)
        largest = rows.abs().amax(-1).double()
        scale = largest / self.limit
        if self.bits < 8:
            count = max(1, _AT_A_TIME * len(rows) // rows.numel())
            parts = zip(rows.split(count), scale.split(count), strict=True)
            scale = torch.cat([self._least_error(r.double(), s, importance) for r, s in parts])
        # A dead channel has no magnitude; any step stores its zeros.
        scale = torch.where(largest > 0, scale.clamp_min(LEAST_SCALE), 1.0).float()
        return scale if self.group_size is not None or self.per_channel else scale.reshape(())

    def _least_error(self, rows: Tensor, scale: Tensor, importance: Tensor | None) -> Tensor:
        factors = torch.ones((), dtype=torch.float64)
        if importance is not None and self.group_size is not None:
            factors = _groups(importance.double().reshape(1, -1), self.group_size)
        elif importance is not None and self.per_channel:
            factors = importance.double()
        best, least = scale, torch.full_like(scale, torch.inf)
        for share in torch.linspace(1.0, 0.5, 51).tolist():
            step = (scale * share).clamp_min(LEAST_SCALE)
            steps = (rows / step[..., None]).round().clamp(-self.limit, self.limit)
            error = ((steps * step[..., None] - rows).square() * factors).sum(-1)
            best = torch.where(error < least, step, best)
            least = torch.minimum(error, least)
        return best

    def expand(self, scale: Tensor, weight: Tensor) -> Tensor:
        """Scales as an array that can be broadcast to the weight."""
        if self.group_size is not None:
            return scale.repeat_interleave(self.group_size, dim=1)[:, : weight.shape[1]]
        return scale.reshape(-1 if self.per_channel else 1, *[1] * (weight.dim() - 1))

    def nearest(self, weight: Tensor, scale: Tensor) -> Tensor:
        """The nearest steps, as int8."""
        steps = (weight / self.expand(scale, weight)).round()
        return steps.clamp(-self.limit, self.limit).to(torch.int8)


def _groups(weight: Tensor, size: int) -> Tensor:
    """[channels, groups, size]; the last group is filled with zeros."""
    channels, inputs = weight.shape
    count = -(-inputs // size)
    padded = torch.nn.functional.pad(weight, (0, count * size - inputs))
    return padded.reshape(channels, count, size)


@dataclass(frozen=True)
class ActivationFormat:
    """How activations are stored: affine, 8 bits.

    Attributes:
        dtype: torch.uint8 (0..255) or torch.int8 (-128..127).
    """

    dtype: torch.dtype = torch.uint8

    @property
    def low(self) -> int:
        return torch.iinfo(self.dtype).min

    @property
    def high(self) -> int:
        return torch.iinfo(self.dtype).max

    def parameters(self, bounds: Range) -> tuple[Tensor, Tensor]:
        """Scale (float32 []) and zero point ([] in the format's dtype) of a range, which is
        widened to have 0.0 in it; that is represented exactly."""
        low, high = min(bounds[0], 0.0), max(bounds[1], 0.0)
        steps = self.high - self.low
        if high == low:
            return torch.tensor(1.0), torch.tensor(self.low, dtype=self.dtype)
        scale = torch.tensor((high - low) / steps).clamp_min(LEAST_SCALE)
        if low == 0 and (scale * steps).item() > high and scale > LEAST_SCALE:
            # What a clamp before it lets through must cover all steps, or it cannot be dropped.
            scale = torch.nextafter(scale, torch.tensor(0.0))
        zero = self.low + round(-low / scale.item())
        return scale, torch.tensor(min(max(zero, self.low), self.high), dtype=self.dtype)


def bias_steps(bias: Tensor, scale: Tensor) -> Tensor:
    """A bias as int32 in steps of a scale, both [channels] or the latter []."""
    steps = (bias.double() / scale.double()).round()
    return steps.clamp(-BIAS_LIMIT, BIAS_LIMIT).to(torch.int32)


def scales_with_room(scale: Tensor, bias: Tensor | None, input_scale: Tensor) -> Tensor:
    """Scales of a weight, widened where the bias would not fit in steps of the product with the
    input's scale, or the product would be subnormal."""
    least = torch.full_like(scale, LEAST_SCALE)
    if bias is not None:
        needed = (bias.abs().double() / (BIAS_LIMIT * input_scale.double())).float()
        least = torch.maximum(least, needed if scale.dim() else needed.max())
    return torch.maximum(scale, least)
