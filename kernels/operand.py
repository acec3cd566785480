"""Tensors as kernels see them: shapes, and how they lie in memory.

Everything here is a plain, hashable fact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from graphopt.kernels.zeros import ZeroPattern

ITEM_BYTES = {
    "float32": 4,
    "float64": 8,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
"""Bytes of one element in memory, by dtype name."""
GROUP = 4
"""Channels of a grouped layout that are together: as many as an instruction multiplies and adds."""
PIXELS = 16
"""Rows of pixels of a grouped layout are multiples of so many, which are a line of the cache."""


@dataclass(frozen=True)
class Layout:
    """How a tensor lies in memory.

    ``order`` lists the dimensions from the outermost (slowest) to the innermost, so that
    (0, 1, 2, 3) is NCHW and (0, 2, 3, 1) channels last. ``pitch`` is the distance in elements
    between neighbours along the second innermost dimension, where it is more than the innermost
    size (rows that start on 64-byte lines); 0 means dense.

    With a ``group``, dimension 1 (channels) is cut into groups of so many, the last one padded,
    whose members are the innermost dimension; the dimensions after it are one row of pixels, padded
    to a multiple of `PIXELS` unless it is a single one. So integer kernels have it: see `grouped`.

    ``plane`` is the distance in elements between neighbours along dimension 1 of an image whose
    planes of pixels are padded, see `padded`; 0 means dense. With ``halves`` it is that between
    neighbours of the upper half of an image, after all channels of which those of the lower half
    follow, see `halved`.
    """

    dtype: str
    order: tuple[int, ...]
    pitch: int = 0
    group: int = 1
    plane: int = 0
    halves: bool = False

    @staticmethod
    def plain(dtype: str, rank: int) -> Layout:
        """Contiguous, outermost dimension first."""
        return Layout(dtype, tuple(range(rank)))

    @staticmethod
    def grouped(dtype: str, rank: int) -> Layout:
        """Memory of shape (N, ceil(C / 4), pixels, 4), in which a pixel's channels are a word."""
        return Layout(dtype, tuple(range(rank)), group=GROUP)

    @staticmethod
    def padded(dtype: str, shape: tuple[int, ...]) -> Layout:
        """Memory of shape (N, C, pixels), padded so that every channel starts on a cache line.

        Distances of 8 lines, or multiples, would put them into few sets of the caches.
        """
        return Layout(dtype, tuple(range(len(shape))), plane=_padded(math.prod(shape[2:])))

    @staticmethod
    def halved(dtype: str, shape: tuple[int, ...]) -> Layout:
        """Memory of shape (1, 2, C, pixels of half an image) of one image with evenly many rows.

        Planes are padded as those of `padded`. Two threads that compute a half each then never have
        pages of memory in common, where their CPUs, which fetch what lies ahead in a page, would
        take each other's lines from the caches again and again.

        Raises ValueError for other shapes.
        """
        if len(shape) != 4 or shape[0] != 1 or shape[2] % 2:
            raise ValueError(f"images of shape {shape} have no halves")
        plane = _padded(shape[2] // 2 * shape[3])
        return Layout(dtype, tuple(range(4)), plane=plane, halves=True)

    @property
    def is_rearranged(self) -> bool:
        """Whether memory has another shape than the tensor in it: in groups, or padded."""
        return self.group > 1 or self.plane > 0

    def memory(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the memory of a tensor of that shape, outermost dimension first.

        Raises ValueError for a layout whose rows have gaps.
        """
        if self.group > 1:
            pixels = math.prod(shape[2:])
            padded = pixels if pixels == 1 else math.ceil(pixels / PIXELS) * PIXELS
            return (shape[0], math.ceil(shape[1] / self.group), padded, self.group)
        if self.halves:
            return (1, 2, shape[1], self.plane)
        if self.plane:
            return (*shape[:2], self.plane)
        if self.pitch:
            raise ValueError("rows with gaps are no tensor")
        return tuple(shape[dimension] for dimension in self.order)

    def strides(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Elements between neighbours along each dimension of a tensor of that shape.

        Raises ValueError for layouts in groups or halves, which have no such distances.
        """
        if self.group > 1:
            raise ValueError("the channels of a grouped layout are at no fixed distance")
        if self.halves:
            raise ValueError("the rows of an image in halves are at no fixed distance")
        strides = [0] * len(shape)
        distance = 1
        for place, dimension in enumerate(reversed(self.order)):
            if place == 1 and self.pitch:
                distance = self.pitch
            if dimension == 1 and self.plane:
                distance = self.plane
            strides[dimension] = distance
            distance *= max(shape[dimension], 1)
        return tuple(strides)

    def bytes(self, shape: tuple[int, ...]) -> int:
        """Memory that a tensor of that shape spans."""
        if 0 in shape:
            return 0
        if self.is_rearranged:
            return math.prod(self.memory(shape)) * ITEM_BYTES[self.dtype]
        steps = zip(shape, self.strides(shape), strict=True)
        return (1 + sum((size - 1) * stride for size, stride in steps)) * ITEM_BYTES[self.dtype]


def _padded(pixels: int) -> int:
    """Elements of a padded plane of so many."""
    lines = math.ceil(pixels / PIXELS)
    return (lines + (lines % 8 == 0)) * PIXELS


@dataclass(frozen=True)
class Operand:
    """A tensor that a problem reads or writes."""

    shape: tuple[int, ...]
    layout: Layout

    @staticmethod
    def plain(dtype: str, shape: tuple[int, ...]) -> Operand:
        """A contiguous tensor."""
        return Operand(tuple(shape), Layout.plain(dtype, len(shape)))

    @property
    def dtype(self) -> str:
        return self.layout.dtype

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def strides(self) -> tuple[int, ...]:
        """Elements between neighbours along each dimension."""
        return self.layout.strides(self.shape)

    @staticmethod
    def grouped(dtype: str, shape: tuple[int, ...]) -> Operand:
        """An image whose channels lie in groups, see `Layout.grouped`."""
        return Operand(tuple(shape), Layout.grouped(dtype, len(shape)))

    @property
    def padded(self) -> Operand:
        """The same image with padded planes, see `Layout.padded`."""
        return Operand(self.shape, Layout.padded(self.dtype, self.shape))

    @property
    def halved(self) -> Operand:
        """The same image in two halves, see `Layout.halved`."""
        return Operand(self.shape, Layout.halved(self.dtype, self.shape))

    @property
    def memory(self) -> tuple[int, ...]:
        """The shape of its memory."""
        return self.layout.memory(self.shape)

    @property
    def bytes(self) -> int:
        """Memory that it spans."""
        return self.layout.bytes(self.shape)


@dataclass(frozen=True)
class ConstantOperand(Operand):
    """A tensor whose values never change, so that a kernel may rearrange it beforehand.

    ``zeros`` is the pattern of its zeros, where they are enough to matter to a kernel's choice.
    """

    zeros: ZeroPattern | None = None
