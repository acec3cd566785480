"""What nobody uses goes; what the model promises, or an effect, stays."""

from __future__ import annotations

import torch
from golden import assert_becomes, body_of, graph_of
from hypothesis import given, settings
from random_graphs import Case, cases, check

from graphopt.passes.dead_code import DeadCode
from graphopt.pipeline import Pipeline


def test_chains_and_their_constants_go() -> None:
    graph = assert_becomes(
        "%x: f32[batch=2, 3], %unused: f32[4]",
        """
        %w: f32[3] = parameter [1.0, 2.0, 3.0]
        %a: f32[2, 3] = aten.mul.Tensor(%x, %w)
        %b: f32[2, 3] = aten.relu(%a)
        %r: f32[2, 3] = aten.rand_like(%b)
        %y: f32[2, 3] = aten.neg(%x)
        return %y
        """,
        """
        %y: f32[2, 3] = aten.neg(%x)
        return %y
        """,
        DeadCode(),
    )
    assert [value.name for value in graph.inputs] == ["x", "unused"]
    assert graph.constants == []


def test_one_used_result_of_several_is_enough() -> None:
    graph = graph_of(
        "%x: f32[2, 6]",
        "%p: f32[2, 3], %q: f32[2, 3] = aten.split.Tensor(%x, 3, 1)\nreturn %q",
    )
    assert not Pipeline([DeadCode()]).run(graph)
    assert len(graph) == 1


def test_a_node_without_results_stays_with_what_it_reads() -> None:
    graph = graph_of(
        "%x: f32[2, 3]",
        """
        %a: bool[2, 3] = aten.gt.Scalar(%x, 0)
        %b: bool[] = aten.all(%a)
        aten._assert_async(%b)
        return %x
        """,
    )
    text = body_of(graph)
    assert not Pipeline([DeadCode()]).run(graph)
    assert body_of(graph) == text


def test_outputs_that_are_inputs_constants_or_literals_stay() -> None:
    graph = graph_of("%x: f32[2]", "%c: f32[1] = constant [1.0]\nreturn %x, %c, 3, None")
    assert not Pipeline([DeadCode()]).run(graph)
    assert torch.equal(graph.constants[0].constant, torch.ones(1))


@settings(max_examples=30)
@given(cases())
def test_everything_left_is_needed(case: Case) -> None:
    changed = case.graph.clone()
    Pipeline([DeadCode()]).run(changed)
    check(case.graph, changed, case.inputs, signed_zeros=True)
    view = changed.to_networkx()
    needed = {"outputs"}
    for node in reversed(changed.nodes):
        if any(successor in needed for successor in view.successors(node)):
            needed.add(node)
    assert set(changed.nodes) <= needed
    assert not Pipeline([DeadCode()]).run(changed)
