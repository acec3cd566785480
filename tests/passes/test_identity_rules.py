"""Identities go where every bit stays, and only there."""

from __future__ import annotations

import pytest
import torch
from golden import assert_becomes, assert_same_bits, assert_stays, graph_of

from graphopt.passes import identity_rules as rules
from graphopt.pipeline import Pipeline

X = "%x: f32[batch=2, 3]"
I = "%x: i64[batch=2, 3]"  # noqa: E741
B = "%x: bool[batch=2, 3]"
H = "%x: f16[batch=2, 3]"


@pytest.mark.parametrize(
    ("inputs", "line"),
    [
        (X, "%y: f32[2, 3] = aten.mul.Tensor(%x, 1)"),
        (X, "%y: f32[2, 3] = aten.mul.Tensor(1.0, %x)"),
        (X, "%y: f32[2, 3] = aten.mul.Scalar(%x, 1.0)"),
        (X, "%y: f32[2, 3] = aten.div.Tensor(%x, 1.0)"),
        (X, "%y: f32[2, 3] = aten.pow.Tensor_Scalar(%x, 1)"),
        (X, "%y: f32[2, 3] = aten.mul.Tensor(%x, True)"),
        (I, "%y: i64[2, 3] = aten.mul.Tensor(%x, 1)"),
        (B, "%y: bool[2, 3] = aten.mul.Tensor(%x, True)"),
        (X, "%y: f32[2, 3] = aten.add.Tensor(%x, -0.0)"),
        (X, "%y: f32[2, 3] = aten.add.Tensor(-0.0, %x)"),
        (X, "%y: f32[2, 3] = aten.add.Tensor(%x, 0.0, alpha=-1)"),
        (X, "%y: f32[2, 3] = aten.sub.Tensor(%x, 0)"),
        (X, "%y: f32[2, 3] = aten.sub.Tensor(%x, 0.0)"),
        (X, "%y: f32[2, 3] = aten.sub.Tensor(%x, -0.0, alpha=-2)"),
        (I, "%y: i64[2, 3] = aten.add.Tensor(%x, 0)"),
        (I, "%y: i64[2, 3] = aten.add.Scalar(%x, 0)"),
        (I, "%y: i64[2, 3] = aten.sub.Tensor(%x, 0, alpha=3)"),
        (B, "%y: bool[2, 3] = aten.bitwise_and.Tensor(%x, %t)"),
        (B, "%y: bool[2, 3] = aten.__and__.Tensor(%t, %x)"),
        (B, "%y: bool[2, 3] = aten.logical_or(%f, %x)"),
        (X, "%y: f32[2, 3] = aten.clone(%x)"),
        (X, "%y: f32[2, 3] = aten.contiguous(%x)"),
        (X, "%y: f32[2, 3] = aten.alias(%x)"),
        (X, "%y: f32[2, 3] = aten.detach(%x)"),
        (X, "%y: f32[2, 3] = aten.lift_fresh_copy(%x)"),
        (X, "%y: f32[2, 3] = aten.positive(%x)"),
        (X, "%y: f32[2, 3] = aten.to.dtype(%x, torch.float32, False, True)"),
        (X, '%y: f32[2, 3] = aten.to.device(%x, device("cpu"), torch.float32)'),
        (X, "%y: f32[2, 3] = aten.to.dtype_layout(%x, dtype=torch.float32)"),
        (X, "%y: f32[2, 3] = aten._to_copy(%x)"),
        (X, "%y: f32[2, 3] = aten.type_as(%x, %x)"),
        (X, "%y: f32[2, 3] = aten.to.other(%x, %x)"),
        (X, "%y: f32[2, 3] = aten.dropout(%x, 0.5, False)"),
        (X, "%y: f32[2, 3] = aten.dropout(%x, 0.0, True)"),
        (X, "%y: f32[2, 3] = aten.alpha_dropout(%x, 0.5, False)"),
        (X, "%y: f32[2, 3] = aten.feature_dropout(%x, 0.5, False)"),
        (X, "%y: f32[2, 3], %mask: bool[2, 3] = aten.native_dropout(%x, 0.5, False)"),
    ],
)
def test_returns_its_operand(inputs: str, line: str) -> None:
    assert_becomes(inputs, f"{_constants(line)}\nreturn %y", "return %x", "simplification")


def _constants(text: str) -> str:
    """The text with the constants %t and %f before it, as far as it uses them."""
    for name, literal in (
        ("%t", "bool[] = constant True"),
        ("%f", "bool[3] = constant [False, False, False]"),
        ("%z", "i64[] = constant 0"),
    ):
        if f"{name})" in text or f"{name}," in text:
            text = f"{name}: {literal}\n{text}"
    return text


@pytest.mark.parametrize(
    ("constant", "line"),
    [
        ("f32[3] = constant [1.0, 1.0, 1.0]", "aten.mul.Tensor(%x, %c)"),
        ("f32[] = constant 1.0", "aten.div.Tensor(%x, %c)"),
        ("i64[2, 3] = constant [[0, 0, 0], [0, 0, 0]]", "aten.sub.Tensor(%x, %c)"),
        ("f32[3] = constant [-0.0, -0.0, -0.0]", "aten.add.Tensor(%c, %x)"),
    ],
)
def test_neutral_constants(constant: str, line: str) -> None:
    assert_becomes(
        "%x: f32[2, 3]",
        f"%c: {constant}\n%y: f32[2, 3] = {line}\nreturn %y",
        "return %x",
        "simplification",
    )


MIXED = "%x: f32[batch=2, 3], %y: f32[1, 3]"


@pytest.mark.parametrize(
    ("inputs", "text", "rule", "reason"),
    [
        # numbers
        (X, "%y: f32[2, 3] = aten.mul.Tensor(%x, 2.0)", rules.neutral_factor, "_is_one"),
        (X, "%y: f32[2, 3] = aten.div.Tensor(1.0, %x)", rules.neutral_factor, "not a value"),
        (X, "%y: f32[2, 3] = aten.add.Tensor(%x, 0.0)", rules.neutral_summand, "-0.0"),
        (X, "%y: f32[2, 3] = aten.add.Tensor(%x, 0)", rules.neutral_summand, "-0.0"),
        (X, "%y: f32[2, 3] = aten.sub.Tensor(%x, -0.0)", rules.neutral_summand, "-0.0"),
        (X, "%y: f32[2, 3] = aten.add.Tensor(%x, -0.0, alpha=-1)", rules.neutral_summand, "-0.0"),
        (X, "%y: f32[2, 3] = aten.add.Tensor(%x, 1.0)", rules.neutral_summand, "zero"),
        (X, "%y: f32[2, 3] = aten.sub.Tensor(0.0, %x)", rules.neutral_summand, "not a value"),
        (
            "%x: c64[batch=2, 3]",
            "%y: c64[2, 3] = aten.add.Tensor(%x, 0)",
            rules.neutral_summand,
            "complex",
        ),
        # dtypes and shapes
        (I, "%y: f32[2, 3] = aten.mul.Tensor(%x, 1.0)", rules.neutral_factor, "is f32"),
        (I, "%y: f32[2, 3] = aten.div.Tensor(%x, 1)", rules.neutral_factor, "is f32"),
        (B, "%y: i64[2, 3] = aten.mul.Tensor(%x, 1)", rules.neutral_factor, "is i64"),
        (I, "%y: f32[2, 3] = aten.add.Tensor(%x, 0.0)", rules.neutral_summand, "is f32"),
        (I, "%y: i64[2, 3] = aten.bitwise_or.Tensor(%x, %z)", rules.neutral_truth, "no truth"),
        (X, "%y: bool[2, 3] = aten.logical_and(%x, %t)", rules.neutral_truth, "no truth"),
        (B, "%y: bool[2, 3] = aten.logical_and(%x, %f)", rules.neutral_truth, "_is_one"),
        (X, "%y: f64[2, 3] = aten.to.dtype(%x, torch.float64)", rules.cast_to_own_dtype, "is f64"),
        # randomness
        (X, "%y: f32[2, 3] = aten.dropout(%x, 0.5, True)", rules.dropout_in_evaluation, "keeps"),
        (
            X,
            "%y: f32[2, 3], %m: bool[2, 3] = aten.native_dropout(%x, 0.5, None)",
            rules.native_dropout_in_evaluation,
            "keeps",
        ),
        # inverses that are none
        (
            I,
            "%n: bool[2, 3] = aten.logical_not(%x)\n%y: bool[2, 3] = aten.logical_not(%n)",
            rules.double_negation,
            "is bool",
        ),
        (
            X,
            "%m: f32[2, 3] = aten.relu(%x)\n%y: f32[2, 3] = aten.neg(%m)",
            rules.double_negation,
            "is aten.relu",
        ),
    ],
)
def test_keeps(inputs: str, text: str, rule: rules.Rule, reason: str) -> None:
    text = f"{_constants(text)}\nreturn %y"
    assert_stays(inputs, text, "simplification", rule=rule, reason=reason)


def test_one_that_broadcasts_is_no_identity() -> None:
    assert_stays(
        "%x: f32[1, 3]",
        """
        %c: f32[2, 3] = constant [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
        %y: f32[2, 3] = aten.mul.Tensor(%x, %c)
        return %y
        """,
        "simplification",
        rule=rules.neutral_factor,
        reason="is f32[2, 3]",
    )


def test_zeros_of_different_signs_are_not_uniform() -> None:
    assert rules.uniform(torch.tensor(0.0)) is None  # a tensor is no operand
    graph = graph_of(
        X,
        """
        %c: f32[3] = constant [0.0, -0.0, 0.0]
        %y: f32[2, 3] = aten.sub.Tensor(%x, %c)
        return %y
        """,
    )
    assert rules.uniform(graph.value("c")) is None
    assert not Pipeline(["simplification"]).run(graph)


def test_a_used_dropout_mask_stays() -> None:
    assert_stays(
        X,
        "%y: f32[2, 3], %m: bool[2, 3] = aten.native_dropout(%x, 0.5, False)\nreturn %y, %m",
        "simplification",
        rule=rules.native_dropout_in_evaluation,
        reason="mask",
    )


@pytest.mark.parametrize(
    ("inputs", "before", "after"),
    [
        (
            H,
            "%w: f32[2, 3] = aten.to.dtype(%x, torch.float32)\n"
            "%y: f16[2, 3] = aten.to.dtype(%w, torch.float16)\nreturn %y",
            "return %x",
        ),
        (
            H,
            "%w: f32[2, 3] = aten._to_copy(%x, dtype=torch.float32)\n"
            "%y: f64[2, 3] = aten.to.dtype(%w, torch.float64)\nreturn %w, %y",
            "%w: f32[2, 3] = aten.to.dtype(%x, torch.float32)\n"
            "%y: f64[2, 3] = aten.to.dtype(%x, torch.float64)\nreturn %w, %y",
        ),
        (
            B,
            "%w: i64[2, 3] = aten.to.dtype(%x, torch.int64)\n"
            "%y: f32[2, 3] = aten.to.dtype(%w, torch.float32)\nreturn %y",
            "%y: f32[2, 3] = aten.to.dtype(%x, torch.float32)\nreturn %y",
        ),
    ],
)
def test_casts_through_a_wider_dtype(inputs: str, before: str, after: str) -> None:
    graph = graph_of(inputs, before)
    source = graph.clone()
    Pipeline(["simplification"]).run(graph)
    assert (
        "\n".join(line.strip().partition("  #")[0] for line in str(graph).splitlines()[1:-1])
        == after
    )
    if inputs != H:  # in float64 there are no half-precision numbers to cast
        assert_same_bits(source, graph)


def test_a_cast_through_a_narrower_dtype_rounds() -> None:
    assert_stays(
        X,
        """
        %h: f16[2, 3] = aten.to.dtype(%x, torch.float16)
        %y: f32[2, 3] = aten.to.dtype(%h, torch.float32)
        return %y
        """,
        "simplification",
        rule=rules.cast_chain,
        reason="does not hold every",
    )


INTEGERS = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
NUMBERS = [*INTEGERS, torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("narrow", NUMBERS)
@pytest.mark.parametrize("wide", NUMBERS)
def test_holds_exactly(narrow: torch.dtype, wide: torch.dtype) -> None:
    """Against the numbers where dtypes differ: the ends of the range, and the finest steps."""
    if narrow == torch.bool:
        numbers = torch.tensor([False, True])
    elif narrow.is_floating_point:
        limits = torch.finfo(narrow)
        numbers = torch.tensor(
            [limits.max, limits.tiny, 1 + limits.eps, limits.smallest_normal, 0.5], dtype=narrow
        )
    else:
        limits = torch.iinfo(narrow)
        numbers = torch.tensor(
            [limits.min, limits.max, limits.max - 1, limits.max // 2 + 1, 1], dtype=narrow
        )
    same = numbers.to(wide).tolist() == numbers.tolist()
    assert rules.holds_exactly(narrow, wide) == same


@pytest.mark.parametrize(("inputs", "op"), [(X, "neg"), (I, "bitwise_not"), (B, "logical_not")])
def test_double_negation(inputs: str, op: str) -> None:
    kind = inputs.split()[1].replace("batch=", "").replace("[2,", "[2,")
    assert_becomes(
        inputs,
        f"%n: {kind} 3] = aten.{op}(%x)\n%y: {kind} 3] = aten.{op}(%n)\nreturn %y, %n",
        f"%n: {kind} 3] = aten.{op}(%x)\nreturn %x, %n",
        "simplification",
    )


def test_relu_of_relu() -> None:
    assert_becomes(
        X,
        "%a: f32[2, 3] = aten.relu(%x)\n%y: f32[2, 3] = aten.relu(%a)\nreturn %y",
        "%a: f32[2, 3] = aten.relu(%x)\nreturn %a",
        "simplification",
    )


def test_numbers_of_sizes() -> None:
    assert_becomes(
        X,
        """
        %b: int=2 = aten.sym_size.int(%x, 0)
        %c: int=2 = operator.mul(%b, 1)
        %d: int=2 = operator.add(0, %c)
        %e: int=2 = operator.floordiv(%d, 1)
        return %e
        """,
        "%b: int=2 = aten.sym_size.int(%x, 0)\nreturn %b",
        "simplification",
    )
