"""The methods that keep accuracy, as passes of their own."""

from __future__ import annotations

import pytest
import torch
from pass_support import Net
from torch import Tensor

from graphopt import reference
from graphopt.calibration import CalibrationData
from graphopt.errors import PassError
from graphopt.ir import Graph, TensorType
from graphopt.passes import (
    BatchNormReestimation,
    BiasCorrection,
    CrossLayerEqualisation,
    Gptq,
    HighBiasAbsorption,
    Quantize,
    Reconstruction,
    SmoothQuant,
)
from graphopt.passes.quantization.bias_correction import channel_means
from graphopt.passes.quantization.equalisation import balancing
from graphopt.pipeline import Pipeline


def data_for(graph: Graph, count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(graph.inputs[0].shape, generator=generator) for _ in range(count)]


def assert_same_function(before: Graph, after: Graph) -> None:
    for x in data_for(before):
        for expected, actual in zip(
            reference.run(before, [x]), reference.run(after, [x]), strict=True
        ):
            error = (expected - actual).abs().max() / expected.abs().max()
            assert error < 1e-5


def linear_bottlenecks() -> Graph:
    """Residual additions, a depthwise convolution, padding and pooling between layers."""
    net = Net(3, 8, 8)
    stream = net.convolution(net.x, 6, 3, padding=[1, 1])
    inner = net("aten.relu6", net.convolution(stream, 12, 1))
    inner = net.convolution(inner, 12, 3, padding=[1, 1], groups=12)
    inner = net("aten.relu", inner)
    padded = net("aten.pad", inner, [0, 1, 0, 1], "constant", 0.0)
    pooled = net("aten.max_pool2d", padded, [2, 2], [1, 1])
    stream = net("aten.add.Tensor", stream, net.convolution(pooled, 6, 1))
    return net.done(net.convolution(stream, 4, 1))


@pytest.mark.parametrize("with_data", [True, False])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_equalisation_keeps_the_function(with_data: bool, strength: float) -> None:
    graph = linear_bottlenecks()
    before = graph.clone()
    one = CrossLayerEqualisation(data_for(graph) if with_data else None, strength)
    assert Pipeline([one]).run(graph)
    assert_same_function(before, graph)


def ranges(graph: Graph, name: str) -> Tensor:
    found: dict[str, Tensor] = {}
    reference.run(
        graph, [torch.cat(data_for(graph))], observe=lambda n, r: found.update({n.name: r[0]})
    )
    return found[name].abs().amax((0, 2, 3))


def test_full_equalisation_gives_all_channels_of_a_residual_stream_one_range() -> None:
    graph = linear_bottlenecks()
    total = next(n for n in graph.nodes if n.op == "aten.add.Tensor")
    stream = [total.name, total["self"].name, total["other"].name]
    Pipeline([CrossLayerEqualisation(data_for(graph), 1.0)]).run(graph)
    largest = torch.stack([ranges(graph, name) for name in stream]).amax(0)
    torch.testing.assert_close(largest, largest.max().expand_as(largest))


def test_equalisation_of_weights_makes_ranges_equal() -> None:
    """Two layers and a ReLU between: sqrt(r1 r2) on either side (Nagel et al., equation 11)."""
    net = Net(3, 5, 5)
    first = net.convolution(net.x, 4, 1)
    graph = net.done(net.convolution(net("aten.relu", first), 2, 1))
    before = graph.clone()

    def largest(g: Graph) -> tuple[Tensor, Tensor]:
        one, two = (n["weight"].constant for n in g.nodes if n.op == "aten.conv2d")
        return one.abs().amax((1, 2, 3)), two.abs().amax((0, 2, 3))

    r1, r2 = largest(graph)
    assert Pipeline([CrossLayerEqualisation()]).run(graph)
    written, read = largest(graph)
    torch.testing.assert_close(written, (r1 * r2).sqrt())
    torch.testing.assert_close(read, (r1 * r2).sqrt())
    assert_same_function(before, graph)


def test_equalisation_stops_at_what_scaling_does_not_pass() -> None:
    net = Net(3, 5, 5)
    y = net("aten.hardtanh", net.convolution(net.x, 4, 1), 0.0, 6.0)
    graph = net.done(net.convolution(y, 2, 1))
    assert not Pipeline([CrossLayerEqualisation()]).run(graph)


def test_a_layer_that_reads_and_writes_the_same_stream() -> None:
    net = Net(3, 5, 5)
    first = net.convolution(net.x, 4, 1)
    total = net("aten.add.Tensor", first, net.convolution(first, 4, 1))
    graph = net.done(net.convolution(total, 2, 1))
    before = graph.clone()
    assert Pipeline([CrossLayerEqualisation(data_for(graph), 1.0)]).run(graph)
    assert_same_function(before, graph)


def with_normalisation() -> Graph:
    net = Net(6, 8)
    weight = net.graph.constant(torch.tensor([1.0, 30.0, 0.1, 1, 1, 1, 2, 1]), "norm.weight")
    bias = net.random(8, name="norm.bias")
    y = net("aten.layer_norm", net.x, [8], weight, bias)
    return net.done(net.linear(y, 5, name="a"), net.linear(y, 3, name="b"))


def test_smoothing_keeps_the_function_and_moves_outliers() -> None:
    graph = with_normalisation()
    before = graph.clone()
    assert Pipeline([SmoothQuant(data_for(graph))]).run(graph)
    assert_same_function(before, graph)

    def spread(g: Graph) -> float:
        seen: list[Tensor] = []
        reference.run(g, data_for(g)[:1], observe=lambda n, r: seen.append(r[0]))
        largest = seen[0].abs().amax((0, 1))
        return float(largest.max() / largest.median())

    assert spread(graph) < spread(before) / 3


def test_smoothing_by_the_formula() -> None:
    activations, weights = torch.tensor([16.0, 4.0, 0.0]), torch.tensor([1.0, 0.25, 3.0])
    expected = torch.tensor([4.0, 4.0, 1.0])
    torch.testing.assert_close(balancing(activations, weights, 0.5), expected)
    torch.testing.assert_close(balancing(activations, weights, 1.0)[:2], activations[:2])


def test_absorption_lowers_biases_and_keeps_the_function() -> None:
    net = Net(3, 5, 5)
    first = net.convolution(net.x, 4, 1)
    graph = net.done(net.convolution(net("aten.relu", first), 2, 1))
    node = graph.nodes[0]
    graph.set_constant(node["bias"], torch.tensor([50.0, 80.0, -50.0, 0.0]))
    before = graph.clone()
    assert Pipeline([HighBiasAbsorption(data_for(graph), deviations=6.0)]).run(graph)
    assert_same_function(before, graph)
    bias = graph.nodes[0]["bias"].constant
    assert (bias[:2] < torch.tensor([50.0, 80.0]) - 10).all()
    assert bias[2:].tolist() == [-50.0, 0.0]


def test_absorption_in_a_network_of_single_vectors() -> None:
    graph = Graph()
    x = graph.add_input("x", TensorType(torch.float32, (3,)))
    weights = [graph.constant(torch.eye(3), name) for name in ("a.weight", "b.weight")]
    bias = graph.constant(torch.tensor([50.0, -50.0, 0.0]), "a.bias")
    y = graph.add("aten.relu", graph.add("aten.linear", x, weights[0], bias))
    graph.set_outputs([graph.add("aten.linear", y, weights[1], None)])
    before = graph.clone()
    assert Pipeline([HighBiasAbsorption(data_for(graph))]).run(graph)
    assert_same_function(before, graph)
    first, _, second = graph.nodes
    seen = torch.stack(data_for(graph))[:, 0].double() + 50
    absorbed = seen.mean() - 3 * seen.std()
    torch.testing.assert_close(first["bias"].constant[0], (50 - absorbed).float())
    torch.testing.assert_close(second["bias"].constant[0], absorbed.float())


def test_absorption_leaves_layers_with_padding_alone() -> None:
    net = Net(3, 5, 5)
    first = net.convolution(net.x, 4, 1)
    graph = net.done(net.convolution(net("aten.relu", first), 2, 3, padding=[1, 1]))
    graph.set_constant(graph.nodes[0]["bias"], torch.full((4,), 50.0))
    assert not Pipeline([HighBiasAbsorption(data_for(graph))]).run(graph)


@pytest.mark.parametrize("static", [True, False])
def test_bias_correction_removes_the_mean_error(static: bool) -> None:
    net = Net(3, 6, 6)
    y = net("aten.relu", net.convolution(net.x, 5, 3))
    source = net.done(net.convolution(y, 4, 3, bias=False))
    graph, data = source.clone(), data_for(source)
    if static:
        options = {"method": "nearest", "correct_bias": False, "per_channel": False}
        Pipeline([Quantize(data=data, **options)]).run(graph)  # type: ignore[arg-type]
    else:
        for node in graph.nodes:
            if node.op == "aten.conv2d":
                weight = node["weight"].constant
                graph.set_constant(node["weight"], weight * (weight.abs() > 0.5))

    def errors() -> list[float]:
        found = []
        for node in graph.nodes:
            if node.op == "aten.conv2d":
                twin = source.value(node.name).producer
                assert twin is not None
                given = CalibrationData(data)
                wanted = channel_means(source, twin, given)
                found.append((channel_means(graph, node, given) - wanted).abs().max().item())
        return found

    before = errors()
    assert Pipeline([BiasCorrection(data, source)]).run(graph)
    after = errors()
    steps = [1e-5, 1e-5]
    if static:  # a bias has steps
        biases = [n["bias"].producer for n in graph.nodes if n.op == "aten.conv2d"]
        steps = [node["scale"].constant.max().item() for node in biases]
    for old, new, step in zip(before, after, steps, strict=True):
        assert new <= 0.51 * step < old


def test_batch_norm_takes_the_statistics_of_the_data() -> None:
    """A batch of n numbers per channel is normalised by its variance, which is a part of 1 / n
    less than what is kept for later."""
    net = Net(3, 6, 6)
    y = net.batch_norm(net.convolution(net.x, 4, 1))
    graph = net.done(net.batch_norm(net("aten.relu", y)))
    data = [torch.randn(400, 3, 6, 6)]
    assert Pipeline([BatchNormReestimation(data)]).run(graph)
    seen: dict[str, Tensor] = {}
    reference.run(graph, data, observe=lambda n, r: seen.update({n.name: r[0]}))
    for node in graph.nodes:
        if node.op == "aten.batch_norm":
            rows = seen[node["input"].name].double().transpose(0, 1).flatten(1)
            for name, expected in (("running_mean", rows.mean(1)), ("running_var", rows.var(1))):
                found = node[name].constant
                torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [Gptq, Reconstruction])
def test_rounding_alone(kind: type[Gptq] | type[Reconstruction]) -> None:
    graph = with_normalisation()
    assert Pipeline([kind(data_for(graph), "int4", 4)]).run(graph)
    assert all(
        graph.weight(node).dequantize is not None
        for node in graph.nodes
        if node.op == "aten.linear"
    )


def test_methods_without_data_say_so() -> None:
    for one in (SmoothQuant(), HighBiasAbsorption(), BiasCorrection(), BatchNormReestimation()):
        with pytest.raises(PassError, match="needs calibration data"):
            Pipeline([one]).run(linear_bottlenecks())
