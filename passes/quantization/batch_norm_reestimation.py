"""Batch-norm re-estimation: statistics that fit a network after its weights were changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from graphopt.calibration import CalibrationData, observe
from graphopt.errors import PassError
from graphopt.ir import Graph, Node
from graphopt.passes.quantization.channel_statistics import ChannelMoments
from graphopt.pipeline import Context
from graphopt.registry import register_pass


@register_pass("batch-norm-reestimation", accuracy="lossy")
@dataclass(frozen=True)
class BatchNormReestimation:
    """Replaces the running mean and variance of batch normalisations by those of data.

    While they are measured, each normalisation uses its own batch's, as in training. It finds
    batch normalisations only where they are not folded yet: put it before the exact passes.

    Attributes:
        data: calibration data, with batches as large as in training.
    """

    data: Any = None

    def run(self, graph: Graph, ctx: Context) -> bool:
        if self.data is None:
            raise PassError("BatchNormReestimation needs calibration data; pass data=")
        nodes = [node for node in graph.nodes if _is_normalisation(node)]
        if not nodes:
            return False
        training = graph.clone()
        twins = [node for node in training.nodes if _is_normalisation(node)]
        for node in twins:
            with training.edit():
                for name in ("running_mean", "running_var"):
                    training.set_operand(node, name, None)
                training.set_operand(node, "training", True)
        moments = [ChannelMoments(1) for _ in twins]
        watched = [(twin["input"], seen) for twin, seen in zip(twins, moments, strict=True)]
        observe(training, CalibrationData(self.data), watched, ctx, "batch norm")
        for node, seen in zip(nodes, moments, strict=True):
            found = {"running_mean": seen.mean(), "running_var": seen.variance()}
            for name, tensor in found.items():
                old = node[name]
                made = graph.constant(tensor.to(old.dtype), old.name)
                graph.set_operand(node, name, made)
        graph.drop_unused_constants()
        return True


def _is_normalisation(node: Node) -> bool:
    if node.op != "aten.batch_norm" or node["training"]:
        return False
    return all(x is not None and x.is_constant for x in (node["running_mean"], node["running_var"]))
