"""Searching for the smallest number that is large enough."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable


def smallest(suffices: Callable[[int], bool], largest: int) -> int:
    """The smallest number from 1 that suffices, by bisection; the largest if none does.

    Args:
        suffices: whether a number is large enough; if one is, all larger ones are.
        largest: the last one that is considered.
    """
    return 1 + bisect_left(range(1, largest), True, key=suffices)
