"""Dense 7 x 7 convolutions with stride 2 over few channels in float32 with fewer multiplications.

Every other pixel, and every other weight, in both directions are four phases: convolutions of 4 x 4
(and 4 x 3, 3 x 4, 3 x 3) with stride 1, whose sum the result is. Each is done by minimal filtering,
F(3 x 2, 4 x 4) (after A. Lavin and S. Gray, "Fast algorithms for convolutional neural networks",
2016), over the points 0, 1, -1, 2, -1/2 and infinity for the three rows of results, and 0, 1, -1,
1/2 and infinity for the two columns: 120 multiplications for the results of a tile in place of 294.
Between the transformations the products of all phases of all channels are summed in register tiles
as in `convolution`, for a column of tiles at a time, whose sums are transformed once while they are
in the first cache.

Results differ from the exact ones about twice as much as those of other kernels. Where a pixel is
infinite or not a number, so is every result of the tiles that contain it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.kernels.epilogue import Epilogue
from graphopt.kernels.image import Image, image_epilogue, image_of
from graphopt.kernels.loops import SHARE, Arguments
from graphopt.kernels.minimal_filtering import KEPT_BYTES, FilteringCandidate, result_lines
from graphopt.kernels.problem import ConvolutionProblem
from graphopt.kernels.register import VECTORS_PER_CYCLE
from graphopt.kernels.registry import (
    Argument,
    Candidate,
    Input,
    Output,
    Packed,
    Scratch,
    aligned_empty,
    register,
)
from graphopt.kernels.simd import LANES
from graphopt.kernels.tile import CYCLES_PER_SECOND, PANEL, TILES, fill, multiply_lines

_RESULTS = 3
"""Rows of results of a tile, which has two columns."""
_ROWS, _COLUMNS = 6, 5
"""Pixels of a phase that a tile sees."""
_POSITIONS = _ROWS * _COLUMNS
_PHASES = 4
"""Even or odd rows, and of each even or odd columns."""
_TILE = TILES[0]
_MOST_CHANNELS = 16
_LEAST_OUTPUTS = 16

ROW_TRANSFORM = np.array(
    [[1, 0, 0, 0], [-1 / 3, -1 / 3, -1 / 3, -1 / 3], [1 / 3, -1 / 3, 1 / 3, -1 / 3],
     [1 / 15, 2 / 15, 4 / 15, 8 / 15], [-16 / 15, 8 / 15, -4 / 15, 2 / 15], [0, 0, 0, 1]]
)  # fmt: skip
COLUMN_TRANSFORM = np.array(
    [[2, 0, 0, 0], [1, 1, 1, 1], [-1 / 3, 1 / 3, -1 / 3, 1 / 3], [-8 / 3, -4 / 3, -2 / 3, -1 / 3],
     [0, 0, 0, 1]]
)  # fmt: skip
"""G of the paper: a kernel g becomes ``ROW_TRANSFORM @ g @ COLUMN_TRANSFORM.T``."""


@dataclass(frozen=True)
class _Cut:
    """How the work is cut into tasks: blocks of rows of tiles."""

    rows: int
    across: int
    row_blocks: int

    @property
    def rows_per_block(self) -> int:
        return math.ceil(self.rows / self.row_blocks)

    @property
    def pitch(self) -> int:
        """Tiles of a block, up to whole vectors."""
        return math.ceil(self.rows_per_block * self.across / LANES) * LANES

    @property
    def stream(self) -> int:
        """Pixels of a row of the image that are four apart, with those that the last tile sees."""
        return (math.ceil(self.across / LANES) + 1) * LANES


class StridedWinogradCandidate(FilteringCandidate):
    """Matrix products of all phases between the transformations."""

    _name = "strided_winograd"

    def pack(self, constants: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        weight = constants[1]
        assert weight is not None
        image, groups = self.image, _groups(self.image)
        rows = np.zeros((groups * _TILE.height, image.channels, 8, 8))
        rows[: image.outputs, :, :7, :7] = weight
        phases = rows.reshape(*rows.shape[:2], 4, 2, 4, 2)
        turned = np.einsum("ik,ockald,jl->ojcadi", ROW_TRANSFORM, phases, COLUMN_TRANSFORM)
        turned = turned.reshape(groups, _TILE.height, _COLUMNS, 4 * image.channels, _ROWS)
        packed = aligned_empty((turned.size,), np.float32)
        packed[:] = turned.transpose(0, 2, 4, 3, 1).reshape(-1)
        return [packed]

    def _buffers(self, team: int) -> tuple[int, int, int, int]:
        return _scratch(self.image, _cut(self.image, team))

    def _arguments(self, team: int) -> tuple[Arguments, Epilogue]:
        cut = _cut(self.image, team)
        image, block = self.image, Arguments()
        streams_bytes, pixels_bytes, products_bytes, _ = buffers = self._buffers(team)
        values: dict[str, Argument] = {
            "x": Input(0), "weight": Packed(0), "y": Output(0), "scratch": Scratch(),
            "thread_scratch": sum(buffers),
            "streams_bytes": streams_bytes, "pixels_bytes": pixels_bytes,
            "products_bytes": products_bytes,
            "channels": image.channels, "outputs": image.outputs,
            "height": image.size[0], "width": image.size[1],
            "out_height": image.out_size[0], "out_width": image.out_size[1],
            "top": image.start[0], "left": image.start[1],
            "rows_of_tiles": cut.rows, "across": cut.across, "pitch": cut.pitch,
            "stream": 4 * cut.stream, "stream_rows": _stream_rows(cut),
            "row_blocks": cut.row_blocks, "groups": _groups(image),
            "tasks": image.batch * cut.row_blocks,
        }  # fmt: skip
        block.add_all(values)
        return block, image_epilogue(self.problem, image, block)

    def _lines(self, epilogue: Epilogue) -> list[str]:
        parts = {
            "prologue": epilogue.prologue(),
            "share": SHARE,
            "turn pixels": _turn_pixels(),
            "vectors": PANEL,
            "multiply": multiply_lines(_TILE, "4", f"{4 * _TILE.height}", padded=True),
            "turn products": _turn_products(),
            "finish": _finish(epilogue),
        }
        sizes = {
            "HEIGHT": _TILE.height,
            "WIDTH": _TILE.width,
            "ROWS": _ROWS,
            "COLUMNS": _COLUMNS,
            "RESULTS": _RESULTS,
            "PHASES": _PHASES,
        }
        return fill(_BODY, parts, sizes)


@register(ConvolutionProblem)
def candidates(problem: ConvolutionProblem) -> list[Candidate]:
    """For first layers: kernels of 7 x 7 that move by two pixels over few channels."""
    problem.check()
    image = image_of(problem)
    if image is None or image.kernel != (7, 7) or problem.outputs[0].size == 0:
        return []
    if image.stride != (2, 2) or image.dilation != (1, 1) or image.groups > 1:
        return []
    if image.channels > _MOST_CHANNELS or image.outputs < _LEAST_OUTPUTS:
        return []
    seconds = _cycles(image, _cut(image, 1), 1) / CYCLES_PER_SECOND
    return [StridedWinogradCandidate("winograd 3x2 strided", problem, seconds, image)]


def _groups(image: Image) -> int:
    """Groups of output channels that are computed at once."""
    return math.ceil(image.outputs / _TILE.height)


def _stream_rows(cut: _Cut) -> int:
    """Rows of the image that a block of rows of tiles sees."""
    return 2 * _RESULTS * (cut.rows_per_block - 1) + 2 * _ROWS - 1


def _scratch(image: Image, cut: _Cut) -> tuple[int, int, int, int]:
    """Bytes of a thread's streams of pixels, of its transformed pixels, of the products of a column
    in a register tile, and of columns of products that were transformed once.

    The last vector of a row of tiles reaches into what follows, so that there is a vector more; so
    there is behind the streams, beside two rows of pixels that are two apart.
    """
    rows = image.channels * _stream_rows(cut)
    streams = 4 * (rows * 4 * cut.stream + 2 * (2 * cut.stream + LANES) + LANES)
    pixels = 4 * _POSITIONS * (4 * image.channels * cut.pitch + LANES)
    products = 4 * _ROWS * _TILE.height * _TILE.width * LANES
    columns = 4 * _RESULTS * _COLUMNS * _TILE.height * (cut.pitch + LANES)
    return streams, pixels, products, columns


@functools.cache
def _cut(image: Image, threads: int) -> _Cut:
    """The cut with the shortest time for the thread that has most to do."""
    return min(_cuts(image), key=lambda cut: _cycles(image, cut, threads))


def _cuts(image: Image) -> Iterator[_Cut]:
    rows, across = math.ceil(image.out_size[0] / _RESULTS), math.ceil(image.out_size[1] / 2)
    for row_blocks in range(1, rows + 1):
        yield _Cut(rows, across, row_blocks)


def _cycles(image: Image, cut: _Cut, threads: int) -> float:
    """Cycles of the thread that has most to do, roughly."""
    tasks = image.batch * cut.row_blocks
    row_vectors = cut.rows_per_block * math.ceil(cut.across / LANES)
    vectors = cut.pitch // LANES
    outputs = _groups(image) * _TILE.height
    products = 4 * image.channels * (1 / VECTORS_PER_CYCLE + 1 / _TILE.width / _TILE.height) + 3
    product = _POSITIONS * vectors * outputs * products
    splitting = 40 * image.channels * _stream_rows(cut) * cut.stream / LANES
    turning = (vectors + row_vectors) * 60 * outputs + row_vectors * 840 * image.channels
    cycles = product + splitting + turning / VECTORS_PER_CYCLE + 500
    if sum(_scratch(image, cut)) > KEPT_BYTES:
        cycles *= 1.3
    return math.ceil(tasks / threads) * cycles


# -- the kernel's body ---------------------------------------------------------------------------


def _turn_pixels() -> list[str]:
    """Lines that store ``B.T @ d @ B`` of the tiles' pixels d of one phase.

    The kernel of an odd phase has three taps: its last pixel meets no weight, and counts as zero.
    """
    lines = []
    for y in range(_ROWS):
        for x in range(_COLUMNS):
            place = f"place + {8 * y + 2 * (x % 2)} * stream + {4 * (x // 2)}"
            ends = (("rows", y == _ROWS - 1), ("columns", x == _COLUMNS - 1))
            mask = " & ".join(f"last_{name}" for name, is_last in ends if is_last)
            load = f"load_masked({place}, FLOAT32, {mask})" if mask else f"load({place}, FLOAT32)"
            lines.append(f"d{y}{x} = {load}")
    for x in range(_COLUMNS):
        pixels = [f"d{y}{x}" for y in range(_ROWS)]
        lines += _turned_rows(pixels, [f"t{y}{x}" for y in range(_ROWS)])
    for y in range(_ROWS):
        names = [f"r{x}" for x in range(_COLUMNS)]
        lines += _turned_columns([f"t{y}{x}" for x in range(_COLUMNS)], names)
        for x, name in enumerate(names):
            lines.append(f"store(target + {_COLUMNS * y + x} * position, {name})")
    return lines


def _turned_rows(d: Sequence[str], names: Sequence[str]) -> list[str]:
    """Lines that multiply six pixels by ``B.T`` of the rows, whose entries are the coefficients of
    the products of ``x - p`` of all points p but one, or of all."""
    return [
        # Of all points but 1 and -1, and of these and 0, also times x.
        f"others = fma({d[2]}, less, {d[3]}) - {d[1]}",
        f"moved = fma({d[3]}, less, {d[4]}) - {d[2]}",
        f"ones = {d[3]} - {d[1]}",
        f"further = {d[4]} - {d[2]}",
        f"{names[0]} = fma(ones, less, further - ({d[2]} - {d[0]}))",
        f"{names[1]} = moved + others",
        f"{names[2]} = moved - others",
        f"{names[3]} = fma(ones, half, further)",
        f"{names[4]} = further - (ones + ones)",
        f"{names[5]} = fma(further, less, {d[5]} - {d[3]} - ones)",
    ]


def _turned_columns(d: Sequence[str], names: Sequence[str]) -> list[str]:
    """Lines that multiply five pixels by ``B.T`` of the columns."""
    return [
        f"{names[3]} = {d[3]} - {d[1]}",
        f"{names[0]} = fma({d[0]} - {d[2]}, half, {names[3]})",
        f"{names[1]} = fma({d[2]} - {d[1]}, half, {d[3]})",
        f"{names[2]} = fma({d[1]}, half, fma({d[2]}, less, {d[3]}))",
        f"{names[4]} = fma({names[3]}, minus, {d[4]} - {d[2]})",
    ]


def _turn_products() -> list[str]:
    """Lines that store ``A.T`` of the rows times the sums of products of a column."""
    row = 4 * _TILE.height * _TILE.width
    return [
        *(f"s{y} = load(sums + {row * y} * LANES, FLOAT32)" for y in range(_ROWS)),
        "both = s1 + s2",
        "store(c, s0 + both + (s3 + s4))",
        "store(c + plane, fma(s4, minus, s1 - s2 + (s3 + s3)))",
        "store(c + 2 * plane, fma(s3, four, fma(s4, quarter, both + s5)))",
    ]


def _finish(epilogue: Epilogue) -> list[str]:
    """Lines that multiply columns of tiles by ``A`` of the columns, finish and store them."""
    lines = [
        f"t{y}{x} = load(origin + ({_RESULTS * _TILE.height * x} + {y}) * plane, FLOAT32)"
        for y in range(_RESULTS)
        for x in range(_COLUMNS)
    ]
    rows = [
        (f"t{y}0 + t{y}1 + t{y}2 + t{y}3", f"fma(t{y}3, half, t{y}1 - t{y}2 + t{y}4)")
        for y in range(_RESULTS)
    ]
    return [*lines, *result_lines(rows, epilogue)]


_BODY = """
<prologue>
streams = scratch + thread * thread_scratch
own_pixels = streams + streams_bytes
products = own_pixels + pixels_bytes
turned = products + products_bytes
evens = streams + channels * stream_rows * 4 * stream
odds = evens + 2 * stream + 4 * LANES
stream_vectors = stream // (4 * LANES)
half = broadcast(0.5, FLOAT32)
minus = broadcast(-0.5, FLOAT32)
less = broadcast(-1.5, FLOAT32)
four = broadcast(4.0, FLOAT32)
quarter = broadcast(0.25, FLOAT32)
nothing = broadcast(0.0, FLOAT32)
whole = mask_first(LANES, FLOAT32)
depth = 4 * channels
position = 4 * (depth * pitch + LANES)
plane = 4 * (pitch + LANES)
vectors = pitch // LANES
panels = (vectors + WIDTH - 1) // WIDTH
b_step = 4 * pitch
c_row = 4 * WIDTH * LANES
rows = HEIGHT
accumulate = False
<share>
while task < stop:
    image = task // row_blocks
    row_block = task - image * row_blocks
    first_row = row_block * rows_of_tiles // row_blocks
    last_row = (row_block + 1) * rows_of_tiles // row_blocks
    seen = 2 * (RESULTS * (last_row - first_row - 1) + ROWS) - 1
    # Rows of pixels become four streams of every fourth.
    channel = 0
    while channel < channels:
        number = 0
        while number < seen:
            line = 2 * RESULTS * first_row - top + number
            target = streams + (channel * stream_rows + number) * 4 * stream
            vector = 0
            if 0 <= line < height:
                place = x + 4 * (((image * channels + channel) * height + line) * width - left)
                while vector < 2 * stream_vectors:
                    first = 2 * vector * LANES - left
                    m0 = m1 = h0 = h1 = whole
                    if first < 0 or first + 2 * LANES >= width:
                        m0 = mask_between(first, 1, width, FLOAT32)
                        h0 = mask_between(first + LANES, 1, width, FLOAT32)
                        m1 = mask_between(first + 1, 1, width, FLOAT32)
                        h1 = mask_between(first + 1 + LANES, 1, width, FLOAT32)
                    origin = place + 8 * vector * LANES
                    store(evens + 4 * vector * LANES, load_even(origin, FLOAT32, m0, h0))
                    store(odds + 4 * vector * LANES, load_even(origin + 4, FLOAT32, m1, h1))
                    vector += 1
                vector = 0
                while vector < stream_vectors:
                    step = 8 * vector * LANES
                    into = target + 4 * vector * LANES
                    store(into, load_even(evens + step, FLOAT32, whole, whole))
                    store(into + stream, load_even(odds + step, FLOAT32, whole, whole))
                    store(into + 2 * stream, load_even(evens + step + 4, FLOAT32, whole, whole))
                    store(into + 3 * stream, load_even(odds + step + 4, FLOAT32, whole, whole))
                    vector += 1
            else:
                while vector < 4 * stream_vectors:
                    store(target + 4 * vector * LANES, nothing)
                    vector += 1
            number += 1
        channel += 1
    # Vectors reach beyond their row of tiles; what they spoil is written later.
    column = (across - 1) // LANES * LANES
    while column >= 0:
        channel = 0
        while channel < channels:
            phase = 0
            while phase < PHASES:
                odd_rows = phase // 2
                odd_columns = phase % 2
                last_rows = mask_first(LANES * (1 - odd_rows), FLOAT32)
                last_columns = mask_first(LANES * (1 - odd_columns), FLOAT32)
                row = first_row
                while row < last_row:
                    number = channel * stream_rows + 2 * RESULTS * (row - first_row)
                    place = streams + number * 4 * stream + 4 * column
                    place += (4 * odd_rows + odd_columns) * stream
                    target = own_pixels + 4 * (PHASES * channel + phase) * pitch
                    target += 4 * ((row - first_row) * across + column)
                    <turn pixels>
                    row += 1
                phase += 1
            channel += 1
        column -= LANES
    group = 0
    while group < groups:
        side = 0
        while side < COLUMNS:
            panel = 0
            while panel < panels:
                <vectors>
                columns = filled * LANES
                a = weight + 4 * (group * COLUMNS + side) * ROWS * depth * HEIGHT
                b = own_pixels + side * position + 4 * start * LANES
                c = products
                line = 0
                while line < ROWS:
                    <multiply>
                    a += 4 * depth * HEIGHT
                    b += COLUMNS * position
                    c += HEIGHT * c_row
                    line += 1
                output = 0
                while output < HEIGHT:
                    sums = products + output * c_row
                    c = turned + RESULTS * (HEIGHT * side + output) * plane + 4 * start * LANES
                    vector = 0
                    while vector < filled:
                        <turn products>
                        sums += 4 * LANES
                        c += 4 * LANES
                        vector += 1
                    output += 1
                panel += 1
            side += 1
        channel = group * HEIGHT
        while channel < min(outputs, (group + 1) * HEIGHT):
            result = y + 4 * (image * outputs + channel) * out_height * out_width
            row = first_row
            while row < last_row:
                column = 0
                while column < across:
                    origin = turned + RESULTS * (channel - group * HEIGHT) * plane
                    origin += 4 * ((row - first_row) * across + column)
                    <finish>
                    column += LANES
                row += 1
            channel += 1
        group += 1
    task += 1
"""
