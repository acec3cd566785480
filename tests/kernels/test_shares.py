"""Shares of panels that take unequally long, against every way to divide them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from graphopt.kernels.registry import WHOLE
from graphopt.kernels.shares import first_task, panel_shares

Panels = list[tuple[float, float]]
PANELS = st.lists(st.tuples(st.floats(0, 1e5), st.floats(1, 1e6)), min_size=1, max_size=9)


def first_tasks(panels: Panels, parts: int, shares: list[int], places: int = 1) -> list[int]:
    table = np.array(panel_shares(panels).numbers)
    address = table.ctypes.data
    return [first_task(share, WHOLE, address, places, len(panels), parts) for share in shares]


def seconds(panels: Panels, parts: int, begin: int, end: int) -> float:
    """How long a thread takes for the tasks from ``begin`` to ``end``."""
    total = 0.0
    for number, (copy, tasks) in enumerate(panels):
        own = min(end, (number + 1) * parts) - max(begin, number * parts)
        if own > 0:
            total += copy + tasks * own / parts
    return total


def longest(panels: Panels, parts: int, split: int) -> float:
    """How long two threads take that share the tasks at ``split``."""
    tasks = len(panels) * parts
    return max(seconds(panels, parts, 0, split), seconds(panels, parts, split, tasks))


@given(PANELS, st.integers(1, 20), st.integers(1, 5), st.lists(st.integers(0, WHOLE)))
@example([(0.0, 1.0), (0.0, 1.0), (48575.0, 1e6)], 1, 1, [])
def test_every_task_has_one_thread(
    panels: Panels, parts: int, places: int, cuts: list[int]
) -> None:
    found = first_tasks(panels, parts, [0, *sorted(cuts), WHOLE], places)
    assert (found[0], found[-1]) == (0, places * len(panels) * parts)
    assert all(first <= second for first, second in pairwise(found))


@given(PANELS, st.integers(1, 20))
def test_two_threads_take_hardly_longer_than_need_be(panels: Panels, parts: int) -> None:
    (split,) = first_tasks(panels, parts, [WHOLE // 2])
    best = min(longest(panels, parts, one) for one in range(len(panels) * parts + 1))
    largest = max(tasks for _, tasks in panels) / parts
    rounding = 4 * sum(map(sum, panels)) / WHOLE
    assert longest(panels, parts, split) <= best + largest + rounding


def test_a_longer_panel_moves_the_middle() -> None:
    assert first_tasks([(0, 8), (0, 8), (0, 8)], 16, [WHOLE // 2]) == [24]
    assert first_tasks([(0, 8), (0, 8), (0, 9)], 16, [WHOLE // 2]) == [25]


@pytest.mark.parametrize(("part", "split"), [(0.47, 4), (0.5, 4), (0.53, 4), (0.65, 5)])
def test_a_panel_is_not_copied_again_for_a_task_or_two(part: float, split: int) -> None:
    assert first_tasks([(5, 10), (5, 10)], 4, [round(WHOLE * part)]) == [split]


def test_places_are_shared_like_one_after_another() -> None:
    panels = [(1.0, 8.0), (1.0, 12.0)]
    assert first_tasks(panels, 4, [0, WHOLE // 3, WHOLE], 3) == [0, 8, 24]
    assert first_tasks(panels, 4, [WHOLE // 2], 3) == [8 + first_tasks(panels, 4, [WHOLE // 2])[0]]
