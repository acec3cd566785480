"""Loop nests over several strided operands at once, reduced to as few dimensions as possible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Nest:
    """``sizes`` from the outermost loop to the innermost; ``strides[operand][loop]``."""

    sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]

    @property
    def inner(self) -> int:
        """Trips of the innermost loop."""
        return self.sizes[-1]

    @property
    def rows(self) -> int:
        """Trips of all other loops together."""
        rows = 1
        for size in self.sizes[:-1]:
            rows *= size
        return rows


def broadcast_strides(
    shape: Sequence[int], strides: Sequence[int], target: Sequence[int]
) -> tuple[int, ...]:
    """Strides for walking a tensor as if it had the shape that it broadcasts to."""
    missing = len(target) - len(shape)
    fits = missing >= 0 and all(
        size in (1, wanted) for size, wanted in zip(shape, target[missing:], strict=True)
    )
    if not fits:
        raise ValueError(f"shape {tuple(shape)} does not broadcast to {tuple(target)}")
    own = zip(shape, strides, strict=True)
    return (0,) * missing + tuple(0 if size == 1 else stride for size, stride in own)


def collapse(
    shape: Sequence[int], strides: Sequence[Sequence[int]], order: Sequence[int] | None = None
) -> Nest:
    """The nest that visits every index of ``shape`` with the fewest loops.

    ``order`` lists the dimensions from the outermost loop to the innermost. Neighbouring loops
    become one where every operand walks through both in one stride.
    """
    dimensions = [axis for axis in (order or range(len(shape))) if shape[axis] != 1]
    sizes: list[int] = []
    steps: list[list[int]] = [[] for _ in strides]
    for axis in dimensions:
        joins = bool(sizes) and all(
            known[-1] == own[axis] * shape[axis] for known, own in zip(steps, strides, strict=True)
        )
        for known, own in zip(steps, strides, strict=True):
            if joins:
                known[-1] = own[axis]
            else:
                known.append(own[axis])
        if joins:
            sizes[-1] *= shape[axis]
        else:
            sizes.append(shape[axis])
    if not sizes:
        return Nest((1,), tuple((1,) for _ in strides))
    return Nest(tuple(sizes), tuple(tuple(known) for known in steps))
