"""Reference execution."""

from __future__ import annotations

import weakref

import pytest
import torch

from graphopt import reference
from graphopt.errors import GraphError
from graphopt.ir import Graph, Node, ScalarType, TensorType

F32, F64 = torch.float32, torch.float64


def test_results_in_order_and_of_every_kind():
    graph = Graph({"batch": 2})
    x = graph.add_input("x", TensorType(F32, (2, 3)), {0: "batch"})
    n = graph.add_input("n", ScalarType(3))
    weight = graph.constant(torch.ones(4, 3), "weight")
    size = graph.add("aten.sym_size.int", x, 0)
    linear = graph.add("aten.linear", graph.add("aten.mul.Tensor", x, n), weight)
    parts = graph.add_node("aten.chunk", linear, 2, 1).outputs
    graph.set_outputs([parts[1], size, 5, None, x, weight, parts[1]])
    tensor = torch.randn(7, 3)
    results = reference.run(graph, [tensor, 3])
    expected = (3 * tensor).sum(1, keepdim=True).expand(7, 2)
    torch.testing.assert_close(results[0], expected)
    assert results[1:4] == [7, 5, None]
    assert results[4] is tensor
    assert results[5] is weight.constant
    assert results[6] is results[0]
    assert not results[0].requires_grad


def test_in_float64():
    graph = Graph()
    x = graph.add_input("x", TensorType(F32, (3,)))
    third = graph.constant(torch.tensor(1.0), "third")
    quotient = graph.add("aten.div.Tensor", third, graph.add("aten.mul.Tensor", x, 3.0))
    cast = graph.add("aten.to.dtype", quotient, F32)
    graph.set_outputs([cast, graph.add("aten.gt.Scalar", cast, 0.1)])
    value, mask = reference.run(graph, [torch.ones(3)], dtype=F64)
    assert value.dtype == F64
    assert mask.dtype == torch.bool
    torch.testing.assert_close(value, torch.full((3,), 1 / 3, dtype=F64), rtol=1e-15, atol=0)


def test_in_float64_where_a_result_would_be_single():
    """Quotients of integers, ranges and filled tensors take torch's default dtype."""
    graph = Graph()
    x = graph.add_input("x", TensorType(F32, (2, 3)))
    half = graph.add("aten.div.Tensor", graph.add("aten.arange", 3), 2)
    filled = graph.add("aten.full", [3, 4], 0.5)
    product = graph.add("aten.matmul", graph.add("aten.mul.Tensor", x, half), filled)
    graph.set_outputs([product])
    tensor = torch.randn(2, 3)
    (result,) = reference.run(graph, [tensor], dtype=F64)
    expected = (tensor.double() * torch.tensor([0, 0.5, 1]).double()).sum(1, keepdim=True) / 2
    torch.testing.assert_close(result, expected.expand(2, 4), rtol=1e-14, atol=1e-14)


def test_observing():
    graph = Graph()
    x = graph.add_input("x", TensorType(F32, (4,)))
    parts = graph.add_node("aten.split.Tensor", x, 3).outputs
    graph.set_outputs([graph.add("aten.neg", parts[0])])
    seen = []
    reference.run(
        graph, [torch.ones(4)], observe=lambda node, results: seen.append((node, results))
    )
    assert [node for node, _ in seen] == graph.nodes
    assert [len(results) for _, results in seen] == [2, 1]
    assert torch.equal(seen[1][1][0], -torch.ones(3))


def test_nothing_is_evaluated_after_the_last_that_is_wanted():
    graph = Graph()
    x = graph.add_input("x", TensorType(F32, (3,)))
    first = graph.add("aten.relu", x)
    graph.set_outputs([graph.add("aten.neg", first), graph.add("aten.abs", x)])
    seen = []
    results = reference.run(
        graph, [torch.ones(3)], observe=lambda node, _: seen.append(node), until=first.producer
    )
    assert results == []
    assert seen == [first.producer]


def test_values_are_released_after_their_last_use():
    graph = Graph()
    value = graph.add_input("x", TensorType(F32, (1000, 1000)))
    for _ in range(4):
        value = graph.add("aten.neg", value)
    graph.set_outputs([value])
    alive: list[weakref.ref] = []
    most = 0

    def count(node, results):
        nonlocal most
        alive.append(weakref.ref(results[0]))
        most = max(most, sum(reference() is not None for reference in alive))

    reference.run(graph, [torch.ones(1000, 1000)], observe=count)
    assert most == 2


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ([], "has 1 inputs, 0 were given"),
        ([torch.ones(2, 3)] * 2, "has 1 inputs, 2 were given"),
        ([torch.ones(2, 3, dtype=F64)], r"%x is f32\[2, 3\], got f64"),
        ([torch.ones(2)], r"%x is f32\[2, 3\], got f32\[2\]"),
        ([1.0], "%x is a tensor, got float"),
    ],
)
def test_inputs_that_are_refused(inputs, reason):
    graph = Graph({"batch": 2})
    x = graph.add_input("x", TensorType(F32, (2, 3)), {0: "batch"})
    graph.set_outputs([x])
    with pytest.raises(GraphError, match=reason):
        reference.run(graph, inputs)


def test_every_value_with_gradients_of_those_that_are_asked_for():
    graph = Graph()
    x = graph.add_input("x", TensorType(F32, (3,)))
    weight = graph.constant(torch.tensor([1.0, 2.0, 3.0]), "weight")
    product = graph.add("aten.mul.Tensor", x, weight)
    square = graph.add("aten.mul.Tensor", product, product)
    graph.set_outputs([square])
    given = torch.tensor([1.0, -1.0, 0.5])

    def ask(node: Node, results: list[torch.Tensor]) -> None:
        if node is product.producer:
            results[0].requires_grad_()

    values = reference.every_value(graph, [given], observe=ask)
    assert set(values) == {x, weight, product, square}
    (gradient,) = torch.autograd.grad(values[square].sum(), values[product])
    torch.testing.assert_close(gradient, 2 * given * weight.constant)
