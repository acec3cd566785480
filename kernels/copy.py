"""Copies without arithmetic: permutation, slicing, concatenation, expansion, padding, rolling.

The functions of this module make the problems; each divides its output into rectangles that are
strided in source and target. A rectangle is moved row by row, or, where source and target run
along different dimensions, in square tiles that are transposed in registers. Kernels move bits and
depend on the elements' size only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from graphopt.kernels import source
from graphopt.kernels.emission import immediate
from graphopt.kernels.expression import Builder, Expression, Ref
from graphopt.kernels.loops import (
    SHARE,
    Arguments,
    Nest,
    Odometer,
    collapse,
    indent,
    kernel_text,
)
from graphopt.kernels.operand import ITEM_BYTES, Layout, Operand
from graphopt.kernels.pointwise import WORTH_SHARING, ElementwiseLoop, transfer_time
from graphopt.kernels.problem import CopyProblem, Piece
from graphopt.kernels.registry import Argument, Candidate, Input, Output, Step, register

_BITS = {1: "int8", 2: "int16", 4: "int32", 8: "int64"}
_LEAST_TILED = 4
"""Sizes below which a dimension is not worth a transposed tile."""


# Problems ---------------------------------------------------------------------------------------


def view(
    operand: Operand, shape: Sequence[int], strides: Sequence[int], offset: int = 0
) -> CopyProblem:
    """A contiguous copy of a strided view of ``operand``'s memory (strides in elements)."""
    target = Operand.plain(operand.dtype, tuple(shape))
    piece = Piece(0, target.shape, tuple(strides), offset, target.strides, 0)
    return CopyProblem((piece,), (operand,), (target,))


def permute(operand: Operand, order: Sequence[int]) -> CopyProblem:
    """``aten.permute``: dimension i of the result is dimension ``order[i]`` of the operand."""
    strides = operand.strides
    return view(operand, [operand.shape[i] for i in order], [strides[i] for i in order])


def narrow(
    operand: Operand, starts: Sequence[int], stops: Sequence[int], steps: Sequence[int]
) -> CopyProblem:
    """Slices along every dimension; ``0 <= start <= size``, steps may be negative."""
    ranges = [range(*bounds) for bounds in zip(starts, stops, steps, strict=True)]
    own = operand.strides
    strides = [stride * step for stride, step in zip(own, steps, strict=True)]
    offset = sum(stride * start for stride, start in zip(own, starts, strict=True))
    return view(operand, [len(indices) for indices in ranges], strides, offset)


def expand(operand: Operand, shape: Sequence[int]) -> CopyProblem:
    """``aten.expand``: the operand broadcast to ``shape``."""
    missing = len(shape) - len(operand.shape)
    sizes = zip(operand.shape, operand.strides, shape[missing:], strict=True)
    strides = [0 if size == 1 and wanted != 1 else stride for size, stride, wanted in sizes]
    return view(operand, shape, [0] * missing + strides)


def concatenate(operands: Sequence[Operand], dimension: int) -> CopyProblem:
    """``aten.cat`` of operands of one rank along ``dimension`` (not negative)."""
    shape = list(operands[0].shape)
    shape[dimension] = sum(operand.shape[dimension] for operand in operands)
    target = Operand.plain(operands[0].dtype, tuple(shape))
    pieces = []
    start = 0
    for index, operand in enumerate(operands):
        offset = start * target.strides[dimension]
        pieces.append(Piece(index, operand.shape, operand.strides, 0, target.strides, offset))
        start += operand.shape[dimension]
    return CopyProblem(tuple(pieces), tuple(operands), (target,))


def pad(
    operand: Operand,
    before: Sequence[int],
    after: Sequence[int],
    value: bool | int | float = 0,
) -> CopyProblem:
    """``aten.constant_pad_nd``: so many elements of ``value`` around each dimension.

    Negative numbers crop.
    """
    own = operand.strides
    sizes = zip(operand.shape, before, after, strict=True)
    target = Operand.plain(operand.dtype, tuple(size + low + high for size, low, high in sizes))
    steps = target.strides
    kept = tuple(
        size + min(low, 0) + min(high, 0)
        for size, low, high in zip(operand.shape, before, after, strict=True)
    )
    skipped = sum(-min(low, 0) * stride for low, stride in zip(before, own, strict=True))
    moved = sum(max(low, 0) * step for low, step in zip(before, steps, strict=True))
    pieces = [Piece(0, kept, own, skipped, steps, moved)]
    # Slabs before and after along one dimension span the target in those that follow it, and only
    # the kept part in those that precede it: together they cover the border exactly once.
    origin = 0
    for axis, (low, high) in enumerate(zip(before, after, strict=True)):
        inside = kept[:axis]
        outside = target.shape[axis + 1 :]
        for size, start in ((low, 0), (high, max(low, 0) + kept[axis])):
            if size > 0:
                shape = (*inside, size, *outside)
                zeros = (0,) * len(shape)
                pieces.append(Piece(None, shape, zeros, 0, steps, origin + start * steps[axis]))
        origin += max(low, 0) * steps[axis]
    return CopyProblem(tuple(pieces), (operand,), (target,), value)


def roll(operand: Operand, shift: int, dimension: int) -> CopyProblem:
    """``aten.roll`` along one dimension."""
    size = operand.shape[dimension]
    target = Operand.plain(operand.dtype, operand.shape)
    shift = shift % size if size else 0
    pieces = []
    for start, count, to in ((0, size - shift, shift), (size - shift, shift, 0)):
        shape = tuple(count if axis == dimension else n for axis, n in enumerate(operand.shape))
        from_offset = start * operand.strides[dimension]
        to_offset = to * target.strides[dimension]
        pieces.append(Piece(0, shape, operand.strides, from_offset, target.strides, to_offset))
    return CopyProblem(tuple(pieces), (operand,), (target,))


def convert(operand: Operand, layout: Layout) -> CopyProblem:
    """The same tensor in another layout of the same dtype."""
    target = Operand(operand.shape, layout)
    piece = Piece(0, operand.shape, operand.strides, 0, target.strides, 0)
    return CopyProblem((piece,), (operand,), (target,))


# Kernels ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CopyCandidate(Candidate):
    """One step per rectangle."""

    problem: CopyProblem

    def build(self, threads: int) -> tuple[Step, ...]:
        pieces = [piece for piece in self.problem.pieces if 0 not in piece.shape]
        return tuple(self._step(piece, threads) for piece in pieces)

    def _step(self, piece: Piece, threads: int) -> Step:
        dtype = self.problem.outputs[0].dtype
        width = ITEM_BYTES[dtype]
        moved = 2 * width * math.prod(piece.shape)
        parallel = threads > 1 and transfer_time(moved) > WORTH_SHARING
        team = threads if parallel else 1
        order = sorted(range(len(piece.shape)), key=lambda axis: -abs(piece.target_strides[axis]))
        nest = collapse(piece.shape, (piece.source_strides, piece.target_strides), order)
        tile = transposable(nest) if piece.source is not None else None
        if tile is not None:
            kernel = _Transposition(nest, tile, piece, width)
            return Step(source.build("transpose", kernel.text()), kernel.arguments(), parallel)
        loop = self._rows(nest, piece, _BITS[width])
        return Step(source.build("copy", loop.text()), loop.arguments(team), parallel)

    def _rows(self, nest: Nest, piece: Piece, bits: str) -> ElementwiseLoop:
        target = (Output(0), bits)
        if piece.source is not None:
            move = Expression((bits,), (), (Ref(0),))
            offsets = (piece.source_offset, piece.target_offset)
            return ElementwiseLoop(move, nest, [(Input(piece.source), bits), target], offsets)
        fill = Builder()
        pattern = immediate(self.problem.fill, self.problem.outputs[0].dtype)
        expression = fill.finish(fill.apply("fill", pattern, dtype=bits))
        written = Nest(nest.sizes, nest.strides[1:])
        return ElementwiseLoop(expression, written, [target], (piece.target_offset,))


@register(CopyProblem)
def candidates(problem: CopyProblem) -> list[Candidate]:
    """The strided copy."""
    operands = (*problem.inputs, *problem.outputs)
    dtypes = {operand.dtype for operand in operands}
    if len(dtypes) != 1:
        raise ValueError(f"a copy does not convert: {sorted(dtypes)}")
    if not dtypes <= ITEM_BYTES.keys():
        return []
    covered = sum(math.prod(piece.shape) for piece in problem.pieces)
    if covered != problem.outputs[0].size:
        raise ValueError("the pieces of a copy do not cover its output")
    estimate = transfer_time(problem.bytes) + 1e-7 * len(problem.pieces)
    return [CopyCandidate("copy", problem, estimate)]


def transposable(nest: Nest) -> int | None:
    """The loop along which the source is contiguous, if tiles along it and the inner loop pay."""
    (source_strides, target_strides) = nest.strides
    if target_strides[-1] != 1 or source_strides[-1] in (0, 1) or nest.inner < _LEAST_TILED:
        return None
    for loop, stride in enumerate(source_strides[:-1]):
        if stride == 1 and nest.sizes[loop] >= _LEAST_TILED:
            return loop
    return None


class _Transposition:
    """Tiles of rows contiguous in the source, written as rows contiguous in the target."""

    def __init__(self, nest: Nest, tile: int, piece: Piece, width: int) -> None:
        assert piece.source is not None
        self.side = "LANES" if width <= 4 else "LANES // 2"
        self.vector = f"Vector(types.int{8 * width}, {self.side})"
        self.block = Arguments()
        start: list[Argument] = [Input(piece.source), Output(0)]
        offsets = (piece.source_offset * width, piece.target_offset * width)
        for name, address, offset in zip(("p", "q"), start, offsets, strict=True):
            self.block.add(name, address)
            self.block.add(f"{name}_offset", offset)
        steps = [[stride * width for stride in strides] for strides in nest.strides]
        self.block.add("rows", nest.inner)  # rows of the source are columns of the target
        self.block.add("columns", nest.sizes[tile])
        self.block.add("p_row", steps[0][-1])
        self.block.add("q_row", steps[1][tile])
        self.block.add("width", width)
        outer = [loop for loop in range(len(nest.sizes) - 1) if loop != tile]
        self.block.add("planes", math.prod(nest.sizes[loop] for loop in outer))
        walked = {"p": [steps[0][loop] for loop in outer], "q": [steps[1][loop] for loop in outer]}
        self.odometer = Odometer(self.block, [nest.sizes[loop] for loop in outer], walked)

    def arguments(self) -> tuple[Argument, ...]:
        return tuple(self.block.values)

    def text(self) -> str:
        """The kernel's source: a task is a strip of target rows, as many as a tile has."""
        body = [
            "p += p_offset",
            "q += q_offset",
            "strips = (columns + SIDE - 1) // SIDE",
            "tasks = planes * strips",
            *SHARE,
            "plane = task // strips",
            "strip = task - plane * strips",
            *self.odometer.start("plane"),
            "while task < stop:",
            *indent(1, self._strip()),
            *indent(1, ["task += 1", "strip += 1", "if strip == strips:", "    strip = 0"]),
            *indent(2, self.odometer.advance()),
        ]
        types = f"from numba import types\n\nSIDE = {self.side}\nTILE = {self.vector}\n\n\n"
        return kernel_text(self.block, body).replace("def kernel", types + "def kernel", 1)

    @staticmethod
    def _strip() -> list[str]:
        return [
            "left = strip * SIDE",
            "wide = min(columns - left, SIDE)",
            "a = p + left * width",
            "b = q + left * q_row",
            "row = 0",
            "while row < rows:",
            "    high = min(rows - row, SIDE)",
            "    if wide == SIDE and high == SIDE:",
            "        transpose_tile(a, p_row, b, q_row, TILE)",
            "    else:",
            "        transpose_corner(a, p_row, b, q_row, high, wide, TILE)",
            "    a += SIDE * p_row",
            "    b += SIDE * width",
            "    row += SIDE",
        ]
