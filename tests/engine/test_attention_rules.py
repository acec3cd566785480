"""Attention in the engine against torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_lowering import check, new_graph, plan_of

from graphopt.engine import Plan
from graphopt.ir import TensorType

ATTENTION = "aten.scaled_dot_product_attention"


def attend(*shapes: tuple[int, ...], mask: torch.Tensor | None = None, **options: Any) -> Plan:
    graph, inputs = new_graph(*shapes)
    given = [torch.randn(shape) for shape in shapes]
    if mask is not None:
        inputs.append(graph.add_input("mask", TensorType(mask.dtype, tuple(mask.shape))))
        given.append(mask)
    graph.set_outputs([graph.add(ATTENTION, *inputs, **options)])
    return check(graph, given)


HEADS = ((2, 3, 9, 8), (2, 3, 11, 8), (2, 3, 11, 5))


@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"scale": 0.3}, {"enable_gqa": True}], ids=str
)
def test_attention_is_one_kernel(options: dict[str, Any]) -> None:
    plan = attend(*HEADS, **options)
    assert [step.kernel for step in plan.steps] == ["attention"]


def test_without_a_batch() -> None:
    assert not attend((3, 9, 8), (3, 11, 8), (3, 11, 8)).call_backs


@pytest.mark.parametrize("shape", [(9, 11), (2, 1, 9, 11), (1, 1, 1, 11), (2, 3, 9, 11)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_masks(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    drawn = torch.randn(shape)
    mask = drawn > -0.5 if dtype == torch.bool else drawn
    assert not attend(*HEADS, mask=mask).call_backs


@pytest.mark.parametrize("masked", [False, True])
def test_keys_shared_by_several_heads(masked: bool) -> None:
    mask = torch.randn(9, 11) > 0 if masked else None
    shapes = ((2, 6, 9, 8), (2, 3, 11, 8), (2, 3, 11, 5))
    assert not attend(*shapes, mask=mask, enable_gqa=True).call_backs


@pytest.mark.parametrize(
    ("shapes", "mask"),
    [
        (((9, 8), (11, 8), (11, 5)), None),
        (HEADS, torch.zeros(9, 1)),
        (((2, 6, 9, 8), (2, 3, 11, 8), (2, 3, 11, 5)), torch.zeros(2, 1, 9, 11)),
    ],
    ids=["no heads", "a mask of one column", "masked groups"],
)
def test_what_is_left_to_torch(shapes: tuple, mask: torch.Tensor | None) -> None:
    grouped = shapes[0][-3:-2] != shapes[1][-3:-2]
    assert len(attend(*shapes, mask=mask, enable_gqa=grouped).call_backs) == 1


def test_dropout_stays_random() -> None:
    graph, inputs = new_graph(*HEADS)
    graph.set_outputs([graph.add(ATTENTION, *inputs, None, 0.5)])
    assert len(plan_of(graph).call_backs) == 1


def test_another_batch() -> None:
    graph, inputs = new_graph(*[(2, 3, 9, 8)] * 3, batch=True)
    graph.set_outputs([graph.add(ATTENTION, *inputs)])
    for batch in (2, 1, 5):
        check(graph, [torch.randn(batch, 3, 9, 8) for _ in range(3)], {"batch": batch})
