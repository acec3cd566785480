"""Convolutions with many zero weights whose kernels are higher than one row, in float32.

As in `sparse_convolution`, but the vectors of a panel lie one below the other in the image instead
of side by side. What is under one row of the kernel is then, a vector further, also what is under
the next one: a panel holds it once, is copied faster, and more channels of it stay in the first
cache. Where the columns of the output end within a vector, vectors hold pieces of several rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.kernels import source, strip_panel
from graphopt.kernels.epilogue import Epilogue
from graphopt.kernels.image import Image, epilogue_starts
from graphopt.kernels.loops import Arguments, indent
from graphopt.kernels.nonzeros import (
    WIDTHS,
    Schedule,
    depths,
    pack_streams,
    product_lines,
    rows_at_once,
    wait_line,
)
from graphopt.kernels.problem import ConvolutionProblem
from graphopt.kernels.registry import Candidate, Packed, aligned_empty, register
from graphopt.kernels.shares import share_lines
from graphopt.kernels.simd import LANES
from graphopt.kernels.sparse_convolution import (
    BODY,
    SparseConvolutionCandidate,
    fetch_lines,
    sparse_candidates,
    task_cycles,
)
from graphopt.kernels.stream import VECTOR_BYTES
from graphopt.kernels.tile import fill
from graphopt.kernels.zeros import ZeroPattern

_PIECES = tuple(LANES // count for count in (1, 2, 4) if LANES // count > 1)
"""Lengths of the pieces of rows that a vector may hold."""
_TOGETHER_CYCLES = 3
"""Cycles to copy a vector of one channel, whole and together with those of two other columns."""
_PACK_CYCLES = 1.5
"""The same where each column is by itself, besides `_PIECE_CYCLES` for each of the vector's pieces,
where columns are side by side, and `_PACK_START` for each of all channels."""
_PIECE_CYCLES = 2.5
_PACK_START = 20


@dataclass(frozen=True)
class Tile:
    """Pixels that are computed at once, ``lanes`` of a row; ``row`` and ``column`` are the first.

    Where a vector has more lanes, they hold the same columns of rows further down.
    """

    row: int
    column: int
    lanes: int


@dataclass(frozen=True)
class Strips:
    """What a panel has of one channel of the image, in vectors.

    For every column of the kernel, and each of ``phases``, the rows of the image from that phase on
    that are ``stride`` apart: ``lines`` of them.
    """

    lines: int
    stride: int
    phases: range
    columns: int

    @property
    def vectors(self) -> int:
        return self.columns * len(self.phases) * self.lines

    def place(self, row: int, column: int) -> int:
        """Where the row of the image that is ``row`` below a tile's first begins."""
        phase = self.phases.index(row % self.stride)
        return (column * len(self.phases) + phase) * self.lines + row // self.stride


@dataclass(frozen=True)
class SparseStripsCandidate(SparseConvolutionCandidate):
    """One schedule: its ``width`` is the number of vectors of a tile."""

    @property
    def _tiles(self) -> tuple[Tile, ...]:
        return tiles(self.image.out_size, self.schedule.width)

    @property
    def _strips(self) -> Strips:
        return strips(self.image, self.schedule.width)

    @property
    def _panels(self) -> int:
        return len(self._tiles)

    @property
    def _pack(self) -> int:
        return source.shared(strip_panel.pack_strips).address

    @staticmethod
    def panel_cycles(
        image: Image, schedule: Schedule, zeros: ZeroPattern
    ) -> tuple[tuple[float, float], ...]:
        blocks = math.ceil(image.channels * image.taps / schedule.depth)
        vectors = strips(image, schedule.width).vectors
        tasks = task_cycles(image, schedule, zeros)

        def copy(pieces: int) -> float:
            if pieces == 1 and image.kernel[1] == 3:
                return vectors * image.channels * _TOGETHER_CYCLES
            channel = _PACK_CYCLES + pieces * _PIECE_CYCLES * image.stride[1]
            return vectors * (pieces * blocks * _PACK_START + image.channels * channel)

        cut = tiles(image.out_size, schedule.width)
        return tuple((copy(LANES // tile.lanes), tasks) for tile in cut)

    def packing(self) -> tuple[object, ...]:
        return (*super().packing(), self._tiles, self._strips, self.image.dilation)

    def pack(self, constants: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        matrices = [block.reshape(self.image.outputs, -1) for block in self._weights(constants)]
        cuts = aligned_empty((self._panels, 3), np.int64)
        cuts[...] = [(tile.row, tile.column, tile.lanes) for tile in self._tiles]
        return [*pack_streams(matrices, self.schedule, self._parts, self._steps()), cuts]

    def _steps(self) -> np.ndarray:
        """Where, in a panel, a tile finds what is under each tap of each channel, in vectors."""
        image, own = self.image, self._strips
        places = [
            own.place(row * image.dilation[0], column)
            for row in range(image.kernel[0])
            for column in range(image.kernel[1])
        ]
        channels = np.arange(self._block_channels) * own.vectors
        return np.add.outer(channels, places).reshape(-1)

    def _arguments(self) -> Arguments:
        block, own = super()._arguments(), self._strips
        block.add("cuts", Packed(2))
        block.add("lines", own.lines)
        block.add("phase_step", own.phases.step)
        block.add("pitch", VECTOR_BYTES * own.vectors)
        block.add("out_height", self.image.out_size[0])
        block.add("out_half", math.ceil(self.image.out_size[0] / 2))
        return block

    def _lines(self, epilogue: Epilogue) -> list[str]:
        schedule = self.schedule
        sizes = {"ROWS": schedule.rows, "WIDTH": schedule.width}
        parts = {
            "prologue": epilogue.prologue(),
            "share": share_lines("panels"),
            "place": fill(_PLACE, {}, sizes),
            "panel": fill(_PACK, {}, sizes),
            "tail": [],
            "product": product_lines(
                schedule,
                _finish_lines(schedule, epilogue),
                fetch_lines(schedule.rows, epilogue, schedule.width, "out_width", [_START]),
            ),
        }
        return fill(BODY, parts, sizes)


@functools.cache
def tiles(size: tuple[int, int], height: int) -> tuple[Tile, ...]:
    """An output cut into as few tiles of ``height`` vectors as possible, from top to bottom."""
    rows, columns = size
    cut = [
        Tile(row, column, lanes)
        for column, lanes in _columns(rows, columns, height)
        for row in range(0, rows, height * (LANES // lanes))
    ]
    return tuple(sorted(cut, key=lambda tile: (tile.row, tile.column)))


def _columns(rows: int, columns: int, height: int) -> list[tuple[int, int]]:
    """The first column of each tile that is uppermost, and the lengths of its pieces."""

    @functools.cache
    def best(left: int) -> tuple[int, tuple[int, ...]]:
        """How few tiles ``left`` columns take, and the pieces."""
        if left <= 0:
            return 0, ()
        found = []
        for lanes in _PIECES:
            number, pieces = best(left - lanes)
            found.append((math.ceil(rows / (height * (LANES // lanes))) + number, (lanes, *pieces)))
        return min(found, key=lambda one: one[0])

    whole = max(columns // LANES - 1, 0)
    lengths = (LANES,) * whole + best(columns - whole * LANES)[1]
    return [(sum(lengths[:number]), lanes) for number, lanes in enumerate(lengths)]


def strips(image: Image, height: int) -> Strips:
    """What the panels of tiles of ``height`` vectors hold."""
    stride, dilation = image.stride[0], image.dilation[0]
    lines = height + (image.kernel[0] - 1) * dilation // stride
    return Strips(lines, stride, range(0, stride, math.gcd(stride, dilation)), image.kernel[1])


@register(ConvolutionProblem)
def candidates(problem: ConvolutionProblem) -> list[Candidate]:
    """Schedules that may suit the zeros; none where the weight has few or rows do not overlap."""
    return sparse_candidates(problem, SparseStripsCandidate, _schedules)


def _schedules(image: Image, zeros: ZeroPattern) -> Iterator[Schedule]:
    for rows in rows_at_once(zeros):
        for height in WIDTHS[rows]:
            vectors = strips(image, height).vectors
            # A piece of a tile lies in one half of the output.
            crosses = image.out_gap > 0 and image.out_size[0] // 2 % height > 0
            if crosses or vectors >= height * image.taps:
                continue
            for channels in depths(image.channels, vectors, VECTOR_BYTES * vectors):
                size = channels * vectors * VECTOR_BYTES
                yield Schedule(rows, height, channels * image.taps, strips=size)


def _finish_lines(schedule: Schedule, epilogue: Epilogue) -> list[str]:
    """Lines that store a tile: as sums that wait, or finished."""
    parts = {
        "wait": [wait_line(schedule, tail=False)],
        "start": [_START],
        "whole": _store_lines(schedule, epilogue, whole=True),
        "part": _store_lines(schedule, epilogue, whole=False),
    }
    return fill(_FINISH, parts, {"ROWS": schedule.rows, "WIDTH": schedule.width})


def _store_lines(schedule: Schedule, epilogue: Epilogue, whole: bool) -> list[str]:
    """Lines that finish and store, of each row of the weight, ``rows`` vectors of a tile, or the
    part of each that the mask ``here`` says."""
    lines: list[str] = []
    for row in range(schedule.rows):
        first = row * schedule.width
        tile = f"tile[{first}:{first + schedule.width}]" if schedule.rows > 1 else "tile"
        inner = [
            "c = y + (image * groups * outputs + channel) * out_plane + 4 * start",
            *epilogue_starts(epilogue),
            *epilogue.row_lines(),
            epilogue.tile_line(tile, 1, int(whole), "LANES" if whole else "here", "out_width"),
        ]
        if row:
            inner = [f"if last > first_row + {row}:", *indent(1, ["channel += 1", *inner])]
        lines += inner
    return lines


_START = "start = row_start(tile_row, out_width, out_half, out_gap) + tile_column"

_PLACE = """
step = 4 * LANES
cut = cuts + 24 * panel_number
tile_row = read(cut, INT64)
tile_column = read(cut + 8, INT64)
lanes = read(cut + 16, INT64)
whole = (
    lanes == LANES and tile_column + LANES <= out_width and tile_row + WIDTH <= out_height
)
"""

_PACK = """
panel = own_scratch
call_kernel(pack, (
    panel, pitch, x + (place * channels + first_channel) * plane, plane,
    min(channels - first_channel, block_channels), height, width,
    tile_row, tile_column, lanes, WIDTH, lines, phase_step, kernel_width,
    stride_height, stride_width, dilation_width, top, left, half, gap,
))
"""

_FINISH = """
if block + 1 < blocks:
    <wait>
else:
    first_row = group * outputs + number * ROWS
    if whole:
        channel = first_row
        rows = WIDTH
        <start>
        <whole>
    else:
        lane = 0
        line = tile_row
        while lane < LANES:
            channel = first_row
            end = lane + min(lanes, out_width - tile_column)
            here = mask_first(end, FLOAT32) & ~mask_first(lane, FLOAT32)
            start = row_start(line, out_width, out_half, out_gap) + tile_column - lane
            rows = out_height - line
            <part>
            lane += lanes
            line += WIDTH
"""
