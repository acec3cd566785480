"""Normalisations and softmax in the engine against torch."""

from __future__ import annotations

import pytest
import torch
from test_lowering import check, new_graph, ops_of

from graphopt.engine import Plan
from graphopt.ir import Graph, Value


def in_one_kernel(plan: Plan, *ops: str) -> None:
    assert ops_of(plan) == [list(ops)]
    assert not plan.call_backs


def parameter(graph: Graph, shape: tuple[int, ...], name: str) -> Value:
    return graph.constant(torch.randn(shape), name)


@pytest.mark.parametrize("given", ["weight and bias", "weight", "bias", "neither"])
@pytest.mark.parametrize("shape", [(37,), (5, 8)])
def test_layer_norm(shape: tuple[int, ...], given: str) -> None:
    graph, (x,) = new_graph((3, 4, *shape))
    weight = parameter(graph, shape, "weight") if "weight" in given else None
    bias = parameter(graph, shape, "bias") if "bias" in given else None
    graph.set_outputs([graph.add("aten.layer_norm", x, list(shape), weight, bias, 1e-3)])
    in_one_kernel(check(graph, [torch.randn(3, 4, *shape) + 2]), "layer_norm")


@pytest.mark.parametrize("epsilon", [None, 1e-2])
def test_rms_norm(epsilon: float | None) -> None:
    graph, (x, weight) = new_graph((3, 4, 37), (37,))
    graph.set_outputs([graph.add("aten.rms_norm", x, [37], weight, epsilon)])
    inputs = [1e-3 * torch.randn(3, 4, 37), torch.randn(37)]
    in_one_kernel(check(graph, inputs), "rms_norm")


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(
    ("shape", "groups"), [((2, 6, 5, 7), 3), ((2, 6), 2), ((2, 6, 9), 1), ((2, 6, 9), 6)]
)
def test_group_norm(shape: tuple[int, ...], groups: int, affine: bool) -> None:
    graph, (x,) = new_graph(shape)
    weight = parameter(graph, (6,), "weight") if affine else None
    bias = parameter(graph, (6,), "bias") if affine else None
    graph.set_outputs([graph.add("aten.group_norm", x, groups, weight, bias)])
    in_one_kernel(check(graph, [torch.randn(shape)]), "group_norm")


def test_instance_norm() -> None:
    graph, (x,) = new_graph((2, 5, 6, 7))
    weight, bias = parameter(graph, (5,), "weight"), parameter(graph, (5,), "bias")
    normal = graph.add("aten.instance_norm", x, weight, bias, None, None, True, 0.1, 1e-5, False)
    graph.set_outputs([normal])
    in_one_kernel(check(graph, [torch.randn(2, 5, 6, 7)]), "instance_norm")


def test_fixed_statistics_are_no_instance_norm() -> None:
    graph, (x,) = new_graph((2, 5, 6, 7))
    mean, variance = parameter(graph, (5,), "mean"), graph.constant(torch.rand(5), "variance")
    fixed = graph.add("aten.instance_norm", x, None, None, mean, variance, False, 0.1, 1e-5, False)
    graph.set_outputs([fixed])
    assert len(check(graph, [torch.randn(2, 5, 6, 7)]).call_backs) == 1


@pytest.mark.parametrize("other", [(2, 6, 5, 7), (6, 1, 1), (5, 1), (7,), (1,), (2, 1, 5, 1)])
def test_what_follows_a_group_norm_is_fused(other: tuple[int, ...]) -> None:
    graph, (x, r) = new_graph((2, 6, 5, 7), other)
    weight = parameter(graph, (6,), "weight")
    normal = graph.add("aten.group_norm", x, 3, weight)
    joined = graph.add("aten.add.Tensor", r, normal, alpha=2)
    graph.set_outputs([graph.add("aten.silu", joined)])
    inputs = [torch.randn(2, 6, 5, 7), torch.randn(other)]
    in_one_kernel(check(graph, inputs), "group_norm", "add", "silu")


def test_an_epilogue_may_change_the_dtype() -> None:
    graph, (x, limit) = new_graph((3, 37), (3, 1))
    normal = graph.add("aten.layer_norm", x, [37])
    graph.set_outputs([graph.add("aten.gt.Tensor", normal, limit)])
    plan = check(graph, [torch.randn(3, 37), torch.randn(3, 1)])
    in_one_kernel(plan, "layer_norm", "gt")


def test_two_uses_of_a_normalised_value_in_one_epilogue() -> None:
    graph, (x,) = new_graph((3, 37))
    weight, bias = parameter(graph, (37,), "weight"), parameter(graph, (37,), "bias")
    normal = graph.add("aten.layer_norm", x, [37], weight, bias)
    gate = graph.add("aten.sigmoid", normal)
    graph.set_outputs([graph.add("aten.mul.Tensor", gate, normal)])
    check(graph, [torch.randn(3, 37)])


def test_another_batch() -> None:
    graph, (x,) = new_graph((2, 6, 9), batch=True)
    graph.set_outputs([graph.add("aten.softmax.int", graph.add("aten.group_norm", x, 3), 1)])
    for batch in (2, 1, 5):
        check(graph, [torch.randn(batch, 6, 9)], {"batch": batch})


@pytest.mark.parametrize("dimension", [0, 1, -1])
@pytest.mark.parametrize("op", ["softmax", "log_softmax"])
def test_softmax(op: str, dimension: int) -> None:
    graph, (x,) = new_graph((5, 6, 37))
    graph.set_outputs(
        [
            graph.add(f"aten.{op}.int", x, dimension),
            graph.add(f"aten._{op}", x, dimension, False),
            graph.add(f"aten.{op}.int", x, dimension, torch.float32),
        ]
    )
    plan = check(graph, [4 * torch.randn(5, 6, 37)])
    assert len(plan.steps) == 3
    assert not plan.call_backs


def test_what_follows_a_softmax_is_a_loop_of_its_own() -> None:
    graph, (x,) = new_graph((5, 37))
    graph.set_outputs([graph.add("aten.mul.Tensor", graph.add("aten.softmax.int", x, 1), 2.0)])
    assert ops_of(check(graph, [torch.randn(5, 37)])) == [["softmax"], ["mul"]]


def test_a_wider_softmax_is_torchs() -> None:
    graph, (x,) = new_graph((5, 37))
    graph.set_outputs([graph.add("aten.softmax.int", x, 1, torch.float64)])
    assert len(check(graph, [torch.randn(5, 37)]).call_backs) == 1
