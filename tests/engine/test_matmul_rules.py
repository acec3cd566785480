"""Linear layers and matrix products in the engine against torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_lowering import check, new_graph, ops_of

from graphopt.engine import Plan
from graphopt.ir import Graph, Value


def product(op: str, *shapes: tuple[int, ...], **options: Any) -> Plan:
    graph, inputs = new_graph(*shapes)
    graph.set_outputs([graph.add(f"aten.{op}", *inputs, **options)])
    return check(graph, [torch.randn(shape) for shape in shapes])


def linear(graph: Graph, x: Value, size: int, name: str = "linear") -> Value:
    weight = graph.constant(torch.randn(size, x.shape[-1]), f"{name}.weight")
    bias = graph.constant(torch.randn(size), f"{name}.bias")
    return graph.add("aten.linear", x, weight, bias)


KERNELS = {
    "linear": ("linear", (2, 5, 7), (4, 7), (4,)),
    "linear without bias": ("linear", (5, 7), (4, 7)),
    "mm": ("mm", (5, 7), (7, 3)),
    "bmm": ("bmm", (2, 5, 7), (2, 7, 3)),
    "matmul": ("matmul", (5, 7), (7, 3)),
    "matmul, one of a batch": ("matmul", (2, 3, 5, 7), (7, 4)),
    "matmul, one before a batch": ("matmul", (5, 7), (2, 7, 4)),
    "matmul, broadcast batches": ("matmul", (2, 1, 5, 7), (3, 7, 4)),
    "matmul of nothing": ("matmul", (2, 5, 0), (0, 4)),
    "addmm, a row": ("addmm", (3,), (5, 7), (7, 3)),
    "addmm, a column": ("addmm", (5, 1), (5, 7), (7, 3)),
    "addmm, a matrix": ("addmm", (5, 3), (5, 7), (7, 3)),
    "addmm, a number": ("addmm", (), (5, 7), (7, 3)),
    "baddbmm": ("baddbmm", (2, 1, 3), (2, 5, 7), (2, 7, 3)),
}


@pytest.mark.parametrize("name", KERNELS)
def test_products_are_kernels(name: str) -> None:
    op, *shapes = KERNELS[name]
    plan = product(op, *shapes)
    assert len(plan.steps) == 1
    assert not plan.call_backs


LEFT_TO_TORCH = {
    "a vector": (("matmul", (7,), (7, 3)), {}),
    "by a vector": (("matmul", (2, 5, 7), (7,)), {}),
    "scaled sum": (("addmm", (3,), (5, 7), (7, 3)), {"beta": 0.5}),
    "scaled product": (("addmm", (3,), (5, 7), (7, 3)), {"alpha": 2}),
    "linear of a vector": (("linear", (7,), (4, 7)), {}),
}


@pytest.mark.parametrize("name", LEFT_TO_TORCH)
def test_what_is_left_to_torch(name: str) -> None:
    (op, *shapes), options = LEFT_TO_TORCH[name]
    assert len(product(op, *shapes, **options).call_backs) == 1


def test_other_dtypes_are_left_to_torch() -> None:
    graph, (x,) = new_graph((4, 4))
    wide = graph.add("aten.to.dtype", x, torch.float64)
    whole = graph.add("aten.to.dtype", x, torch.int64)
    graph.set_outputs([graph.add("aten.mm", y, y) for y in (wide, whole)])
    assert len(check(graph, [torch.randn(4, 4) * 9]).call_backs) == 2


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "sigmoid"])
def test_bias_residual_and_activation_are_fused(activation: str) -> None:
    graph, (x, residual) = new_graph((2, 5, 7), (2, 5, 9))
    y = graph.add("aten.add.Tensor", residual, linear(graph, x, 9))
    graph.set_outputs([graph.add(f"aten.{activation}", y)])
    plan = check(graph, [torch.randn(2, 5, 7), torch.randn(2, 5, 9)])
    assert ops_of(plan) == [["linear", "add", activation]]


def test_rows_and_columns_are_told_apart() -> None:
    # Square, so that a vector could be taken for either.
    graph, (x, row, column) = new_graph((5, 5), (5,), (5, 1))
    y = graph.add("aten.mul.Tensor", linear(graph, x, 5), row)
    graph.set_outputs([graph.add("aten.add.Tensor", y, column)])
    plan = check(graph, [torch.randn(5, 5), torch.randn(5), torch.randn(5, 1)])
    assert ops_of(plan) == [["linear", "mul", "add"]]


def test_numbers_of_an_epilogue_beside_several_operands() -> None:
    graph, (x, a, b) = new_graph((3, 5), (3, 4), (4,))
    y = graph.add("aten.addcmul", a, b, linear(graph, x, 4), value=0.5)
    graph.set_outputs([graph.add("aten.hardswish", y)])
    plan = check(graph, [torch.randn(3, 5), torch.randn(3, 4), torch.randn(4)])
    assert ops_of(plan) == [["linear", "addcmul", "hardswish"]]


def test_what_widens_a_product_is_not_its_epilogue() -> None:
    graph, (x, y) = new_graph((1, 5), (3, 4))
    graph.set_outputs([graph.add("aten.add.Tensor", linear(graph, x, 4), y)])
    assert ops_of(check(graph, [torch.randn(1, 5), torch.randn(3, 4)])) == [["linear"], ["add"]]


def test_a_product_with_two_users_is_written() -> None:
    graph, (x,) = new_graph((3, 5))
    y = linear(graph, x, 4)
    graph.set_outputs([graph.add("aten.relu", y), graph.add("aten.neg", y)])
    assert ["linear"] in ops_of(check(graph, [torch.randn(3, 5)]))


def test_scores_and_their_use_move_nothing() -> None:
    shape = (2, 6, 3, 8)
    graph, (q, k, v) = new_graph(shape, shape, shape)
    query, key, value = (graph.add("aten.permute", x, [0, 2, 1, 3]) for x in (q, k, v))
    scores = graph.add("aten.matmul", query, graph.add("aten.transpose.int", key, -2, -1))
    scaled = graph.add("aten.mul.Tensor", scores, 0.25)
    weights = graph.add("aten.softmax.int", scaled, -1)
    graph.set_outputs([graph.add("aten.matmul", weights, value)])
    plan = check(graph, [torch.randn(shape) for _ in range(3)])
    assert ops_of(plan) == [["matmul", "mul"], ["softmax"], ["matmul"]]


@pytest.mark.parametrize("order", [(1, 2, 0), (2, 0, 1), (0, 2, 1), (1, 0, 2), (2, 1, 0)])
def test_permuted_operands_lie_where_they_are(order: tuple[int, int, int]) -> None:
    shape = (3, 4, 5)
    graph, (x,) = new_graph(shape)
    y = graph.add("aten.permute", x, list(order))
    other = graph.constant(torch.randn(y.shape[-1], 7), "other")
    turned = graph.add("aten.mT", y)
    graph.set_outputs([graph.add("aten.matmul", y, other), graph.add("aten.matmul", y, turned)])
    plan = check(graph, [torch.randn(shape)])
    assert not plan.call_backs
    assert ["matmul"] in ops_of(plan)


def test_a_permuted_operand_that_is_returned_is_written() -> None:
    graph, (x, y) = new_graph((3, 5), (4, 5))
    turned = graph.add("aten.t", y)
    graph.set_outputs([graph.add("aten.mm", x, turned), turned])
    assert ops_of(check(graph, [torch.randn(3, 5), torch.randn(4, 5)])) == [["t"], ["mm"]]


def test_a_permuted_constant() -> None:
    graph, (x,) = new_graph((2, 3, 5))
    weight = graph.constant(torch.randn(4, 5), "weight")
    stack = graph.constant(torch.randn(4, 5, 2), "stack")
    graph.set_outputs(
        [
            graph.add("aten.matmul", x, graph.add("aten.t", weight)),
            graph.add("aten.linear", x, graph.add("aten.t", graph.add("aten.t", weight))),
            graph.add("aten.matmul", x, graph.add("aten.permute", stack, [2, 1, 0])),
        ]
    )
    assert not check(graph, [torch.randn(2, 3, 5)]).call_backs


def test_free_sizes() -> None:
    graph, (x,) = new_graph((2, 6, 5), batch=True)
    graph.set_outputs([graph.add("aten.relu", linear(graph, x, 4))])
    for batch in (1, 2, 5):
        check(graph, [torch.randn(batch, 6, 5)], {"batch": batch})
