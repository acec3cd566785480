"""Convolutions with many zero weights in float32, of one or two spatial dimensions, any groups.

Like the dense convolution (`convolution`), this is a product of the weights and a panel of the
pixels under the kernel, with output pixels in the lanes of vectors; `nonzeros` says how it skips
the zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.kernels import panel, source
from graphopt.kernels.convolution import pack_cycles
from graphopt.kernels.epilogue import Epilogue
from graphopt.kernels.image import Image, epilogue_starts, image_epilogue, image_of
from graphopt.kernels.loops import Arguments, indent, kernel_text
from graphopt.kernels.memory import LINE
from graphopt.kernels.nonzeros import (
    VOCABULARY,
    Schedule,
    pack_streams,
    panels_of,
    product_cycles,
    product_lines,
    schedules,
    tile_name,
    wait_line,
)
from graphopt.kernels.operand import ConstantOperand
from graphopt.kernels.problem import ConvolutionProblem
from graphopt.kernels.register import AMD, VECTORS_PER_CYCLE
from graphopt.kernels.registry import (
    Argument,
    Candidate,
    Input,
    Output,
    Packed,
    Scratch,
    Step,
    like_output,
    register,
)
from graphopt.kernels.shares import panel_shares, share_lines
from graphopt.kernels.simd import LANES
from graphopt.kernels.tile import CYCLES_PER_SECOND, WORTH_SHARING, fill
from graphopt.kernels.zeros import ZeroPattern

_READ_CYCLES = 3
"""Cycles to bring a vector of a panel in place from the second cache."""


@dataclass(frozen=True)
class SparseConvolutionCandidate(Candidate):
    """One schedule, whose blocks of depth are whole input channels.

    ``cycles`` are those of each panel, see `panel_cycles`.
    """

    problem: ConvolutionProblem
    image: Image
    schedule: Schedule
    cycles: tuple[tuple[float, float], ...]

    @property
    def _block_channels(self) -> int:
        return self.schedule.depth // self.image.taps

    @property
    def _blocks(self) -> int:
        return math.ceil(self.image.channels / self._block_channels)

    @property
    def _panels(self) -> int:
        image = self.image
        return image.bands * self.schedule.panels(image.pixels // image.bands)

    @property
    def _parts(self) -> int:
        return self.schedule.parts(self.image.outputs, self._panels)

    @property
    def _has_unknown(self) -> bool:
        """Whether a panel in place ends with the padding of planes."""
        lanes = self.schedule.tail or LANES
        return self.schedule.pitch > 0 and self.image.pixels // self.image.bands % lanes > 0

    @property
    def _pack(self) -> int:
        """The address of what copies a panel; 0 where it stays."""
        return 0 if self.schedule.pitch else source.shared(panel.pack_taps).address

    @staticmethod
    def panel_cycles(
        image: Image, schedule: Schedule, zeros: ZeroPattern
    ) -> tuple[tuple[float, float], ...]:
        """Cycles of each panel, roughly: to copy it or read it first, and of all its tasks."""
        depth = image.channels * image.taps
        tasks = task_cycles(image, schedule, zeros)
        if schedule.pitch:
            # A part of the product, which every thread that works on the panel does.
            copy = min(schedule.width * depth * _READ_CYCLES, tasks / 2)
            tasks -= copy
        else:
            copy = schedule.width * depth * pack_cycles(image)
        return image.bands * panels_of((copy, tasks), schedule, image.pixels // image.bands)

    def packing(self) -> tuple[object, ...]:
        return (self.schedule, self._parts)

    def pack(self, constants: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        blocks = [block.transpose(0, 2, 1) for block in self._weights(constants)]
        matrices = [block.reshape(self.image.outputs, -1) for block in blocks]
        return pack_streams(matrices, self.schedule, self._parts)

    def _weights(self, constants: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        """The weight (outputs, channels, taps) of each block of each group."""
        weight = constants[1]
        assert weight is not None
        image = self.image
        grouped = weight.reshape(image.groups, image.outputs, image.channels, image.taps)
        return [
            group[:, first : first + self._block_channels]
            for group in grouped
            for first in range(0, image.channels, self._block_channels)
        ]

    def overwrites(self) -> tuple[int, ...]:
        return like_output(self.problem, range(2, len(self.problem.inputs)))

    def scratch_bytes(self, threads: int) -> int:
        return (threads if self._parallel(threads) else 1) * self._thread_scratch

    @property
    def _thread_scratch(self) -> int:
        waiting = self.schedule.sums_bytes(self.image.outputs) if self._blocks > 1 else 0
        return self.schedule.sums_start + waiting

    def _parallel(self, threads: int) -> bool:
        return threads > 1 and self.estimate > WORTH_SHARING

    def build(self, threads: int) -> tuple[Step, ...]:
        block = self._arguments()
        epilogue = image_epilogue(self.problem, self.image, block)
        name = f"sparse_convolution_{self.schedule.rows}x{self.schedule.width}"
        text = kernel_text(block, self._lines(epilogue), VOCABULARY, epilogue.functions())
        arguments = (*block.values, *epilogue.immediates)
        return (Step(source.build(name, text), arguments, self._parallel(threads), block.tasks),)

    def _arguments(self) -> Arguments:
        image, block = self.image, Arguments()
        # A single row of pixels is cut within, so that a band of it begins so much further.
        shift = image.gap if image.is_pointwise else 0
        values: dict[str, Argument] = {
            "x": Input(0), "starts": Packed(0), "words": Packed(1), "y": Output(0),
            "shares": panel_shares(self.cycles),
            "scratch": Scratch() if self._thread_scratch else 0,
            "thread_scratch": self._thread_scratch, "pack": self._pack,
            "sums_start": self.schedule.sums_start, "tail_start": self.schedule.tail_start,
            "places": image.batch * image.groups, "groups": image.groups,
            "channels": image.channels, "outputs": image.outputs,
            "height": image.size[0], "width": image.size[1],
            "plane": 4 * image.plane, "out_plane": 4 * image.out_plane,
            "out_width": image.out_size[1], "pixels": image.pixels,
            "half": math.ceil(image.size[0] / 2), "gap": image.gap - shift, "shift": 4 * shift,
            "out_gap": image.out_gap, "bands": image.bands,
            "kernel_height": image.kernel[0], "kernel_width": image.kernel[1],
            "stride_height": image.stride[0], "stride_width": image.stride[1],
            "dilation_height": image.dilation[0], "dilation_width": image.dilation[1],
            "top": image.start[0], "left": image.start[1],
            "panels": self._panels, "block_channels": self._block_channels,
            "blocks": self._blocks, "parts": self._parts,
            "tasks": image.batch * image.groups * self._panels * self._parts,
        }  # fmt: skip
        block.add_all(values)
        return block

    def _lines(self, epilogue: Epilogue) -> list[str]:
        """The kernel's body."""
        schedule = self.schedule
        sizes = {
            "ROWS": schedule.rows,
            "WIDTH": schedule.width,
            "STEP": schedule.row_bytes,
            "TAIL_ROW": schedule.tail_step,
        }
        parts = {
            "prologue": epilogue.prologue(),
            "share": share_lines("panels"),
            "place": fill(_PLACE, {}, sizes),
            "panel": fill(_PANEL, {}, sizes),
            "tail": fill(_TAIL, {}, sizes) if schedule.tail else [],
            "product": product_lines(
                schedule,
                _finish_lines(schedule, epilogue, tail=False),
                fetch_lines(schedule.rows, epilogue, schedule.lines + 1, f"{LINE // 4}"),
                _finish_lines(schedule, epilogue, tail=True) if schedule.tail else (),
                "columns" if self._has_unknown else "",
            ),
        }
        return fill(BODY, parts, sizes)


@register(ConvolutionProblem)
def candidates(problem: ConvolutionProblem) -> list[Candidate]:
    """Schedules that may suit the zeros; none where the weight has few."""
    return sparse_candidates(problem, SparseConvolutionCandidate, _schedules)


def sparse_candidates(
    problem: ConvolutionProblem,
    kind: type[SparseConvolutionCandidate],
    suitable: Callable[[Image, ZeroPattern], Iterable[Schedule]],
) -> list[Candidate]:
    """A candidate of a kind for each schedule that suits the zeros; none where there are few."""
    problem.check()
    image = image_of(problem, padded=True, halved=True)
    weight = problem.inputs[1]
    if image is None or not isinstance(weight, ConstantOperand) or weight.zeros is None:
        return []
    if problem.outputs[0].size == 0:
        return []
    found: list[Candidate] = []
    zeros = weight.zeros
    for schedule in suitable(image, zeros):
        name, cycles = f"sparse convolution {schedule}", kind.panel_cycles(image, schedule, zeros)
        seconds = image.batch * image.groups * sum(map(sum, cycles)) / CYCLES_PER_SECOND
        found.append(kind(name, problem, seconds, image, schedule, cycles))
    return found


def task_cycles(image: Image, schedule: Schedule, zeros: ZeroPattern) -> float:
    """Cycles of all tasks of a panel, roughly: its products with the weight, and their epilogue."""
    finish = 3 * image.outputs * schedule.width / VECTORS_PER_CYCLE
    return product_cycles(schedule, zeros, image.outputs, image.channels * image.taps) + finish


def _schedules(image: Image, zeros: ZeroPattern) -> Iterable[Schedule]:
    depth = image.channels * image.taps
    pitch = 4 * image.plane if image.is_pointwise else 0
    pixels = image.pixels // image.bands
    return schedules(zeros, depth, pixels, image.taps, image.out_size[1], pitch)


def _finish_lines(schedule: Schedule, epilogue: Epilogue, tail: bool) -> list[str]:
    """Lines that store a tile: as sums that wait, or finished."""
    width = schedule.width
    store = [epilogue.tile_line(tile_name(tail), width + tail, whole=width)]
    if not tail:
        part = epilogue.tile_line("tile", width, whole=0)
        store = [f"if columns >= {width} * LANES:", *indent(1, store), "else:", f"    {part}"]
    parts = {
        "wait": [wait_line(schedule, tail)],
        "starts": epilogue_starts(epilogue),
        "store": store,
    }
    return fill(_FINISH, parts, {"ROWS": schedule.rows})


def fetch_lines(
    rows: int, epilogue: Epilogue, lines: int, step: str, start: Sequence[str] = ()
) -> list[str]:
    """Lines that fetch, while a row group is multiplied, what its epilogue will read and write.

    That is too little in a row for the CPU to foresee it. Of each operand, ``lines`` lines of the
    cache are fetched that are ``step`` elements apart; the lines ``start`` find the first pixel.
    The result mostly becomes of what is added to it, if anything is; else its own lines are
    fetched, though not on AMD's CPUs, where that was not measured.
    """
    places = [
        (f"e{index}", f"e{index}_row", extra.width)
        for index, extra in enumerate(epilogue.extras)
        if extra.along
    ]
    fetch = [
        f"prefetch_written({first} + {row} * {along} + {line * width} * {step})"
        for first, along, width in places or ([] if AMD else [("c", "out_plane", 4)])
        for row in range(rows)
        for line in range(lines)
    ]
    parts = {"start": start, "starts": epilogue_starts(epilogue), "fetch": fetch}
    return fill(_FETCH, parts, {"ROWS": rows}) if fetch else []


_FETCH = """
if block + 1 == blocks:
    channel = group * outputs + number * ROWS
    <start>
    <starts>
    c = y + (image * groups * outputs + channel) * out_plane + 4 * start
    <fetch>
"""

_FINISH = """
if block + 1 < blocks:
    <wait>
else:
    channel = group * outputs + number * ROWS
    rows = last - channel
    c = y + (image * groups * outputs + channel) * out_plane + 4 * start
    <starts>
    <store>
"""

_PANEL = """
source = x + (place * channels + first_channel) * plane + band * shift
panel_channels = min(channels - first_channel, block_channels)
if pack == 0:
    step = plane
    panel = source + 4 * first
else:
    step = STEP
    panel = own_scratch
    call_kernel(pack, (
        panel, STEP, source, plane, panel_channels, height, width, out_width, pixels,
        first, (min(columns, WIDTH * LANES) + LANES - 1) // LANES,
        kernel_height, kernel_width, stride_height, stride_width,
        dilation_height, dilation_width, top, left, half, gap,
    ))
"""

_TAIL = """
has_tail = (panel_number + 1) % band_panels == 0
tail_step = step if pack == 0 else TAIL_ROW
tail = panel + (4 * WIDTH * LANES if pack == 0 else tail_start)
if has_tail and pack != 0:
    call_kernel(pack, (
        tail, TAIL_ROW, source, plane, panel_channels, height, width, out_width, first + columns,
        first + WIDTH * LANES, 1,
        kernel_height, kernel_width, stride_height, stride_width,
        dilation_height, dilation_width, top, left, half, gap,
    ))
"""

_PLACE = """
band_panels = panels // bands
band = panel_number // band_panels
band_pixels = pixels // bands
columns = band_pixels - (panel_number - band * band_panels) * WIDTH * LANES
first = (band + 1) * band_pixels - columns
start = first + band * out_gap
"""

BODY = """
<prologue>
own_scratch = scratch + thread * thread_scratch
all_sums = own_scratch + sums_start
c_row = out_plane
<share>
while task < stop:
    place = task // parts // panels
    panel_number = task // parts - place * panels
    first_part = task % parts
    last_part = min(parts, first_part + stop - task)
    <place>
    image = place // groups
    group = place - image * groups
    last = (group + 1) * outputs
    block = 0
    while block < blocks:
        first_channel = block * block_channels
        first_block = block == 0
        <panel>
        <tail>
        part = first_part
        while part < last_part:
            p = words + read(starts + 8 * ((group * blocks + block) * parts + part), INT64)
            <product>
            part += 1
        block += 1
    task += last_part - first_part
"""
