"""Batch-norm re-estimation: statistics that fit a network after its weights were changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphopt.calibration import CalibrationData, observe
from graphopt.errors import PassError
from graphopt.ir import Graph, Node
from graphopt.pipeline import Context
from graphopt.registry import register_pass


class Moments:
    """Mean and variance of every channel over all batches."""

    def __init__(self, dimension: int) -> None:
        self._dimension = dimension
        self.count = 0
        self.sum: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def __call__(self, x: Tensor) -> None:
        rows = x.double().movedim(self._dimension, -1).flatten(0, -2)
        self.count += len(rows)
        self.sum = self.sum + rows.sum(0)
        self.squares = self.squares + rows.square().sum(0)

    def mean_and_variance(self) -> tuple[Tensor, Tensor]:
        mean = torch.as_tensor(self.sum) / self.count
        unbiased = self.count / max(self.count - 1, 1)
        variance = (torch.as_tensor(self.squares) / self.count - mean.square()) * unbiased
        return mean, variance.clamp_min(0)


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
        moments = [Moments(1) for _ in twins]
        watched = {node["input"]: seen for node, seen in zip(twins, moments, strict=True)}
        observe(training, CalibrationData(self.data), watched.items(), ctx, "batch norm")
        for node, twin in zip(nodes, twins, strict=True):
            found = watched[twin["input"]].mean_and_variance()
            for name, tensor in zip(("running_mean", "running_var"), found, strict=True):
                old = node[name]
                made = graph.constant(tensor.to(old.dtype), old.name)
                graph.set_operand(node, name, made)
        graph.drop_unused_constants()
        return True


def _is_normalisation(node: Node) -> bool:
    if node.op != "aten.batch_norm" or node["training"]:
        return False
    return all(x is not None and x.is_constant for x in (node["running_mean"], node["running_var"]))
