"""Products of a weight that has many zeros and a panel: what the sparse kernels are built on.

The panel holds one row per step of the depth, a few vectors wide. The weight is a stream: for each
of its rows the offsets of its non-zero columns in the panel, and their values (compare E. Elsen,
M. Dukhan, T. Gale and K. Simonyan, "Fast sparse convnets", 2020). Each non-zero costs one
multiplication per vector, and a load, since other rows have other columns: so most of the panel
should stay in the first cache. Where it is too deep, it is cut into blocks of depth, between which
the sums wait in scratch memory. In each block, rows are sorted by their number of non-zeros, so
that loops of equal length follow one another and end as the CPU predicts.

Where neighbouring rows share their columns (blocks of rows were pruned), they are computed together
and share the loads as well.

A weight that is zero multiplies nothing, so that an infinity or NaN in the panel reaches only the
results whose weights for it are not zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.kernels.loops import indent
from graphopt.kernels.registry import aligned_empty
from graphopt.kernels.simd import LANES
from graphopt.kernels.tile import PARTS, VECTORS_PER_CYCLE, fill
from graphopt.kernels.zeros import NEIGHBOURS, ZeroPattern, group_rows

VECTOR_BYTES = 4 * LANES
_FIRST_CACHE = 26 * 1024
"""Bytes of a panel that stay in the first cache, beside what else passes through it."""
_PANEL_BYTES = (_FIRST_CACHE, 2 * _FIRST_CACHE)
"""Sizes of panels to try: more than stays in the first cache means fewer blocks of depth."""
_WIDTHS = {1: (4, 5, 7), 2: (4, 5, 7), 4: (4, 5)} if LANES == 16 else {1: (4, 6), 2: (4,), 4: (2,)}
"""Vectors of a panel, by rows that share their columns."""
_TAIL_WIDTHS = {1: (3, 4, 6), 2: (3, 4), 4: (3, 4)}
"""The same of panels of which the last has a tail."""
_TAILS = (4, 8) if LANES == 16 else ()
"""Lanes of vectors that cost half of a whole one."""
_AHEAD = 2048
"""Bytes of a stream that are fetched in advance: it comes from the main memory once a call."""
_FOUR = 4
"""Columns that are multiplied at once: one load brings their weights."""
_LEAST_PART = 8
"""Row groups of a part at least."""
_WORTH_SHARING_COLUMNS = 1.2
"""How many more products with rows taken together are made up for by fewer loads."""


@dataclass(frozen=True)
class Schedule:
    """``rows`` of the weight at once, ``width`` vectors, ``depth`` steps per block.

    ``tail`` is the number of lanes of the narrower vector that the last panel has more, or 0.
    """

    rows: int
    width: int
    depth: int
    tail: int = 0

    def __str__(self) -> str:
        tail = f" and {self.tail} lanes" if self.tail else ""
        return f"{self.rows}x{self.width}{tail}, depth {self.depth}"

    @property
    def step(self) -> int:
        """Bytes of a row of the panel."""
        return self.width * VECTOR_BYTES

    @property
    def tail_shift(self) -> int:
        """A row's place in the tail is its place in the panel, shifted right by so many bits.

        Rows of the tail are whole multiples of it long, so that none lies in two cache lines.
        """
        shift = 0
        while self.step % (8 * self.tail << shift) == 0:
            shift += 1
        return shift

    @property
    def tail_step(self) -> int:
        """Bytes of a row of the tail."""
        return self.step >> self.tail_shift if self.tail else 0

    @property
    def tail_start(self) -> int:
        """Bytes from the panel to its tail."""
        return self.depth * self.step

    @property
    def panel_bytes(self) -> int:
        # The last row of the tail is written as a whole vector.
        tail = self.depth * self.tail_step + VECTOR_BYTES if self.tail else 0
        return self.tail_start + math.ceil(tail / VECTOR_BYTES) * VECTOR_BYTES

    @property
    def sums_step(self) -> int:
        """Bytes of the sums of a row of the weight."""
        return self.step + (VECTOR_BYTES if self.tail else 0)

    def panels(self, columns: int) -> int:
        """Panels that ``columns`` columns take."""
        if self.tail:
            return columns // (self.width * LANES)
        return math.ceil(columns / (self.width * LANES))

    def panels_of_work(self, columns: int) -> float:
        """As many panels without a tail would take as long."""
        return self.panels(columns) + (0.5 / self.width if self.tail else 0)

    def row_groups(self, outputs: int) -> int:
        return math.ceil(outputs / self.rows)

    def sums_bytes(self, outputs: int) -> int:
        """Scratch memory for the sums of ``outputs`` rows of the weight."""
        return self.row_groups(outputs) * self.rows * self.sums_step

    def parts(self, outputs: int) -> int:
        """Parts of the weight that a panel may be multiplied by separately."""
        return max(min(self.row_groups(outputs) // _LEAST_PART, PARTS), 1)


def schedules(
    zeros: ZeroPattern, depth: int, columns: int, unit: int = 1, run: int | None = None
) -> Iterator[Schedule]:
    """Schedules that may suit the zeros and so many columns.

    Blocks of depth are multiples of ``unit``. The last ``run`` columns, or all, are neighbours
    wherever they are copied from: a tail has no more.
    """
    units = depth // unit
    rest = columns % LANES
    tail = next((lanes for lanes in _TAILS if 0 < rest <= min(lanes, run or columns)), 0)
    for rows in NEIGHBOURS:
        if zeros.density(rows) > _WORTH_SHARING_COLUMNS * zeros.density(1):
            continue
        vectors = columns // LANES
        divisors = [
            width for width in _TAIL_WIDTHS[rows] if tail and vectors and vectors % width == 0
        ]
        for width in divisors or _WIDTHS[rows]:
            blocks = {units}
            for size in _PANEL_BYTES:
                fitting = max(size // (width * VECTOR_BYTES * unit), 1)
                blocks.add(math.ceil(units / math.ceil(units / fitting)))
            for block in sorted(blocks):
                yield Schedule(rows, width, block * unit, tail if divisors else 0)


def product_cycles(schedule: Schedule, zeros: ZeroPattern, outputs: int, depth: int) -> float:
    """Cycles to multiply one panel by a weight (outputs, depth), roughly."""
    width = schedule.width / VECTORS_PER_CYCLE
    load = 1.75 - 0.75 * min(1.0, _FIRST_CACHE / schedule.panel_bytes)
    column = max(width * schedule.rows + 0.7, width * load + 0.5 + 0.7 * schedule.rows)
    blocks = math.ceil(depth / schedule.depth)
    waiting = (blocks - 1) * (8 + 3.5 * schedule.rows * width)
    columns = zeros.density(schedule.rows) * depth
    return schedule.row_groups(outputs) * (columns * column + 12 + waiting)


# -- the stream ----------------------------------------------------------------------------------


def pack_streams(blocks: Sequence[np.ndarray], schedule: Schedule, parts: int) -> list[np.ndarray]:
    """Arrays for a kernel: where each stream starts, in bytes (int64), and all streams (int32).

    ``blocks`` are weights (outputs, steps of one block of depth). Stream ``block * parts + part``
    is that of a part of the row groups.
    """
    streams = [_streams(block, schedule, parts) for block in blocks]
    sizes = [len(words) for words, _ in streams]
    before = np.cumsum([0, *sizes[:-1]])
    starts = aligned_empty((len(blocks), parts), np.int64)
    starts[...] = [4 * (first + own) for first, (_, own) in zip(before, streams, strict=True)]
    words = aligned_empty((sum(sizes),), np.int32)
    np.concatenate([words for words, _ in streams], out=words)
    return [starts.reshape(-1), words]


def _streams(matrix: np.ndarray, schedule: Schedule, parts: int) -> tuple[np.ndarray, np.ndarray]:
    """The streams of one block, and the word where that of each part starts.

    A stream has runs of row groups with equally many columns: that number, how many groups, and
    for each group its number and its columns, as their offset in the panel and the value of each
    row, four columns together as long as there are four. A run of no groups ends it.
    """
    count, entry = schedule.row_groups(len(matrix)), 1 + schedule.rows
    rows = np.zeros((count * schedule.rows, matrix.shape[1]), np.float32)
    rows[: len(matrix)] = matrix
    nonzero = group_rows(rows != 0, schedule.rows)
    lengths = nonzero.sum(axis=1)
    part = np.repeat(np.arange(parts), np.diff(np.arange(parts + 1) * count // parts))
    order = np.lexsort((-lengths, part))
    lengths = lengths[order]
    begins_part = np.diff(part, prepend=-1) != 0
    begins_run = begins_part | (np.diff(lengths, prepend=-1) != 0)
    # A run has two words more, and so has the end of every part.
    sizes = 1 + lengths * entry
    more = 2 * begins_run + 2 * begins_part
    places = np.cumsum(sizes + more) - sizes - 2
    words = np.zeros(places[-1] + sizes[-1] + 2, np.int32)
    words[places] = order
    runs = np.flatnonzero(begins_run)
    words[places[runs] - 2] = lengths[runs]
    words[places[runs] - 1] = np.diff(runs, append=count)
    groups, columns = np.nonzero(nonzero[order])
    number = np.arange(len(groups)) - (np.cumsum(lengths) - lengths)[groups]
    # Fours hold their columns first, then the values of one row after those of another.
    four, lane = np.divmod(number, _FOUR)
    in_four = number < lengths[groups] // _FOUR * _FOUR
    entries = places[groups] + 1 + np.where(in_four, four * _FOUR, number) * entry
    step = np.where(in_four, _FOUR, 1)
    lane = np.where(in_four, lane, 0)
    words[entries + lane] = columns * schedule.step
    values = rows.reshape(count, schedule.rows, -1)[order[groups], :, columns]
    for row in range(schedule.rows):
        words[entries + (1 + row) * step + lane] = values[:, row].view(np.int32)
    return words, places[begins_part] - 2


# -- the kernel ----------------------------------------------------------------------------------


def tile_names(schedule: Schedule, tail: bool) -> list[tuple[str, int, int]]:
    """The variables that hold the sums, each with its row and its vector; ``tail`` with the tail.

    The sums of a tail are in a narrower vector.
    """
    return [
        (f"s{row}_{vector}", row, vector)
        for row in range(schedule.rows)
        for vector in range(schedule.width + tail)
    ]


def wait_lines(schedule: Schedule, tail: bool) -> list[str]:
    """Lines that store the sums of a row group at ``sums``."""
    names = tile_names(schedule, tail)
    return [f"store({_at(schedule, row, vector)}, {name})" for name, row, vector in names]


def widen_lines(schedule: Schedule) -> list[str]:
    """Lines that make whole vectors of the sums of a tail; the lanes beyond hold anything."""
    names = [f"s{row}_{schedule.width}" for row in range(schedule.rows)]
    return [f"{name} = resize({name}, FLOAT32)" for name in names]


def product_lines(
    schedule: Schedule,
    finish: Sequence[str],
    before: Sequence[str] = (),
    finish_tail: Sequence[str] = (),
) -> list[str]:
    """Lines that multiply a panel by a stream.

    They expect the addresses ``panel``, ``p`` (of the stream) and ``all_sums`` (of the sums that
    wait, by row group), and ``first_block``, whether there are none yet; where the schedule has a
    tail, also ``has_tail`` and the address ``tail``. ``before`` and ``finish`` (``finish_tail``
    for a panel with a tail) are the lines around each row group, with its ``number`` and the
    address ``sums`` of its own; at the end the sums are in the variables `tile_names`.
    """
    whole = _product_lines(schedule, before, finish, tail=False)
    if not schedule.tail:
        return whole
    tail = _product_lines(schedule, before, finish_tail, tail=True)
    return ["if has_tail:", *indent(1, tail), "else:", *indent(1, whole)]


def _product_lines(
    schedule: Schedule, before: Sequence[str], finish: Sequence[str], tail: bool
) -> list[str]:
    kinds = ["FLOAT32"] * schedule.width + [f"FLOAT32X{schedule.tail}"] * tail
    names = tile_names(schedule, tail)
    parts = {
        "zero": [f"{name} = broadcast(0.0, {kinds[vector]})" for name, _, vector in names],
        "resume": [
            f"{name} = load({_at(schedule, row, vector)}, {kinds[vector]})"
            for name, row, vector in names
        ],
        "four": _four_lines(schedule, kinds),
        "one": _one_lines(schedule, kinds),
        "before": before,
        "finish": finish,
    }
    sizes = {
        "SUMS": schedule.rows * schedule.sums_step,
        "FOUR": _FOUR,
        "ENTRY": 4 + 4 * schedule.rows,
        "AHEAD": _AHEAD,
    }
    return fill(_BODY, parts, sizes)


def _one_lines(schedule: Schedule, kinds: Sequence[str]) -> list[str]:
    """Lines that multiply the column at ``p``."""
    weights = [
        f"w{row} = broadcast(read(p + {4 + 4 * row}, FLOAT32), FLOAT32)"
        for row in range(schedule.rows)
    ]
    return ["offset = read(p, INT32)", *weights, *_multiply_lines(schedule, kinds)]


def _four_lines(schedule: Schedule, kinds: Sequence[str]) -> list[str]:
    """Lines that multiply the four columns at ``p``."""
    lines = [
        f"four{row} = load_repeated(p + {4 * _FOUR * (1 + row)}, FLOAT32)"
        for row in range(schedule.rows)
    ]
    for lane in range(_FOUR):
        lines.append(f"offset = read(p + {4 * lane}, INT32)")
        lines += [f"w{row} = repeat_lane(four{row}, {lane})" for row in range(schedule.rows)]
        lines += _multiply_lines(schedule, kinds)
    return lines


def _multiply_lines(schedule: Schedule, kinds: Sequence[str]) -> list[str]:
    """Lines that multiply a row of the panel, ``offset`` bytes into it, by ``w{row}``."""
    lines = []
    for vector, kind in enumerate(kinds):
        weights = [f"w{row}" for row in range(schedule.rows)]
        if vector == schedule.width:
            lines.append(f"value = load(tail + (offset >> {schedule.tail_shift}), {kind})")
            weights = [f"resize({weight}, {kind})" for weight in weights]
        else:
            lines.append(f"value = load(panel + offset + {vector * VECTOR_BYTES}, {kind})")
        lines += [
            f"s{row}_{vector} = fma(value, {weight}, s{row}_{vector})"
            for row, weight in enumerate(weights)
        ]
    return lines


def _at(schedule: Schedule, row: int, vector: int) -> str:
    return f"sums + {row * schedule.sums_step + vector * VECTOR_BYTES}"


_BODY = """
members = read(p + 4, INT32)
while members > 0:
    count = read(p, INT32)
    p += 8
    while members > 0:
        number = read(p, INT32)
        p += 4
        sums = all_sums + number * SUMS
        <before>
        if first_block:
            <zero>
        else:
            <resume>
        end = p + count * ENTRY
        ahead = p + AHEAD
        while ahead < end + AHEAD:
            prefetch(ahead)
            ahead += 64
        last_four = p + count // FOUR * FOUR * ENTRY
        while p < last_four:
            <four>
            p += FOUR * ENTRY
        while p < end:
            <one>
            p += ENTRY
        <finish>
        members -= 1
    members = read(p + 4, INT32)
"""
