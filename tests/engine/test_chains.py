"""Convolutions that are computed together, band by band."""

from __future__ import annotations

import copy

import pytest
import torch
from agreement import bound, largest_error
from torch import Tensor, nn

import graphopt
from graphopt.engine import Plan, compile_graph, planning
from graphopt.engine.chains import chains, with_chain
from graphopt.engine.layouts import with_layouts
from graphopt.engine.lowering import lower
from graphopt.engine.work import Work
from graphopt.ir import Graph
from graphopt.passes import EXACT


class Block(nn.Module):
    """Expand, depthwise, project, and what came in added."""

    def __init__(self, channels: int = 8, inside: int = 24) -> None:
        super().__init__()
        self.expand = nn.Conv2d(channels, inside, 1)
        self.depthwise = nn.Conv2d(inside, inside, 3, padding=1, groups=inside)
        self.project = nn.Conv2d(inside, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.relu6(self.depthwise(nn.functional.relu6(self.expand(x))))
        return self.project(y) + x


class ReadTwice(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.relu6(self.expand(x))
        return self.project(self.depthwise(y) + y)


class Returned(Block):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        y = self.depthwise(nn.functional.relu6(self.expand(x)))
        return self.project(y), y


class Mobile(nn.Sequential):
    def __init__(self) -> None:
        stem = [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU6()]
        depthwise = [nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.ReLU6(), nn.Conv2d(8, 8, 1)]
        super().__init__(*stem, *depthwise, Block(), Block())


@pytest.fixture(autouse=True)
def _measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every chain is tried, and faster."""
    monkeypatch.setenv("GRAPHOPT_SELECTION", "measure")
    monkeypatch.setattr("graphopt.engine.chains._WORTH_TRYING", float("inf"))
    monkeypatch.setattr(planning, "CLEARLY_FASTER", float("inf"))
    torch.manual_seed(0)


def graph_of(network: nn.Module, x: Tensor) -> Graph:
    graph = graphopt.trace(network.eval(), x)
    graphopt.Pipeline(EXACT).run(graph)
    return graph


def works_of(network: nn.Module, x: Tensor) -> list[Work]:
    graph = graph_of(network, x)
    return with_layouts(lower(graph, graph.types_under(graph.sizes)))


def kernels_of(plan: Plan) -> list[str]:
    return [step.kernel.partition(" in ")[0] for step in plan.steps]


@pytest.mark.parametrize("size", [(12, 16), (14, 14), (15, 7)])
@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_network(size: tuple[int, int], pruned: bool, threads: int) -> None:
    network = Mobile()
    if pruned:
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d) and layer.groups == 1:
                with torch.no_grad():
                    layer.weight *= torch.rand_like(layer.weight) >= 0.8
    x = torch.randn(1, 3, *(2 * one for one in size))
    plan = compile_graph(graph_of(network, x), threads=threads)
    assert kernels_of(plan) == ["chain of 3"] * 3
    with torch.no_grad():
        yardstick, reference = network(x), copy.deepcopy(network).double()(x.double())
    first = plan.run(x)
    assert largest_error(first, reference) <= bound(yardstick, reference)
    for _ in range(20):
        assert torch.equal(plan.run(x)[0], first[0])
    assert len(plan.profile()) == 3


def test_a_report_has_the_chain_as_a_layer() -> None:
    x = torch.randn(1, 8, 14, 14)
    optimized = graphopt.optimize(Block().eval(), x)
    optimized(x)
    (layer,) = optimized.report().layers
    assert layer.kernel is not None
    assert layer.kernel.startswith("chain of 3")
    assert layer.macs == 14 * 14 * (2 * 8 * 24 + 9 * 24)


def test_slower_chains_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 8, 14, 14)
    monkeypatch.setattr(planning, "CLEARLY_FASTER", 0.0)
    plan = compile_graph(graph_of(Block(), x), threads=1)
    assert len(plan.steps) == 3
    assert not any(name.startswith("chain") for name in kernels_of(plan))


def test_estimates_choose_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHOPT_SELECTION", "estimate")
    assert len(compile_graph(graph_of(Block(), torch.randn(1, 8, 14, 14)), threads=1).steps) == 3


def test_another_batch_has_its_own_kernels() -> None:
    graph = graph_of(Block(), torch.randn(2, 8, 14, 14))
    (name,) = graph.sizes
    x = torch.randn(3, 8, 14, 14)
    single = compile_graph(graph, {name: 1}, threads=1)
    several = compile_graph(graph, {name: 3}, threads=1, like=single)
    again = compile_graph(graph, {name: 1}, threads=1, like=several)
    for plan in (single, again):
        assert kernels_of(plan) == ["chain of 3"]
    (together,) = several.run(x)
    for image, expected in zip(x, together, strict=True):
        torch.testing.assert_close(single.run(image[None])[0][0], expected)


@pytest.mark.parametrize("network", [ReadTwice(), Returned()], ids=["read twice", "returned"])
def test_what_is_needed_elsewhere_stays(network: nn.Module) -> None:
    for chain in chains(works_of(network, torch.randn(1, 8, 14, 14))):
        assert len(chain.parts) == 2


def test_no_two_share_a_work() -> None:
    # Each depthwise convolution would like the one between them.
    network = nn.Sequential(
        nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, 1, 1, groups=8)
    )
    works = works_of(network, torch.randn(1, 8, 14, 14))
    (chain,) = chains(works)
    assert [id(part) for part in chain.parts] == [id(work) for work in works[:2]]
    first, second = with_chain(works, chain)
    assert first is chain.work
    assert second is works[2]
