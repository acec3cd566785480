"""Operators with several spellings get one."""

from __future__ import annotations

import pytest
from golden import assert_becomes, assert_stays

from graphopt.passes import canonical_rules as rules

X = "%x: f32[batch=2, 3]"


@pytest.mark.parametrize(
    ("inputs", "before", "after"),
    [
        (
            X,
            "%y: f32[2, 3] = aten.add.Scalar(%x, 2.0, 3)\nreturn %y",
            "%y: f32[2, 3] = aten.add.Tensor(%x, 2.0, alpha=3)\nreturn %y",
        ),
        (
            X,
            "%y: f32[2, 3] = aten.sub.Scalar(%x, 2)\nreturn %y",
            "%y: f32[2, 3] = aten.sub.Tensor(%x, 2)\nreturn %y",
        ),
        (
            "%x: i64[3]",
            "%y: f32[3] = aten.mul.Scalar(%x, 0.5)\nreturn %y",
            "%y: f32[3] = aten.mul.Tensor(%x, 0.5)\nreturn %y",
        ),
        (
            "%x: i64[3]",
            "%y: f32[3] = aten.div.Scalar(%x, 2)\nreturn %y",
            "%y: f32[3] = aten.div.Tensor(%x, 2)\nreturn %y",
        ),
        (
            "%x: i64[3], %z: f32[2]",
            "%y: f32[3] = aten.type_as(%x, %z)\nreturn %y",
            "%y: f32[3] = aten.to.dtype(%x, torch.float32)\nreturn %y",
        ),
        (
            "%x: i64[3]",
            "%y: f32[3] = aten._to_copy(%x, dtype=torch.float32)\n"
            "%z: f32[3] = aten.to.dtype(%x, torch.float32, False, True)\nreturn %y, %z",
            "%y: f32[3] = aten.to.dtype(%x, torch.float32)\n"
            "%z: f32[3] = aten.to.dtype(%x, torch.float32)\nreturn %y, %z",
        ),
        (
            X,
            "%y: f32[2, 6] = aten.concat([%x, %x], -1)\nreturn %y",
            "%y: f32[2, 6] = aten.cat([%x, %x], -1)\nreturn %y",
        ),
        (
            "%x: f32[2, 3]",
            "%y: i64[2, 3] = aten.ones_like(%x, dtype=torch.int64)\nreturn %y",
            "%y: i64[2, 3] = aten.full([2, 3], 1, dtype=torch.int64)\nreturn %y",
        ),
        (
            X,
            "%s: int=2 = aten.sym_size.int(%x, 0)\n"
            "%y: bool[2, 4] = aten.new_ones(%x, [%s, 4], dtype=torch.bool)\nreturn %y",
            "%s: int=2 = aten.sym_size.int(%x, 0)\n"
            "%y: bool[2, 4] = aten.full([%s, 4], 1, dtype=torch.bool)\nreturn %y",
        ),
        (
            "%x: i64[2]",
            "%y: i64[2] = aten.full_like(%x, 2.5)\nreturn %y",
            "%y: i64[2] = aten.full([2], 2.5, dtype=torch.int64)\nreturn %y",
        ),
        (
            "%x: f32[2]",
            "%y: f32[3] = aten.new_full(%x, [3], -1)\nreturn %y",
            "%y: f32[3] = aten.full([3], -1, dtype=torch.float32)\nreturn %y",
        ),
    ],
)
def test_spelling(inputs: str, before: str, after: str) -> None:
    assert_becomes(inputs, before, after, "simplification")


def test_the_shape_of_a_free_batch_is_not_written_down() -> None:
    assert_stays(
        X,
        "%y: f32[2, 3] = aten.zeros_like(%x)\nreturn %y",
        "simplification",
        rule=rules.fill_by_size,
        reason="free",
    )
