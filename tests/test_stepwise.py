"""Batches node by node, against whole evaluations."""

from __future__ import annotations

import torch
from torch import nn

import graphopt
from graphopt import reference
from graphopt.stepwise import Stepwise

MODEL = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


def traced() -> tuple[graphopt.Graph, list[list[torch.Tensor]]]:
    graph = graphopt.trace(MODEL, torch.randn(2, 3))
    return graph, [[torch.randn(size, 3)] for size in (2, 5)]


def test_the_end_is_that_of_an_evaluation() -> None:
    graph, batches = traced()
    walk = Stepwise(graph, batches)
    for node in graph.nodes:
        walk.advance(node)
    (output,) = graph.outputs
    for inputs, environment in zip(batches, walk.environments, strict=True):
        assert set(environment) == {output}
        assert torch.equal(environment[output], reference.run(graph, inputs)[0])


def test_a_weight_that_changes_before_its_turn_counts() -> None:
    graph, batches = traced()
    walk = Stepwise(graph, batches)
    layers = [node for node in graph.nodes if node.op == "aten.linear"]
    for node in graph.nodes:
        if node is layers[1]:
            graph.set_operand(node, "weight", graph.constant(2 * node["weight"].constant))
        walk.advance(node)
        if node is layers[0]:
            graph.set_operand(node, "weight", graph.constant(0 * node["weight"].constant))
    graph.set_operand(layers[0], "weight", graph.constant(MODEL[0].weight))
    (output,) = graph.outputs
    for inputs, environment in zip(batches, walk.environments, strict=True):
        assert torch.equal(environment[output], reference.run(graph, inputs)[0])


def test_a_quantized_weight_is_read_anew() -> None:
    graph, batches = traced()
    layer = next(node for node in graph.nodes if node.op == "aten.linear")
    steps = graph.constant(torch.randint(-9, 9, (4, 3), dtype=torch.int8))
    scheme = (graph.constant(torch.ones(4)), None, 0, -127, 127, torch.int8)
    weight = graph.add("graphopt.dequantize", steps, *scheme, before=layer)
    graph.set_operand(layer, "weight", weight)
    walk = Stepwise(graph, batches)
    walk.advance(weight.producer)
    graph.set_constant(steps, -steps.constant)
    assert torch.equal(walk.read(weight, walk.environments[0]), steps.constant.float())
    walk.advance(layer)
    for inputs, environment in zip(batches, walk.environments, strict=True):
        expected = inputs[0] @ steps.constant.float().T + layer["bias"].constant
        torch.testing.assert_close(walk.read(layer.output, environment), expected)
