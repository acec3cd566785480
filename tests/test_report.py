"""Parameters, non-zeros, multiply-adds and bytes, against counts made by hand."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

import graphopt
from graphopt.engine import selection
from graphopt.engine.parts import part_keys
from graphopt.flops import count_flops
from graphopt.ir import Graph, TensorType
from graphopt.pass_report import PassReport
from graphopt.report import Totals, benchmark, build_report, totals

BATCH = 2


def traced(model: nn.Module, *shape: int) -> Graph:
    return graphopt.trace(model.eval(), torch.randn(BATCH, *shape))


def test_perceptron() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight[:, :2] = 0
        model[2].bias[0] = 0
    parameters = (4 * 3 + 3) + (3 * 2 + 2)
    expected = Totals(
        parameters=parameters,
        nonzeros=parameters - 3 * 2 - 1,
        macs=BATCH * (4 * 3 + 3 * 2),
        bytes=4 * parameters,
    )
    assert totals(traced(model, 4)) == expected


def test_convolutions_with_batch_norm() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),  # 8x8 stays 8x8
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, stride=2, groups=8),  # 8x8 becomes 3x3
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    parameters = 8 * 3 * 9 + 2 * 8 + (8 * 9 + 8) + (8 * 5 + 5)
    expected = Totals(
        parameters=parameters,
        nonzeros=parameters,
        macs=BATCH * (8 * 8 * 8 * 3 * 9 + 3 * 3 * 8 * 9 + 8 * 5),
        bytes=4 * (parameters + 2 * 8),  # running mean and variance are no parameters
    )
    graph = traced(model, 3, 8, 8)
    assert totals(graph) == expected
    layers = {layer.layer: layer for layer in build_report(graph, graph).layers}
    assert layers["0"].macs == BATCH * 8 * 8 * 8 * 3 * 9
    assert layers["2"].parameters == 8 * 9 + 8
    assert layers["2"].inputs == ((BATCH, 8, 8, 8),)
    assert layers["2"].outputs == ((BATCH, 8, 3, 3),)
    assert layers["1"].bytes == 4 * 4 * 8
    assert layers["3"].parameters == 0
    assert layers["3"].bits is None


class TiedAttention(nn.Module):
    """Keys are made by the layer that makes the queries."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(8, 8, bias=False)
        self.key = self.query

    def forward(self, x: Tensor) -> Tensor:
        query, key = self.query(x), self.key(x)
        attended: Tensor = functional.scaled_dot_product_attention(query, key, x)
        return attended


def test_attention_with_tied_weights() -> None:
    model = TiedAttention()
    expected = Totals(
        parameters=8 * 8,
        nonzeros=8 * 8,
        macs=BATCH * (2 * 6 * 8 * 8 + 6 * 6 * 8 + 6 * 6 * 8),
        bytes=4 * 8 * 8,
    )
    assert totals(traced(model, 6, 8)) == expected


def quantized_linear(quant_min: int, quant_max: int) -> Graph:
    """A linear layer 4 -> 3 with an int8 weight, of which two elements stand for zero."""
    graph = Graph({"batch": BATCH})
    x = graph.add_input("x", TensorType(torch.float32, (BATCH, 4)), {0: "batch"})
    steps = torch.tensor([[1, 2, 3, 1], [5, 6, 5, 7], [3, 2, 2, 1]], dtype=torch.int8)
    weight = graph.add(
        "graphopt.dequantize",
        graph.constant(steps, "weight"),
        graph.constant(torch.tensor([0.1, 0.2, 0.3]), "scale"),
        graph.constant(torch.tensor([0, 5, 0], dtype=torch.int8), "zero_point"),
        0,
        quant_min,
        quant_max,
        torch.int8,
    )
    graph.set_outputs([graph.add("aten.linear", x, weight)])
    return graph


def test_quantized_weights_count_their_own_bits() -> None:
    for quant_min, quant_max, bits in ((-128, 127, 8), (-127, 127, 8), (-8, 7, 4), (-7, 7, 4)):
        graph = quantized_linear(quant_min, quant_max)
        scales_and_zero_points = 3 * 4 + 3
        assert totals(graph) == Totals(
            parameters=12,
            nonzeros=10,
            macs=BATCH * 12,
            bytes=12 * bits // 8 + scales_and_zero_points,
        )
        (layer,) = build_report(graph, graph).layers
        assert layer.operators == ("linear",)
        assert (layer.parameters, layer.nonzeros, layer.bits) == (12, 10, bits)


def test_operators_that_the_counter_of_torch_passes_over() -> None:
    graph = Graph()
    matrix = graph.add_input("matrix", TensorType(torch.float32, (3, 5)))
    vector = graph.add_input("vector", TensorType(torch.float32, (5,)))
    heads = graph.add_input("heads", TensorType(torch.float32, (2, 4, 6, 8)))
    shared = graph.add("aten.slice.Tensor", heads, 1, 0, 2)
    attention = "aten.scaled_dot_product_attention"
    counted = [
        (graph.add_node("aten.mv", matrix, vector), 3 * 5),
        (graph.add_node("aten.linear", vector, matrix), 3 * 5),
        (graph.add_node("aten.dot", vector, vector), 5),
        (graph.add_node(attention, heads, heads, heads), 2 * 4 * 36 * 16),
        (graph.add_node(attention, heads, shared, shared, enable_gqa=True), 2 * 4 * 36 * 16),
        (graph.add_node("aten.relu", heads), 0),
    ]
    for node, macs in counted:
        assert count_flops(node) == 2 * macs, node


def test_report_prints_and_converts() -> None:
    source, pruned = nn.Linear(4, 3), nn.Linear(4, 3)
    with torch.no_grad():
        pruned.weight[0] = 0
    report = build_report(traced(source, 4), traced(pruned, 4))
    content = report.to_dict()
    assert content["before"]["nonzeros"] == 15
    assert content["totals"] == {
        "parameters": 15,
        "nonzeros": 11,
        "macs": BATCH * 12,
        "bytes": 60,
        "time_ms": None,
    }
    assert [layer["operators"] for layer in content["layers"]] == [("linear",)]
    lines = str(report).splitlines()
    assert any("linear" in line and f"{BATCH}x4 → {BATCH}x3" in line for line in lines)
    assert "60 bytes before, 60 bytes after" in lines[-1]


def test_report_with_a_plan_names_kernels_and_times() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 5))
    optimized = graphopt.optimize(model.eval(), torch.randn(BATCH, 3, 6, 6))
    report = optimized.report()
    assert all(layer.kernel and layer.time_ms is not None for layer in report.layers)
    assert report.totals.time_ms == sum(layer.time_ms or 0 for layer in report.layers)
    assert sum(layer.macs for layer in report.layers) == report.before.macs
    assert sum(layer.parameters for layer in report.layers) == report.totals.parameters


def test_benchmark_takes_turns() -> None:
    calls: list[str] = []
    result = benchmark({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=7)
    # One call of every turn is not timed.
    assert "".join(calls) == 6 * "a" + 6 * "b" + 3 * "a" + 3 * "b"
    assert {name: len(times) for name, times in result.times.items()} == {"a": 7, "b": 7}
    assert result.ratio == result.medians["a"] / result.medians["b"]
    assert "speed-up" in str(result)


@graphopt.register_pass("tells")
@dataclass(frozen=True)
class Tells:
    """Reports, and does nothing else."""

    def run(self, graph: graphopt.Graph, ctx: graphopt.Context) -> bool:
        rows = (("conv[0]", 0.5, None, 12), ("fc", 1.0, "left alone", 7))
        ctx.report(PassReport("tells", ("layer", "error", "why", "count"), rows, ("A remark.",)))
        return False


def test_memory_of_a_plan_is_reported():
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 48), nn.ReLU())
    model.append(nn.Linear(48, 2))
    report = graphopt.optimize(model, torch.randn(7, 64)).report()
    memory = report.memory
    assert memory is not None
    live = 4 * 7 * (32 + 48)
    assert live <= memory.arena_lower_bound <= memory.arena <= live + 1024
    assert memory.packed >= 4 * (64 * 32 + 32 * 48 + 48 * 2)
    assert report.to_dict()["memory"]["arena"] == memory.arena
    assert "memory of a call" in str(report)


def test_parts_of_a_batch_are_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAPHOPT_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("GRAPHOPT_SELECTION", "measure")
    selection.forget()
    try:
        opt = graphopt.optimize(nn.Linear(6, 4), torch.randn(8, 6))
        keys = part_keys(opt.graph, opt.graph.sizes, opt.threads, [1, 4])
        selection.remember(dict(zip(keys, (3.0, 2.0, 1.0), strict=True)))
        report = opt.report()
    finally:
        selection.forget()
    assert report.parts == report.to_dict()["parts"] == 2
    assert "in 2 parts" in str(report)
    assert report.layers[0].macs == 8 * 6 * 4


def test_what_passes_tell_is_part_of_the_report():
    opt = graphopt.optimize(nn.Linear(3, 2), torch.randn(1, 3), passes=[Tells()])
    for model in (opt, copy.deepcopy(opt)):
        report = model.report()
        (told,) = report.to_dict()["passes"]
        assert told["rows"][1] == ("fc", 1.0, "left alone", 7)
        assert "conv[0]" in str(report)
        assert "A remark." in str(report)
