"""Dimensions of values as rows of channels: what a reshape, a slice or a concatenation makes of
them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

Channels = NDArray[np.int64]
"""Identities of channels, in order. A negative one, ``~reason``, can never be removed."""

Sizes = tuple[int, ...]
"""A size under each assignment of the graph's free sizes."""


@dataclass(frozen=True, eq=False)
class Axis:
    """One dimension of a value. Its index ``i`` belongs to channel
    ``channels[i // inner % len(channels)]``.

    Attributes:
        outer: how often the row of channels is repeated.
        channels: the row.
        inner: how many indices in a row belong to the same channel.
    """

    outer: Sizes
    channels: Channels
    inner: Sizes

    @property
    def is_fixed(self) -> bool:
        """Whether no index can be removed."""
        return bool((self.channels < 0).all())

    @property
    def sizes(self) -> Sizes:
        return self.sizes_with(len(self.channels))

    def sizes_with(self, count: int) -> Sizes:
        """The sizes that are left when so many of the channels are."""
        return tuple(o * count * i for o, i in zip(self.outer, self.inner, strict=True))

    def flat(self) -> Channels | None:
        """The channel of every index; None if the size is free."""
        if len(set(self.outer)) > 1 or len(set(self.inner)) > 1:
            return None
        return np.tile(np.repeat(self.channels, self.inner[0]), self.outer[0])


def row(channels: Channels, assignments: int) -> Axis:
    """An axis in which every index is a channel of its own."""
    return Axis((1,) * assignments, channels, (1,) * assignments)


def same_structure(a: Axis, b: Axis) -> bool:
    return (a.outer, len(a.channels), a.inner) == (b.outer, len(b.channels), b.inner)


@dataclass(frozen=True)
class Piece:
    """What one dimension of a reshape's result holds of a row of channels: its index ``i`` the
    channels ``c`` with ``c // stride % size == i``.

    Attributes:
        dimension: of the result.
        size, stride: see above.
        outer, inner: as in `Axis`.
    """

    dimension: int
    size: int
    stride: int
    outer: Sizes
    inner: Sizes

    def coordinates(self, channels: int) -> Channels:
        """The index in this piece of each of so many channels."""
        found: Channels = np.arange(channels) // self.stride % self.size
        return found


def pieces(axis: Axis, later: Sizes, shapes: Sequence[Sequence[int]]) -> tuple[Piece, ...] | None:
    """Where a reshape puts the channels of an axis.

    Args:
        axis: of the operand.
        later: product of the sizes of the dimensions after it.
        shapes: of the result, under each assignment of the free sizes.

    Returns:
        The pieces of more than one index, outermost first; None if the channels do not fall on
        whole indices of the result, or do so differently under the assignments.
    """
    found = [
        _pieces(len(axis.channels), outer, inner * after, tuple(shape))
        for outer, inner, after, shape in zip(axis.outer, axis.inner, later, shapes, strict=True)
    ]
    if None in found or len({tuple(one[:3] for one in placed or ()) for placed in found}) != 1:
        return None
    places = [placed for placed in found if placed is not None]
    return tuple(
        Piece(*one[:3], tuple(p[k][3] for p in places), tuple(p[k][4] for p in places))
        for k, one in enumerate(places[0])
    )


_Found = tuple[tuple[int, int, int, int, int], ...]


def _pieces(channels: int, outer: int, inner: int, shape: Sizes) -> _Found | None:
    """Dimension, size, stride, outer and inner of the pieces under one assignment.

    In the row-major order of all elements, the channels' index is
    ``position // inner % channels`` and that of a dimension ``position // after % size``.
    """
    top = inner * channels
    found = []
    for dimension, size in enumerate(shape):
        after = prod(shape[dimension + 1 :])
        low, high = max(inner, after), min(top, after * size)
        if high <= low:
            continue
        if low % inner or high % low or top % high or low % after or (after * size) % high:
            return None
        found.append((dimension, high // low, low // inner, after * size // high, low // after))
    if prod(one[1] for one in found) != channels:
        return None
    return tuple(found)


def kept_ranges(kept: NDArray[np.bool_], sizes: Sequence[int]) -> Iterator[int]:
    """How many indices are kept in each of consecutive ranges."""
    start = 0
    for size in sizes:
        yield int(kept[start : start + size].sum())
        start += size
