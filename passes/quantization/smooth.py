"""SmoothQuant: outliers of activations move into the weights that read them.

Xiao et al., "SmoothQuant: accurate and efficient post-training quantization for large language
models", 2023.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from graphopt.calibration import CalibrationData
from graphopt.errors import PassError
from graphopt.ir import Graph
from graphopt.passes.quantization.equalisation import (
    LAYER_NORM,
    activation_ranges,
    balancing,
    channel_groups,
    read_range,
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
        count = 0
        ranges = activation_ranges(graph, groups, CalibrationData(self.data), ctx)
        for group, largest in zip(groups, ranges, strict=True):
            read = read_range(group)
            assert read is not None
            count += scale_group(graph, group, balancing(largest, read, self.strength))
        return count > 0
