"""Padded planes and halves in front of sparse convolutions, and nowhere else."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from agreement import bound, largest_error
from torch import Tensor, nn

import graphopt
from graphopt.engine import compile_graph, layouts
from graphopt.engine.layouts import with_layouts
from graphopt.engine.lowering import lower
from graphopt.engine.work import KernelWork
from graphopt.kernels.operand import Layout
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
    monkeypatch.setattr(layouts, "HALVES", False)
    torch.manual_seed(0)
    network = Bottlenecks().eval()
    for group in (network.reduce, network.middle, network.expand):
        for layer in group:
            with torch.no_grad():
                layer.weight *= torch.rand_like(layer.weight) >= 0.9
    return network


def arranged(network: nn.Module, x: Tensor) -> list[Layout]:
    """The layouts of the values that have padded planes or halves; the plan gives the network's
    numbers."""
    graph = graphopt.trace(network, x)
    graphopt.Pipeline(EXACT).run(graph)
    works = with_layouts(lower(graph, graph.types_under(graph.sizes)))
    chosen: dict[object, Layout] = {}
    for work in works:
        if isinstance(work, KernelWork):
            operands = (*work.problem.inputs, *work.problem.outputs)
            for operand, value in zip(operands, (*work.inputs, *work.outputs), strict=True):
                assert chosen.setdefault(value, operand.layout) == operand.layout
    with torch.no_grad():
        yardstick = network(x)
        reference = copy.deepcopy(network).double()(x.double())
    for threads in (1, 2):
        results = compile_graph(graph, threads=threads).run(x)
        assert largest_error(results, reference) <= bound(yardstick, reference)
    return [layout for layout in chosen.values() if layout.plane]


def padded(network: nn.Module, x: Tensor) -> int:
    """How many values have padded planes, none of them halves."""
    found = arranged(network, x)
    assert not any(layout.halves for layout in found)
    return len(found)


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


@pytest.fixture
def halves(network: Bottlenecks, monkeypatch: pytest.MonkeyPatch) -> Bottlenecks:
    monkeypatch.setattr(layouts, "HALVES", True)
    # Whatever the families expect to take.
    monkeypatch.setattr(layouts, "_MOST_FOR_HALVES", 10.0)
    return network


def test_images_in_halves(halves: Bottlenecks) -> None:
    found = arranged(halves, torch.randn(1, 3, 28, 28))
    # The stem is dense and the head knows of none, but so what is added to the last sum.
    assert [layout.halves for layout in found] == [True] * 4
    assert len({layout.plane for layout in found}) == 1


def test_stages_that_begin_and_end_with_sparse_convolutions(halves: Bottlenecks) -> None:
    network = nn.Sequential(nn.Conv2d(3, 96, 1), halves, nn.Flatten(), nn.Linear(96, 3)).eval()
    halves.stem = nn.Conv2d(96, 96, 3, stride=2, padding=1)
    halves.between = nn.Conv2d(96, 96, 1)
    with torch.no_grad():
        for layer in (halves.stem, halves.between):
            layer.weight *= torch.rand_like(layer.weight) >= 0.9
    found = arranged(network, torch.randn(1, 3, 28, 28))
    # The results of the stem, of two reductions, middles and sums, and of what is between these.
    assert sum(layout.halves for layout in found) == 8


@pytest.mark.parametrize(("batch", "rows"), [(2, 14), (1, 15)])
def test_images_without_halves(halves: Bottlenecks, batch: int, rows: int) -> None:
    found = arranged(halves, torch.randn(batch, 3, rows, 14))
    assert found
    assert not any(layout.halves for layout in found)


def test_works_of_other_operands_than_values(halves: Bottlenecks) -> None:
    # A lookup has a result more, which says whether its indices exist.
    network = nn.Sequential(nn.Embedding(9, 14), nn.Unflatten(1, (3, 14)), halves).eval()
    tokens = torch.randint(0, 9, (1, 42))
    graph = graphopt.trace(network, tokens)
    graphopt.Pipeline(EXACT).run(graph)
    with torch.no_grad():
        reference = copy.deepcopy(network).double()(tokens)
        yardstick = network(tokens)
    results = compile_graph(graph, threads=2).run(tokens)
    assert largest_error(results, reference) <= bound(yardstick, reference)


def test_halves_that_take_too_long(halves: Bottlenecks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "_MOST_FOR_HALVES", 0.0)
    assert padded(halves, torch.randn(1, 3, 14, 14)) == PADDED[14]
