"""Concatenations and splits that undo each other go; near misses stay."""

from __future__ import annotations

import pytest
from golden import assert_becomes, assert_stays

from graphopt.passes import concatenation_rules as rules

X = "%x: f32[batch=2, 6]"
AB = "%a: f32[batch=2, 2], %b: f32[batch=2, 3]"
CAT = "%c: f32[2, 5] = aten.cat([%a, %b], 1)\n"
HALVES = "%p: f32[2, 3], %q: f32[2, 3] = "


@pytest.mark.parametrize(
    ("inputs", "before", "after"),
    [
        (X, "%y: f32[2, 6] = aten.cat([%x], 1)\nreturn %y", "return %x"),
        (
            X,
            "%y: f32[2, 1, 6] = aten.stack([%x], 1)\nreturn %y",
            "%y: f32[2, 1, 6] = aten.unsqueeze(%x, 1)\nreturn %y",
        ),
        (
            X,
            HALVES + "aten.split.Tensor(%x, 3, 1)\n"
            "%y: f32[2, 6] = aten.cat([%p, %q], -1)\nreturn %y",
            "return %x",
        ),
        (
            X,
            HALVES + "aten.chunk(%x, 2, -1)\n"
            "%y: f32[2, 6] = aten.concatenate([%p, %q], 1)\nreturn %y, %q",
            HALVES + "aten.chunk(%x, 2, -1)\nreturn %x, %q",
        ),
        (
            "%x: f32[3, 2]",
            "%p: f32[2], %q: f32[2], %r: f32[2] = aten.unbind.int(%x)\n"
            "%y: f32[3, 2] = aten.stack([%p, %q, %r])\nreturn %y",
            "return %x",
        ),
        (
            AB,
            CAT + "%p: f32[2, 2], %q: f32[2, 3] = aten.split_with_sizes(%c, [2, 3], 1)\n"
            "return %q, %p",
            "return %b, %a",
        ),
        (
            "%a: f32[batch=2, 3], %b: f32[batch=2, 3]",
            "%c: f32[2, 2, 3] = aten.stack([%a, %b], 1)\n"
            + HALVES
            + "aten.unbind.int(%c, -2)\nreturn %p, %q, %c",
            "%c: f32[2, 2, 3] = aten.stack([%a, %b], 1)\nreturn %a, %b, %c",
        ),
        (
            AB,
            CAT + "%y: f32[2, 3] = aten.slice.Tensor(%c, 1, 2)\nreturn %y",
            "return %b",
        ),
        (
            AB,
            CAT + "%y: f32[2, 2] = aten.narrow(%c, -1, 3, 2)\nreturn %y",
            "%y: f32[2, 2] = aten.slice.Tensor(%b, 1, 1, 3)\nreturn %y",
        ),
        (
            AB,
            CAT + "%y: f32[2, 2] = aten.slice.Tensor(%c, 1, 2, 5, 2)\nreturn %y, %c",
            CAT + "%y: f32[2, 2] = aten.slice.Tensor(%b, 1, 0, 3, 2)\nreturn %y, %c",
        ),
        (
            "%a: f32[batch=2, 3], %b: f32[batch=2, 3]",
            "%c: f32[2, 2, 3] = aten.stack([%a, %b], 1)\n"
            "%y: f32[2, 3] = aten.select.int(%c, 1, -1)\nreturn %y",
            "return %b",
        ),
    ],
)
def test_cancels(inputs: str, before: str, after: str) -> None:
    assert_becomes(inputs, before, after, "simplification")


@pytest.mark.parametrize(
    ("inputs", "text", "rule", "reason"),
    [
        (
            X,
            HALVES + "aten.split.Tensor(%x, 3, 1)\n%y: f32[2, 6] = aten.cat([%q, %p], 1)",
            rules.concatenation_of_split,
            "not all results of %p, in order",
        ),
        (
            X,
            "%p: f32[2, 2], %q: f32[2, 2], %r: f32[2, 2] = aten.split.Tensor(%x, 2, 1)\n"
            "%y: f32[2, 4] = aten.cat([%p, %q], 1)",
            rules.concatenation_of_split,
            "not all results of %p, in order",
        ),
        (
            "%x: f32[6, 6]",
            "%p: f32[6, 3], %q: f32[6, 3] = aten.split.Tensor(%x, 3, 1)\n"
            "%y: f32[12, 3] = aten.cat([%p, %q])",
            rules.concatenation_of_split,
            "splits dimension 1, not 0",
        ),
        (
            "%x: f32[2, 6], %z: f32[2, 3]",
            HALVES + "aten.split.Tensor(%x, 3, 1)\n%y: f32[2, 6] = aten.cat([%p, %z], 1)",
            rules.concatenation_of_split,
            "do not come from one node",
        ),
        (
            "%x: f32[2, 3]",
            "%p: f32[3], %q: f32[3] = aten.unbind.int(%x)\n%y: f32[6] = aten.cat([%p, %q])",
            rules.concatenation_of_split,
            "%p is aten.unbind.int",
        ),
        (
            "%x: f32[2, 3]",
            "%p: f32[1, 3], %q: f32[1, 3] = aten.split.Tensor(%x, 1)\n"
            "%y: f32[2, 1, 3] = aten.stack([%p, %q])",
            rules.concatenation_of_split,
            "%p is aten.split.Tensor",
        ),
        (
            AB,
            CAT + "%y: f32[2, 3], %q: f32[2, 2] = aten.split_with_sizes(%c, [3, 2], 1)",
            rules.split_of_concatenation,
            "not as large",
        ),
        (
            "%a: f32[2, 2], %b: f32[2, 2]",
            "%c: f32[4, 2] = aten.cat([%a, %b])\n"
            "%y: f32[4, 1], %q: f32[4, 1] = aten.split.Tensor(%c, 1, 1)",
            rules.split_of_concatenation,
            "splits dimension 1, not 0",
        ),
        (
            "%a: f32[2, 2], %b: f16[2, 2]",
            "%c: f32[4, 2] = aten.cat([%a, %b])\n"
            "%y: f32[2, 2], %q: f32[2, 2] = aten.split.Tensor(%c, 2)",
            rules.split_of_concatenation,
            "not as large",
        ),
        (
            "%a: f32[batch=2, 2], %b: f32[batch=2, 2]",
            "%c: f32[4, 2] = aten.cat([%a, %b])\n%y: f32[2, 2], %q: f32[2, 2] = aten.chunk(%c, 2)",
            rules.split_of_concatenation,
            "free",
        ),
        (
            "%a: f32[2, 2], %b: f32[2, 2]",
            "%c: f32[2, 2, 2] = aten.stack([%a, %b])\n"
            "%y: f32[1, 2, 2], %q: f32[1, 2, 2] = aten.chunk(%c, 2)",
            rules.split_of_concatenation,
            "does not undo",
        ),
        (
            AB,
            CAT + "%y: f32[2, 3] = aten.slice.Tensor(%c, 1, 1, 4)",
            rules.slice_of_concatenation,
            "several parts",
        ),
        (
            AB,
            CAT + "%y: f32[1, 5] = aten.slice.Tensor(%c, 0, 0, 1)",
            rules.slice_of_concatenation,
            "another dimension",
        ),
        (
            AB,
            CAT + "%y: f32[2, 0] = aten.slice.Tensor(%c, 1, 2, 2)",
            rules.slice_of_concatenation,
            "nothing",
        ),
        (
            "%a: f32[2, 2], %b: f16[2, 3]",
            CAT + "%y: f32[2, 3] = aten.slice.Tensor(%c, 1, 2)",
            rules.slice_of_concatenation,
            "torch.float16 before",
        ),
        (
            "%a: f32[0], %b: f32[2, 3]",
            "%c: f32[2, 3] = aten.cat([%a, %b])\n%y: f32[1, 3] = aten.slice.Tensor(%c, 0, 1)",
            rules.slice_of_concatenation,
            "%a along dimension 0 is not fixed",
        ),
        (
            "%a: f32[2, 3], %b: f32[2, 3]",
            "%c: f32[2, 2, 3] = aten.stack([%a, %b])\n%y: f32[2, 3] = aten.select.int(%c, 1, 0)",
            rules.select_of_stack,
            "another dimension",
        ),
        (
            "%a: f32[2, 3], %b: f16[2, 3]",
            "%c: f32[2, 2, 3] = aten.stack([%a, %b])\n%y: f32[2, 3] = aten.select.int(%c, 0, 1)",
            rules.select_of_stack,
            "torch.float16 before",
        ),
    ],
)
def test_stays(inputs: str, text: str, rule: rules.Rule, reason: str) -> None:
    assert_stays(inputs, f"{text}\nreturn %y", "simplification", rule=rule, reason=reason)
