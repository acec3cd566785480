"""Bias correction: the mean error of every output channel goes into its bias.

Nagel et al., "Data-free quantization through weight equalization and bias correction", 2019.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from graphopt import reference
from graphopt.calibration import CalibrationData
from graphopt.errors import PassError
from graphopt.ir import Graph, Node
from graphopt.passes.layers import LINEAR
from graphopt.passes.quantization.channel_statistics import ChannelMean
from graphopt.passes.quantization.insertion import read_bias, write_bias
from graphopt.passes.quantization.scheme import CONVOLUTIONS
from graphopt.pipeline import Context
from graphopt.registry import register_pass


@register_pass("bias-correction", accuracy="lossy")
@dataclass(frozen=True)
class BiasCorrection:
    """Gives every output channel of a changed network the mean that it has in the source.

    For networks that were quantized, pruned or otherwise changed in their weights. Layers are
    corrected one after the other, each with a sweep over the data.

    Attributes:
        data: calibration data.
        source: the graph before it was changed; layers are matched by their names.
    """

    data: Any = None
    source: Graph | None = None

    def run(self, graph: Graph, ctx: Context) -> bool:
        if self.data is None or self.source is None:
            raise PassError("BiasCorrection needs calibration data and the source's graph")
        data = CalibrationData(self.data)
        twins = {node.name: node for node in self.source.nodes if _has_bias(node)}
        nodes = [node for node in graph.nodes if _has_bias(node) and node.name in twins]
        if not nodes:
            raise PassError("no layer of the graph has the name of one of the source")
        changed = False
        for node in ctx.track(nodes, "correcting biases"):
            wanted = channel_means(self.source, twins[node.name], data)
            drift = (wanted - channel_means(graph, node, data)).float()
            if drift.any():
                old = read_bias(node)
                write_bias(graph, node, drift if old is None else old + drift)
                changed = True
        return changed


def _has_bias(node: Node) -> bool:
    if node.op not in (*CONVOLUTIONS, LINEAR):
        return False
    bias = node["bias"]
    return bias is None or bias.is_constant or bias.producer.op == "graphopt.dequantize"


def channel_means(graph: Graph, node: Node, data: CalibrationData) -> Tensor:
    """The mean of every output channel of a layer over data, [channels] in float64."""
    mean = ChannelMean(node.output.rank - (node["weight"].rank - 1))

    def show(seen: Node, results: list[Tensor]) -> None:
        if seen is node:
            mean(results[0])

    for batch in data.batches(graph):
        reference.run(graph, batch.inputs, observe=show, until=node)
    return mean.mean()
