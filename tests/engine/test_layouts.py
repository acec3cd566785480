"""Padded planes in front of sparse convolutions, and nowhere else."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from agreement import bound, largest_error
from torch import Tensor, nn

import graphopt
from graphopt.engine import compile_graph
from graphopt.engine.layouts import with_padded_planes
from graphopt.engine.lowering import lower
from graphopt.engine.work import KernelWork
from graphopt.kernels.simd import LANES
from graphopt.passes import EXACT


class Bottlenecks(nn.Module):
    """A stem, two bottlenecks with a residual, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 96, 3, padding=1)
        self.reduce = nn.ModuleList(nn.Conv2d(96, 64, 1) for _ in range(2))
        self.middle = nn.ModuleList(nn.Conv2d(64, 64, 3, padding=1) for _ in range(2))
        self.expand = nn.ModuleList(nn.Conv2d(64, 96, 1) for _ in range(2))
        self.between: Callable[[Tensor], Tensor] = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for reduce, middle, expand in zip(self.reduce, self.middle, self.expand, strict=True):
            x = self.between((expand(middle(reduce(x).relu()).relu()) + x).relu())
        return x.mean((2, 3))


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Bottlenecks:
    monkeypatch.setenv("GRAPHOPT_SELECTION", "estimate")
    torch.manual_seed(0)
    network = Bottlenecks().eval()
    for group in (network.reduce, network.middle, network.expand):
        for layer in group:
            with torch.no_grad():
                layer.weight *= torch.rand_like(layer.weight) >= 0.9
    return network


def padded(network: nn.Module, x: Tensor) -> int:
    """How many values have padded planes; the plan gives the network's numbers."""
    graph = graphopt.trace(network, x)
    graphopt.Pipeline(EXACT).run(graph)
    works = with_padded_planes(lower(graph, graph.types_under(graph.sizes)))
    planes = {}
    for work in works:
        if isinstance(work, KernelWork):
            operands = (*work.problem.inputs, *work.problem.outputs)
            for operand, value in zip(operands, (*work.inputs, *work.outputs), strict=True):
                assert planes.setdefault(value, operand.layout.plane) == operand.layout.plane
    with torch.no_grad():
        yardstick = network(x)
        reference = copy.deepcopy(network).double()(x.double())
    for threads in (1, 2):
        results = compile_graph(graph, threads=threads).run(x)
        assert largest_error(results, reference) <= bound(yardstick, reference)
    return sum(plane > 0 for plane in planes.values())


# Between the blocks, in front of the first and of each expansion; the head knows of none. With
# short vectors, planes of 7 x 7 would lie in the same few sets of the first cache.
PADDED = {7: 4 if LANES == 16 else 0, 14: 4, 16: 4}


@pytest.mark.parametrize("size", PADDED)
@pytest.mark.parametrize("batch", [1, 3])
def test_images_of_sparse_products(network: Bottlenecks, size: int, batch: int) -> None:
    assert padded(network, torch.randn(batch, 3, size, size)) == PADDED[size]


def test_planes_that_fill_their_lines(network: Bottlenecks) -> None:
    assert padded(network, torch.randn(1, 3, 8, 8)) == 0


def test_a_reader_that_knows_of_none(network: Bottlenecks) -> None:
    network.between = nn.MaxPool2d(3, 1, 1)
    assert padded(network, torch.randn(1, 3, 14, 14)) == 3


def test_depthwise_convolutions_between(network: Bottlenecks) -> None:
    network.middle = nn.ModuleList(nn.Conv2d(64, 64, 3, padding=1, groups=64) for _ in range(2))
    assert padded(network, torch.randn(2, 3, 14, 14)) == 4


def test_dense_networks(network: Bottlenecks) -> None:
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.05)
    assert padded(network, torch.randn(1, 3, 14, 14)) == 0
