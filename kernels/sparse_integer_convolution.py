"""Convolutions of uint8 images with int8 weights of which many words are zero.

A word of a weight is what one instruction multiplies: four input channels of an output channel.
Like the dense convolution (`integer_convolution`), this is a product of the weight with the pixels
under the kernel, which are in the lanes of vectors. The weight is a stream: for one, two or four
output channels at once, which word of the depth comes next and its weights, so that blocks of
1 x 4, 2 x 4 or 4 x 4 zeros are skipped. Four output channels have their sums in registers at the
same time, since they are finished as words of the result.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.kernels import source
from graphopt.kernels.integer_convolution import (
    IntegerImage,
    finish_lines,
    finishing,
    integer_image,
    requantization,
    target_lines,
)
from graphopt.kernels.integer_problems import IntegerConvolutionProblem, IntegerMatmulProblem
from graphopt.kernels.loops import SHARE, Arguments, kernel_text
from graphopt.kernels.operand import GROUP, ConstantOperand
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
from graphopt.kernels.requantization import Requantization, pack_numbers
from graphopt.kernels.simd import LANES
from graphopt.kernels.tile import CYCLES_PER_SECOND, WORTH_SHARING, fill
from graphopt.kernels.zeros import NEIGHBOURS, ZeroPattern, group_rows

VOCABULARY = ("simd", "words")
_WIDTHS = {1: (7, 4, 2, 1), 2: (7, 4, 2, 1), 4: (5, 4, 2, 1)} if LANES == 16 else {
    1: (2, 1), 2: (2, 1), 4: (2, 1)
}  # fmt: skip
"""Vectors of pixels, by output channels at once."""
_FIRST_CACHE = 24 * 1024
_TASKS = 16
"""Tasks of which threads get equal shares."""


@dataclass(frozen=True)
class Schedule:
    """``rows`` output channels at once by ``width`` vectors of pixels."""

    rows: int
    width: int

    @property
    def entry(self) -> int:
        """Words of the stream for a word of the depth: its number and the weights."""
        return 1 + self.rows


@dataclass(frozen=True)
class SparseIntegerCandidate(Candidate):
    """One schedule for a convolution, or for a linear layer, whose rows are the pixels of an
    image."""

    problem: IntegerConvolutionProblem | IntegerMatmulProblem
    image: IntegerImage
    schedule: Schedule

    @property
    def tiles(self) -> int:
        """Of output channels."""
        return math.ceil(self.image.outputs / GROUP)

    @property
    def panels(self) -> int:
        """Of pixels."""
        return math.ceil(self.image.vectors / self.schedule.width)

    @property
    @abstractmethod
    def thread_scratch(self) -> int:
        """Bytes of memory of a thread's own."""

    def packing(self) -> tuple[int]:
        return (self.schedule.rows,)

    def pack(self, constants: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        weight, numbers = constants[1], constants[4]
        assert weight is not None
        assert numbers is not None
        image = self.image
        matrix = image.matrix(weight).view(np.int32).reshape(image.groups, image.outputs, -1)
        rows = np.zeros((image.groups, self.tiles * GROUP, image.depth), np.int32)
        rows[:, : image.outputs] = matrix
        starts, words = _streams(rows.reshape(-1, image.depth), self.schedule.rows)
        return [words, starts, finishing(image, GROUP, constants), pack_numbers(numbers)]

    def scratch_bytes(self, threads: int) -> int:
        return (threads if self.is_parallel(threads) else 1) * self.thread_scratch

    def is_parallel(self, threads: int) -> bool:
        """Whether the work is worth sharing."""
        return threads > 1 and self.estimate > WORTH_SHARING


class SparseIntegerConvolutionCandidate(SparseIntegerCandidate):
    """With words in the order of the image, or gathered into panels."""

    problem: IntegerConvolutionProblem

    @property
    def thread_scratch(self) -> int:
        image = self.image
        return 0 if image.is_direct else 4 * LANES * self.schedule.width * image.depth

    def build(self, threads: int) -> tuple[Step, ...]:
        finish = requantization(self.problem)
        block = self._arguments()
        text = kernel_text(block, _lines(self.schedule, finish), VOCABULARY)
        name = f"sparse_integer_convolution_{self.schedule.rows}x{self.schedule.width}{finish.name}"
        entry = source.build(name, text)
        return (Step(entry, tuple(block.values), self.is_parallel(threads), block.tasks),)

    def _arguments(self) -> Arguments:
        image, block = self.image, Arguments()
        x, y = self.problem.inputs[0], self.problem.outputs[0]
        floating, plane = y.dtype == "float32", GROUP * x.memory[2]
        # The same for every number of threads, so that few panels are shared evenly.
        parts = min(math.ceil(_TASKS / (image.batch * image.groups * self.panels)), self.tiles)
        values: dict[str, Argument] = {
            "x": Input(0), "words_of_weight": Packed(0), "starts": Packed(1),
            "finish": Packed(2), "numbers": Packed(3),
            "y": Output(0), "residual": Input(5) if self.problem.has_residual else 0,
            "scratch": 0 if image.is_direct else Scratch(),
            "thread_scratch": self.thread_scratch, "direct": int(image.is_direct),
            "b_step": plane if image.is_direct else 4 * LANES * self.schedule.width,
            "groups": image.groups, "words": image.words, "outputs": image.outputs,
            "plane": plane, "image_bytes": x.bytes // image.batch,
            "out_plane": 4 * image.pixels if floating else GROUP * y.memory[2],
            "out_image": y.bytes // image.batch,
            "height": image.size[0], "width": image.size[1], "out_width": image.out_size[1],
            "pixels": image.pixels, "vectors": image.vectors,
            "kernel_height": image.kernel[0], "kernel_width": image.kernel[1],
            "stride_height": image.stride[0], "stride_width": image.stride[1],
            "dilation_height": image.dilation[0], "dilation_width": image.dilation[1],
            "top": image.start[0], "left": image.start[1],
            "tiles": self.tiles, "panels": self.panels, "parts": parts,
            "tasks": image.batch * image.groups * self.panels * parts,
        }  # fmt: skip
        block.add_all(values)
        return block


def _streams(matrix: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the stream of each tile starts, in bytes (int64), and all streams (int32).

    ``matrix`` has a word per output channel, a multiple of four of them, and step of the depth. A
    tile's stream has four numbers, of which the first are how many words each of its groups of
    ``rows`` channels has, and then those: number of the step, and the weights of the rows.
    """
    present = group_rows(matrix != 0, rows)
    groups = GROUP // rows
    counts = present.sum(axis=1).reshape(-1, groups)
    entry = 1 + rows
    sizes = GROUP + entry * counts.sum(axis=1)
    begins = np.cumsum(sizes) - sizes
    words = aligned_empty((int(sizes.sum()),), np.int32)
    words[...] = 0
    for group in range(groups):
        words[begins + group] = counts[:, group]
    number, steps = np.nonzero(present)
    within = np.arange(len(number)) * entry
    places = within + GROUP * (number // groups + 1)
    words[places] = steps
    for row in range(rows):
        words[places + 1 + row] = matrix[number * rows + row, steps]
    starts = aligned_empty((len(sizes),), np.int64)
    starts[...] = 4 * begins
    return starts, words


@register(IntegerConvolutionProblem)
def candidates(problem: IntegerConvolutionProblem) -> list[Candidate]:
    """The schedule that suits the zeros best; none where the weight has few."""
    image = integer_image(problem)
    weight = problem.inputs[1]
    if image is None or not isinstance(weight, ConstantOperand) or weight.zeros is None:
        return []
    if image.merged > 1:
        return []
    schedule = best_schedule(image, weight.zeros)
    seconds = cycles(image, schedule, weight.zeros) / CYCLES_PER_SECOND
    name = f"sparse integer convolution {schedule.rows}x{schedule.width}"
    return [SparseIntegerConvolutionCandidate(name, problem, seconds, image, schedule)]


def best_schedule(image: IntegerImage, zeros: ZeroPattern) -> Schedule:
    """The schedule that suits the zeros of a weight best."""
    found = [
        Schedule(rows, width)
        for rows in NEIGHBOURS
        for width in _WIDTHS[rows]
        if width <= image.vectors
    ]
    return min(found, key=lambda schedule: cycles(image, schedule, zeros))


def cycles(image: IntegerImage, schedule: Schedule, zeros: ZeroPattern) -> float:
    """Cycles of all tasks together, roughly."""
    rows, width = schedule.rows, schedule.width
    panels = math.ceil(image.vectors / width)
    tiles = math.ceil(image.outputs / GROUP)
    copy = 0.0
    if not image.is_direct:
        pieces = width * (1 + min(LANES, image.pixels) / image.out_size[1])
        copy = pieces * image.taps * (8 + 2 * image.words)
    load = 1.0 if 4 * LANES * width * image.depth <= _FIRST_CACHE else 1.6
    word = max(rows * width, load * width) + 1.5
    words = zeros.density(rows) * image.depth * GROUP / rows
    product = tiles * (words * word + 12 * GROUP / rows + 24 * width)
    return image.batch * image.groups * panels * (copy + product)


def _lines(schedule: Schedule, finish: Requantization) -> list[str]:
    """The kernel's body."""
    parts = {
        "prologue": finish.prologue(),
        "share": SHARE,
        "target": target_lines(finish),
        "sums": sum_lines(schedule),
        "end": finish_lines(GROUP, schedule.width, finish),
    }
    return fill(_BODY, parts, {"WIDTH": schedule.width})


def sum_lines(schedule: Schedule) -> list[str]:
    """Lines that make the sums of a tile, in the variables ``s{row}_{vector}``.

    Its stream is at ``a``, its biases at ``own``, and the words of the depth at ``b``, each
    ``b_step`` after the one before.
    """
    rows, columns = range(schedule.rows), range(schedule.width)
    lines = ["q = a + 16"]
    for row in range(GROUP):
        bias = f"broadcast(read(own + {4 * row}, INT32), INT32)"
        lines += [f"s{row}_{column} = {bias}" for column in columns]
    for group in range(GROUP // schedule.rows):
        inner = [f"w{row} = broadcast(read(q + {4 + 4 * row}, INT32), INT32)" for row in rows]
        for column in columns:
            inner.append(f"value = load(place + {4 * LANES * column}, INT32)")
            for row in rows:
                name = f"s{group * schedule.rows + row}_{column}"
                inner.append(f"{name} = dot(value, w{row}, {name})")
        lines += fill(
            _GROUP, {"products": inner}, {"PLACE": 4 * group, "ENTRY": 4 * schedule.entry}
        )
    return lines


_GROUP = """
stop_word = q + read(a + PLACE, INT32) * ENTRY
while q < stop_word:
    place = b + read(q, INT32) * b_step
    <products>
    q += ENTRY
"""

_BODY = """
<prologue>
own_scratch = scratch + thread * thread_scratch
packed_panel = -1
<share>
while task < stop:
    panel_number = task // parts
    part = task - panel_number * parts
    number = panel_number // panels
    image = number // groups
    group = number - image * groups
    # The last panel ends with the image, so that all are whole.
    vector = min((panel_number - number * panels) * WIDTH, vectors - WIDTH)
    origin = x + image * image_bytes + group * words * plane
    b = origin + 4 * LANES * vector
    if direct == 0:
        b = own_scratch
        if packed_panel != panel_number:
            pack_words(
                b, b_step, origin, plane, words, height, width, out_width, pixels,
                vector * LANES, unliteral(WIDTH), kernel_height, kernel_width,
                stride_height, stride_width, dilation_height, dilation_width, top, left, outside,
            )
            packed_panel = panel_number
    tile = part * tiles // parts
    last_tile = (part + 1) * tiles // parts
    while tile < last_tile:
        a = words_of_weight + read(starts + 8 * (group * tiles + tile), INT64)
        own = finish + 32 * (group * tiles + tile)
        channel = group * outputs + tile * 4
        rows = outputs - tile * 4
        <target>
        <sums>
        <end>
        tile += 1
    task += 1
"""
