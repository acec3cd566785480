"""GPTQ and rounding by reconstruction as passes of their own: weights of linear layers only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from graphopt.ir import Graph
from graphopt.passes.quantization.quantize import Quantize
from graphopt.pipeline import Context
from graphopt.registry import register_pass


@register_pass("gptq", accuracy="lossy")
@dataclass(frozen=True)
class Gptq:
    """Rounds the weights of linear layers so that the errors of a row's columns cancel.

    Attributes:
        data: calibration data.
        weights: "int8" or "int4".
        group_size: a scale for each run of so many inputs; None for one per output channel.
    """

    data: Any
    weights: Literal["int8", "int4"] = "int4"
    group_size: int | None = 32

    def run(self, graph: Graph, ctx: Context) -> bool:
        return _weights_only(self, "gptq").run(graph, ctx)


@register_pass("reconstruction", accuracy="lossy")
@dataclass(frozen=True)
class Reconstruction:
    """Rounds the weights of linear layers, then changes single steps while outputs get better.

    Attributes:
        data: calibration data.
        weights: "int8" or "int4".
        group_size: a scale for each run of so many inputs; None for one per output channel.
    """

    data: Any
    weights: Literal["int8", "int4"] = "int4"
    group_size: int | None = 32

    def run(self, graph: Graph, ctx: Context) -> bool:
        return _weights_only(self, "reconstruction").run(graph, ctx)


def _weights_only(options: Gptq | Reconstruction, method: str) -> Quantize:
    return Quantize(
        data=options.data,
        activations=None,
        weights=options.weights,
        group_size=options.group_size,
        method=method,
    )
