"""What the pass Quantize makes of a network runs on kernels for integers, layer by layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_lowering import plan_of
from torch import Tensor, nn

import graphopt
from graphopt import reference
from graphopt.ir import Graph
from graphopt.passes import Quantize


class Images(nn.Module):
    """A stem, a depthwise convolution, a residual addition, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pointwise = nn.Conv2d(8, 8, 1)
        self.classifier = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.pointwise(nn.functional.relu6(self.depthwise(x))))
        return self.classifier(x.mean((2, 3)))


class Tokens(nn.Module):
    """A perceptron of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(20)
        self.first = nn.Linear(20, 48)
        self.second = nn.Linear(48, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(nn.functional.gelu(self.first(self.norm(x))))


def quantized(model: nn.Module, shape: tuple[int, ...], **options: Any) -> Graph:
    """The graph of a network in integers, calibrated with random inputs."""
    if options["activations"] in ("uint8", "int8"):
        options["data"] = [torch.randn(shape) for _ in range(2)]
    passes = [Quantize(**options)]
    return graphopt.optimize(model.eval(), torch.randn(shape), passes=passes).graph


@pytest.mark.parametrize(
    ("model", "shape", "activations", "kernels"),
    [
        (Images, (2, 3, 10, 10), "uint8", 5),
        (Images, (2, 3, 10, 10), "int8", 5),
        (Tokens, (2, 6, 20), "uint8", 2),
        (Tokens, (2, 6, 20), "int8", 2),
        (Tokens, (2, 6, 20), "dynamic", 2),
        (Tokens, (2, 1, 20), None, 2),
    ],
)
def test_every_layer_has_an_integer_kernel(
    model: type[nn.Module], shape: tuple[int, ...], activations: Any, kernels: int
) -> None:
    graph = quantized(model(), shape, activations=activations)
    plan = plan_of(graph)
    assert not plan.call_backs
    kinds = ("integer ", "dynamic ", "weight-only ")
    assert sum(step.kernel.startswith(kinds) for step in plan.steps) == kernels
    x = torch.randn(shape)
    (result,), (expected,) = plan.run(x), reference.run(graph, [x])
    assert (result - expected).abs().max() < 0.02 * expected.abs().max()
