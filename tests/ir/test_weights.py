"""Weights read and rewritten wherever they are kept."""

from __future__ import annotations

import pytest
import torch

from graphopt.errors import GraphError
from graphopt.ir import Graph, TensorType, Value


def _graph() -> tuple[Graph, Value]:
    graph = Graph()
    return graph, graph.add_input("x", TensorType(torch.float32, (2, 3)))


def _quantized(graph: Graph) -> Value:
    steps = torch.tensor([[1, -2, 3], [4, 5, -6]], dtype=torch.int8)
    return graph.add(
        "graphopt.dequantize",
        graph.constant(steps, "fc.weight"),
        graph.constant(torch.tensor([0.5, 0.25]), "scale"),
        None,
        axis=0,
        quant_min=-127,
        quant_max=127,
        dtype=torch.int8,
    )


def test_plain_weight() -> None:
    graph, x = _graph()
    node = graph.add("aten.linear", x, graph.constant(torch.ones(2, 3), "fc.weight")).producer
    graph.set_outputs(node.outputs)
    assert torch.equal(graph.weight(node).tensor, torch.ones(2, 3))
    graph.weight(node).write(torch.zeros(2, 3))
    assert torch.equal(graph.weight(node).tensor, torch.zeros(2, 3))
    assert [value.name for value in graph.constants] == ["fc.weight"]
    graph.verify()


def test_quantized_weight() -> None:
    graph, x = _graph()
    node = graph.add("aten.linear", x, _quantized(graph)).producer
    graph.set_outputs(node.outputs)
    weight = graph.weight(node)
    assert weight.tensor.tolist() == [[0.5, -1.0, 1.5], [1.0, 1.25, -1.5]]
    weight.write(torch.tensor([[1.0, 0.0, -0.74], [100.0, 0.125, 0.375]]))
    stored = graph.weight(node).constant.constant
    # Half way between two steps goes to the even one; what is out of range saturates.
    assert stored.tolist() == [[2, 0, -1], [127, 0, 2]]
    graph.verify()


@pytest.mark.parametrize("quantized", [False, True])
def test_other_users_keep_their_weight(quantized: bool) -> None:
    graph, x = _graph()
    value = _quantized(graph) if quantized else graph.constant(torch.ones(2, 3), "fc.weight")
    nodes = [graph.add("aten.linear", x, value).producer for _ in range(2)]
    graph.set_outputs([node.output for node in nodes])
    before = graph.weight(nodes[1]).tensor.clone()
    graph.weight(nodes[0]).write(torch.zeros(2, 3))
    assert torch.equal(graph.weight(nodes[0]).tensor, torch.zeros(2, 3))
    assert torch.equal(graph.weight(nodes[1]).tensor, before)
    graph.verify()


def test_refusals() -> None:
    graph, x = _graph()
    relu = graph.add("aten.relu", x)
    product = graph.add("aten.linear", x, relu)
    fixed = graph.add("aten.linear", x, graph.constant(torch.ones(2, 3), "fc.weight"))
    with pytest.raises(GraphError, match="has no weight"):
        graph.weight(relu.producer)
    with pytest.raises(GraphError, match="is not a constant"):
        graph.weight(product.producer)
    with pytest.raises(GraphError, match=r"is f32\[2, 3\], got f32\[3, 2\]"):
        graph.weight(fixed.producer).write(torch.ones(3, 2))
