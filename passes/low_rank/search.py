"""Searching for the smallest number that is large enough."""

from __future__ import annotations

from collections.abc import Callable


def smallest(suffices: Callable[[int], bool], largest: int) -> int:
    """The smallest number from 1 that suffices, by bisection; the largest if none does.

    Args:
        suffices: whether a number is large enough; if one is, all larger ones are.
        largest: the last one that is considered.
    """
    low, high = 1, max(1, largest)
    while low < high:
        middle = (low + high) // 2
        if suffices(middle):
            high = middle
        else:
            low = middle + 1
    return low
