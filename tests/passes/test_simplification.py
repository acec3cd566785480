"""The whole pass: assertions, and the rules together."""

from __future__ import annotations

from golden import assert_becomes, assert_same_bits, body_of, graph_of
from hypothesis import given, settings
from random_graphs import Case, cases, check

from graphopt.passes.simplification import RULES, Simplification
from graphopt.pipeline import Pipeline


def test_assertions_go() -> None:
    graph = graph_of(
        "%x: f32[batch=2, 3]",
        """
        aten._assert_tensor_metadata(%x, None, None, torch.float32)
        %s: int=2 = aten.sym_size.int(%x, 0)
        %c: bool=True = operator.ge(%s, 1)
        aten._assert_scalar(%c, "at least one")
        return %x
        """,
    )
    source = graph.clone()
    assert Pipeline([Simplification(), "dead-code"]).run(graph)
    assert body_of(graph) == "return %x"
    assert_same_bits(source, graph)


def test_rules_work_together() -> None:
    assert_becomes(
        "%x: f32[batch=2, 3, 4]",
        """
        %a: f32[2, 4, 3] = aten.transpose.int(%x, 1, 2)
        %b: f32[2, 4, 3] = aten.contiguous(%a)
        %c: f32[2, 4, 3] = aten.dropout(%b, 0.1, False)
        %d: f32[2, 3, 4] = aten.permute(%c, [0, 2, 1])
        %e: f32[2, 3, 4] = aten.mul.Scalar(%d, 1.0)
        %p: f32[2, 1, 4], %q: f32[2, 2, 4] = aten.split_with_sizes(%e, [1, 2], 1)
        %r: f32[2, 3, 4] = aten.concat([%p, %q], 1)
        %y: f32[2, 12] = aten.flatten.using_ints(%r, 1)
        %z: f32[2, 12] = aten.reshape(%y, [-1, 12])
        return %z
        """,
        """
        %y: f32[2, 12] = aten.flatten.using_ints(%x, 1)
        return %y
        """,
        Simplification(),
    )


def test_names_of_rules_are_distinct_equations() -> None:
    names = [rule.name for rule in RULES]
    assert len(set(names)) == len(names)
    assert all(" => " in name for name in names)


@settings(max_examples=40)
@given(cases())
def test_keeps_numbers_and_signs_of_zeros(case: Case) -> None:
    changed = case.graph.clone()
    pipeline = Pipeline([Simplification()])
    pipeline.run(changed)
    check(case.graph, changed, case.inputs, signed_zeros=True)
    assert not pipeline.run(changed).changed
