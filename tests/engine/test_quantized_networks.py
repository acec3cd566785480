"""What the pass Quantize makes of a network runs on kernels for integers, layer by layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quantized_graphs import bias, weight
from test_lowering import check, new_graph, plan_of
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


class Signals(nn.Module):
    """The like of `Images` in one dimension, with pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(3, 8, 5, stride=2, padding=2)
        self.depthwise = nn.Conv1d(8, 8, 3, padding=1, groups=8)
        self.pointwise = nn.Conv1d(8, 8, 1)
        self.classifier = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool1d(torch.relu(self.stem(x)), 3, 2, 1)
        x = torch.relu(x + self.pointwise(torch.relu(self.depthwise(x))))
        return self.classifier(nn.functional.adaptive_avg_pool1d(x, 1).flatten(1))


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
        (Signals, (2, 3, 60), "uint8", 6),
        (Signals, (2, 3, 60), "int8", 6),
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


FLOATS: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "convolution": ("aten.conv2d", (2, 8, 9, 7), (12, 8, 3, 3), {"padding": [1, 1]}),
    "groups": ("aten.conv2d", (2, 8, 9, 7), (8, 1, 3, 3), {"groups": 8}),
    "signal": ("aten.conv1d", (2, 8, 30), (12, 8, 3), {"stride": [2]}),
    "many rows": ("aten.linear", (40, 32), (24, 32), {}),
}


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("name", FLOATS)
def test_a_layer_whose_weight_alone_is_quantized_has_a_kernel_for_floats(
    name: str, per_channel: bool
) -> None:
    op, shape, size, options = FLOATS[name]
    graph, (x,) = new_graph(shape)
    own, scales = weight(graph, *size, per_channel=per_channel)
    y = graph.add(op, x, own, bias(graph, 0.05, scales, size[0]), **options)
    graph.set_outputs([graph.add("aten.relu", y)])
    assert len(check(graph, [torch.randn(shape)]).steps) == 1


def test_zeros_of_a_quantized_weight_are_skipped_in_floats() -> None:
    graph, (x,) = new_graph((1, 64, 14, 14))
    values = torch.randint(-127, 128, (64, 64, 1, 1), dtype=torch.int8)
    values *= torch.rand(64, 64, 1, 1) < 0.05
    scale = graph.constant(torch.tensor(0.01))
    tail = (scale, None, None, -127, 127, torch.int8)
    own = graph.add("graphopt.dequantize", graph.constant(values), *tail)
    graph.set_outputs([graph.add("aten.conv2d", x, own)])
    plan = check(graph, [torch.randn(1, 64, 14, 14)])
    assert [step.kernel.split()[0] for step in plan.steps] == ["sparse"]
