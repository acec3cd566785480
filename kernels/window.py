"""Sliding windows over single planes: depthwise convolutions of any strides and dilations.

The rows that a block of output rows needs are copied into scratch memory with their padding, the
columns sorted by their remainder modulo the stride. There every position of the window is one
unmasked load, at a distance that a table holds, for as many output rows at once as a strip has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.kernels import source
from graphopt.kernels.epilogue import Epilogue, ExtraOperand
from graphopt.kernels.expression import Expression
from graphopt.kernels.loops import SHARE, Arguments, kernel_text
from graphopt.kernels.operand import Operand
from graphopt.kernels.padded_rows import PaddedRows
from graphopt.kernels.registry import (
    Argument,
    Input,
    Output,
    Packed,
    Scratch,
    Step,
    aligned_empty,
)
from graphopt.kernels.simd import LANES
from graphopt.kernels.tile import VOCABULARY, fill

_BLOCK_BYTES = 2**17
"""Padded rows that a task keeps at a time."""


_TASKS = 32
"""Tasks that are enough to be shared evenly: fewer planes are cut into bands of rows."""


def bands_of(planes: int, strips: int) -> int:
    """Into how many bands each of so many planes is cut, whose rows come in ``strips``."""
    return min(strips, math.ceil(_TASKS / planes))


@dataclass(frozen=True)
class Windows:
    """Windows over ``batch`` images of ``channels`` planes of ``size``, by (vertical, horizontal).

    Each plane yields ``results`` outputs of ``out_size`` side by side. ``start`` is the padding
    above and on the left. ``strip`` output rows are made at once.
    """

    batch: int
    channels: int
    results: int
    size: tuple[int, int]
    out_size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    start: tuple[int, int]
    strip: int

    @property
    def planes(self) -> int:
        """Planes of all images."""
        return self.batch * self.channels

    @property
    def taps(self) -> int:
        """Positions of a window."""
        return math.prod(self.kernel)

    @property
    def rows(self) -> PaddedRows:
        """How the rows of a plane are copied."""
        columns = LANES * math.ceil(self.out_size[1] / LANES)
        return PaddedRows(columns, self.kernel, self.stride, self.dilation)

    @property
    def block_rows(self) -> int:
        """Output rows of a task, a multiple of the strip."""
        strips = math.ceil(self.out_size[0] / self.strip)
        fitting = _BLOCK_BYTES // self.rows.pitch - self.rows.needed(1)
        blocks = math.ceil(strips / max(fitting // (self.strip * self.stride[0]), 1))
        return math.ceil(strips / blocks) * self.strip

    @property
    def scratch_bytes(self) -> int:
        """Scratch memory of one thread."""
        return self.rows.needed(self.block_rows) * self.rows.pitch

    @property
    def cycles(self) -> float:
        """Cycles of all tasks together, roughly."""
        vectors = math.ceil(self.out_size[1] / LANES)
        strips = math.ceil(self.out_size[0] / self.strip)
        windows = self.results * strips * vectors * (self.taps * (1 + self.strip) + 5 * self.strip)
        blocks = math.ceil(self.out_size[0] / self.block_rows)
        copied = blocks * self.rows.needed(self.block_rows) * self.rows.pitch / (4 * LANES)
        return self.planes * (windows + 2 * copied + 50)

    def offsets(self) -> np.ndarray:
        """Bytes from a window's first position to each of the others, int64."""
        table = aligned_empty((self.taps,), np.int64)
        for tap in range(self.taps):
            table[tap] = self.rows.tap(*divmod(tap, self.kernel[1]))
        return table

    def step(self, extras: Extras, parallel: bool) -> Step:
        """The step that multiplies all windows of input 0 by the weights, input 1."""
        block = Arguments()
        blocks = math.ceil(self.out_size[0] / self.block_rows)
        values: dict[str, Argument] = {
            "x": Input(0), "weight": Input(1), "y": Output(0),
            "offsets": Packed(0), "scratch": Scratch(),
            "thread_scratch": self.scratch_bytes, "tasks": self.planes * blocks, "blocks": blocks,
            "block_rows": self.block_rows, "results": self.results, "taps": self.taps,
            "channels": self.channels * self.results,
            "window_height": self.rows.needed(1), "height": self.size[0], "width": self.size[1],
            "out_height": self.out_size[0], "out_width": self.out_size[1],
            "stride_height": self.stride[0], "stride_width": self.stride[1],
            "top": self.start[0], "left": self.start[1],
            "pitch": self.rows.pitch, "phase_pitch": self.rows.phase_pitch,
        }  # fmt: skip
        block.add_all(values | extras.arguments(self.out_size[1]))
        epilogue = Epilogue(extras.expression, extras.operands, len(block.names))
        strip = range(self.strip)
        value = "load(place + {} * stride_height * pitch, FLOAT32)"
        parts = {
            "prologue": epilogue.prologue(),
            "share": SHARE,
            "begin": [f"sum{row} = broadcast(0.0, FLOAT32)" for row in strip],
            "multiply": [f"sum{row} = fma({value.format(row)}, factor, sum{row})" for row in strip],
            "store": [
                line
                for row in strip
                for line in (
                    f"if rows > {row}:",
                    f"    store_first(c + {row} * c_row + 4 * column, sum{row}, mask)",
                )
            ],
            "epilogue": [*extras.starts(), *epilogue.lines()],
        }
        lines = fill(_BODY, parts, {"STRIP": self.strip})
        text = kernel_text(block, lines, VOCABULARY, epilogue.functions())
        entry = source.build(f"depthwise_window_{self.strip}", text)
        return Step(entry, (*block.values, *epilogue.immediates), parallel, block.tasks)


@dataclass(frozen=True)
class Extras:
    """An epilogue, and the inputs of the problem from number ``first`` on that it reads.

    ``strides`` are those of each by (image, channel, pixel).
    """

    expression: Expression | None
    operands: tuple[ExtraOperand, ...]
    strides: tuple[tuple[int, int, int], ...]
    first: int

    @staticmethod
    def of(
        expression: Expression | None,
        inputs: Sequence[Operand],
        strides: Sequence[tuple[int, int, int]],
        first: int,
    ) -> Extras:
        """For a problem's inputs."""
        operands = tuple(
            ExtraOperand(operand.dtype, along=walk[2] != 0)
            for operand, walk in zip(inputs[first:], strides, strict=True)
        )
        return Extras(expression, operands, tuple(strides), first)

    def arguments(self, width: int) -> dict[str, Argument]:
        """What the kernel is told of them; output rows have ``width`` elements."""
        values: dict[str, Argument] = {}
        for index, (operand, walk) in enumerate(zip(self.operands, self.strides, strict=True)):
            values[f"extra{index}"] = Input(self.first + index)
            values[f"extra{index}_image"] = walk[0] * operand.width
            values[f"extra{index}_channel"] = walk[1] * operand.width
            values[f"e{index}_row"] = walk[2] * operand.width * width
        return values

    def starts(self) -> list[str]:
        """Lines that find what belongs to the strip from ``row`` on."""
        return [
            f"e{index} = extra{index} + image * extra{index}_image"
            f" + channel * extra{index}_channel + row * e{index}_row"
            for index in range(len(self.operands))
        ]


_BODY = """
<prologue>
c_row = 4 * out_width
own_scratch = scratch + thread * thread_scratch
<share>
while task < stop:
    plane = task // blocks
    first_row = (task - plane * blocks) * block_rows
    last_row = min(first_row + block_rows, out_height)
    needed = (last_row - first_row - 1) * stride_height + window_height
    origin = x + 4 * plane * height * width
    pad_rows(
        own_scratch, pitch, needed, phase_pitch, origin, height, width,
        top - first_row * stride_height, left, stride_width,
    )
    number = plane * results
    while number < (plane + 1) * results:
        image = number // channels
        channel = number - image * channels
        own_weight = weight + 4 * taps * channel
        row = first_row
        while row < last_row:
            rows = min(last_row - row, STRIP)
            columns = out_width
            c = y + number * out_height * c_row + row * c_row
            corner = own_scratch + (row - first_row) * stride_height * pitch
            column = 0
            while column < columns:
                mask = mask_first(columns - column, FLOAT32)
                <begin>
                tap = 0
                while tap < taps:
                    place = corner + read(offsets + 8 * tap, INT64)
                    factor = broadcast(read(own_weight + 4 * tap, FLOAT32), FLOAT32)
                    <multiply>
                    tap += 1
                <store>
                corner += 4 * LANES
                column += LANES
            <epilogue>
            row += STRIP
        number += 1
    task += 1
"""
