"""Time budgets, on machines whose times follow formulas."""

from __future__ import annotations

import itertools

import pytest
import torch
from pruning_networks import batches, pruned, traced
from torch import nn

from graphopt.errors import PassError
from graphopt.ir import Graph
from graphopt.passes import Prune
from graphopt.passes.pruning.layer_times import fragment, measure
from graphopt.passes.pruning.layers_to_prune import prunable_layers
from graphopt.passes.pruning.time_budget import AIM, TimeTable
from graphopt.pipeline import Context, Pipeline
from graphopt.target import Target


def network() -> nn.Sequential:
    torch.manual_seed(1)
    layers = [module for _ in range(6) for module in (nn.Linear(32, 32), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(32, 64))


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 16), nn.Linear(16, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = x + self.second(torch.relu(self.first(x)))
        return result


def machine(overhead: float = 0.1, slope: float = 1.0, fusion: float = 1.0) -> Context:
    """A machine that skips zeros where they are at least half, 10 % more slowly than dense ones,
    and takes some time per network; whole networks run faster than their parts by `fusion`."""

    def time(graph: Graph) -> float:
        layers, _ = prunable_layers(graph)
        seconds = overhead
        for layer in layers:
            weight = layer.weight.tensor
            density = torch.count_nonzero(weight).item() / weight.numel()
            seconds += (
                weight.numel() / 1024 * (min(1.0, 1.1 * density**slope) if density <= 0.5 else 1)
            )
        return 1e-3 * seconds * (fusion if len(layers) > 1 else 1.0)

    return Context(target=Target(time=time, threads=1, vector_bytes=64))


@pytest.mark.parametrize("speedup", [1.3, 2.0, 4.0])
@pytest.mark.parametrize("options", [{}, {"slope": 0.7}, {"fusion": 0.6}, {"overhead": 0.5}])
@pytest.mark.parametrize("granularity", ["unstructured", "1x4"])
def test_the_whole_network_is_as_much_faster_as_asked(
    speedup: float, options: dict[str, float], granularity: str
) -> None:
    if options == {"overhead": 0.5} and speedup == 4.0:
        pytest.skip("more than half a layer of overhead leaves no such speed-up")
    ctx = machine(**options)
    graph = traced(network(), torch.randn(2, 32))
    before = ctx.target.time(graph)
    report = pruned(graph, Prune(speedup=speedup, granularity=granularity), ctx)
    reached = before / ctx.target.time(graph)
    assert reached == pytest.approx(speedup, rel=0.1)
    assert f"{reached:.2f} times as fast" in " ".join(report.remarks)
    assert {"ms before", "ms after"} <= set(report.columns)


def test_layers_that_do_not_pay_stay_dense() -> None:
    """Layers gain nothing below a sparsity of half: none is pruned a little."""
    graph = traced(network(), torch.randn(2, 32))
    report = pruned(graph, Prune(speedup=1.3), machine())
    sparsities = [row[3] for row in report.rows]
    assert all(s == 0 or s >= 0.49 for s in sparsities)
    assert 0.0 in sparsities


def test_sensitive_layers_are_spared() -> None:
    """The third layer's result is nearly constant: with data, it and those before it are pruned,
    and those after it are not."""
    model = network()
    with torch.no_grad():
        model[4].weight.mul_(1e-4)
    x = [torch.randn(16, 32)]
    graph = traced(model, x[0])
    report = pruned(graph, Prune(speedup=1.3, data=x), machine())
    asked = {row[0]: row[2] for row in report.rows}
    assert min(asked["0"], asked["2"], asked["4"]) >= 0.5
    assert asked["6"] == asked["8"] == asked["10"] == asked["12"] == 0


@pytest.mark.parametrize("granularity", ["unstructured", "2:4"])
def test_a_speedup_out_of_reach_names_the_best(granularity: str) -> None:
    graph = traced(network(), torch.randn(2, 32))
    text = graph.to_text()
    with pytest.raises(PassError, match=r"speed-up of 100 cannot be reached: .* reach is \d") as e:
        pruned(graph, Prune(speedup=100.0, granularity=granularity), machine(overhead=1.0))
    best = float(str(e.value).partition("reach is ")[2].split()[0])
    assert 1.5 < best < 10
    assert graph.to_text() == text


def test_with_the_hessian_method() -> None:
    ctx = machine()
    graph = traced(network(), torch.randn(2, 32))
    before = ctx.target.time(graph)
    data = [torch.randn(16, 32) for _ in range(3)]
    pruned(graph, Prune(speedup=2.0, criterion="hessian", granularity="2x2", data=data), ctx)
    assert before / ctx.target.time(graph) == pytest.approx(2.0, rel=0.1)


def test_a_lucky_measurement_is_not_believed() -> None:
    """Every third time of a whole network is 15 % too short or too long."""
    ctx = machine()
    noise = itertools.cycle([1.0, 1.0, 0.85, 1.0, 1.0, 1.15])

    def time(graph: Graph) -> float:
        whole = len(prunable_layers(graph)[0]) > 1
        return ctx.target.time(graph) * (next(noise) if whole else 1.0)

    noisy = Context(target=Target(time=time, threads=1, vector_bytes=64))
    graph = traced(network(), torch.randn(2, 32))
    before = ctx.target.time(graph)
    pruned(graph, Prune(speedup=2.0), noisy)
    assert before / ctx.target.time(graph) == pytest.approx(2.0, rel=AIM)


def test_without_a_timer() -> None:
    with pytest.raises(PassError, match="cannot measure time"):
        Pipeline([Prune(speedup=2.0)]).run(traced(network(), torch.randn(2, 32)))


@pytest.mark.parametrize("granularity", ["unstructured", "channel", "residual-block"])
def test_nothing_is_timed_unless_asked(granularity: str) -> None:
    def time(graph: Graph) -> float:
        raise AssertionError("timed")

    ctx = Context(target=Target(time=time, threads=1, vector_bytes=64))
    graph = traced(nn.Sequential(Skip(), nn.Linear(32, 8)), torch.randn(2, 32))
    Pipeline([Prune(0.5, granularity=granularity)]).run(graph, ctx)
    assert not any("ms before" in report.columns for report in ctx.reports)
    with pytest.raises(PassError, match="cannot measure time"):
        pruned(graph, Prune(0.5, granularity=granularity, measure=True))


def test_times_of_the_layers_and_of_the_network() -> None:
    ctx = machine()
    graph = traced(network(), torch.randn(2, 32))
    report = pruned(graph, Prune(0.5, measure=True, ignore=["2"]), ctx)
    times = {row[0]: row[-2:] for row in report.rows}
    assert list(times) == ["0", "4", "6", "8", "10", "12"]
    # by `machine`: 1 ms per 1024 weights, 55 % of that at half, 0.1 ms in every graph
    assert times["0"] == pytest.approx([1.1, 0.65])
    assert times["12"] == pytest.approx([2.1, 1.2])
    assert "8.1 ms before, 4.95 ms after, 1.64 times as fast" in " ".join(report.remarks)


def test_time_for_measuring_is_bounded() -> None:
    """The largest layers come first; the others have empty cells."""
    graph = traced(network(), torch.randn(2, 32))
    layers = [(layer, layer) for layer in prunable_layers(graph)[0]]
    clock = iter([0.0, 0.0, 50.0, 70.0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("graphopt.passes.pruning.layer_times.time.monotonic", lambda: next(clock))
        times = measure(graph, graph, layers, machine())
    assert list(times.layers) == ["12", "0"]
    assert times.row("12") == pytest.approx([2.1, 2.1])
    assert times.row("2") == [None, None]


def test_fragments_compute_the_layer() -> None:
    from graphopt import reference

    graph = traced()
    (x, _), *_ = batches()
    values: dict[str, list[torch.Tensor]] = {}
    reference.run(graph, [x], observe=lambda node, results: values.update({node.name: results}))
    for layer in prunable_layers(graph)[0]:
        alone = fragment(layer.node, layer.weight.tensor)
        source = layer.node["input"]
        given = x if source.is_input else values[source.producer.name][source.index]
        (result,) = reference.run(alone, [given])
        assert torch.equal(result, values[layer.node.name][0])


def test_refined_tables_interpolate_above_the_first_sparsity() -> None:
    layers, _ = prunable_layers(traced(network(), torch.randn(2, 32)))
    own = {layers[0]: [0.0, 1.0, 3.0]}
    fine = TimeTable((0.0, 0.5, 0.9), own, {layers[0]: [9.0, 5.0, 1.0]}).refined()
    assert fine.levels == pytest.approx((0.0, 0.5, 0.6, 0.7, 0.8, 0.9))
    assert fine.seconds[layers[0]] == pytest.approx([9, 5, 4, 3, 2, 1])
    assert fine.errors[layers[0]] == pytest.approx([0, 1, 1.5, 2, 2.5, 3])
