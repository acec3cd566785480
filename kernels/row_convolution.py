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
from graphopt.kernels.direct_convolution import (
    TILES,
    packed_tiles,
    product_lines,
    tile_cycles,
    tile_parts,
)
from graphopt.kernels.epilogue import Epilogue
from graphopt.kernels.image import Image, image_epilogue, image_of
from graphopt.kernels.loops import Arguments, kernel_text
from graphopt.kernels.problem import ConvolutionProblem
from graphopt.kernels.registry import (
    Argument,
    Candidate,
    Input,
    Output,
    Packed,
    Scratch,
    Step,
    register,
)
from graphopt.kernels.simd import LANES
from graphopt.kernels.tile import (
    CYCLES_PER_SECOND,
    VOCABULARY,
    WORTH_SHARING,
    TileShape,
    fill,
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
    def _block_rows(self) -> int:
        return min(_BLOCK_ROWS, self.image.out_size[0])

    @property
    def _channel_bytes(self) -> int:
        return self.image.rows.needed(self._block_rows) * self.image.rows.pitch

    def packing(self) -> tuple[TileShape]:
        return (self.tile,)

    def pack(self, constants: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        weight = constants[1]
        assert weight is not None
        return [packed_tiles(weight, self.image, self.tile)]

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
            "channels": image.channels, "outputs": image.outputs,
            "tiles": math.ceil(image.outputs / self.tile.height),
            "plane": 4 * image.plane, "out_plane": 4 * image.out_plane,
            "height": image.size[0], "width": image.size[1],
            "out_height": image.out_size[0], "out_width": image.out_size[1],
            "kernel_height": image.kernel[0], "window_height": image.rows.needed(1),
            "row_step": image.dilation[0] * image.rows.pitch, "stride_height": image.stride[0],
            "top": image.start[0], "left": image.start[1],
            "pitch": image.rows.pitch, "phase_pitch": image.rows.phase_pitch,
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
    if image.channels * image.rows.needed(1) * image.rows.pitch > _MOST_BYTES:
        return []
    # The last panel of a row ends with it, so that all are whole.
    fitting = [tile for tile in TILES if tile.width * LANES <= image.out_size[1]]
    if not fitting:
        return []
    tile = min(fitting, key=lambda tile: _cycles(image, tile))
    seconds = _cycles(image, tile) / CYCLES_PER_SECOND
    return [RowCandidate(f"convolution by rows {tile}", problem, seconds, image, tile)]


def _cycles(image: Image, tile: TileShape) -> float:
    """Cycles of all tasks together, roughly."""
    tiles = math.ceil(image.outputs / tile.height)
    panels = math.ceil(image.out_size[1] / (tile.width * LANES))
    # Most loads touch two lines of the cache.
    rows = tiles * panels * tile_cycles(tile, image.channels * image.taps, lines=2)
    copied = image.rows.needed(_BLOCK_ROWS) / _BLOCK_ROWS * image.rows.pitch / (4 * LANES)
    copy = image.channels * copied * _COPY_CYCLES
    return image.batch * image.out_size[0] * (rows + copy)


def _lines(image: Image, tile: TileShape, epilogue: Epilogue) -> list[str]:
    """The kernel's body."""
    products = []
    for column in range(image.kernel[1]):
        phase, more = image.rows.place(column)
        pixels = f"place + {phase} * phase_pitch + {more}"
        products += product_lines(tile, f"w + {4 * tile.height * column}", pixels)
    parts = tile_parts(tile, epilogue) | {"products": products}
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
