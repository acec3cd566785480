"""Max, average and adaptive average pooling in float32, of sequences and images.

A window of one size is combined down its columns first, which then are those of one line with
its padding, and along the line after that: each element of the image is read about once per row of
windows that it is in. Bins of differing sizes, which adaptive pooling has where the sizes do not
divide, are summed down the columns in vectors and then along the row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.kernels import source
from graphopt.kernels.epilogue import Epilogue, epilogue_supported, image_strides
from graphopt.kernels.loops import SHARE, Arguments, indent, kernel_text
from graphopt.kernels.operand import Layout, Operand
from graphopt.kernels.problem import AdaptivePoolingProblem, PoolingProblem
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
from graphopt.kernels.tile import CYCLES_PER_SECOND, VOCABULARY, WORTH_SHARING, fill
from graphopt.kernels.window import Extras, bands_of

_STRIP = 4
"""Output rows made at once: what is stored for one is in the cache until it is read."""
_REGISTERS = 4
"""Vectors of a line that are combined at once."""

Counts = tuple[tuple[int, ...], tuple[int, ...]]
"""Elements that a window averages, by its row and by its column; it has their product."""

_NOTHING = Extras(None, (), (), first=1)


@dataclass(frozen=True)
class PoolingCandidate(Candidate):
    """Windows of one size; averages have ``counts``.

    Sizes are by (vertical, horizontal); ``start`` is the padding above and on the left.
    """

    planes: int
    channels: int
    size: tuple[int, int]
    out_size: tuple[int, int]
    window: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    start: tuple[int, int]
    counts: Counts | None
    extras: Extras

    @property
    def _line_bytes(self) -> int:
        """Memory of a line: what vectors of outputs read, and what vectors of the image write."""
        vectors = math.ceil(self.out_size[1] / LANES)
        # A vector of windows reads whole vectors, as many as its stride.
        read = (vectors * LANES - 1) * self.stride[1] + 2 * LANES
        read += (self.window[1] - 1) * self.dilation[1]
        written = self.start[1] + math.ceil(self.size[1] / LANES) * LANES
        return 4 * LANES * math.ceil(max(read, written) / LANES)

    def pack(self, constants: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        packed = []
        for numbers in self.counts or ():
            table = aligned_empty((len(numbers),), np.float32)
            table[...] = numbers
            packed.append(table)
        return packed

    def scratch_bytes(self, threads: int) -> int:
        return threads * _STRIP * self._line_bytes

    def build(self, threads: int) -> tuple[Step, ...]:
        if self.problem.outputs[0].size == 0:
            return ()
        block = Arguments()
        strips = math.ceil(self.out_size[0] / _STRIP)
        bands = bands_of(self.planes, strips)
        values: dict[str, Argument] = {
            "x": Input(0), "y": Output(0), "scratch": Scratch(), "line_bytes": self._line_bytes,
            "channels": self.channels, "tasks": self.planes * bands, "bands": bands,
            "strips": strips, "height": self.size[0], "width": self.size[1],
            "out_height": self.out_size[0], "out_width": self.out_size[1],
            "kernel_height": self.window[0], "kernel_width": self.window[1],
            "stride_height": self.stride[0], "stride_width": self.stride[1],
            "dilation_height": self.dilation[0], "dilation_width": self.dilation[1],
            "top": self.start[0], "left": self.start[1],
        }  # fmt: skip
        if self.counts is not None:
            values |= {"row_counts": Packed(0), "column_counts": Packed(1)}
        block.add_all(values | self.extras.arguments(self.out_size[1]))
        epilogue = Epilogue(self.extras.expression, self.extras.operands, len(block.names))
        name = "max_pool" if self.counts is None else "avg_pool"
        text = kernel_text(block, self._lines(epilogue), VOCABULARY, epilogue.functions())
        parallel = threads > 1 and self.estimate > WORTH_SHARING
        arguments = (*block.values, *epilogue.immediates)
        return (Step(source.build(name, text), arguments, parallel, block.tasks),)

    def _lines(self, epilogue: Epilogue) -> list[str]:
        """The kernel's body."""
        is_maximum = self.counts is None

        def combine(value: str, total: str) -> str:
            joined = f"maximum({total}, {value})" if is_maximum else f"{total} + {value}"
            return f"{total} = {joined}"

        vectors = range(_REGISTERS)
        count = "broadcast(read(row_counts + 4 * (row + line), FLOAT32), FLOAT32)"
        average = f"total / ({count} * load_masked(column_counts + 4 * column, FLOAT32, mask))"
        parts = {
            "prologue": epilogue.prologue(),
            "nothing": [f"nothing = broadcast({'-math.inf' if is_maximum else '0.0'}, FLOAT32)"],
            "share": SHARE,
            "begin all": [f"s{vector} = nothing" for vector in vectors],
            "combine all": [
                combine(f"load(p + {4 * LANES * vector}, FLOAT32)", f"s{vector}")
                for vector in vectors
            ],
            "store all": [f"store(q + {4 * LANES * vector}, s{vector})" for vector in vectors],
            "combine": [combine("load_masked(p, FLOAT32, inside)", "s0")],
            "along": self._along(combine),
            "finish": [] if is_maximum else [f"total = {average}"],
            "epilogue": [*self.extras.starts(), *epilogue.lines()],
        }
        return fill(_BODY, parts, {"STRIP": _STRIP, "TOGETHER": _REGISTERS})

    def _along(self, combine: Callable[[str, str], str]) -> list[str]:
        """Lines that combine what is under a vector of windows, from ``place`` in a line on."""
        stride, all_lanes = self.stride[1], ", all_lanes" * 2
        if (stride, self.window[1], self.dilation[1]) == (2, 3, 1):
            return [
                f"total, v1, v2 = load_three(place, FLOAT32{all_lanes}, all_lanes)",
                combine("v1", "total"),
                combine("v2", "total"),
            ]
        value = f"gather(place, {4 * stride}, FLOAT32, all_lanes)"
        if stride <= 2:
            value = (
                "load(place, FLOAT32)" if stride == 1 else f"load_even(place, FLOAT32{all_lanes})"
            )
        step = [combine(value, "total"), "place += 4 * dilation_width", "tap += 1"]
        return ["total = nothing", "tap = 0", "while tap < kernel_width:", *indent(1, step)]


@register(PoolingProblem)
def candidates(problem: PoolingProblem) -> list[PoolingCandidate]:
    """Strips of a few heights, in one and two dimensions."""
    problem.check()
    sizes = _image_sizes(problem.inputs[0], problem.outputs[0])
    extras = _extras(problem)
    if sizes is None or extras is None or problem.operator not in ("max", "mean"):
        return []
    kernel = _pair(problem.kernel, 1)
    dilation = _pair(problem.dilation, 1)
    stride = _pair(problem.stride, 1)
    padding = problem.padding if len(problem.padding) == 2 else ((0, 0), *problem.padding)
    counts = None
    if problem.operator == "mean":
        rows, columns = (
            _counts(problem.count_padding, *facts)
            for facts in zip(*sizes, kernel, stride, dilation, padding, strict=True)
        )
        counts = (rows, columns)
        if problem.divisor is not None:
            counts = ((problem.divisor,) * len(rows), (1,) * len(columns))
    start = (padding[0][0], padding[1][0])
    return _sliding(problem, sizes, kernel, stride, dilation, start, counts, extras)


def _extras(problem: PoolingProblem) -> Extras | None:
    """The epilogue and what it reads; None where it cannot be computed exactly."""
    further, y = problem.inputs[1:], problem.outputs[0]
    if problem.epilogue is None:
        return _NOTHING
    strides = [walk for operand in further if (walk := image_strides(operand, y)) is not None]
    if len(strides) < len(further) or not epilogue_supported(problem.epilogue, further):
        return None
    return Extras.of(problem.epilogue, problem.inputs, strides, first=1)


def _sliding(
    problem: PoolingProblem | AdaptivePoolingProblem,
    sizes: tuple[tuple[int, int], tuple[int, int]],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    start: tuple[int, int],
    counts: Counts | None,
    extras: Extras = _NOTHING,
) -> list[PoolingCandidate]:
    batch, channels = problem.inputs[0].shape[:2]
    size, out_size = sizes
    name = "max" if counts is None else "average"
    columns, rows = (math.ceil(wide / LANES) for wide in (size[1], out_size[1]))
    row = columns * (kernel[0] + 2) + rows * (3 * kernel[1] + 4) + 10
    seconds = batch * channels * (out_size[0] * row + 30) / CYCLES_PER_SECOND
    return [
        PoolingCandidate(
            f"{name} pooling",
            problem,
            seconds,
            batch * channels,
            channels,
            size,
            out_size,
            kernel,
            stride,
            dilation,
            start,
            counts,
            extras,
        )
    ]


def _image_sizes(x: Operand, y: Operand) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Height and width of the input and of the output; None for what there is no kernel for."""
    plain = Layout.plain("float32", len(x.shape))
    if len(x.shape) not in (3, 4) or x.layout != plain or y.layout != plain:
        return None
    return _pair(x.shape[2:], 1), _pair(y.shape[2:], 1)


def _pair(given: tuple[int, ...], missing: int) -> tuple[int, int]:
    return (given[0], given[1]) if len(given) == 2 else (missing, given[0])


def _counts(
    count_padding: bool,
    size: int,
    out_size: int,
    kernel: int,
    step: int,
    reach: int,
    padding: tuple[int, int],
) -> tuple[int, ...]:
    """How many elements each window has along one dimension; 1 for none, whose average is 0."""
    before, after = padding
    low, high = (-before, size + after) if count_padding else (0, size)
    starts = (step * window - before for window in range(out_size))
    return tuple(
        max(sum(low <= start + reach * tap < high for tap in range(kernel)), 1) for start in starts
    )


_BODY = """
<prologue>
<nothing>
all_lanes = mask_first(LANES, FLOAT32)
c_row = 4 * out_width
lines = scratch + thread * STRIP * line_bytes
place = lines
while place < lines + STRIP * line_bytes:
    store(place, nothing)
    place += 4 * LANES
<share>
while task < stop:
    plane = task // bands
    band = task - plane * bands
    image = plane // channels
    channel = plane - image * channels
    origin = x + 4 * plane * height * width
    row = band * strips // bands * STRIP
    last_row = min((band + 1) * strips // bands * STRIP, out_height)
    while row < last_row:
        rows = min(last_row - row, STRIP)
        line = 0
        while line < rows:
            # The rows of the image that are under the windows' columns.
            first = (row + line) * stride_height - top
            count = kernel_height
            while count > 0 and first < 0:
                first += dilation_height
                count -= 1
            while count > 0 and first + (count - 1) * dilation_height >= height:
                count -= 1
            source = origin + 4 * first * width
            step = 4 * dilation_height * width
            q = lines + line * line_bytes + 4 * left
            column = 0
            while column + TOGETHER * LANES <= width:
                p = source + 4 * column
                <begin all>
                tap = 0
                while tap < count:
                    <combine all>
                    p += step
                    tap += 1
                <store all>
                q += 4 * TOGETHER * LANES
                column += TOGETHER * LANES
            while column < width:
                p = source + 4 * column
                inside = mask_first(width - column, FLOAT32)
                s0 = nothing
                tap = 0
                while tap < count:
                    <combine>
                    p += step
                    tap += 1
                store(q, select(inside, s0, nothing))
                q += 4 * LANES
                column += LANES
            line += 1
        c = y + (plane * out_height + row) * c_row
        line = 0
        while line < rows:
            column = 0
            while column < out_width:
                place = lines + line * line_bytes + 4 * column * stride_width
                mask = mask_first(out_width - column, FLOAT32)
                <along>
                <finish>
                store_first(c + line * c_row + 4 * column, total, mask)
                column += LANES
            line += 1
        columns = out_width
        <epilogue>
        row += STRIP
    task += 1
"""


# -- adaptive pooling ----------------------------------------------------------------------------


@dataclass(frozen=True)
class BinsCandidate(Candidate):
    """Bins of any sizes; a task is a row of them."""

    problem: AdaptivePoolingProblem
    size: tuple[int, int]
    bins: tuple[int, int]

    def pack(self, constants: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        tables = []
        for size, bins in zip(self.size, self.bins, strict=True):
            table = aligned_empty((bins, 2), np.int64)
            for number in range(bins):
                table[number] = number * size // bins, -(-(number + 1) * size // bins)
            tables.append(table)
        return tables

    def scratch_bytes(self, threads: int) -> int:
        return threads * self._row_bytes

    @property
    def _row_bytes(self) -> int:
        return math.ceil(self.size[1] / LANES) * LANES * 4

    def build(self, threads: int) -> tuple[Step, ...]:
        if self.problem.outputs[0].size == 0:
            return ()
        block = Arguments()
        values: dict[str, Argument] = {
            "x": Input(0), "y": Output(0), "row_bins": Packed(0), "column_bins": Packed(1),
            "scratch": Scratch(), "row_bytes": self._row_bytes,
            "height": self.size[0], "width": self.size[1],
            "out_height": self.bins[0], "out_width": self.bins[1],
            "tasks": math.prod(self.problem.inputs[0].shape[:2]) * self.bins[0],
        }  # fmt: skip
        block.add_all(values)
        entry = source.build("adaptive_pool", kernel_text(block, fill(_BINS, {"share": SHARE}, {})))
        parallel = threads > 1 and self.estimate > WORTH_SHARING
        return (Step(entry, tuple(block.values), parallel),)


@register(AdaptivePoolingProblem)
def adaptive_candidates(problem: AdaptivePoolingProblem) -> Sequence[Candidate]:
    """Sliding windows where the bins are equal, else the kernel for bins of any sizes."""
    x, y = problem.inputs[0], problem.outputs[0]
    if x.shape[:2] != y.shape[:2] or len(x.shape) != len(y.shape):
        raise ValueError(f"{y.shape} is not {x.shape} pooled")
    sizes = _image_sizes(x, y)
    if sizes is None or 0 in x.shape[2:]:
        return []
    size, bins = sizes
    if 0 not in bins and size[0] % bins[0] == size[1] % bins[1] == 0:
        window = (size[0] // bins[0], size[1] // bins[1])
        counts = ((window[0],) * bins[0], (window[1],) * bins[1])
        return _sliding(problem, sizes, window, window, (1, 1), (0, 0), counts)
    cycles = x.size * (2 / LANES + 4 * bins[0] / size[0]) + 20 * y.size
    return [BinsCandidate("adaptive pooling", problem, cycles / CYCLES_PER_SECOND, size, bins)]


_BINS = """
sums = scratch + thread * row_bytes
<share>
while task < stop:
    plane = task // out_height
    row = task - plane * out_height
    first_row = read(row_bins + 16 * row, INT64)
    last_row = read(row_bins + 16 * row + 8, INT64)
    column = 0
    while column < width:
        mask = mask_first(width - column, FLOAT32)
        total = broadcast(0.0, FLOAT32)
        p = x + 4 * ((plane * height + first_row) * width + column)
        r = first_row
        while r < last_row:
            total += load_masked(p, FLOAT32, mask)
            p += 4 * width
            r += 1
        store(sums + 4 * column, total)
        column += LANES
    q = y + 4 * task * out_width
    b = 0
    while b < out_width:
        first = read(column_bins + 16 * b, INT64)
        last = read(column_bins + 16 * b + 8, INT64)
        sum = 0.0
        c = first
        while c < last:
            sum += read(sums + 4 * c, FLOAT32)
            c += 1
        write(q + 4 * b, sum / ((last_row - first_row) * (last - first)), FLOAT32)
        b += 1
    task += 1
"""
