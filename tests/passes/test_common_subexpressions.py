"""Equal computations and constants are merged; those that only look equal are not."""

from __future__ import annotations

import pytest
import torch
from golden import assert_becomes, body_of, graph_of
from hypothesis import given, settings
from random_graphs import Case, cases, check

from graphopt.ir import Graph, TensorType
from graphopt.passes.common_subexpressions import CommonSubexpressions
from graphopt.pipeline import Pipeline

X = "%x: f32[batch=2, 3]"


def test_equal_nodes_are_merged_down_the_chain() -> None:
    assert_becomes(
        X,
        """
        %c: f32[3] = constant [1.0, 2.0, nan]
        %d: f32[3] = constant [1.0, 2.0, nan]
        %a: f32[2, 3] = aten.add.Tensor(%x, %c)
        %b: f32[2, 3] = aten.add.Tensor(%x, %d)
        %e: f32[2, 3] = aten.relu(%a)
        %f: f32[2, 3] = aten.relu(%b)
        %g: f32[2, 3] = aten.mul.Tensor(%e, %f)
        return %g, %f, %d
        """,
        """
        %c: f32[3] = constant [1.0, 2.0, nan]
        %a: f32[2, 3] = aten.add.Tensor(%x, %c)
        %e: f32[2, 3] = aten.relu(%a)
        %g: f32[2, 3] = aten.mul.Tensor(%e, %e)
        return %g, %e, %c
        """,
        CommonSubexpressions(),
    )


def test_all_results_of_a_node_are_merged() -> None:
    assert_becomes(
        "%x: f32[2, 6]",
        """
        %p: f32[2, 3], %q: f32[2, 3] = aten.split.Tensor(%x, 3, 1)
        %r: f32[2, 3], %s: f32[2, 3] = aten.split.Tensor(%x, 3, 1)
        return %q, %r, %s
        """,
        """
        %p: f32[2, 3], %q: f32[2, 3] = aten.split.Tensor(%x, 3, 1)
        return %q, %p, %q
        """,
        CommonSubexpressions(),
    )


@pytest.mark.parametrize(
    "body",
    [
        "%a: f32[2, 3] = aten.rand_like(%x)\n%b: f32[2, 3] = aten.rand_like(%x)",
        "%a: f32[2, 3] = aten.dropout(%x, 0.5, True)\n%b: f32[2, 3] = aten.dropout(%x, 0.5, True)",
        "%a: f32[2, 3] = aten.sub.Tensor(%x, 1)\n%b: f32[2, 3] = aten.sub.Tensor(1, %x)",
        "%a: f32[2, 3] = aten.add.Tensor(%x, 0.0)\n%b: f32[2, 3] = aten.add.Tensor(%x, -0.0)",
        "%a: f32[2] = aten.sum.dim_IntList(%x, [1])\n%b: f32[3] = aten.sum.dim_IntList(%x, [0])",
        "%i: i64[2, 3] = aten.to.dtype(%x, torch.int64)\n"
        "%a: i64[2, 3] = aten.mul.Tensor(%i, 1)\n%b: f32[2, 3] = aten.mul.Tensor(%i, 1.0)",
        "%i: bool[2, 3] = aten.gt.Scalar(%x, 0)\n"
        "%a: i64[2, 3] = aten.mul.Tensor(%i, 1)\n%b: bool[2, 3] = aten.mul.Tensor(%i, True)",
    ],
)
def test_nodes_that_differ(body: str) -> None:
    graph = graph_of(X, f"{body}\nreturn %a, %b")
    text = body_of(graph)
    assert not Pipeline([CommonSubexpressions()]).run(graph)
    assert body_of(graph) == text


NAN = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (torch.tensor([0.0]), torch.tensor([-0.0])),
        (NAN[:1], NAN[1:]),  # not a number, twice, with different bits
        (torch.tensor([1.0]), torch.tensor(1.0)),  # a dimension more promotes differently
        (torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64)),
        (torch.tensor([1, 0]), torch.tensor([True, False])),
        (torch.arange(100.0), torch.arange(100.0).clone().index_fill_(0, torch.tensor(99), 0)),
    ],
)
def test_constants_that_differ(first: torch.Tensor, second: torch.Tensor) -> None:
    graph = Graph()
    graph.set_outputs([graph.constant(first, "a"), graph.constant(second, "b")])
    assert not Pipeline([CommonSubexpressions()]).run(graph)
    assert len(graph.constants) == 2


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(100.0),
        torch.tensor(3),
        torch.tensor([True, False]),
        torch.randn(5, 4).t(),
        torch.arange(10.0)[::10],  # one element, with a stride
        torch.empty(0, 3),
        torch.arange(10.0)[:0:2],
        torch.randn(3, dtype=torch.complex64),
        torch.randn(3, dtype=torch.complex64).conj(),
        torch.ones(3, dtype=torch.bfloat16),
    ],
)
def test_constants_of_equal_bits(tensor: torch.Tensor) -> None:
    graph = Graph()
    graph.set_outputs([graph.constant(tensor, "a"), graph.constant(tensor.clone(), "b")])
    assert Pipeline([CommonSubexpressions()]).run(graph)
    (constant,) = graph.constants
    assert constant.constant is not None
    assert torch.equal(constant.constant, tensor)
    assert graph.outputs == (constant, constant)


def test_parameters_are_merged_only_where_they_are_one() -> None:
    """Two layers that begin equal need not end equal; two names of one tensor are tied."""
    weight = torch.ones(3)
    graph = Graph()
    x = graph.add_input("x", TensorType(torch.float32, (3,)))
    for name, tensor in (("a", weight), ("b", torch.ones(3)), ("tied", weight)):
        x = graph.add("aten.mul.Tensor", x, graph.constant(tensor, name, trainable=True))
    graph.set_outputs([x])
    assert Pipeline([CommonSubexpressions()]).run(graph)
    assert [value.name for value in graph.constants] == ["a", "b"]


@settings(max_examples=30)
@given(cases())
def test_keeps_numbers_and_signs_of_zeros(case: Case) -> None:
    changed = case.graph.clone()
    Pipeline([CommonSubexpressions()]).run(changed)
    check(case.graph, changed, case.inputs, signed_zeros=True)
    assert not Pipeline([CommonSubexpressions()]).run(changed)
