"""`Prune` with granularity "residual-block"."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pruning_networks import pruned, traced
from torch import Tensor, nn

from graphopt import reference
from graphopt.errors import PassError
from graphopt.ir import Graph
from graphopt.passes import Prune
from graphopt.pipeline import Context
from graphopt.report import totals
from graphopt.target import Target


class Block(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)
        with torch.no_grad():
            self.second.weight.mul_(scale)
            self.second.bias.mul_(scale)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.second(torch.relu(self.first(x)))
        return result


SCALES = (1.0, 0.01, 2.0, 0.1)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*map(Block, SCALES), nn.Linear(8, 3))


def graph_and_data() -> tuple[Graph, list[Tensor]]:
    x = torch.randn(4, 8)
    return traced(network(), x), [x, torch.randn(4, 8)]


@pytest.mark.parametrize("criterion", ["influence", "l2"])
def test_blocks_that_change_least_go(criterion: str) -> None:
    graph, data = graph_and_data()
    one = Prune(0.5, granularity="residual-block", criterion=criterion, data=data)
    report = pruned(graph, one)
    assert [row[2] for row in report.rows] == ["kept", "removed", "kept", "removed"]
    model = network()
    assert isinstance(model, nn.Sequential)
    short = nn.Sequential(model[0], model[2], model[4])
    assert torch.allclose(reference.run(graph, [data[0]])[0], short(data[0]), atol=1e-6)


@pytest.mark.parametrize("options", [{"macs": 0.8}, {"parameters": 0.8}, {"speedup": 1.25}])
def test_budgets_take_as_few_blocks_as_they_need(options: dict[str, Any]) -> None:
    graph, data = graph_and_data()
    whole = totals(graph)
    time = Target(time=lambda g: totals(g).macs * 1e-6, threads=1, vector_bytes=64)
    one = Prune(granularity="residual-block", criterion="influence", data=data, **options)
    pruned(graph, one, Context(target=time))
    assert 0.7 < totals(graph).macs / whole.macs <= 0.8


def test_what_cannot_be_done() -> None:
    graph, data = graph_and_data()
    with pytest.raises(PassError, match="all 4 residual blocks does not meet"):
        pruned(graph, Prune(macs=0.001, granularity="residual-block"))
    with pytest.raises(PassError, match="of 4 in the network all have layers that are ignored"):
        pruned(graph, Prune(0.5, granularity="residual-block", ignore=nn.Linear))
    with pytest.raises(PassError, match="no residual block to prune"):
        pruned(traced(nn.Linear(4, 4), torch.randn(2, 4)), Prune(0.5, granularity="residual-block"))
    with pytest.raises(PassError, match="goes with granularity='residual-block'"):
        Prune(0.5, criterion="influence", data=data)
    with pytest.raises(PassError, match="'influence' needs data"):
        Prune(0.5, criterion="influence", granularity="residual-block")
    with pytest.raises(PassError, match="ranked all together"):
        Prune(0.5, granularity="residual-block", allocation="global")
