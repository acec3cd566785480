"""The memory plan: offsets in one arena for buffers that live for a part of the program.

Greedy, after Pisarchyk and Lee, "Efficient memory management for deep neural net inference"
(2020): largest buffer first, each into the smallest gap that fits among those already placed that
live at the same time. Where that leaves gaps at the fullest step, other orders are tried, and then
those in which the buffer that ended up highest comes first.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

ALIGNMENT = 64
"""Bytes to which every buffer is aligned: a cache line, and the widest vector register."""

SLACK = 64
"""Bytes that may be read after the end of every buffer."""


@dataclass(frozen=True)
class Lifetime:
    """A buffer's size in bytes, and the first and last step (inclusive) that touch it."""

    size: int
    first: int
    last: int

    @property
    def steps(self) -> int:
        """How many steps it lives for."""
        return self.last - self.first + 1


@dataclass(frozen=True)
class MemoryPlan:
    """Byte offsets of buffers in an arena.

    Attributes:
        offsets: one per buffer, multiples of `ALIGNMENT`.
        size: bytes of the arena.
        lower_bound: bytes of the largest set of buffers that live at one step; no arena can be
            smaller.
    """

    offsets: tuple[int, ...]
    size: int
    lower_bound: int


def plan_memory(lifetimes: Sequence[Lifetime]) -> MemoryPlan:
    """Place buffers in an arena, and verify the result.

    Raises:
        ValueError: a buffer has a negative size or ends before it begins.
        RuntimeError: the plan is wrong (a fault of this module).
    """
    for index, lifetime in enumerate(lifetimes):
        if lifetime.size < 0 or lifetime.first > lifetime.last:
            raise ValueError(f"buffer {index} has no valid size and lifetime: {lifetime}")
    live = _live_bytes(lifetimes)
    offsets, size = _place(lifetimes, live)
    plan = MemoryPlan(tuple(offsets), size, max(live))
    verify_plan(lifetimes, plan)
    return plan


def verify_plan(lifetimes: Sequence[Lifetime], plan: MemoryPlan) -> None:
    """Check that buffers are aligned, inside the arena, and apart while they live.

    Raises:
        RuntimeError: names the buffers at fault.
    """
    if len(plan.offsets) != len(lifetimes):
        raise RuntimeError(f"{len(plan.offsets)} offsets for {len(lifetimes)} buffers")
    begin = np.array(plan.offsets, dtype=np.int64)
    end = begin + np.array([_footprint(lifetime) for lifetime in lifetimes], dtype=np.int64)
    first = np.array([lifetime.first for lifetime in lifetimes])
    last = np.array([lifetime.last for lifetime in lifetimes])
    for index in range(len(lifetimes)):
        if begin[index] < 0 or begin[index] % ALIGNMENT or end[index] > plan.size:
            raise RuntimeError(
                f"buffer {index} at [{begin[index]}, {end[index]}) is not aligned or not inside "
                f"the arena of {plan.size} bytes"
            )
        others = slice(index + 1, None)
        clash = (first[others] <= last[index]) & (first[index] <= last[others])
        clash &= (begin[others] < end[index]) & (begin[index] < end[others])
        if clash.any():
            other = index + 1 + int(clash.argmax())
            raise RuntimeError(
                f"buffers {index} and {other} overlap in the arena while both live: "
                f"{lifetimes[index]} at {begin[index]}, {lifetimes[other]} at {begin[other]}"
            )


def _footprint(lifetime: Lifetime) -> int:
    """Bytes that a buffer takes up with its slack; an empty one takes none."""
    if lifetime.size == 0:
        return 0
    return -(-(lifetime.size + SLACK) // ALIGNMENT) * ALIGNMENT


_ATTEMPTS = 8
"""How many orders are tried at most."""
_CLOSE = 1.05
"""Times the lower bound: a plan as small as that is not worth the time for more than these."""


def _place(lifetimes: Sequence[Lifetime], live: Sequence[int]) -> tuple[list[int], int]:
    """Offsets, and the size of the arena: the smallest that was found."""
    least = max(live)
    found: list[tuple[list[int], int]] = []
    for order in _orders(lifetimes, live):
        found.append(_greedy(lifetimes, order))
        if found[-1][1] <= least:
            return found[-1]
    while len(found) < _ATTEMPTS and min(size for _, size in found) > _CLOSE * least:
        offsets = found[-1][0]
        highest = max(order, key=lambda i: offsets[i] + _footprint(lifetimes[i]))
        order.remove(highest)
        order.insert(0, highest)
        found.append(_greedy(lifetimes, order))
    return min(found, key=lambda attempt: attempt[1])


def _orders(lifetimes: Sequence[Lifetime], live: Sequence[int]) -> Iterator[list[int]]:
    """The largest buffers first; those that are large for long; and those that live at the fullest
    steps, for long."""
    keys: tuple[Callable[[Lifetime], tuple[int, ...]], ...] = (
        lambda buffer: (_footprint(buffer),),
        lambda buffer: (_footprint(buffer) * buffer.steps,),
        lambda buffer: (max(live[buffer.first : buffer.last + 1]), buffer.steps),
    )
    for key in keys:
        ranks = [key(lifetime) for lifetime in lifetimes]
        yield sorted(range(len(lifetimes)), key=ranks.__getitem__, reverse=True)


def _greedy(lifetimes: Sequence[Lifetime], order: Sequence[int]) -> tuple[list[int], int]:
    """Offsets, and the size of the arena, if buffers are placed in this order."""
    footprints = [_footprint(lifetime) for lifetime in lifetimes]
    offsets = [0] * len(lifetimes)
    # What was placed, sorted by offset: one row (begin, end, first, last) per buffer.
    placed = np.empty((0, 4), dtype=np.int64)
    for index in order:
        need, lifetime = footprints[index], lifetimes[index]
        if need == 0:
            continue
        live = placed[(placed[:, 2] <= lifetime.last) & (lifetime.first <= placed[:, 3])]
        offset = _best_gap(live[:, 0], live[:, 1], need)
        offsets[index] = offset
        position = int(np.searchsorted(placed[:, 0], offset))
        row = (offset, offset + need, lifetime.first, lifetime.last)
        placed = np.insert(placed, position, row, axis=0)
    return offsets, int(placed[:, 1].max(initial=0))


def _best_gap(begins: np.ndarray, ends: np.ndarray, need: int) -> int:
    """Start of the smallest gap of at least `need` bytes; after everything if there is none."""
    if len(begins) == 0:
        return 0
    reached = np.maximum.accumulate(ends)
    starts = np.concatenate(([0], reached[:-1]))
    gaps = begins - starts
    fitting = np.flatnonzero(gaps >= need)
    if len(fitting) == 0:
        return int(reached[-1])
    return int(starts[fitting[gaps[fitting].argmin()]])


def _live_bytes(lifetimes: Sequence[Lifetime]) -> list[int]:
    """Bytes that live at each step."""
    steps = max((lifetime.last for lifetime in lifetimes), default=-1) + 1
    changes = [0] * (steps + 1)
    for lifetime in lifetimes:
        changes[lifetime.first] += _footprint(lifetime)
        changes[lifetime.last + 1] -= _footprint(lifetime)
    return list(itertools.accumulate(changes))
