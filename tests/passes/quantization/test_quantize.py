"""The pass Quantize: every option on a small network, what it composes with, and its errors."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt import reference
from graphopt.comparison import Difference, decibels
from graphopt.errors import PassError
from graphopt.ir import Graph
from graphopt.passes import Quantize
from graphopt.pipeline import Context, Pipeline


class Small(nn.Module):
    """A stem, a depthwise convolution, a residual addition, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.pointwise = nn.Conv2d(8, 8, 1)
        self.classifier = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.pointwise(nn.functional.hardtanh(self.depthwise(x), 0.0, 6.0)))
        return self.classifier(x.mean((2, 3)))


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(20)
        self.first = nn.Linear(20, 48)
        self.second = nn.Linear(48, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(nn.functional.gelu(self.first(self.norm(x))))


class Signals(nn.Module):
    """Convolutions of signals, pooling, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(3, 8, 5, stride=2, padding=2)
        self.depthwise = nn.Conv1d(8, 8, 3, padding=1, groups=8, bias=False)
        self.pointwise = nn.Conv1d(8, 8, 1)
        self.classifier = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool1d(torch.relu(self.stem(x)), 3, 2, 1)
        x = torch.relu(x + self.pointwise(torch.relu(self.depthwise(x))))
        return self.classifier(nn.functional.adaptive_avg_pool1d(x, 1).flatten(1))


def signals(seed: int, count: int = 8) -> Tensor:
    return torch.randn(count, 3, 60, generator=torch.Generator().manual_seed(seed))


def images(seed: int, count: int = 8) -> Tensor:
    return torch.randn(count, 3, 10, 10, generator=torch.Generator().manual_seed(seed))


def tokens(seed: int, count: int = 32) -> Tensor:
    x = torch.randn(count, 5, 20, generator=torch.Generator().manual_seed(seed))
    return x @ torch.randn(20, 20, generator=torch.Generator().manual_seed(99))


DATA = [images(k) for k in range(4)]
TOKENS = [tokens(k) for k in range(4)]


@pytest.fixture(scope="module")
def small() -> Graph:
    torch.manual_seed(0)
    return graphopt.trace(Small().eval(), images(0))


@pytest.fixture(scope="module")
def perceptron() -> Graph:
    torch.manual_seed(0)
    return graphopt.trace(Perceptron().eval(), tokens(0))


def quantize(source: Graph, **options: Any) -> tuple[Graph, Context]:
    graph, ctx = source.clone(), Context()
    assert Pipeline([Quantize(**options)]).run(graph, ctx)
    return graph, ctx


def sqnr(source: Graph, graph: Graph, x: Tensor) -> float:
    (expected,), (actual,) = reference.run(source, [x]), reference.run(graph, [x])
    return Difference.between("output", "", expected, actual).sqnr


def weights(graph: Graph) -> dict[str, Tensor]:
    layers = [node for node in graph.nodes if node.op in ("aten.conv2d", "aten.linear")]
    return {node.name: graph.weight(node).tensor for node in layers}


@pytest.mark.parametrize(
    "options",
    [{}, {"activations": "int8"}, {"per_channel": False}, {"method": "nearest"},
     {"method": "reconstruction"}, {"equalise": 0.5}, {"equalise": 1.0}, {"correct_bias": False},
     {"method": "nearest", "correct_bias": False}, {"fuse_additions": False}, {"batches": 2},
     *({"observer": o} for o in ("min-max", "moving-average", "percentile", "entropy"))],
    ids=str,
)  # fmt: skip
def test_static_options(small: Graph, options: dict[str, Any]) -> None:
    graph, ctx = quantize(small, data=DATA, **options)
    assert sqnr(small, graph, images(9)) > 25
    for node in graph.nodes:
        if node.op in ("aten.conv2d", "aten.linear"):
            assert graph.weight(node).constant.dtype == torch.int8
            assert node["bias"] is None or node["bias"].producer["dtype"] == torch.int32
            axis = node["weight"].producer["axis"]
            assert axis == (None if options.get("per_channel") is False else 0)
    (report,) = ctx.reports
    assert "4 of 4 layers" in report.title


@pytest.mark.parametrize(
    ("options", "least"),
    [({"activations": None}, 45), ({"activations": None, "weights": "int4"}, 20),
     ({"activations": None, "weights": "int4", "group_size": 4}, 24),
     ({"activations": None, "weights": "int8", "group_size": 16}, 45),
     ({"activations": "dynamic"}, 35)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("method", ["nearest", "gptq"])
def test_linear_layers(
    perceptron: Graph, options: dict[str, Any], least: float, method: str
) -> None:
    data = None if method == "nearest" else TOKENS
    graph, _ = quantize(perceptron, data=data, method=method, **options)
    assert sqnr(perceptron, graph, tokens(9)) > least
    stored = [graph.weight(n) for n in graph.nodes if n.op == "aten.linear"]
    limit = 7 if options.get("weights") == "int4" else 127
    for weight in stored:
        assert weight.constant.dtype == torch.int8
        steps, node = weight.constant.constant, weight.dequantize
        assert steps is not None
        assert node is not None
        assert steps.abs().max() <= limit
        assert node["block_size"] == options.get("group_size")


def test_compensated_rounding_beats_the_nearest_steps_with_four_bits(perceptron: Graph) -> None:
    four = {"activations": None, "weights": "int4", "correct_bias": False, "data": TOKENS}
    nearest, gptq, reconstruction = (
        sqnr(perceptron, quantize(perceptron, method=method, **four)[0], tokens(9))
        for method in ("nearest", "gptq", "reconstruction")
    )
    assert gptq > nearest + 1
    assert reconstruction > nearest + 1


def test_rows_of_a_dynamic_layer_do_not_depend_on_each_other(perceptron: Graph) -> None:
    graph, _ = quantize(perceptron, activations="dynamic")
    x = tokens(3)
    (together,) = reference.run(graph, [x])
    x[1:] *= 100
    (apart,) = reference.run(graph, [x])
    assert torch.equal(together[0], apart[0])
    assert [n.op for n in graph.nodes].count("graphopt.quantize") == 2


def test_dynamic_rows_by_the_formula(perceptron: Graph) -> None:
    graph, _ = quantize(perceptron, activations="dynamic")
    steps = next(n for n in graph.nodes if n.op == "graphopt.quantize")
    seen: dict[str, Tensor] = {}
    reference.run(graph, [tokens(1)], observe=lambda n, r: seen.update({n.name: r[0]}))
    x = seen[steps["x"].name]
    scale = x.abs().amax(-1, keepdim=True) / 127
    assert torch.equal(seen[steps.name], (x / scale).round().to(torch.int8))


def test_zeros_stay_zeros_and_blocks_survive(small: Graph) -> None:
    pruned = small.clone()
    node = next(n for n in pruned.nodes if n.origin.module == "pointwise")
    weight = node["weight"].constant.clone()
    weight[:, 4:] = 0
    weight[2:4, :4] = 0
    pruned.set_constant(node["weight"], weight)
    for method in ("nearest", "gptq", "reconstruction"):
        graph, _ = quantize(pruned, data=DATA, method=method)
        after = weights(graph)[node.name]
        assert torch.equal(after == 0, (weight == 0) | (after == 0))
        assert (after[weight == 0] == 0).all()
        assert (after != 0).sum() > 20


def test_a_dead_channel_and_a_dead_activation() -> None:
    torch.manual_seed(0)
    model = Small().eval()
    with torch.no_grad():
        model.stem.weight[3] = 0
        nn.init.constant_(model.stem.bias, 0.7)  # type: ignore[arg-type]
        model.depthwise.weight[5] = 0
        model.pointwise.weight.zero_()
        nn.init.zeros_(model.pointwise.bias)  # type: ignore[arg-type]
    source = graphopt.trace(model, images(0))
    graph, _ = quantize(source, data=DATA)
    assert sqnr(source, graph, images(9)) > 25


def test_ignored_layers_stay_floats(small: Graph) -> None:
    for ignore in (["stem"], "stem", re.compile("st.m"), [nn.Linear, "stem"]):
        graph, ctx = quantize(small, data=DATA, ignore=ignore)
        stem = next(n for n in graph.nodes if n.origin.module == "stem" and n.op == "aten.conv2d")
        assert stem["weight"].is_constant
        assert ("stem", "floats", "ignored") in ctx.reports[0].rows


def test_means_of_the_channels_are_kept(small: Graph) -> None:
    """One scale for a weight whose channels differ in size: the steps of most are coarse."""
    uneven = small.clone()
    for node in uneven.nodes:
        if node.op == "aten.conv2d":
            weight = node["weight"].constant.clone()
            weight[0] *= 20
            uneven.set_constant(node["weight"], weight)
    x = torch.cat(DATA)
    expected = _means(uneven, x)

    def worst(correct_bias: bool) -> float:
        graph, _ = quantize(uneven, data=DATA, per_channel=False, correct_bias=correct_bias)
        actual = _means(graph, x)
        return max((actual[n] - mean).abs().max().item() for n, mean in expected.items())

    assert 4 * worst(correct_bias=True) < worst(correct_bias=False)


def _means(graph: Graph, x: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def show(node: Any, results: list[Any]) -> None:
        if node.op == "aten.conv2d":
            found[node.name] = results[0].double().mean((0, 2, 3))

    reference.run(graph, [x], observe=show)
    return found


def test_decibels() -> None:
    assert decibels(100.0, 1.0) == pytest.approx(20)
    assert decibels(1.0, 0.0) == math.inf
    assert decibels(0.0, 1.0) == pytest.approx(-3000)


def test_mixed_precision_by_the_ratio_of_signal_to_noise(small: Graph) -> None:
    everything = sqnr(small, quantize(small, data=DATA)[0], torch.cat(DATA))
    graph, ctx = quantize(small, data=DATA, target_sqnr=everything + 2)
    assert sqnr(small, graph, torch.cat(DATA)) >= everything + 2
    report = ctx.reports[0]
    kept = [row for row in report.rows if row[2] == "hurts too much"]
    assert 1 <= len(kept) < 4
    hurts = {row[0]: float(row[3] or 0) for row in report.rows}
    others = [hurts[row[0]] for row in report.rows if row not in kept]
    assert max(hurts[row[0]] for row in kept) <= min(others)
    assert "was asked for" in report.remarks[0]


def test_weights_are_rounded_for_the_layers_that_stay_in_floats() -> None:
    """One colour is a hundredth of the others and weighs as much: only floats resolve it."""
    torch.manual_seed(0)
    faint = torch.tensor([0.01, 1.0, 1.0]).reshape(3, 1, 1)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)
    )
    with torch.no_grad():
        model[0].weight /= faint
    data = [images(k) * faint for k in range(4)]
    source = graphopt.trace(model.eval(), data[0])

    def quality(**options: Any) -> tuple[float, Context]:
        graph, ctx = quantize(source, data=data, **options)
        return sqnr(source, graph, torch.cat(data)), ctx

    mixed, ctx = quality(target_sqnr=quality()[0] + 6)
    report = ctx.reports[0]
    assert [row[0] for row in report.rows if row[1] == "floats"] == ["0"]
    assert mixed >= quality(ignore=["0"])[0] - 1e-6
    assert f"{mixed:.4g}" in report.remarks[0]


def test_mixed_precision_that_asks_for_nothing_or_too_much(small: Graph) -> None:
    _, ctx = quantize(small, data=DATA, target_sqnr=1.0)
    assert "4 of 4" in ctx.reports[0].title
    graph = small.clone()
    assert not Pipeline([Quantize(data=DATA, target_sqnr=500.0)]).run(graph)
    assert graph.to_text() == small.to_text()


def test_mixed_precision_by_a_figure_of_merit(small: Graph) -> None:
    """An evaluation that counts the layers in floats: three quarters of them must stay."""

    def evaluate(graph: Graph) -> float:
        layers = [n for n in graph.nodes if n.op in ("aten.conv2d", "aten.linear")]
        return sum(n["weight"].is_constant for n in layers) / len(layers)

    _, ctx = quantize(small, data=DATA, evaluate=evaluate, max_drop=0.25)
    assert "1 of 4" in ctx.reports[0].title


def test_the_source_model_and_the_given_graph_on_failure_stay(small: Graph) -> None:
    before = small.to_text()
    graph = small.clone()
    with pytest.raises(PassError, match="batch 0 of the calibration data"):
        Pipeline([Quantize(data=[torch.zeros(2, 2)])]).run(graph)
    assert graph.to_text() == small.to_text() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [({}, "needs calibration data"),
     ({"activations": None, "method": "gptq"}, "method='gptq' needs calibration data"),
     ({"activations": "dynamic", "target_sqnr": 20.0}, "target_sqnr needs calibration data"),
     ({"data": DATA, "weights": "int3"}, "weights='int3' is unknown"),
     ({"data": DATA, "weights": "int4"}, "int4 weights go with activations=None"),
     ({"data": DATA, "observer": "median"}, "observer='median' is unknown"),
     ({"data": DATA, "method": "magic"}, "method='magic' is unknown"),
     ({"data": DATA, "group_size": 32}, "group_size goes with activations=None"),
     ({"data": DATA, "equalise": 2.0}, "from 0 to 1"),
     ({"data": DATA, "max_drop": 0.1}, "go together"),
     ({"data": DATA, "ignore": [3]}, "ignore has 3")],
)  # fmt: skip
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PassError, match=message):
        Quantize(**options)


def test_infinities_are_named(small: Graph) -> None:
    with pytest.raises(PassError, match="%x has infinities or NaNs"):
        Pipeline([Quantize(data=[images(0) / 0])]).run(small.clone())


@pytest.mark.parametrize("method", ["nearest", "gptq", "reconstruction"])
def test_convolutions_of_signals(method: str) -> None:
    torch.manual_seed(0)
    source = graphopt.trace(Signals().eval(), signals(0))
    graph, ctx = quantize(source, data=[signals(k) for k in range(4)], method=method)
    assert [row[2] for row in ctx.reports[0].rows] == [""] * 4
    assert sqnr(source, graph, signals(9)) > 25


def test_layers_that_have_no_integer_form_say_why() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.Conv2d(4, 4, 1))
    graph = graphopt.trace(model.eval(), images(0))
    _, ctx = quantize(graph, data=DATA)
    assert ctx.reports[0].rows[0][2] == "aten.conv_transpose2d.input has no integer form"
    double = graphopt.trace(nn.Linear(20, 3).double().eval(), tokens(0).double())
    assert not Pipeline([Quantize(activations="dynamic")]).run(double)


def test_ignoring_what_is_not_there(small: Graph) -> None:
    with pytest.raises(PassError, match="ignore has 'nowhere', which means no layer"):
        Pipeline([Quantize(data=DATA, ignore="nowhere")]).run(small.clone())


def test_a_generator_serves_only_methods_of_one_sweep(small: Graph) -> None:
    with pytest.raises(PassError, match="is a generator and was read already"):
        Pipeline([Quantize(data=iter(DATA))]).run(small.clone())
    graph = small.clone()
    one = Quantize(data=iter(DATA), method="nearest", correct_bias=False)
    assert Pipeline([one]).run(graph)


def test_through_optimize(small: Graph) -> None:
    torch.manual_seed(0)
    model = Small().eval()
    x = images(5)
    optimized = graphopt.optimize(model, x, passes=[Quantize(data=DATA)])
    (expected,) = reference.run(optimized.graph, [x])
    assert (optimized(x) - expected).abs().max() < 0.02 * expected.abs().max()
    assert "quantize: 4 of 4 layers" in str(optimized.report()).replace("\n", " ")
