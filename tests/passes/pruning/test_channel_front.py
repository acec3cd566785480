"""`Prune` with granularity "channel" or "head"."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pruning_networks import batches, pruned, traced
from torch import Tensor, nn
from torch.nn import functional

from graphopt import reference
from graphopt.errors import PassError
from graphopt.ir import Graph
from graphopt.passes import EXACT, Prune
from graphopt.passes.pruning.channel_groups import find_groups
from graphopt.passes.pruning.criteria import CRITERIA
from graphopt.pipeline import Context, Pipeline
from graphopt.report import totals
from graphopt.target import Target


class Residual(nn.Module):
    """A stem that feeds a block with a residual sum, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 16, 3, padding=1)
        self.first = nn.Conv2d(16, 24, 3, padding=1)
        self.norm = nn.BatchNorm2d(24)
        self.second = nn.Conv2d(24, 16, 3, padding=1)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.second(torch.relu(self.norm(self.first(x))))
        result: Tensor = self.fc(x.mean((2, 3)))
        return result


def residual_network() -> nn.Module:
    torch.manual_seed(2)
    return Residual().eval()


def residual() -> Graph:
    return traced(residual_network)


def weight(graph: Graph, module: str) -> Tensor:
    tensor = graph.value(f"{module}.weight").constant
    assert tensor is not None
    return tensor


@pytest.mark.parametrize("allocation", ["uniform", "global", "sensitivity"])
@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name != "batch-norm"])
def test_every_criterion_and_allocation(criterion: str, allocation: str) -> None:
    graph, data = traced(), batches(1)
    report = pruned(
        graph,
        Prune(0.5, granularity="channel", criterion=criterion, allocation=allocation, data=data,
              loss=functional.cross_entropy),
    )  # fmt: skip
    units, kept = (sum(row[k] for row in report.rows) for k in (1, 3))
    assert 0.4 <= kept / units <= 0.65
    assert all(row[3] >= 1 for row in report.rows)
    assert reference.run(graph, [data[0][0]])[0].isfinite().all()


def test_batch_norm_ranks_channels_by_gamma() -> None:
    graph = traced()
    gamma = graph.value("15.weight").constant
    pruned(graph, Prune(0.5, granularity="channel", criterion="batch-norm", ignore=["17"]))
    assert gamma is not None
    assert torch.equal(graph.value("15.weight").constant, gamma[gamma > gamma.median()])


def test_the_units_of_least_magnitude_go() -> None:
    graph = residual()
    first = weight(graph, "first")
    report = pruned(graph, Prune(0.5, granularity="channel", ignore="stem"))
    norms = first.abs().sum((1, 2, 3))
    assert torch.equal(weight(graph, "first"), first[norms > norms.median()])
    assert any("fc keeps its 4 channels" in remark for remark in report.remarks)

    graph = residual()
    pruned(graph, Prune(0.5, granularity="channel"))
    assert weight(graph, "stem").shape[0] == weight(graph, "second").shape[0] == 8
    assert weight(graph, "first").shape[:2] == (12, 8)
    assert weight(graph, "fc").shape == (4, 8)


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("fraction", [0.3, 0.6])
def test_budgets(allocation: str, fraction: float) -> None:
    for aim in ("macs", "parameters"):
        graph = residual()
        before = totals(graph)
        pruned(graph, Prune(granularity="channel", allocation=allocation, **{aim: fraction}))
        share = getattr(totals(graph), aim) / getattr(before, aim)
        assert fraction - 0.12 <= share <= fraction


def test_the_report_goes_layer_by_layer() -> None:
    def time(graph: Graph) -> float:
        return totals(graph).macs * 1e-9

    ctx = Context(target=Target(time=time, threads=1, vector_bytes=64))
    graph = residual()
    dense, (x, _) = graph.clone(), batches(1)[0]
    pruned(graph, Prune(0.5, granularity="channel", data=[x], measure=True), ctx)
    report = ctx.reports[-1]
    rows = {row[0]: dict(zip(report.columns, row, strict=True)) for row in report.rows}
    first = rows["first"]
    assert (first["weight before"], first["weight after"]) == ("24x16x3x3", "12x8x3x3")
    assert (first["bytes before"], first["bytes after"]) == (24 * 16 * 9 * 4, 12 * 8 * 9 * 4)
    assert first["MACs before"] == 4 * 64 * 24 * 16 * 9 == 4 * first["MACs after"]
    assert first["ms before"] == pytest.approx(first["MACs before"] * 1e-6)
    assert first["ms after"] == pytest.approx(first["MACs after"] * 1e-6)
    # the stem reads all of the input: half of its output is gone, the rest as it was
    y = functional.conv2d(x, weight(dense, "stem"), dense.value("stem.bias").constant, padding=1)
    norms = weight(dense, "stem").abs().sum((1, 2, 3)) + 0
    norms += weight(dense, "second").abs().sum((1, 2, 3))
    gone = norms <= norms.median()
    assert rows["stem"]["error"] == pytest.approx(float(y[:, gone].norm() / y.norm()), rel=1e-5)
    assert any("times as fast" in remark for remark in report.remarks)


def test_a_time_budget() -> None:
    def time(graph: Graph) -> float:
        return totals(graph).macs * 1e-9

    ctx = Context(target=Target(time=time, threads=1, vector_bytes=64))
    graph = residual()
    before = time(graph)
    pruned(graph, Prune(speedup=2.0, granularity="channel"), ctx)
    assert 2.0 <= before / time(graph) <= 2.4
    with pytest.raises(PassError, match=r"speed-up of 1e\+06 cannot be reached"):
        pruned(residual(), Prune(speedup=1e6, granularity="channel"), ctx)


@pytest.mark.parametrize("round_to", [3, 4, 8])
def test_rounding(round_to: int) -> None:
    graph = residual()
    pruned(graph, Prune(0.4, granularity="channel", round_to=round_to))
    sizes = [weight(graph, name).shape[0] for name in ("stem", "first")]
    for size, whole in zip(sizes, (16, 24), strict=True):
        assert size % round_to == 0 or size == whole
        assert abs(size - 0.6 * whole) <= max(round_to, 1)


def test_what_is_ignored_keeps_its_channels() -> None:
    graph = residual()
    report = pruned(graph, Prune(0.5, granularity="channel", ignore="second"))
    assert weight(graph, "stem").shape[0] == 16
    assert weight(graph, "first").shape[0] == 12
    assert any("stem: ignored" in remark for remark in report.remarks)


class EinsteinSum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 12))
        self.first, self.last = nn.Linear(4, 8), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.einsum("bc,cd->bd", torch.relu(self.first(x)), self.weight)
        result: Tensor = self.last(torch.relu(x))
        return result


def test_channels_that_no_criterion_ranks_are_left_alone() -> None:
    """Until the exact passes have made a layer of the product."""
    graph = traced(EinsteinSum(), torch.randn(2, 4))
    exact = graph.clone()
    report = pruned(graph, Prune(0.5, granularity="channel"))
    assert [row[0] for row in report.rows] == ["first"]
    assert any(r.startswith("left alone: einsum: criteria rank") for r in report.remarks)
    Pipeline(EXACT).run(exact)
    assert len(pruned(exact, Prune(0.5, granularity="channel")).rows) == 2


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        parts = [
            p(x).unflatten(2, (4, 8)).transpose(1, 2) for p in (self.query, self.key, self.value)
        ]
        y = functional.scaled_dot_product_attention(*parts)
        result: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return result


def test_heads() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 32)
    graph = traced(Attention(), x)
    pruned(graph, Prune(0.5, granularity="head"))
    assert weight(graph, "query").shape == (16, 32)
    assert weight(graph, "out").shape == (32, 16)
    assert reference.run(graph, [x])[0].shape == x.shape
    assert len(find_groups(graph, heads=True)[0]) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [({"threshold": 0.1}, "a threshold is about single weights"),
     ({"sparsity": 0.5, "allocation": "erk"}, "'erk' is about single weights"),
     ({"sparsity": 0.5, "round_to": 0}, "whole number from 1"), ({}, "one of sparsity")],
)  # fmt: skip
def test_options_that_are_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PassError, match=message):
        Prune(granularity="channel", **options)


def test_what_cannot_be_done() -> None:
    with pytest.raises(PassError, match="no head to prune"):
        pruned(residual(), Prune(0.5, granularity="head"))
    with pytest.raises(PassError, match="MACs cannot be met by removing channels"):
        pruned(residual(), Prune(macs=0.001, granularity="channel"))
    with pytest.raises(PassError, match="round_to goes with"):
        Prune(0.5, round_to=8)
