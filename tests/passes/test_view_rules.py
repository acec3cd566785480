"""Views that change nothing go, chains become one view; free sizes are not taken for fixed."""

from __future__ import annotations

import itertools

import pytest
import torch
from golden import assert_becomes, assert_stays
from hypothesis import given
from hypothesis import strategies as st

from graphopt import reference
from graphopt.ir import Graph, TensorType
from graphopt.passes import view_rules as rules
from graphopt.pipeline import Pipeline

X = "%x: f32[batch=2, 3, 4]"
S = "%s: int=2 = aten.sym_size.int(%x, 0)\n"


@pytest.mark.parametrize(
    ("inputs", "line"),
    [
        (X, "%y: f32[2, 3, 4] = aten.reshape(%x, [-1, 3, 4])"),
        (X, S + "%y: f32[2, 3, 4] = aten.reshape(%x, [%s, 3, 4])"),
        (X, S + "%y: f32[2, 3, 4] = aten.view(%x, [%s, 3, 4])"),
        (X, "%y: f32[2, 3, 4] = aten.flatten.using_ints(%x, 1, 1)"),
        (X, "%y: f32[2, 3, 4] = aten.unflatten.int(%x, 2, [4])"),
        (X, "%y: f32[2, 3, 4] = aten.reshape_as(%x, %x)"),
        (X, "%y: f32[2, 3, 4] = aten.squeeze.dim(%x, 1)"),
        (X, "%y: f32[2, 3, 4] = aten.squeeze.dims(%x, [1, -1])"),
        ("%x: f32[2, 3]", "%y: f32[2, 3] = aten.squeeze(%x)"),
        (X, S + "%y: f32[2, 3, 4] = aten.expand(%x, [%s, -1, 4])"),
        (X, "%y: f32[2, 3, 4] = aten.expand_as(%x, %x)"),
        (X, "%y: f32[2, 3, 4] = aten.repeat(%x, [1, 1, 1])"),
        (X, "%y: f32[2, 3, 4] = aten.permute(%x, [0, -2, 2])"),
        (X, "%y: f32[2, 3, 4] = aten.transpose.int(%x, 1, -2)"),
        ("%x: f32[batch=2]", "%y: f32[2] = aten.t(%x)"),
        ("%x: f32[]", "%y: f32[] = aten.permute(%x, [])"),
        (X, "%y: f32[2, 3, 4] = aten.slice.Tensor(%x, 1, 0, 3)"),
        (X, "%y: f32[2, 3, 4] = aten.slice.Tensor(%x, 1, -3, 100)"),
        (X, "%y: f32[2, 3, 4] = aten.slice.Tensor(%x, 0, 0, 9223372036854775807)"),
        (X, "%y: f32[2, 3, 4] = aten.slice.Tensor(%x)"),
        (X, S + "%y: f32[2, 3, 4] = aten.slice.Tensor(%x, 0, 0, %s)"),
        (X, "%y: f32[2, 3, 4] = aten.narrow(%x, 2, 0, 4)"),
        (X, S + "%y: f32[2, 3, 4] = aten.narrow(%x, 0, 0, %s)"),
        (X, "%y: f32[2, 3, 4] = aten.constant_pad_nd(%x, [0, 0, 0, 0], 1.0)"),
        (X, '%y: f32[2, 3, 4] = aten.pad(%x, [0, 0], "reflect")'),
    ],
)
def test_changes_nothing(inputs: str, line: str) -> None:
    assert_becomes(inputs, f"{line}\nreturn %y", "return %x", "simplification", "dead-code")


@pytest.mark.parametrize(
    ("inputs", "text", "rule", "reason"),
    [
        # The shapes agree for the example's batch alone, or for both batches that are tried.
        (
            "%x: f32[1, 3], %z: f32[batch=2, 3]",
            "%s: int=2 = aten.sym_size.int(%z, 0)\n%y: f32[2, 3] = aten.expand(%x, [%s, 3])",
            rules.expand_to_own_shape,
            "is f32[2, 3]",
        ),
        (
            X,
            "%y: f32[2, 3, 4] = aten.slice.Tensor(%x, 0, 0, 100)",
            rules.slice_of_everything,
            "100",
        ),
        (X, "%y: f32[2, 3, 4] = aten.slice.Tensor(%x, 0, -100)", rules.slice_of_everything, "-100"),
        (X, "%y: f32[2, 3, 4] = aten.squeeze.dim(%x, 0)", rules.reshape_to_own_shape, "free"),
        (X, "%y: f32[2, 3, 4] = aten.squeeze(%x)", rules.reshape_to_own_shape, "free"),
        # Something is changed.
        (
            "%x: f32[4, 3]",
            "%y: f32[3, 4] = aten.reshape(%x, [3, 4])",
            rules.reshape_to_own_shape,
            "is f32[3, 4]",
        ),
        (
            "%x: f32[3, 3]",
            "%y: f32[3, 3] = aten.transpose.int(%x, 0, 1)",
            rules.permute_to_own_order,
            "[1, 0]",
        ),
        (
            "%x: f32[batch=2, 3, 3]",
            "%y: f32[2, 3, 3] = aten.permute(%x, [0, 2, 1])",
            rules.permute_to_own_order,
            "[0, 2, 1]",
        ),
        (
            "%x: f32[2, 3]",
            "%y: f32[2, 3] = aten.constant_pad_nd(%x, [1, -1])",
            rules.empty_padding,
            "_is_zero",
        ),
        (
            X,
            "%y: f32[2, 3, 2] = aten.slice.Tensor(%x, 2, 0, 4, 2)",
            rules.slice_of_everything,
            "f32",
        ),
        (
            "%x: f32[1, 3]",
            "%y: f32[2, 3] = aten.repeat(%x, [2, 1])",
            rules.expand_to_own_shape,
            "is f32[2, 3]",
        ),
    ],
)
def test_changes_something(inputs: str, text: str, rule: rules.Rule, reason: str) -> None:
    assert_stays(inputs, f"{text}\nreturn %y", "simplification", rule=rule, reason=reason)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            "%a: f32[6, 4] = aten.flatten.using_ints(%x, 0, 1)\n"
            "%y: f32[24] = aten.reshape(%a, [-1])\nreturn %y",
            "%y: f32[24] = aten.reshape(%x, [-1])\nreturn %y",
        ),
        (
            "%a: f32[6, 4] = aten.reshape(%x, [-1, 4])\n%b: f32[24] = aten.reshape(%a, [-1])\n"
            "%y: f32[12, 2] = aten.reshape(%b, [-1, 2])\nreturn %y, %b",
            "%b: f32[24] = aten.reshape(%x, [-1])\n%y: f32[12, 2] = aten.reshape(%x, [-1, 2])\n"
            "return %y, %b",
        ),
        (
            "%a: f32[2, 1, 3, 4] = aten.unsqueeze(%x, 1)\n"
            "%y: f32[2, 3, 4] = aten.squeeze.dim(%a, 1)\nreturn %y",
            "return %x",
        ),
        (
            "%a: f32[2, 12] = aten.flatten.using_ints(%x, 1)\n"
            "%y: f32[2, 3, 4] = aten.unflatten.int(%a, 1, [3, 4])\nreturn %y, %a",
            "%a: f32[2, 12] = aten.flatten.using_ints(%x, 1)\nreturn %x, %a",
        ),
        (
            "%a: f32[2, 1, 3, 4] = aten.unsqueeze(%x, 1)\n"
            "%b: f32[2, 1, 3, 4, 1] = aten.unsqueeze(%a, -1)\n"
            "%c: f32[2, 3, 4, 1] = aten.squeeze.dim(%b, 1)\n"
            "%y: f32[2, 3, 4] = aten.squeeze.dim(%c, 3)\nreturn %y",
            "return %x",
        ),
    ],
)
def test_chains_of_reshapes(before: str, after: str) -> None:
    assert_becomes(X, before, after, "simplification")


def test_a_chain_does_not_squeeze_the_free_batch() -> None:
    assert_stays(
        X,
        """
        %a: f32[2, 1, 3, 4] = aten.unsqueeze(%x, 1)
        %y: f32[2, 3, 4] = aten.squeeze(%a)
        return %y
        """,
        "simplification",
        rule=rules.reshape_there_and_back,
        reason="no operand",
    )


def test_a_reshape_between_does_not_undo_a_transposition() -> None:
    assert_stays(
        "%x: f32[4, 3]",
        """
        %a: f32[3, 4] = aten.transpose.int(%x, 0, 1)
        %y: f32[4, 3] = aten.reshape(%a, [4, 3])
        return %y
        """,
        "simplification",
        rule=rules.reshape_chain,
        reason="aten.transpose.int, not",
    )


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            "%a: f32[2, 4, 3] = aten.transpose.int(%x, 1, 2)\n"
            "%y: f32[2, 3, 4] = aten.transpose.int(%a, -1, 1)\nreturn %y",
            "return %x",
        ),
        (
            "%a: f32[4, 2, 3] = aten.permute(%x, [2, 0, 1])\n"
            "%y: f32[3, 2, 4] = aten.permute(%a, [2, 1, 0])\nreturn %y, %a",
            "%a: f32[4, 2, 3] = aten.permute(%x, [2, 0, 1])\n"
            "%y: f32[3, 2, 4] = aten.transpose.int(%x, 0, 1)\nreturn %y, %a",
        ),
        (
            "%a: f32[4, 2, 3] = aten.permute(%x, [2, 0, 1])\n"
            "%b: f32[3, 4, 2] = aten.movedim.int(%a, 2, 0)\n"
            "%y: f32[3, 2, 4] = aten.mT(%b)\nreturn %y",
            "%y: f32[3, 2, 4] = aten.transpose.int(%x, 0, 1)\nreturn %y",
        ),
        (
            "%a: f32[4, 3, 2] = aten.swapaxes(%x, 0, 2)\n"
            "%y: f32[3, 4, 2] = aten.swapdims(%a, 0, 1)\nreturn %y",
            "%y: f32[3, 4, 2] = aten.permute(%x, [1, 2, 0])\nreturn %y",
        ),
    ],
)
def test_chains_of_permutations(before: str, after: str) -> None:
    assert_becomes(X, before, after, "simplification")


PERMUTATIONS = [
    *[("aten.permute", [list(order)]) for order in itertools.permutations(range(3))],
    *[("aten.transpose.int", [a, b]) for a in range(-3, 3) for b in range(-3, 3)],
    *[("aten.swapaxes", [a, b]) for a in range(-3, 3) for b in range(-3, 3)],
    *[("aten.swapdims", [a, b]) for a in range(-3, 3) for b in range(-3, 3)],
    *[("aten.movedim.int", [a, b]) for a in range(-3, 3) for b in range(-3, 3)],
    ("aten.movedim.intlist", [[0, 1], [2, 0]]),
    ("aten.movedim.intlist", [[-1, 0], [0, 1]]),
    ("aten.movedim.intlist", [[0, 1, 2], [1, 2, 0]]),
    ("aten.numpy_T", []),
    ("aten.mT", []),
]


@pytest.mark.parametrize(("op", "operands"), PERMUTATIONS)
def test_permutation_is_what_torch_does(op: str, operands: list[object]) -> None:
    graph = Graph()
    x = graph.add_input("x", TensorType(torch.int64, (2, 3, 4)))
    y = graph.add(op, x, *operands)
    graph.set_outputs([y])
    assert y.producer is not None
    data = torch.arange(24).reshape(2, 3, 4)
    (expected,) = reference.run(graph, [data])
    assert torch.equal(data.permute(rules.permutation(y.producer)), expected)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            "%a: f32[2, 3, 3] = aten.slice.Tensor(%x, 2, 1)\n"
            "%y: f32[2, 3, 2] = aten.slice.Tensor(%a, 2, 0, 2)\nreturn %y",
            "%y: f32[2, 3, 2] = aten.slice.Tensor(%x, 2, 1, 3)\nreturn %y",
        ),
        (
            "%a: f32[2, 3, 2] = aten.slice.Tensor(%x, -1, 0, 4, 2)\n"
            "%y: f32[2, 3, 1] = aten.narrow(%a, 2, -1, 1)\nreturn %y, %a",
            "%a: f32[2, 3, 2] = aten.slice.Tensor(%x, -1, 0, 4, 2)\n"
            "%y: f32[2, 3, 1] = aten.slice.Tensor(%x, 2, 2, 3, 2)\nreturn %y, %a",
        ),
    ],
)
def test_chains_of_slices(before: str, after: str) -> None:
    assert_becomes(X, before, after, "simplification")


bounds = st.one_of(st.none(), st.integers(-9, 9))
slices = st.tuples(bounds, bounds, st.integers(1, 3))


@given(st.integers(0, 7), slices, slices)
def test_any_chain_of_slices(size: int, first: tuple, second: tuple) -> None:
    graph = Graph()
    x = graph.add_input("x", TensorType(torch.int64, (2, size)))
    a = graph.add("aten.slice.Tensor", x, 1, *first)
    graph.set_outputs([graph.add("aten.slice.Tensor", a, 1, *second)])
    data = torch.arange(2 * size).reshape(2, size)
    (expected,) = reference.run(graph, [data])
    Pipeline(["simplification"]).run(graph)
    assert len(graph) <= 1
    (actual,) = reference.run(graph, [data])
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "%a: f32[2, 3, 3] = aten.slice.Tensor(%x, 2, 1)\n"
            "%y: f32[2, 2, 3] = aten.slice.Tensor(%a, 1, 1)",
            "slices dimension 1",
        ),
        (
            "%a: f32[1, 3, 4] = aten.slice.Tensor(%x, 0, 1)\n"
            "%y: f32[1, 3, 4] = aten.slice.Tensor(%a, 0, -1)",
            "free sizes",
        ),
    ],
)
def test_slices_that_do_not_merge(text: str, reason: str) -> None:
    text = f"{text}\nreturn %y"
    assert_stays(X, text, "simplification", rule=rules.slice_chain, reason=reason)
