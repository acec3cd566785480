"""What depends on constants alone is computed; what is free, random or would grow is not."""

from __future__ import annotations

import pytest
import torch
from golden import assert_becomes, assert_same_bits, body_of, graph_of
from hypothesis import given, settings
from random_graphs import Case, cases, check

from graphopt.errors import PassError
from graphopt.ir import Graph, TensorType
from graphopt.passes.constant_folding import ConstantFolding
from graphopt.pipeline import Pipeline

X = "%x: f32[batch=2, 3]"


def assert_not_folded(inputs: str, body: str, folding: ConstantFolding | None = None) -> None:
    graph = graph_of(inputs, body)
    text = body_of(graph)
    assert not Pipeline([folding or ConstantFolding()]).run(graph)
    assert body_of(graph) == text


def test_a_chain_becomes_one_constant() -> None:
    """It is called like the parameter that it is made of, and stays one."""
    assert_becomes(
        X,
        """
        %w: f32[3] = parameter [1.0, 2.0, 4.0]
        %c: f32[] = constant 0.5
        %a: f32[3] = aten.mul.Tensor(%w, %c)
        %b: f32[3] = aten.add.Tensor(%a, 1)
        %y: f32[2, 3] = aten.mul.Tensor(%x, %b)
        return %y
        """,
        """
        %w: f32[3] = parameter [1.5, 2.0, 3.0]
        %y: f32[2, 3] = aten.mul.Tensor(%x, %w)
        return %y
        """,
        ConstantFolding(),
    )


def test_outputs_and_values_of_several_users() -> None:
    assert_becomes(
        "%x: f32[3]",
        """
        %c: i64[4] = constant [4, 3, 2, 1]
        %a: i64[4] = aten.neg(%c)
        %p: i64[2], %q: i64[2] = aten.split.Tensor(%a, 2)
        return %a, %q, %c, %x
        """,
        """
        %a: i64[4] = constant [-4, -3, -2, -1]
        %q: i64[2] = constant [-2, -1]
        %c: i64[4] = constant [4, 3, 2, 1]
        return %a, %q, %c, %x
        """,
        ConstantFolding(),
    )


def test_literals_alone() -> None:
    assert_becomes(
        X,
        """
        %a: f32[3] = aten.full([3], 2.0)
        %y: f32[2, 3] = aten.mul.Tensor(%x, %a)
        return %y
        """,
        """
        %a: f32[3] = constant [2.0, 2.0, 2.0]
        %y: f32[2, 3] = aten.mul.Tensor(%x, %a)
        return %y
        """,
        ConstantFolding(),
    )


def test_zero_dimensional_results_stay_so() -> None:
    """A tensor of rank one would promote x."""
    graph = graph_of(
        "%x: f16[batch=2, 3]",
        """
        %c: f32[] = constant 0.5
        %a: f32[] = aten.neg(%c)
        %y: f16[2, 3] = aten.mul.Tensor(%x, %a)
        return %y
        """,
    )
    Pipeline([ConstantFolding()]).run(graph)
    assert graph.value("a").types == (TensorType(torch.float32, ()),) * 2
    assert graph.value("y").dtype == torch.float16


@pytest.mark.parametrize(
    "op",
    ["aten.bernoulli(%c)", "aten.rand_like(%c)", "aten.dropout(%c, 0.5, True)"],
)
def test_random_operators_stay(op: str) -> None:
    assert_not_folded("%x: f32[3]", f"%c: f32[1] = constant [0.5]\n%a: f32[1] = {op}\nreturn %a")


def test_the_dequantize_of_a_constant_stays() -> None:
    text = """
        %q: i8[3] = constant [1, 2, 3]
        %s: f32[] = constant 0.5
        %w: f32[3] = graphopt.dequantize(%q, %s, None, None, -128, 127, torch.int8)
        %y: f32[2, 3] = aten.mul.Tensor(%x, %w)
        return %y
        """
    assert_not_folded(X, text)


def test_nothing_behind_a_dequantize_is_folded() -> None:
    text = """
        %q: i8[3] = constant [1, 2, 3]
        %s: f32[] = constant 0.5
        %w: f32[3] = graphopt.dequantize(%q, %s, None, None, -128, 127, torch.int8)
        %v: f32[3] = aten.neg(%w)
        %y: f32[2, 3] = aten.mul.Tensor(%x, %v)
        return %y
        """
    assert_not_folded(X, text)


def test_the_quantize_of_a_constant_is_folded() -> None:
    graph = graph_of(
        "%x: f32[3]",
        """
        %w: f32[3] = constant [1.0, 2.0, 300.0]
        %s: f32[] = constant 0.5
        %q: i8[3] = graphopt.quantize(%w, %s, None, None, -128, 127, torch.int8)
        return %q
        """,
    )
    assert Pipeline([ConstantFolding()]).run(graph)
    assert body_of(graph) == "%q: i8[3] = constant [2, 4, 127]\nreturn %q"


# -- sizes ------------------------------------------------------------------------------------


def test_fixed_sizes_become_literals() -> None:
    assert_becomes(
        "%x: f32[batch=2, 3, 4]",
        """
        %b: int=2 = aten.sym_size.int(%x, 0)
        %c: int=3 = aten.sym_size.int(%x, 1)
        %d: int=4 = aten.sym_size.int(%x, -1)
        %e: int=12 = operator.mul(%c, %d)
        %y: f32[2, 12] = aten.reshape(%x, [%b, %e])
        return %y
        """,
        """
        %b: int=2 = aten.sym_size.int(%x, 0)
        %y: f32[2, 12] = aten.reshape(%x, [%b, 12])
        return %y
        """,
        ConstantFolding(),
    )


def test_without_free_sizes_every_size_is_fixed() -> None:
    assert_becomes(
        "%x: f32[2, 3]",
        """
        %y: f32[3, 2] = aten.transpose.int(%x, 0, 1)
        %b: int=2 = aten.sym_size.int(%y, 1)
        %z: f32[2, 3] = aten.reshape(%y, [%b, 3])
        return %z
        """,
        """
        %y: f32[3, 2] = aten.transpose.int(%x, 0, 1)
        %z: f32[2, 3] = aten.reshape(%y, [2, 3])
        return %z
        """,
        ConstantFolding(),
    )


def test_the_size_of_a_constant_is_fixed() -> None:
    assert_becomes(
        X,
        """
        %c: f32[3] = constant [1.0, 2.0, 3.0]
        %n: int=3 = aten.sym_size.int(%c, 0)
        %y: f32[2, 3] = aten.add.Tensor(%x, %n)
        return %y, %c
        """,
        """
        %y: f32[2, 3] = aten.add.Tensor(%x, 3)
        %c: f32[3] = constant [1.0, 2.0, 3.0]
        return %y, %c
        """,
        ConstantFolding(),
    )


@pytest.mark.parametrize(
    "body",
    [
        # The batch itself, and what derives from it.
        "%b: int=2 = aten.sym_size.int(%x, 0)\n%y: f32[2] = aten.arange(%b, dtype=torch.float32)",
        "%b: int=2 = aten.sym_size.int(%x, -2)\n%c: int=4 = operator.mul(%b, 2)\n"
        "%y: f32[4, 1] = aten.full([%c, 1], 1.0)",
        # A number that is the same for both batches that are tried, and not for every batch.
        "%b: int=2 = aten.sym_size.int(%x, 0)\n%c: int=0 = operator.floordiv(%b, 100)\n"
        "%y: f32[0] = aten.full([%c], 1.0)",
        "%b: int=2 = aten.sym_size.int(%x, 0)\n%c: bool=True = operator.lt(%b, 100)\n"
        "%d: int=1 = torch.sym_ite(%c, 1, 2)\n%y: f32[1] = aten.full([%d], 1.0)",
        # The same in disguise, as the size of a result.
        "%z: f32[2, 3] = aten.slice.Tensor(%x, 0, 0, 100)\n"
        "%b: int=2 = aten.sym_size.int(%z, 0)\n%y: f32[2] = aten.full([%b], 1.0)",
        "%z: f32[0, 3] = aten.slice.Tensor(%x, 0, 100)\n"
        "%b: int=0 = aten.sym_size.int(%z, 0)\n%y: f32[0] = aten.full([%b], 1.0)",
    ],
)
def test_nothing_that_derives_from_a_free_size_is_folded(body: str) -> None:
    assert_not_folded(X, f"{body}\nreturn %y")


def test_a_number_that_the_model_returns_stays_computed() -> None:
    assert_not_folded(X, "%c: int=3 = aten.sym_size.int(%x, 1)\nreturn %c")


# -- growth -----------------------------------------------------------------------------------


def test_a_large_result_of_little_is_not_folded() -> None:
    text = """
        %c: f32[1] = constant [0.5]
        %a: f32[100] = aten.expand(%c, [100])
        return %a
        """
    assert_not_folded("%x: f32[1]", text, ConstantFolding(growth_bytes=399))
    graph = graph_of("%x: f32[1]", text)
    assert Pipeline([ConstantFolding(growth_bytes=400)]).run(graph)


@pytest.mark.parametrize("op", ["aten.arange(100000)", "aten.full([100000], 1)"])
def test_large_results_of_nothing_are_not_folded(op: str) -> None:
    assert_not_folded("%x: f32[1]", f"%a: i64[100000] = {op}\nreturn %a")


def test_a_result_no_larger_than_what_it_frees_is_folded() -> None:
    weight = torch.randn(300, 300)
    graph = Graph()
    w = graph.constant(weight, "w", trainable=True)
    graph.set_outputs([graph.add("aten.transpose.int", w, 0, 1)])
    assert Pipeline([ConstantFolding(growth_bytes=0)]).run(graph)
    (constant,) = graph.constants
    assert constant.name == "w"
    assert constant.constant is not None
    assert torch.equal(constant.constant, weight.t())


def test_a_weight_with_another_user_frees_nothing() -> None:
    graph = Graph()
    x = graph.add_input("x", TensorType(torch.float32, (300,)))
    w = graph.constant(torch.randn(300, 300), "w")
    transposed = graph.add("aten.transpose.int", w, 0, 1)
    graph.set_outputs([transposed, graph.add("aten.mul.Tensor", x, w)])
    assert not Pipeline([ConstantFolding(growth_bytes=359_999)]).run(graph)
    assert Pipeline([ConstantFolding(growth_bytes=360_000)]).run(graph)


def test_a_small_result_of_a_large_one_is_folded() -> None:
    assert_becomes(
        "%x: f32[batch=2, 3]",
        """
        %c: f32[3, 1] = constant [[1.0], [2.0], [3.0]]
        %a: f32[3, 100000] = aten.expand(%c, [3, 100000])
        %m: f32[3] = aten.amax(%a, [1])
        %y: f32[2, 3] = aten.mul.Tensor(%x, %m)
        return %y
        """,
        """
        %m: f32[3] = constant [1.0, 2.0, 3.0]
        %y: f32[2, 3] = aten.mul.Tensor(%x, %m)
        return %y
        """,
        ConstantFolding(),
    )


def test_the_source_is_never_written_and_results_own_their_layout() -> None:
    weight = torch.randn(2, 3)
    before = weight.clone()
    graph = Graph()
    w = graph.constant(weight, "w")
    graph.set_outputs([graph.add("aten.expand", graph.add("aten.neg", w), [4, 2, 3])])
    source = graph.clone()
    Pipeline([ConstantFolding()]).run(graph)
    (constant,) = graph.constants
    assert constant.constant is not None
    assert constant.constant.is_contiguous()
    assert torch.equal(weight, before)
    assert_same_bits(source, graph)


def test_a_negative_bound_is_refused() -> None:
    with pytest.raises(PassError, match="growth_bytes"):
        ConstantFolding(growth_bytes=-1)


@settings(max_examples=40)
@given(cases())
def test_no_foldable_node_is_left(case: Case) -> None:
    case = case.in_double()  # where no constant is rounded
    changed = case.graph.clone()
    Pipeline([ConstantFolding()]).run(changed)
    check(case.graph, changed, case.inputs, signed_zeros=True)
    assert not Pipeline([ConstantFolding()]).run(changed)
    for node in changed.nodes:
        small = all(v.is_tensor and v.type.nbytes < 1 << 18 for v in node.outputs)
        constant = all(v.is_constant for v in node.input_values())
        assert not (small and constant) or node.operator.is_random or "quantize" in node.op
