"""Pooling in the engine against torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_lowering import check, convolution, new_graph, ops_of

from graphopt.engine import Plan


def pool(op: str, shape: tuple[int, ...], *arguments: Any, **options: Any) -> Plan:
    graph, (x,) = new_graph(shape)
    graph.set_outputs([graph.add(f"aten.{op}", x, *arguments, **options)])
    return check(graph, [torch.randn(shape)])


IMAGE, SEQUENCE = (2, 3, 9, 11), (2, 3, 17)
CASES = {
    "maximum": ("max_pool2d", IMAGE, [2, 2], {}),
    "one size for both": ("max_pool2d", IMAGE, [3], {"stride": [2], "padding": [1]}),
    "rounded up": ("max_pool2d", IMAGE, [2, 3], {"stride": [2, 3], "ceil_mode": True}),
    "dilated": ("max_pool2d", IMAGE, [2, 2], {"stride": [1, 2], "dilation": [2, 3]}),
    "no batch": ("max_pool2d", IMAGE[1:], [3, 2], {}),
    "maximum of a sequence": ("max_pool1d", SEQUENCE, [3], {"stride": [2], "padding": [1]}),
    "sequence without a batch": ("max_pool1d", SEQUENCE[1:], [3], {}),
    "average": ("avg_pool2d", IMAGE, [3, 3], {"stride": [2, 2], "padding": [1, 1]}),
    "padding not counted": (
        "avg_pool2d",
        IMAGE,
        [3, 3],
        {"stride": [2, 2], "padding": [1, 1], "ceil_mode": True, "count_include_pad": False},
    ),
    "other divisor": ("avg_pool2d", IMAGE, [3, 3], {"divisor_override": 7}),
    "average of a sequence": ("avg_pool1d", SEQUENCE, [4], {"padding": [2], "ceil_mode": True}),
    "bins": ("adaptive_avg_pool2d", IMAGE, [4, 5], {}),
    "equal bins": ("adaptive_avg_pool2d", IMAGE, [3, 11], {}),
    "one bin": ("adaptive_avg_pool2d", IMAGE, [1, 1], {}),
    "bins without a batch": ("adaptive_avg_pool2d", IMAGE[1:], [2, 3], {}),
    "bins of a sequence": ("adaptive_avg_pool1d", SEQUENCE, [5], {}),
}


@pytest.mark.parametrize("name", CASES)
def test_pooling_is_a_kernel(name: str) -> None:
    op, shape, size, options = CASES[name]
    plan = pool(op, shape, size, **options)
    assert len(plan.steps) == 1
    assert not plan.call_backs


def test_what_follows_is_fused() -> None:
    graph, (x, scale) = new_graph((2, 3, 8, 8), (1, 3, 1, 1))
    largest = graph.add("aten.max_pool2d", x, [2, 2])
    graph.set_outputs([graph.add("aten.relu", graph.add("aten.mul.Tensor", largest, scale))])
    plan = check(graph, [torch.randn(2, 3, 8, 8), torch.randn(1, 3, 1, 1)])
    assert ops_of(plan) == [["max_pool2d", "mul", "relu"]]


def test_a_row_is_not_taken_for_channels() -> None:
    graph, (x, row) = new_graph((1, 4, 8, 8), (4,))
    average = graph.add("aten.avg_pool2d", x, [2, 2])
    graph.set_outputs([graph.add("aten.mul.Tensor", average, row)])
    check(graph, [torch.randn(1, 4, 8, 8), torch.randn(4)])


def test_a_pool_with_two_users_is_written() -> None:
    graph, (x,) = new_graph((1, 3, 8, 8))
    largest = graph.add("aten.max_pool2d", convolution(graph, x, 4, "conv"), [2, 2])
    graph.set_outputs([graph.add("aten.relu", largest), graph.add("aten.neg", largest)])
    assert ["max_pool2d"] in ops_of(check(graph, [torch.randn(1, 3, 8, 8)]))


def test_free_sizes() -> None:
    graph, (x,) = new_graph((2, 3, 8, 8), batch=True)
    graph.set_outputs([graph.add("aten.avg_pool2d", x, [3, 3], [2, 2], [1, 1])])
    for batch in (1, 2, 5):
        check(graph, [torch.randn(batch, 3, 8, 8)], {"batch": batch})


def test_indices_are_left_to_torch_where_they_are_used() -> None:
    for used in (False, True):
        graph, (x,) = new_graph((1, 3, 8, 8))
        largest, indices = graph.add_node("aten.max_pool2d_with_indices", x, [2, 2]).outputs
        graph.set_outputs([largest, indices] if used else [largest])
        assert bool(check(graph, [torch.randn(1, 3, 8, 8)]).call_backs) == used


def test_other_dtypes_are_left_to_torch() -> None:
    graph, (x,) = new_graph((1, 3, 8, 8))
    wide = graph.add("aten.to.dtype", x, torch.float64)
    results = [
        graph.add("aten.max_pool2d", wide, [2, 2]),
        graph.add("aten.avg_pool2d", wide, [2, 2]),
        graph.add("aten.adaptive_avg_pool2d", wide, [2, 3]),
    ]
    graph.set_outputs(results)
    assert len(check(graph, [torch.randn(1, 3, 8, 8)]).call_backs) == len(results)
