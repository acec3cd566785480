"""Depthwise convolutions and pooling of bytes whose channels are grouped.

A plane of words, four channels of each pixel, is copied into scratch memory with its padding, the
columns sorted by their remainder modulo the stride: there every position of a window is one load,
for the four channels together. A sum for one of them is a product with a word in which only its own
weight is not zero, so that sums are finished as those of other convolutions are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.kernels import source
from graphopt.kernels.integer_convolution import (
    corrected_bias,
    integer_image,
    requantization,
)
from graphopt.kernels.integer_problems import IntegerConvolutionProblem, IntegerPoolingProblem
from graphopt.kernels.loops import SHARE, Arguments, kernel_text
from graphopt.kernels.operand import GROUP, Layout
from graphopt.kernels.padded_rows import PaddedRows
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

VOCABULARY = ("simd", "words")
_MOST_TAPS = 49
"""Positions of a window for which code is written out."""
_BLOCK_BYTES = 2**16
"""Padded rows that a task keeps at a time."""


@dataclass(frozen=True)
class IntegerWindows:
    """Windows over planes of words, by (vertical, horizontal); ``start`` is the padding before."""

    batch: int
    words: int
    size: tuple[int, int]
    out_size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    start: tuple[int, int]

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    @property
    def rows(self) -> PaddedRows:
        """How the rows of a plane are copied."""
        columns = LANES * math.ceil(self.out_size[1] / LANES)
        return PaddedRows(columns, self.kernel, self.stride, self.dilation)

    @property
    def block_rows(self) -> int:
        """Output rows of a task."""
        fitting = (_BLOCK_BYTES // self.rows.pitch - self.rows.needed(1)) // self.stride[0]
        blocks = math.ceil(self.out_size[0] / max(fitting, 1))
        return math.ceil(self.out_size[0] / blocks)

    @property
    def scratch_bytes(self) -> int:
        """Scratch memory of one thread."""
        return self.rows.needed(self.block_rows) * self.rows.pitch

    def cycles(self, per_tap: float) -> float:
        """Cycles of all tasks together, roughly."""
        vectors = math.ceil(self.out_size[1] / LANES)
        windows = self.out_size[0] * vectors * (self.taps * (per_tap + 1) + 24)
        copied = self.rows.needed(self.out_size[0]) * self.rows.pitch / (4 * LANES)
        return self.batch * self.words * (windows + 3 * copied + 60)

    def arguments(self, plane: int, out_plane: int) -> Arguments:
        """What a kernel is told of them."""
        blocks = math.ceil(self.out_size[0] / self.block_rows)
        values: dict[str, Argument] = {
            "x": Input(0), "weight": Packed(0), "finish": Packed(1), "numbers": Packed(2),
            "y": Output(0), "scratch": Scratch(), "thread_scratch": self.scratch_bytes,
            "words": self.words, "blocks": blocks, "tasks": self.batch * self.words * blocks,
            "block_rows": self.block_rows, "window_height": self.rows.needed(1),
            "height": self.size[0], "width": self.size[1],
            "out_height": self.out_size[0], "out_width": self.out_size[1],
            "plane": plane, "out_plane": out_plane,
            "top": self.start[0], "left": self.start[1],
            "pitch": self.rows.pitch, "phase_pitch": self.rows.phase_pitch,
            "down": self.stride[0], "dilation_height": self.dilation[0],
        }  # fmt: skip
        for column in range(self.kernel[1]):
            values[f"tap{column}"] = self.rows.tap(0, column)
        block = Arguments()
        block.add_all(values)
        return block

    def lines(self, finish: Requantization | None) -> list[str]:
        """The kernel's body: sums where they are finished, else maxima."""
        sums = [f"s{byte}" for byte in range(GROUP)]
        if finish is None:
            begin, end = ["word = broadcast(0, INT32)"], []
        else:
            begin = [f"s{byte} = bias{byte}" for byte in range(GROUP)]
            end = finish.word_lines(sums)
        parts = {
            "prologue": finish.prologue() if finish else ["outside = broadcast(0, INT32)"],
            "share": SHARE,
            "each word": _finish_lines() if finish else ["pass"],
            "begin": begin,
            "taps": [line for y in range(self.kernel[0]) for line in self._tap_lines(y, finish)],
            "end": end or ["pass"],
        }
        return fill(_BODY, parts, {"ACROSS": self.stride[1]})

    def _tap_lines(self, y: int, finish: Requantization | None) -> list[str]:
        """Lines for row ``y`` of the window."""
        lines = [f"place = corner + {y} * dilation_height * pitch"]
        for x in range(self.kernel[1]):
            lines.append(f"value = load(place + tap{x}, INT32)")
            if finish is None:
                lines.append("word = byte_maximum(word, value)")
                continue
            for byte in range(GROUP):
                address = f"a + {4 * (GROUP * (y * self.kernel[1] + x) + byte)}"
                weight = f"broadcast(read({address}, INT32), INT32)"
                lines.append(f"s{byte} = dot(value, {weight}, s{byte})")
        return lines


def _finish_lines() -> list[str]:
    """Lines that read the weights, biases and multipliers of a word of channels."""
    lines = ["a = weight + word_number * weight_bytes", "own = finish + word_number * 32"]
    for byte in range(GROUP):
        lines.append(f"bias{byte} = broadcast(read(own + {4 * byte}, INT32), INT32)")
        lines.append(f"m{byte} = broadcast(read(own + {16 + 4 * byte}, FLOAT32), FLOAT32)")
    return lines


_BODY = """
<prologue>
own_scratch = scratch + thread * thread_scratch
row_bytes = 4 * out_width
<share>
while task < stop:
    number = task // blocks
    word_number = number % words
    first_row = (task - number * blocks) * block_rows
    last_row = min(first_row + block_rows, out_height)
    needed = (last_row - first_row - 1) * down + window_height
    pad_words(
        own_scratch, pitch, needed, phase_pitch, x + number * plane, height, width,
        top - first_row * down, left, ACROSS, outside,
    )
    <each word>
    row = first_row
    while row < last_row:
        c = y + number * out_plane + row * row_bytes
        corner = own_scratch + (row - first_row) * down * pitch
        column = 0
        while column < out_width:
            mask = mask_first(out_width - column, INT32)
            <begin>
            <taps>
            <end>
            store_first(c, word, mask)
            c += 4 * LANES
            corner += 4 * LANES
            column += LANES
        row += 1
    task += 1
"""


@dataclass(frozen=True)
class IntegerDepthwiseCandidate(Candidate):
    """A depthwise convolution."""

    problem: IntegerConvolutionProblem
    windows: IntegerWindows

    def packing(self) -> tuple[()]:
        return ()

    def pack(self, constants: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        _, weight, multiplier, bias, numbers = constants
        assert weight is not None
        assert multiplier is not None
        assert bias is not None
        assert numbers is not None
        return _pack_sums(weight, corrected_bias(weight, bias, numbers), multiplier, numbers)

    def scratch_bytes(self, threads: int) -> int:
        return threads * self.windows.scratch_bytes

    def build(self, threads: int) -> tuple[Step, ...]:
        windows = self.windows
        x, y = self.problem.inputs[0], self.problem.outputs[0]
        name = "integer_depthwise"
        return (_step(self, windows, name, x.memory[2], y.memory[2], Requantization(), threads),)


def _pack_sums(
    weight: np.ndarray, bias: np.ndarray, multiplier: np.ndarray, numbers: np.ndarray
) -> list[np.ndarray]:
    """Weights (words of channels, taps, 4 words), biases and multipliers by word, and numbers."""
    channels, taps = len(weight), weight[0].size
    words = math.ceil(channels / GROUP)
    padded = np.zeros((words * GROUP, taps), np.int8)
    padded[:channels] = weight.reshape(channels, taps)
    packed = aligned_empty((words, taps, GROUP, GROUP), np.int8)
    packed[...] = 0
    for byte in range(GROUP):
        packed[:, :, byte, byte] = padded.reshape(words, GROUP, taps)[:, byte]
    finish = aligned_empty((words, 2, GROUP), np.int32)
    for place, row in enumerate((bias, multiplier.view(np.int32))):
        whole = np.zeros(words * GROUP, np.int32)
        whole[:channels] = row
        finish[:, place] = whole.reshape(words, GROUP)
    return [packed, finish, pack_numbers(numbers)]


def _step(
    candidate: Candidate,
    windows: IntegerWindows,
    name: str,
    pixels: int,
    out_pixels: int,
    finish: Requantization | None,
    threads: int,
) -> Step:
    block = windows.arguments(GROUP * pixels, GROUP * out_pixels)
    block.add("weight_bytes", 4 * GROUP * windows.taps)
    text = kernel_text(block, windows.lines(finish), VOCABULARY)
    kernel = "x".join(map(str, windows.kernel))
    entry = source.build(f"{name}_{kernel}_{windows.stride[1]}", text)
    parallel = threads > 1 and candidate.estimate > WORTH_SHARING
    return Step(entry, tuple(block.values), parallel)


@register(IntegerConvolutionProblem)
def depthwise_candidates(problem: IntegerConvolutionProblem) -> list[Candidate]:
    """Windows, where every output channel sees one input channel of its own."""
    image = integer_image(problem)
    weight = problem.inputs[1]
    if image is None or weight.shape[1] != 1 or weight.shape[0] != problem.groups:
        return []
    finish = requantization(problem)
    if finish.residual or finish.floating or image.taps > _MOST_TAPS:
        return []
    windows = IntegerWindows(
        image.batch,
        math.ceil(weight.shape[0] / GROUP),
        image.size,
        image.out_size,
        image.kernel,
        image.stride,
        image.dilation,
        image.start,
    )
    seconds = windows.cycles(4) / CYCLES_PER_SECOND
    return [IntegerDepthwiseCandidate("integer depthwise", problem, seconds, windows)]


@dataclass(frozen=True)
class IntegerPoolingCandidate(Candidate):
    """Windows over an image."""

    problem: IntegerPoolingProblem
    windows: IntegerWindows

    def packing(self) -> tuple[()]:
        return ()

    def pack(self, constants: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        if not self.problem.averages:
            return [aligned_empty((16,), np.int32) for _ in range(3)]
        _, multiplier, bias, numbers = constants
        assert multiplier is not None
        assert bias is not None
        assert numbers is not None
        ones = np.ones((len(bias), self.windows.taps), np.int8)
        return _pack_sums(ones, corrected_bias(ones, bias, numbers), multiplier, numbers)

    def scratch_bytes(self, threads: int) -> int:
        return threads * self.windows.scratch_bytes

    def build(self, threads: int) -> tuple[Step, ...]:
        x, y = self.problem.inputs[0], self.problem.outputs[0]
        finish = Requantization() if self.problem.averages else None
        name = "integer_average" if self.problem.averages else "integer_maximum"
        pixels, out_pixels = x.memory[2], y.memory[2]
        return (_step(self, self.windows, name, pixels, out_pixels, finish, threads),)


@register(IntegerPoolingProblem)
def pooling_candidates(problem: IntegerPoolingProblem) -> list[Candidate]:
    """Windows; the average of the whole image in one go."""
    x, y = problem.inputs[0], problem.outputs[0]
    grouped = Layout.grouped("uint8", 4)
    if x.layout != grouped or y.layout != grouped or x.shape[:2] != y.shape[:2]:
        raise ValueError(f"{y} is not {x} pooled")
    if 0 in y.shape:
        return []
    whole = problem.kernel == x.shape[2:] and problem.padding == ((0, 0), (0, 0))
    if problem.averages and whole and math.prod(y.shape[2:]) == 1:
        vectors = math.ceil(math.prod(x.shape[2:]) / LANES)
        seconds = x.memory[0] * x.memory[1] * (8 * vectors + 80) / CYCLES_PER_SECOND
        return [GlobalAverageCandidate("integer global average", problem, seconds)]
    if math.prod(problem.kernel) > _MOST_TAPS:
        return []
    windows = IntegerWindows(
        x.shape[0],
        x.memory[1],
        (x.shape[2], x.shape[3]),
        (y.shape[2], y.shape[3]),
        problem.kernel,
        problem.stride,
        problem.dilation,
        (problem.padding[0][0], problem.padding[1][0]),
    )
    seconds = windows.cycles(4 if problem.averages else 1) / CYCLES_PER_SECOND
    return [IntegerPoolingCandidate("integer pooling", problem, seconds, windows)]


@dataclass(frozen=True)
class GlobalAverageCandidate(Candidate):
    """The average of each channel of an image."""

    problem: IntegerPoolingProblem

    def packing(self) -> tuple[()]:
        return ()

    def pack(self, constants: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        _, multiplier, bias, numbers = constants
        assert multiplier is not None
        assert bias is not None
        assert numbers is not None
        ones = np.ones((len(bias), math.prod(self.problem.kernel)), np.int8)
        return _pack_sums(ones[:, :1], corrected_bias(ones, bias, numbers), multiplier, numbers)

    def build(self, threads: int) -> tuple[Step, ...]:
        x = self.problem.inputs[0]
        block = Arguments()
        values: dict[str, Argument] = {
            "x": Input(0), "finish": Packed(1), "numbers": Packed(2), "y": Output(0),
            "words": x.memory[1], "plane": GROUP * x.memory[2],
            "pixels": math.prod(x.shape[2:]), "tasks": x.memory[0] * x.memory[1],
        }  # fmt: skip
        block.add_all(values)
        finish = Requantization()
        begin, add, total = [], [], []
        for byte in range(GROUP):
            begin.append(f"s{byte} = broadcast(0, INT32)")
            one = f"broadcast({256**byte}, INT32)"
            add.append(f"s{byte} = dot(value, {one}, s{byte})")
            bias = f"read(own + {4 * byte}, INT32)"
            total += [
                f"s{byte} = broadcast(reduce_add(s{byte}) + {bias}, INT32)",
                f"m{byte} = broadcast(read(own + {16 + 4 * byte}, FLOAT32), FLOAT32)",
            ]
        parts = {
            "prologue": finish.prologue(),
            "share": SHARE,
            "begin": begin,
            "add": add,
            "total": total,
            "word": finish.word_lines([f"s{byte}" for byte in range(GROUP)]),
        }
        text = kernel_text(block, fill(_GLOBAL, parts, {}), VOCABULARY)
        parallel = threads > 1 and self.estimate > WORTH_SHARING
        entry = source.build("integer_global_average", text)
        return (Step(entry, tuple(block.values), parallel),)


_GLOBAL = """
<prologue>
<share>
while task < stop:
    own = finish + task % words * 32
    place = x + task * plane
    <begin>
    pixel = 0
    while pixel < pixels:
        value = load_masked(place + 4 * pixel, INT32, mask_first(pixels - pixel, INT32))
        <add>
        pixel += LANES
    <total>
    <word>
    store_first(y + 4 * task, word, mask_first(1, INT32))
    task += 1
"""
