"""Max, average and adaptive average pooling in float32, of sequences and images.

Windows of one size slide over padded copies of the rows, as those of depthwise convolutions do.
Bins of differing sizes, which adaptive pooling has where the sizes do not divide, are summed down
the columns in vectors and then along the row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.kernels import source
from graphopt.kernels.loops import SHARE, Arguments, kernel_text
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
from graphopt.kernels.tile import (
    CYCLES_PER_SECOND,
    WORTH_SHARING,
    epilogue_supported,
    fill,
    image_strides,
)
from graphopt.kernels.window import Extras, WindowBody, Windows

_STRIP = 4
"""Output rows made at once. Twice as many were as fast, and would be compiled for nothing."""

Counts = tuple[tuple[int, ...], tuple[int, ...]]
"""Elements that a window averages, by its row and by its column; it has their product."""

_NOTHING = Extras(None, (), (), first=1)
_MAXIMUM = WindowBody(outside="-math.inf", combine="maximum({0}, {1})")
_AVERAGE = WindowBody(
    outside="0.0",
    combine="{0} + {1}",
    finish="{0} / (broadcast(read(row_counts + 4 * ({1}), FLOAT32), FLOAT32)"
    " * load_masked(column_counts + 4 * column, FLOAT32, mask))",
)


@dataclass(frozen=True)
class PoolingCandidate(Candidate):
    """Windows in strips of so many rows; averages have ``counts``."""

    windows: Windows
    counts: Counts | None
    extras: Extras

    def pack(self, constants: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        packed = [self.windows.offsets()]
        for numbers in self.counts or ():
            table = aligned_empty((len(numbers),), np.float32)
            table[...] = numbers
            packed.append(table)
        return packed

    def scratch_bytes(self, threads: int) -> int:
        return threads * self.windows.scratch_bytes

    def build(self, threads: int) -> tuple[Step, ...]:
        if self.problem.outputs[0].size == 0:
            return ()
        arguments: dict[str, Argument] = {"x": Input(0)}
        if self.counts is not None:
            arguments |= {"row_counts": Packed(1), "column_counts": Packed(2)}
        body = _MAXIMUM if self.counts is None else _AVERAGE
        name = "max_pool" if self.counts is None else "avg_pool"
        parallel = threads > 1 and self.estimate > WORTH_SHARING
        return (self.windows.step(name, arguments, body, self.extras, parallel),)


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
    name = "max" if counts is None else "average"
    batch, channels = problem.inputs[0].shape[:2]
    size, out_size = sizes
    strip = _STRIP if out_size[0] > 1 else 1
    windows = Windows(batch, channels, 1, size, out_size, kernel, stride, dilation, start, strip)
    seconds = windows.cycles / CYCLES_PER_SECOND
    return [PoolingCandidate(f"{name} pooling", problem, seconds, windows, counts, extras)]


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
