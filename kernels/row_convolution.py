"""Dense convolutions of few input channels in float32, such as the first of a network.

The rows of the image that a few output rows need are copied with zeros around them, columns that
are a stride apart side by side. What lies under a position of the kernel is then a plain vector of
a row, so that nothing is copied once per position as `convolution` does for its panels, and a
register tile of output channels by pixels is finished in registers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.kernels import panel, source
from graphopt.kernels.convolution import Image, epilogue_starts, image_epilogue, image_of
from graphopt.kernels.epilogue import Epilogue
from graphopt.kernels.loops import SHARE, Arguments, kernel_text
from graphopt.kernels.problem import ConvolutionProblem
from graphopt.kernels.registry import (
    Argument,
    Candidate,
    Input,
    Output,
    Packed,
    Scratch,
    Step,
    aligned_empty,
    register,
)
from graphopt.kernels.simd import LANES
from graphopt.kernels.tile import (
    CYCLES_PER_SECOND,
    VECTORS_PER_CYCLE,
    VOCABULARY,
    WORTH_SHARING,
    TileShape,
    fill,
    product_lines,
)

_TILES = (
    (TileShape(8, 3), TileShape(6, 4), TileShape(4, 7))
    if LANES == 16
    else (TileShape(4, 3), TileShape(6, 2))
)
_MOST_CHANNELS = 16
_MOST_COLUMNS = 7
"""Columns of a kernel, whose products are spelled out."""
_MOST_BYTES = 24 * 2**10
"""Bytes of the rows that an output row needs: they stay in the first cache."""
_BLOCK_ROWS = 4
"""Output rows of a task, whose rows of the image are copied at once."""
_COPY_CYCLES = 4
"""Cycles to copy one vector of a row."""


@dataclass(frozen=True)
class RowCandidate(Candidate):
    """One shape of register tile."""

    problem: ConvolutionProblem
    image: Image
    tile: TileShape

    @property
    def _tiles(self) -> int:
        return math.ceil(self.image.outputs / self.tile.height)

    @property
    def _block_rows(self) -> int:
        return min(_BLOCK_ROWS, self.image.out_size[0])

    @property
    def _channel_bytes(self) -> int:
        return _rows_needed(self.image, self._block_rows) * _pitch(self.image)

    def packing(self) -> tuple[TileShape]:
        return (self.tile,)

    def pack(self, constants: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        weight = constants[1]
        assert weight is not None
        image, height = self.image, self.tile.height
        rows = np.zeros((self._tiles * height, image.channels * image.taps), np.float32)
        rows[: image.outputs] = weight.reshape(image.outputs, -1)
        packed = aligned_empty((self._tiles, rows.shape[1], height), np.float32)
        packed[...] = rows.reshape(self._tiles, height, -1).swapaxes(1, 2)
        return [packed]

    def scratch_bytes(self, threads: int) -> int:
        return threads * self.image.channels * self._channel_bytes

    def build(self, threads: int) -> tuple[Step, ...]:
        block, epilogue = self._arguments()
        text = kernel_text(
            block, _lines(self.image, self.tile, epilogue), VOCABULARY, epilogue.functions()
        )
        entry = source.build(f"row_convolution_{self.tile}", text)
        parallel = threads > 1 and self.estimate > WORTH_SHARING
        return (Step(entry, (*block.values, *epilogue.immediates), parallel, block.tasks),)

    def _arguments(self) -> tuple[Arguments, Epilogue]:
        image, block = self.image, Arguments()
        blocks = math.ceil(image.out_size[0] / self._block_rows)
        values: dict[str, Argument] = {
            "x": Input(0), "weight": Packed(0), "y": Output(0), "scratch": Scratch(),
            "pad": source.shared(panel.pad_rows).address,
            "thread_scratch": self.scratch_bytes(1), "channel_bytes": self._channel_bytes,
            "channels": image.channels, "outputs": image.outputs, "tiles": self._tiles,
            "plane": 4 * image.plane, "out_plane": 4 * image.out_plane,
            "height": image.size[0], "width": image.size[1],
            "out_height": image.out_size[0], "out_width": image.out_size[1],
            "kernel_height": image.kernel[0], "window_height": _rows_needed(image, 1),
            "row_step": image.dilation[0] * _pitch(image), "stride_height": image.stride[0],
            "top": image.start[0], "left": image.start[1],
            "pitch": _pitch(image), "phase_pitch": _phase_pitch(image),
            "block_rows": self._block_rows, "blocks": blocks, "tasks": image.batch * blocks,
        }  # fmt: skip
        block.add_all(values)
        return block, image_epilogue(self.problem, image, block)


@register(ConvolutionProblem)
def candidates(problem: ConvolutionProblem) -> list[Candidate]:
    """The tile that fits the image best, for kernels of several positions on few channels."""
    problem.check()
    image = image_of(problem, padded=True)
    if image is None or image.groups != 1 or image.channels > _MOST_CHANNELS:
        return []
    if problem.outputs[0].size == 0 or image.taps == 1 or image.kernel[1] > _MOST_COLUMNS:
        return []
    if image.channels * _rows_needed(image, 1) * _pitch(image) > _MOST_BYTES:
        return []
    # The last panel of a row ends with it, so that all are whole.
    fitting = [tile for tile in _TILES if tile.width * LANES <= image.out_size[1]]
    found: list[Candidate] = []
    for tile in sorted(fitting, key=lambda tile: _cycles(image, tile))[:1]:
        seconds = _cycles(image, tile) / CYCLES_PER_SECOND
        found.append(RowCandidate(f"convolution by rows {tile}", problem, seconds, image, tile))
    return found


def _rows_needed(image: Image, rows: int) -> int:
    """Rows of the image that ``rows`` output rows need."""
    return (rows - 1) * image.stride[0] + (image.kernel[0] - 1) * image.dilation[0] + 1


def _phase_pitch(image: Image) -> int:
    """Bytes of the columns of a row that have one remainder modulo the stride."""
    reach = (image.kernel[1] - 1) * image.dilation[1] // image.stride[1]
    return 4 * LANES * math.ceil((image.out_size[1] + reach) / LANES)


def _pitch(image: Image) -> int:
    """Bytes of a copied row."""
    return image.stride[1] * _phase_pitch(image)


def _cycles(image: Image, tile: TileShape) -> float:
    """Cycles of all tasks together, roughly."""
    tiles = math.ceil(image.outputs / tile.height)
    panels = math.ceil(image.out_size[1] / (tile.width * LANES))
    # Most loads touch two lines of the cache.
    loads = (2 * tile.width + tile.height / 2) / VECTORS_PER_CYCLE
    step = max(tile.height * tile.width / VECTORS_PER_CYCLE, loads) * 1.03
    finish = 4 * tile.height * tile.width / VECTORS_PER_CYCLE + 15
    rows = tiles * panels * (image.channels * image.taps * step + finish)
    copied = _rows_needed(image, _BLOCK_ROWS) / _BLOCK_ROWS * _pitch(image) / (4 * LANES)
    copy = image.channels * copied * _COPY_CYCLES
    return image.batch * image.out_size[0] * (rows + copy)


def _lines(image: Image, tile: TileShape, epilogue: Epilogue) -> list[str]:
    """The kernel's body."""
    rows, columns = range(tile.height), range(tile.width)
    sums = ", ".join(f"s{row}_{v}" for row in rows for v in columns)
    products = []
    for position in range(image.kernel[1]):
        place, phase = divmod(position * image.dilation[1], image.stride[1])
        pixels = f"place + {phase} * phase_pitch + {4 * place}"
        products += product_lines(tile, f"w + {4 * tile.height * position}", pixels)
    parts = {
        "prologue": epilogue.prologue(),
        "share": SHARE,
        "zero": [f"s{row}_{v} = broadcast(0.0, FLOAT32)" for row in rows for v in columns],
        "products": products,
        "starts": epilogue_starts(epilogue),
        "finish": [
            epilogue.tile_line(f"({sums})", tile.width, tile.width, str(tile.width * LANES))
        ],
    }
    sizes = {
        "HEIGHT": tile.height,
        "PIXELS": tile.width * LANES,
        "COLUMNS": image.kernel[1],
        "ACROSS": image.stride[1],
    }
    return fill(_BODY, parts, sizes)


_BODY = """
<prologue>
c_row = out_plane
copy = scratch + thread * thread_scratch
<share>
while task < stop:
    image = task // blocks
    first_row = (task - image * blocks) * block_rows
    last_row = min(first_row + block_rows, out_height)
    copied = (last_row - first_row - 1) * stride_height + window_height
    number = 0
    while number < channels:
        call_kernel(pad, (
            copy + number * channel_bytes, pitch, copied, phase_pitch,
            x + (image * channels + number) * plane, height, width,
            top - first_row * stride_height, left, ACROSS,
        ))
        number += 1
    row = first_row
    while row < last_row:
        first_line = copy + (row - first_row) * stride_height * pitch
        tile = 0
        while tile < tiles:
            channel = tile * HEIGHT
            rows = outputs - channel
            column = 0
            while column < out_width:
                first = min(column, out_width - PIXELS)
                w = weight + 4 * channel * channels * kernel_height * COLUMNS
                line = first_line + 4 * first
                <zero>
                number = 0
                while number < channels:
                    place = line
                    down = 0
                    while down < kernel_height:
                        <products>
                        w += 4 * HEIGHT * COLUMNS
                        place += row_step
                        down += 1
                    line += channel_bytes
                    number += 1
                start = row * out_width + first
                c = y + (image * outputs + channel) * out_plane + 4 * start
                <starts>
                <finish>
                column += PIXELS
            tile += 1
        row += 1
    task += 1
"""
