"""Dense 3 x 3 convolutions in float32 with fewer multiplications.

Winograd's minimal filtering F(2 x 2, 3 x 3): tiles of 2 x 2 results are made from 4 x 4 pixels by
16 multiplications in place of 36 (A. Lavin and S. Gray, "Fast algorithms for convolutional neural
networks", 2016). Pixels, weights and products are transformed by small matrices of 0, 1, -1 and
1/2; between the transformations there are 16 matrix products of channels, in register tiles as in
`convolution`, with tiles of the image in the lanes of vectors.

Results are about as accurate as those of other kernels. Where a pixel is infinite or not a number,
so is every result of the tiles that contain it, and not only those that see it; and sums of four
pixels must not exceed the largest float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.kernels.epilogue import Epilogue
from graphopt.kernels.image import Image, image_epilogue, image_of
from graphopt.kernels.loops import SHARE, Arguments, indent
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

_TILE = TILES[0] if LANES == 16 else TILES[1]
_POSITIONS = 16
_CHUNK = 4
"""Register tiles of output channels whose products are kept before they are transformed back."""
_DEPTH = 128
"""Input channels whose products are summed before they are added to what is known: a few vectors of
so many stay in the first cache, and shorter sums are more accurate."""
_LEAST_CHANNELS = 16

WEIGHT_TRANSFORM = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
"""G of the paper: a kernel g becomes ``G @ g @ G.T``."""


@dataclass(frozen=True)
class _Cut:
    """How the work is cut into tasks: blocks of rows of tiles by chunks of output channels.

    A thread transforms the pixels of a block once for all chunks that are its share.
    """

    rows: int
    across: int
    row_blocks: int
    chunks: int

    @property
    def pitch(self) -> int:
        """Tiles of a block, up to whole vectors."""
        rows = math.ceil(self.rows / self.row_blocks)
        return math.ceil(rows * self.across / LANES) * LANES


class WinogradCandidate(FilteringCandidate):
    """Matrix products of all channels between the transformations."""

    _name = "winograd"

    def pack(self, constants: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        weight = constants[1]
        assert weight is not None
        image, tiles, height = self.image, _tiles(self.image), _TILE.height
        rows = np.zeros((image.groups, tiles * height, image.channels, 3, 3))
        rows[:, : image.outputs] = weight.reshape(image.groups, image.outputs, -1, 3, 3)
        turned = np.einsum("ik,gockl,jl->gijoc", WEIGHT_TRANSFORM, rows, WEIGHT_TRANSFORM)
        turned = turned.reshape(image.groups, _POSITIONS, tiles, height, image.channels)
        size = tiles * _POSITIONS * image.channels * height
        packed = aligned_empty((image.groups, size), np.float32)
        depth, start = _depth(image), 0
        for first in range(0, tiles, _CHUNK):
            for position in range(_POSITIONS):
                for channel in range(0, image.channels, depth):
                    block = turned[
                        :, position, first : first + _CHUNK, :, channel : channel + depth
                    ]
                    block = block.swapaxes(2, 3).reshape(image.groups, -1)
                    packed[:, start : start + block.shape[1]] = block
                    start += block.shape[1]
        return [packed]

    def _buffers(self, team: int) -> tuple[int, int]:
        return _scratch(self.image, _cut(self.image, team))

    def _arguments(self, team: int) -> tuple[Arguments, Epilogue]:
        cut = _cut(self.image, team)
        image, block = self.image, Arguments()
        pixels_bytes, products_bytes = _scratch(image, cut)
        values: dict[str, Argument] = {
            "x": Input(0), "weight": Packed(0), "y": Output(0), "scratch": Scratch(),
            "thread_scratch": pixels_bytes + products_bytes, "pixels_bytes": pixels_bytes,
            "groups": image.groups, "channels": image.channels, "outputs": image.outputs,
            "depth_channels": _depth(image), "height": image.size[0], "width": image.size[1],
            "out_height": image.out_size[0], "out_width": image.out_size[1],
            "top": image.start[0], "left": image.start[1],
            "rows_of_tiles": cut.rows, "across": cut.across, "pitch": cut.pitch,
            "row_blocks": cut.row_blocks, "tiles": _tiles(image), "chunks": cut.chunks,
            "tasks": image.batch * image.groups * cut.row_blocks * cut.chunks,
        }  # fmt: skip
        block.add_all(values)
        return block, image_epilogue(self.problem, image, block)

    def _lines(self, epilogue: Epilogue) -> list[str]:
        parts = {
            "prologue": epilogue.prologue(),
            "share": SHARE,
            "masks": [line for x in range(4) for line in _mask_lines(x)],
            "turn pixels": _turn_pixels(),
            "vectors": PANEL,
            "multiply": multiply_lines(_TILE, "4", f"{4 * _TILE.height}", padded=True),
            "turn products": _turn_products(epilogue),
        }
        sizes = {"HEIGHT": _TILE.height, "WIDTH": _TILE.width, "CHUNK": _CHUNK}
        return fill(_BODY, parts, sizes)


@register(ConvolutionProblem)
def candidates(problem: ConvolutionProblem) -> list[Candidate]:
    """For kernels of 3 x 3 that move by single pixels over enough channels to be worth it."""
    problem.check()
    image = image_of(problem)
    if image is None or image.kernel != (3, 3) or problem.outputs[0].size == 0:
        return []
    if image.stride != (1, 1) or image.dilation != (1, 1):
        return []
    if min(image.channels, image.outputs) < _LEAST_CHANNELS:
        return []
    seconds = _cycles(image, _cut(image, 1), 1) / CYCLES_PER_SECOND
    return [WinogradCandidate("winograd 2x2", problem, seconds, image)]


def _tiles(image: Image) -> int:
    """Register tiles of output channels."""
    return math.ceil(image.outputs / _TILE.height)


def _scratch(image: Image, cut: _Cut) -> tuple[int, int]:
    """Bytes of a thread's transformed pixels, and of its products.

    The last vector of a row of tiles reaches into what follows, so that there is a vector more.
    """
    products = _CHUNK * _TILE.height
    return tuple(
        4 * (_POSITIONS * (channels * cut.pitch + LANES) + LANES)
        for channels in (image.channels, products)
    )  # type: ignore[return-value]


def _depth(image: Image) -> int:
    """Input channels of one block of depth."""
    return math.ceil(image.channels / math.ceil(image.channels / _DEPTH))


@functools.cache
def _cut(image: Image, threads: int) -> _Cut:
    """The cut with the shortest time for the thread that has most to do."""
    return min(_cuts(image), key=lambda cut: _cycles(image, cut, threads))


def _cuts(image: Image) -> Iterator[_Cut]:
    rows, across = (math.ceil(size / 2) for size in image.out_size)
    chunks = math.ceil(_tiles(image) / _CHUNK)
    for row_blocks in range(1, rows + 1):
        yield _Cut(rows, across, row_blocks, chunks)


def _cycles(image: Image, cut: _Cut, threads: int) -> float:
    """Cycles of the thread that has most to do, roughly."""
    blocks = image.batch * image.groups * cut.row_blocks
    tasks = math.ceil(blocks * cut.chunks / threads)
    rows = math.ceil(cut.rows / cut.row_blocks)
    row_vectors = rows * math.ceil(cut.across / LANES)
    tiles = _tiles(image)
    vectors = cut.pitch // LANES
    panels = math.ceil(vectors / _TILE.width)
    per_step = max(_TILE.height * vectors / VECTORS_PER_CYCLE, (panels * 4 + vectors))
    if _scratch(image, cut)[0] > KEPT_BYTES:
        per_step *= 1.3
    # Every block of pixels reads all weights, mostly from the third cache.
    per_step = max(per_step, _TILE.height / 2)
    product = _POSITIONS * tiles * (image.channels * per_step + 4 * _TILE.height * vectors)
    pixels = row_vectors * 60 * image.channels / VECTORS_PER_CYCLE + 500
    products = row_vectors * 50 * tiles * _TILE.height / VECTORS_PER_CYCLE
    return math.ceil(tasks / cut.chunks) * pixels + tasks / cut.chunks * (product + products)


def _mask_lines(x: int) -> list[str]:
    """Lines that make the masks of the columns ``x`` of tiles, which are every other pixel's."""
    return [
        f"m{x} = mask_between(first + {x}, 1, width, FLOAT32)",
        f"h{x} = mask_between(first + {x} + LANES, 1, width, FLOAT32)",
    ]


def _turn_pixels() -> list[str]:
    """Lines that store ``B.T @ d @ B`` of the tiles' pixels d, after Lavin and Gray."""
    lines = []
    for y in range(4):
        load = [f"d{y}{x} = load_even(place + {4 * x}, FLOAT32, m{x}, h{x})" for x in range(4)]
        zero = [f"d{y}{x} = broadcast(0.0, FLOAT32)" for x in range(4)]
        lines += [f"if 0 <= line + {y} < height:", *indent(1, load), "else:", *indent(1, zero)]
        lines.append("place += 4 * width")
    lines += [f"t{y}{x} = {_combined('d{0}' + str(x), y)}" for y in range(4) for x in range(4)]
    for y in range(4):
        for x in range(4):
            value = _combined("t" + str(y) + "{0}", x)
            lines.append(f"store(target + {4 * y + x} * position, {value})")
    return lines


def _combined(name: str, row: int) -> str:
    """A row of ``B.T`` times what ``name`` calls 0 to 3."""
    pairs = ("{0} - {2}", "{1} + {2}", "{2} - {1}", "{1} - {3}")
    return pairs[row].format(*(name.format(index) for index in range(4)))


def _turn_products(epilogue: Epilogue) -> list[str]:
    """Lines that make ``A.T @ m @ A`` of the tiles' products m, finish it and store it."""
    lines = [
        f"p{y}{x} = load(origin + {4 * y + x} * position, FLOAT32)"
        for y in range(4)
        for x in range(4)
    ]
    for x in range(4):
        lines += [f"t0{x} = p0{x} + p1{x} + p2{x}", f"t1{x} = p1{x} - p2{x} - p3{x}"]
    rows = [(f"t{y}0 + t{y}1 + t{y}2", f"t{y}1 - t{y}2 - t{y}3") for y in range(2)]
    return [*lines, *result_lines(rows, epilogue)]


_BODY = """
<prologue>
own_pixels = scratch + thread * thread_scratch
own_products = own_pixels + pixels_bytes
c_row = 4 * pitch
b_step = 4 * pitch
rows = HEIGHT
vectors = pitch // LANES
panels = (vectors + WIDTH - 1) // WIDTH
<share>
while task < stop:
    first_chunk = task % chunks
    last_chunk = min(chunks, first_chunk + stop - task)
    number = task // chunks // row_blocks
    row_block = task // chunks - number * row_blocks
    image = number // groups
    group = number - image * groups
    first_row = row_block * rows_of_tiles // row_blocks
    last_row = (row_block + 1) * rows_of_tiles // row_blocks
    # Vectors reach beyond their row of tiles; what they spoil is written later.
    position = 4 * (channels * pitch + LANES)
    column = (across - 1) // LANES * LANES
    while column >= 0:
        first = 2 * column - left
        <masks>
        channel = 0
        while channel < channels:
            origin = x + 4 * ((number * channels + channel) * height * width + first)
            target = own_pixels + 4 * (channel * pitch + column)
            row = first_row
            while row < last_row:
                line = 2 * row - top
                place = origin + 4 * line * width
                <turn pixels>
                target += 4 * across
                row += 1
            channel += 1
        column -= LANES
    first_tile = first_chunk * CHUNK
    last_tile = min(last_chunk * CHUNK, tiles)
    while first_tile < last_tile:
        chunk_tiles = min(last_tile - first_tile, CHUNK)
        a = weight + 64 * HEIGHT * channels * (group * tiles + first_tile)
        position = 4 * (CHUNK * HEIGHT * pitch + LANES)
        number_of_position = 0
        while number_of_position < 16:
            pixels = own_pixels + number_of_position * 4 * (channels * pitch + LANES)
            products = own_products + number_of_position * position
            channel = 0
            while channel < channels:
                depth = min(channels - channel, depth_channels)
                accumulate = channel > 0
                tile = 0
                while tile < chunk_tiles:
                    panel = 0
                    while panel < panels:
                        <vectors>
                        columns = filled * LANES
                        b = pixels + 4 * (channel * pitch + LANES * start)
                        c = products + 4 * (tile * HEIGHT * pitch + LANES * start)
                        <multiply>
                        panel += 1
                    a += 4 * HEIGHT * depth
                    tile += 1
                channel += depth_channels
            number_of_position += 1
        inner = 0
        inner_channels = min(outputs - first_tile * HEIGHT, chunk_tiles * HEIGHT)
        while inner < inner_channels:
            channel = group * outputs + first_tile * HEIGHT + inner
            result = y + 4 * (image * groups * outputs + channel) * out_height * out_width
            row = first_row
            while row < last_row:
                column = 0
                while column < across:
                    place = inner * pitch + (row - first_row) * across + column
                    origin = own_products + 4 * place
                    <turn products>
                    column += LANES
                row += 1
            inner += 1
        first_tile += CHUNK
    task += last_chunk - first_chunk
"""
