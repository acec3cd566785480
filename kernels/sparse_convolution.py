"""Convolutions with many zero weights in float32, of one or two spatial dimensions, any groups.

Like the dense convolution (`convolution`), this is a product of the weights and a panel of the
pixels under the kernel, with output pixels in the lanes of vectors. Here the weights are a stream:
for each output channel the offsets of its non-zero columns in the panel, and their values (compare
E. Elsen, M. Dukhan, T. Gale and K. Simonyan, "Fast sparse convnets", 2020). Each non-zero costs one
multiplication per vector of pixels, and a load, since other channels have other columns: so the
panel should stay in the first cache. Where it is too deep, it is cut into blocks of depth, between
which the sums wait in scratch memory. In each block, channels are sorted by their number of
non-zeros, so that loops of equal length follow one another and end as the CPU predicts.

Where neighbouring channels share their columns (blocks of rows were pruned), they are computed
together and share the loads as well.

A weight that is zero multiplies nothing, so that an infinity or NaN in the image reaches only the
outputs whose weights for it are not zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.kernels import source
from graphopt.kernels.convolution import Image, image_of, pack_cycles
from graphopt.kernels.loops import SHARE, Arguments, indent, kernel_text
from graphopt.kernels.problem import ConstantOperand, ConvolutionProblem
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
    Epilogue,
    ExtraOperand,
    fill,
)
from graphopt.kernels.zeros import NEIGHBOURS, ZeroPattern, group_rows

_VECTOR_BYTES = 4 * LANES
_FIRST_CACHE = 26 * 1024
"""Bytes of a panel that stay in the first cache, beside what else passes through it."""
_PANEL_BYTES = (_FIRST_CACHE, 2 * _FIRST_CACHE)
"""Sizes of panels to try: more than stays in the first cache means fewer blocks of depth."""
_WIDTHS = (
    {1: (3, 4, 5, 7), 2: (4, 5, 7), 4: (4, 5)} if LANES == 16 else {1: (4, 6), 2: (4,), 4: (2,)}
)
"""Vectors of pixels of a panel, by rows that share their columns."""
_AHEAD = 2048
"""Bytes of a stream that are fetched in advance: it comes from the main memory once a call."""
_TASKS = 16
"""Tasks that are enough to be shared evenly: fewer panels are cut into parts of their outputs."""
_LEAST_PART = 8
"""Row groups of a part at least."""
_WORTH_SHARING_COLUMNS = 1.2
"""How many more products with rows taken together are made up for by fewer loads."""


@dataclass(frozen=True)
class Schedule:
    """``rows`` output channels at once, ``width`` vectors of pixels, ``channels`` per block."""

    rows: int
    width: int
    channels: int

    @property
    def step(self) -> int:
        """Bytes of a row of the panel."""
        return self.width * _VECTOR_BYTES


@dataclass(frozen=True)
class SparseConvolutionCandidate(Candidate):
    """One schedule."""

    problem: ConvolutionProblem
    image: Image
    schedule: Schedule

    @property
    def _blocks(self) -> int:
        """Blocks of depth."""
        return math.ceil(self.image.channels / self.schedule.channels)

    @property
    def _panels(self) -> int:
        return math.ceil(self.image.pixels / (self.schedule.width * LANES))

    @property
    def _row_groups(self) -> int:
        return math.ceil(self.image.outputs / self.schedule.rows)

    @property
    def _parts(self) -> int:
        """Parts of the output channels, the least that a thread computes of a panel."""
        panels = self._panels * self.image.batch * self.image.groups
        return max(min(self._row_groups // _LEAST_PART, math.ceil(_TASKS / panels)), 1)

    def pack(self, constants: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        weight = constants[1]
        assert weight is not None
        image = self.image
        grouped = weight.reshape(image.groups, image.outputs, image.channels, image.taps)
        streams = []
        for group in grouped:
            for first in range(0, image.channels, self.schedule.channels):
                block = group[:, first : first + self.schedule.channels]
                matrix = block.transpose(0, 2, 1).reshape(image.outputs, -1)
                streams += _streams(matrix, self.schedule, self._parts)
        starts = aligned_empty((len(streams),), np.int64)
        starts[:] = np.cumsum([0, *(4 * len(stream) for stream in streams[:-1])])
        words = aligned_empty((sum(map(len, streams)),), np.int32)
        np.concatenate(streams, out=words)
        return [starts, words]

    def scratch_bytes(self, threads: int) -> int:
        return self._team(threads) * self._thread_scratch

    @property
    def _panel_bytes(self) -> int:
        return self.schedule.channels * self.image.taps * self.schedule.step

    @property
    def _thread_scratch(self) -> int:
        rows = self._row_groups * self.schedule.rows if self._blocks > 1 else 0
        return self._panel_bytes + rows * self.schedule.step

    def _team(self, threads: int) -> int:
        return threads if self.estimate > WORTH_SHARING else 1

    def build(self, threads: int) -> tuple[Step, ...]:
        team = self._team(threads)
        block, epilogue = self._arguments()
        name = f"sparse_convolution_{self.schedule.rows}x{self.schedule.width}"
        text = kernel_text(block, _lines(self.schedule, epilogue), VOCABULARY)
        entry = source.build(name, text)
        return (Step(entry, (*block.values, *epilogue.immediates), team > 1),)

    def _arguments(self) -> tuple[Arguments, Epilogue]:
        image, block = self.image, Arguments()
        values: dict[str, Argument] = {
            "x": Input(0), "starts": Packed(0), "words": Packed(1), "y": Output(0),
            "scratch": Scratch(), "thread_scratch": self._thread_scratch,
            "panel_bytes": self._panel_bytes,
            "groups": image.groups, "channels": image.channels, "outputs": image.outputs,
            "height": image.size[0], "width": image.size[1],
            "plane": 4 * math.prod(image.size), "out_plane": 4 * image.pixels,
            "out_width": image.out_size[1], "pixels": image.pixels,
            "kernel_height": image.kernel[0], "kernel_width": image.kernel[1],
            "stride_height": image.stride[0], "stride_width": image.stride[1],
            "dilation_height": image.dilation[0], "dilation_width": image.dilation[1],
            "top": image.start[0], "left": image.start[1],
            "panels": self._panels, "depth_channels": self.schedule.channels,
            "blocks": self._blocks, "parts": self._parts,
            "tasks": image.batch * image.groups * self._panels * self._parts,
        }  # fmt: skip
        for name, value in values.items():
            block.add(name, value)
        extras = []
        for index, (operand, strides) in enumerate(
            zip(self.problem.inputs[2:], image.extras, strict=True)
        ):
            extras.append(ExtraOperand(operand.dtype, along=strides[2] != 0))
            width = extras[-1].width
            block.add(f"extra{index}", Input(2 + index))
            block.add(f"extra{index}_image", strides[0] * width)
            block.add(f"e{index}_row", strides[1] * width)
        return block, Epilogue(self.problem.epilogue, extras, len(block.names))


def _streams(matrix: np.ndarray, schedule: Schedule, parts: int) -> list[np.ndarray]:
    """The non-zeros of (output channels, rows of the panel) as the kernel reads them, int32 words.

    There is a stream for each of ``parts`` parts of the row groups. It has runs of groups with
    equally many columns: that number, how many groups, and for each group its number and its
    columns, as their offset in the panel and the value of each row. A run of no groups ends it.
    """
    count = math.ceil(len(matrix) / schedule.rows)
    rows = np.zeros((count * schedule.rows, matrix.shape[1]), np.float32)
    rows[: len(matrix)] = matrix
    nonzero = group_rows(rows != 0, schedule.rows)
    values = rows.reshape(count, schedule.rows, -1).transpose(0, 2, 1)
    lengths = nonzero.sum(axis=1)
    streams = []
    for part in range(parts):
        own = np.arange(part * count // parts, (part + 1) * count // parts)
        words = []
        for length in np.unique(lengths[own])[::-1]:
            members = own[lengths[own] == length]
            words += [np.array([length, len(members)], np.int32)]
            words += [_run(members, nonzero[members], values[members], schedule)]
        streams.append(np.concatenate([*words, np.zeros(2, np.int32)]))
    return streams


def _run(
    members: np.ndarray, nonzero: np.ndarray, values: np.ndarray, schedule: Schedule
) -> np.ndarray:
    """The words of row groups with equally many columns."""
    groups, columns = np.nonzero(nonzero)
    entries = np.empty((len(groups), 1 + schedule.rows), np.int32)
    entries[:, 0] = columns * schedule.step
    entries[:, 1:] = values[groups, columns].view(np.int32)
    run = np.column_stack([members.astype(np.int32), entries.reshape(len(members), -1)])
    return run.reshape(-1)


@register(ConvolutionProblem)
def candidates(problem: ConvolutionProblem) -> list[Candidate]:
    """Schedules that may suit the zeros; none where the weight has few."""
    problem.check()
    image = image_of(problem)
    weight = problem.inputs[1]
    if image is None or not isinstance(weight, ConstantOperand) or weight.zeros is None:
        return []
    if problem.outputs[0].size == 0:
        return []
    return [
        SparseConvolutionCandidate(
            f"sparse convolution {s.rows}x{s.width}, {s.channels} channels",
            problem,
            _cycles(image, s, weight.zeros) / CYCLES_PER_SECOND,
            image,
            s,
        )
        for s in _schedules(image, weight.zeros)
    ]


def _schedules(image: Image, zeros: ZeroPattern) -> Iterator[Schedule]:
    for rows in NEIGHBOURS:
        if zeros.density(rows) > _WORTH_SHARING_COLUMNS * zeros.density(1):
            continue
        for width in _WIDTHS[rows]:
            depths = {image.channels}
            for size in _PANEL_BYTES:
                fitting = max(size // (width * _VECTOR_BYTES * image.taps), 1)
                depths.add(math.ceil(image.channels / math.ceil(image.channels / fitting)))
            for channels in sorted(depths):
                yield Schedule(rows, width, channels)


def _cycles(image: Image, schedule: Schedule, zeros: ZeroPattern) -> float:
    """Cycles of all tasks together, roughly."""
    width = schedule.width / VECTORS_PER_CYCLE
    depth = image.channels * image.taps
    groups = math.ceil(image.outputs / schedule.rows)
    panel = schedule.channels * image.taps * schedule.step
    load = 1.75 - 0.75 * min(1.0, _FIRST_CACHE / panel)
    column = max(width * schedule.rows + 0.7, width * load + 0.5 + 0.7 * schedule.rows)
    blocks = math.ceil(image.channels / schedule.channels)
    waiting = (blocks - 1) * (8 + 3.5 * schedule.rows * width)
    product = groups * (zeros.density(schedule.rows) * depth * column + 12 + waiting)
    panels = math.ceil(image.pixels / (schedule.width * LANES))
    copy = schedule.width * depth * pack_cycles(image)
    finish = 3 * image.outputs * width
    return image.batch * image.groups * panels * (copy + product + finish)


def _lines(schedule: Schedule, epilogue: Epilogue) -> list[str]:
    """The kernel's body."""
    tile = [(row, vector) for row in range(schedule.rows) for vector in range(schedule.width)]

    def at(row: int, vector: int) -> str:
        return f"sums + {row * schedule.step + vector * _VECTOR_BYTES}"

    products = []
    for vector in range(schedule.width):
        products.append(f"value = load(column + {vector * _VECTOR_BYTES}, FLOAT32)")
        for row in range(schedule.rows):
            products.append(f"s{row}_{vector} = fma(value, w{row}, s{row}_{vector})")
    parts = {
        "prologue": epilogue.prologue(),
        "share": SHARE,
        "zero": [f"s{row}_{vector} = broadcast(0.0, FLOAT32)" for row, vector in tile],
        "resume": [f"s{row}_{vector} = load({at(row, vector)}, FLOAT32)" for row, vector in tile],
        "wait": [f"store({at(row, vector)}, s{row}_{vector})" for row, vector in tile],
        "weights": [
            f"w{row} = broadcast(read(p + {4 + 4 * row}, FLOAT32), FLOAT32)"
            for row in range(schedule.rows)
        ],
        "products": products,
        "starts": [
            f"e{index} = extra{index} + image * extra{index}_image + channel * e{index}_row"
            + (f" + {extra.width} * start" if extra.along else "")
            for index, extra in enumerate(epilogue.extras)
        ],
        "whole": _finish(schedule, epilogue, masked=False),
        "partial": _finish(schedule, epilogue, masked=True),
    }
    sizes = {
        "ROWS": schedule.rows, "WIDTH": schedule.width, "STEP": schedule.step,
        "ENTRY": 4 + 4 * schedule.rows, "AHEAD": _AHEAD,
    }  # fmt: skip
    return fill(_BODY, parts, sizes)


def _finish(schedule: Schedule, epilogue: Epilogue, masked: bool) -> list[str]:
    """Lines that apply the epilogue to a finished tile in registers and store it."""
    lines = []
    for row in range(schedule.rows):
        inner = []
        for vector in range(schedule.width):
            mask = f"mask_first(columns - {vector * LANES}, FLOAT32)" if masked else ""
            inner += epilogue.register_lines(f"s{row}_{vector}", vector, mask)
        step = ["c += out_plane", *(f"e{i} += e{i}_row" for i in range(len(epilogue.extras)))]
        if row == 0:
            lines += [*epilogue.row_lines(), *inner]
        else:
            lines += [f"if channel + {row} < last:"]
            lines += indent(1, [*step, *epilogue.row_lines(), *inner])
    return lines


_BODY = """
<prologue>
own_scratch = scratch + thread * thread_scratch
<share>
while task < stop:
    place = task // parts // panels
    panel = task // parts - place * panels
    first_part = task % parts
    last_part = min(parts, first_part + stop - task)
    start = panel * WIDTH * LANES
    columns = min(pixels - start, WIDTH * LANES)
    image = place // groups
    group = place - image * groups
    last = (group + 1) * outputs
    block = 0
    while block < blocks:
        first_channel = block * depth_channels
        pack_taps(
            own_scratch, STEP, x + (place * channels + first_channel) * plane, plane,
            min(channels - first_channel, depth_channels), height, width, out_width, pixels,
            start, (columns + LANES - 1) // LANES,
            kernel_height, kernel_width, stride_height, stride_width,
            dilation_height, dilation_width, top, left,
        )
        part = first_part
        while part < last_part:
            p = words + read(starts + 8 * ((group * blocks + block) * parts + part), INT64)
            members = read(p + 4, INT32)
            while members > 0:
                count = read(p, INT32)
                p += 8
                while members > 0:
                    number = read(p, INT32)
                    p += 4
                    sums = own_scratch + panel_bytes + number * ROWS * STEP
                    if block == 0:
                        <zero>
                    else:
                        <resume>
                    end = p + count * ENTRY
                    ahead = p + AHEAD
                    while ahead < end + AHEAD:
                        prefetch(ahead)
                        ahead += 64
                    while p < end:
                        column = own_scratch + read(p, INT32)
                        <weights>
                        <products>
                        p += ENTRY
                    if block + 1 < blocks:
                        <wait>
                    else:
                        channel = group * outputs + number * ROWS
                        c = y + (image * groups * outputs + channel) * out_plane + 4 * start
                        <starts>
                        if columns == WIDTH * LANES:
                            <whole>
                        else:
                            <partial>
                    members -= 1
                members = read(p + 4, INT32)
            part += 1
        block += 1
    task += last_part - first_part
"""
