"""SmoothQuant: outliers of activations move into the weights that read them.

Xiao et al., "SmoothQuant: accurate and efficient post-training quantization for large language
models", 2023.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphopt.calibration import CalibrationData, observe
from graphopt.errors import PassError
from graphopt.ir import Graph
from graphopt.passes.layers import Layer, layer_of
from graphopt.passes.quantization.channel_statistics import ChannelRange
from graphopt.passes.quantization.equalisation import (
    LAYER_NORM,
    ChannelGroup,
    channel_groups,
    scale_group,
)
from graphopt.pipeline import Context
from graphopt.registry import register_pass


@register_pass("smooth-quant", accuracy=1e-3)
@dataclass(frozen=True)
class SmoothQuant:
    """Divides the channels behind layer normalisations, and multiplies the weights that read them.

    A channel with the largest magnitude a, whose weights have the largest magnitude w, is divided
    by ``a**strength / w**(1 - strength)``.

    Attributes:
        data: calibration data.
        strength: from 0 to 1.
    """

    data: Any = None
    strength: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise PassError(f"the strength of SmoothQuant is from 0 to 1, not {self.strength}")

    def run(self, graph: Graph, ctx: Context) -> bool:
        if self.data is None:
            raise PassError("SmoothQuant needs calibration data; pass data=")
        groups = [
            group
            for group in channel_groups(graph)
            if all(node.op == LAYER_NORM for node in group.writers)
        ]
        if not groups:
            return False
        ranges = {v: ChannelRange(dim) for group in groups for v, dim in group.values.items()}
        observe(graph, CalibrationData(self.data), ranges.items(), ctx, "ranges of channels")
        count = 0
        for group in groups:
            seen = [r for v in group.values if (r := ranges[v].largest) is not None]
            largest = torch.stack(seen).amax(0).double()
            factor = smoothing(largest, _weights(group), self.strength)
            count += scale_group(graph, group, factor)
        return count > 0


def smoothing(activations: Tensor, weights: Tensor, strength: float) -> Tensor:
    """Factors [channels] from the largest magnitudes of activations and weights; 1 for channels
    without any."""
    usable = (activations > 0) & (weights > 0)
    factor = activations**strength / weights.clamp_min(1e-30) ** (1 - strength)
    return torch.where(usable, factor, 1.0).clamp(1e-4, 1e4)


def _weights(group: ChannelGroup) -> Tensor:
    readers = [layer_of(node) for node in group.readers]
    largest = [r.taps().abs().amax((1, 3)).reshape(-1) for r in readers if isinstance(r, Layer)]
    return torch.stack(largest).amax(0)
