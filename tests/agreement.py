"""How close float32 results must come to a float64 reference.

torch's own float32 result is the yardstick: another order of summation may err a small factor
more, a wrong result errs by orders of magnitude more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves

FACTOR = 4.0
EPSILON = torch.finfo(torch.float32).eps
FLOOR = 8 * EPSILON  # where torch happens to round exactly, others need not


def tensors(outputs: Any) -> list[Tensor]:
    """The tensors of a nested result, in order."""
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def relative_error(result: Tensor, reference: Tensor) -> float:
    """Largest absolute difference of finite values over the largest finite reference value.

    Infinite unless shapes agree and both are NaN, and both infinite with one sign, at the same
    places. A reference beyond the result's range counts as infinite.
    """
    if result.shape != reference.shape:
        return float("inf")
    expected = reference.to(result.dtype)
    finite = expected.isfinite()
    same_finite = torch.equal(result.isfinite(), finite)
    if not same_finite or not torch.equal(
        result[~finite].nan_to_num(), expected[~finite].nan_to_num()
    ):
        return float("inf")
    if not finite.any():
        return 0.0
    exact = reference.to(torch.float64)[finite]
    difference = (result.to(torch.float64)[finite] - exact).abs().max().item()
    scale = exact.abs().max().item()
    return difference / scale if scale > 0 else (0.0 if difference == 0 else float("inf"))


def largest_error(outputs: Any, reference: Any) -> float:
    """`relative_error` of the worst tensor of two nested results; integers must be equal."""
    ours, theirs = tensors(outputs), tensors(reference)
    if len(ours) != len(theirs):
        return float("inf")
    worst = 0.0
    for result, expected in zip(ours, theirs, strict=True):
        if expected.is_floating_point():
            worst = max(worst, relative_error(result, expected))
        elif not torch.equal(result, expected):
            return float("inf")
    return worst


def bound(yardstick: Any, reference: Any) -> float:
    """The largest relative error allowed, given torch's float32 outputs and the reference."""
    return max(FACTOR * largest_error(yardstick, reference), FLOOR)


def assert_same_form(outputs: Any, expected: Any) -> None:
    """Same structure, and every tensor of the same dtype and shape."""
    (ours, structure), (theirs, expected_structure) = tree_flatten(outputs), tree_flatten(expected)
    assert structure == expected_structure, f"{structure} instead of {expected_structure}"
    for result, wanted in zip(ours, theirs, strict=True):
        if isinstance(wanted, Tensor):
            assert isinstance(result, Tensor)
            assert (result.dtype, result.shape) == (wanted.dtype, wanted.shape)
        else:
            assert result == wanted
