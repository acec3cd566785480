"""Rounding the weights of a network layer by layer, each seeing what the layers before it give."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from graphopt import reference
from graphopt.calibration import CalibrationData
from graphopt.ir import Graph, Node, Value
from graphopt.passes.layers import Layer, layer_of
from graphopt.passes.quantization.channel_statistics import ChannelMean
from graphopt.passes.quantization.gptq import round_gptq
from graphopt.passes.quantization.insertion import RoundedWeight
from graphopt.passes.quantization.rounding import round_by_reconstruction
from graphopt.passes.quantization.statistics import InputStatistics
from graphopt.passes.quantization.weights import WeightFormat
from graphopt.pipeline import Context
from graphopt.stepwise import Stepwise

METHODS: dict[str, Callable[[Tensor, Tensor, Tensor, int], Tensor]] = {
    "gptq": round_gptq,
    "reconstruction": round_by_reconstruction,
}
ITEMS = 64
"""How many items of calibration data weights are rounded for."""


def round_nearest(node: Node, format: WeightFormat) -> RoundedWeight:
    """A layer's weight at the nearest steps, and its bias as it is."""
    weight, bias = node["weight"].constant, node["bias"]
    scale = format.scales(weight)
    steps = format.nearest(weight, scale)
    return RoundedWeight(steps, scale, None if bias is None else bias.constant)


def round_with_data(
    source: Graph,
    quantized: Graph,
    layers: Sequence[str],
    format: WeightFormat,
    method: str,
    correct_bias: bool,
    data: CalibrationData,
    ctx: Context,
) -> dict[str, RoundedWeight]:
    """Round the weights of layers in the order of the graph. Each layer is rounded for the inputs
    that the layers before it give after rounding, and its bias makes good for the mean error that
    all of them brought, so that errors do not add up.

    The first batches, of about `ITEMS` items, go through the network together, operator by
    operator, so that one evaluation is enough.

    Args:
        source: the network in floats; calibration data is read in its form.
        quantized: the network with its activations quantized already, if they are to be. The
            weights of its layers are replaced by what they were rounded to.
        layers: names of the layers.
        format: of the weights.
        method: "nearest" or one of `METHODS`.
        correct_bias: give every output channel the mean that it has in floats.
        data: calibration data.
        ctx: shows the progress, and is the source of randomness.
    """
    held = _held(source, data)
    expected = _output_means(source, layers, held) if correct_bias else {}
    names = set(layers)
    found: dict[str, RoundedWeight] = {}
    walk = Stepwise(quantized, held)
    for node in ctx.track(quantized.nodes, "rounding weights"):
        if node.name not in names:
            walk.advance(node)
            continue
        inputs = [walk.read(node["input"], environment) for environment in walk.environments]
        rounded = _round(node, inputs, format, method, correct_bias, ctx)
        _write(quantized, node, rounded, format)
        walk.advance(node)
        if correct_bias:
            rounded = _keep_mean(node, rounded, walk.environments, expected[node.name])
            _write(quantized, node, rounded, format)
        found[node.name] = rounded
    return found


def _held(graph: Graph, data: CalibrationData) -> list[list[Tensor]]:
    """The first batches, until they have so many items."""
    held: list[list[Tensor]] = []
    items = 0
    for batch in data.batches(graph):
        held.append(batch.inputs)
        items += batch.inputs[0].shape[0] if batch.inputs and batch.inputs[0].dim() else 1
        if items >= ITEMS:
            break
    return held


def _output_means(
    graph: Graph, layers: Sequence[str], held: Sequence[Sequence[Tensor]]
) -> dict[str, Tensor]:
    means: dict[str, ChannelMean] = {}
    for node in graph.nodes:
        if node.name in layers:
            layer = layer_of(node)
            assert isinstance(layer, Layer)
            means[node.name] = ChannelMean(layer.output_dimension)

    def show(node: Node, results: list[Tensor]) -> None:
        if node.name in means:
            means[node.name](results[0])

    for inputs in held:
        reference.run(graph, inputs, observe=show)
    return {name: mean.mean() for name, mean in means.items()}


def _keep_mean(
    node: Node,
    rounded: RoundedWeight,
    environments: Sequence[dict[Value, Tensor]],
    expected: Tensor,
) -> RoundedWeight:
    """The rounded weight with a bias that gives each channel its mean; results follow."""
    layer = layer_of(node)
    assert isinstance(layer, Layer)
    mean = ChannelMean(layer.output_dimension)
    for environment in environments:
        mean(environment[node.output])
    drift = (expected - mean.mean()).float()
    shape = [1] * node.output.rank
    shape[layer.output_dimension] = -1
    for environment in environments:
        environment[node.output] = environment[node.output] + drift.reshape(shape)
    bias = drift if rounded.bias is None else rounded.bias + drift
    return RoundedWeight(rounded.steps, rounded.scale, bias)


def _round(
    node: Node,
    inputs: Sequence[Tensor],
    format: WeightFormat,
    method: str,
    centred: bool,
    ctx: Context,
) -> RoundedWeight:
    if method == "nearest":
        return round_nearest(node, format)
    statistics = InputStatistics(node, ctx.generator)
    for x in inputs:
        statistics(x)
    weight, bias = node["weight"].constant, node["bias"]
    covariance = statistics.covariance(centred)
    importance = covariance.diagonal(dim1=1, dim2=2).mean(0) if statistics.groups == 1 else None
    scale = format.scales(weight, importance)
    groups = statistics.groups
    matrix = weight.reshape(groups, weight.shape[0] // groups, -1)
    spread = format.expand(scale, weight).expand_as(weight).reshape(matrix.shape)
    steps = METHODS[method](matrix, spread, covariance, format.limit)
    steps = steps.reshape(weight.shape).to(torch.int8)
    return RoundedWeight(steps, scale, None if bias is None else bias.constant)


def _write(graph: Graph, node: Node, rounded: RoundedWeight, format: WeightFormat) -> None:
    """Let a layer compute with what its weight was rounded to, kept in floats."""
    spread = format.expand(rounded.scale, rounded.steps)
    weight = graph.constant(rounded.steps.float() * spread, node["weight"].name)
    with graph.edit():
        graph.set_operand(node, "weight", weight)
        if rounded.bias is not None:
            graph.set_operand(node, "bias", graph.constant(rounded.bias, "bias"))
