"""Products of a weight that has many zeros and a panel: what the sparse kernels are built on.

The panel holds one row per step of the depth, a few vectors wide. The weight is a stream: for each
of its rows the offsets of its non-zero columns in the panel, and their values (compare E. Elsen,
M. Dukhan, T. Gale and K. Simonyan, "Fast sparse convnets", 2020). Each non-zero costs one
multiplication per vector, and a load, since other rows have other columns: so most of the panel
should stay in the first cache. Where it is too deep, it is cut into blocks of depth, between which
the sums wait in scratch memory. Non-zeros are multiplied in fours, after which two may be left but
no other number (`_in_twos`), and in each block rows are sorted by how many they have: loops of
equal length follow one another and end as the CPU predicts. What `stream` does is the innermost
part. Where the columns already lie in memory as they would in a panel, as the pixels under a 1 x 1
kernel do, and begin on cache lines, they are not copied.

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

from graphopt.kernels import tile
from graphopt.kernels.caches import FIRST_CACHE
from graphopt.kernels.loops import indent
from graphopt.kernels.memory import LINE
from graphopt.kernels.register import VECTORS_PER_CYCLE
from graphopt.kernels.registry import aligned_empty
from graphopt.kernels.simd import LANES
from graphopt.kernels.stream import (
    FOUR,
    MOST_STEPS,
    TWO,
    VECTOR_BYTES,
    two_bytes,
)
from graphopt.kernels.tile import PARTS, fill
from graphopt.kernels.zeros import NEIGHBOURS, ZeroPattern

VOCABULARY = (*tile.VOCABULARY, "shares", "stream")
"""Modules whose names the kernels use that multiply streams."""

_KEPT_BYTES = FIRST_CACHE * 13 // 16
"""Bytes of a panel that stay in the first cache, beside what else passes through it."""
_PANEL_BYTES = (_KEPT_BYTES, 52 * 1024)
"""Sizes of panels to try: more than stays in the first cache means fewer blocks of depth."""
WIDTHS = (
    {1: (4, 5, 7), 2: (4, 5, 7), 4: (4, 5)} if LANES == 16 else {1: (4, 6, 7), 2: (4, 6), 4: (2,)}
)
"""Vectors of a panel, by rows that share their columns."""
_STAYING_WIDTHS = WIDTHS[1] if LANES == 16 else (*WIDTHS[1], 8)
"""The same of panels of one row at a time that may stay where they are: of whole cache lines."""
_TAIL_WIDTHS = (3, 4) if LANES == 16 else (4, 6)
"""The same of panels of which the last has a tail."""
_TAILS = tuple(lanes for lanes in (4, 8) if lanes < LANES)
"""Lanes of narrower vectors."""
_TAIL_COST = 1.0 if LANES == 16 and VECTORS_PER_CYCLE == 2 else 0.5
"""Of that of a whole vector."""
_LEAST_PART = 8
"""Row groups of a part at least."""
_TASKS = 64
"""As many are enough for threads to share: in longer parts more rows are of one length."""
_SETS = 64
"""Sets of the first cache, as most CPUs have it."""
_WORTH_SHARING_COLUMNS = 1.2
"""How many more products with rows taken together are made up for by fewer loads."""


@dataclass(frozen=True)
class Schedule:
    """``rows`` of the weight at once, ``width`` vectors, ``depth`` steps per block.

    ``tail`` is the number of lanes of the narrower vector that the last panel has more, or 0.
    ``pitch`` is 0 where panels are copied; else they are where the columns are, whose rows are so
    many bytes apart. ``strips`` is 0, or the bytes of a panel that is no matrix: its steps share
    memory (`sparse_strips`).
    """

    rows: int
    width: int
    depth: int
    tail: int = 0
    pitch: int = 0
    strips: int = 0

    def __str__(self) -> str:
        tail = f" and {self.tail} lanes" if self.tail else ""
        place = " in place" if self.pitch else " in strips" if self.strips else ""
        return f"{self.rows}x{self.width}{tail}{place}, depth {self.depth}"

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of the panel."""
        return self.width * VECTOR_BYTES

    @property
    def lines(self) -> int:
        """Lines of the cache that a row of the panel takes."""
        return math.ceil(self.row_bytes / LINE)

    @property
    def tail_step(self) -> int:
        """Bytes from one row of a tail that is copied to the next."""
        return 4 * self.tail

    @property
    def tail_start(self) -> int:
        """Bytes from the panel to its tail."""
        return self.depth * self.row_bytes

    @property
    def panel_bytes(self) -> int:
        """Memory that a panel takes."""
        if self.strips:
            return self.strips
        # The last row of the tail is written as a whole vector.
        tail = self.depth * self.tail_step + VECTOR_BYTES if self.tail else 0
        return self.tail_start + math.ceil(tail / VECTOR_BYTES) * VECTOR_BYTES

    @property
    def sums_start(self) -> int:
        """Where, in a thread's scratch memory, the sums are: behind the panel, if it is there."""
        return 0 if self.pitch else self.panel_bytes

    @property
    def sums_step(self) -> int:
        """Bytes of the sums of a row of the weight."""
        return self.row_bytes + (VECTOR_BYTES if self.tail else 0)

    def panels(self, columns: int) -> int:
        """Panels that ``columns`` columns take."""
        if self.tail:
            return columns // (self.width * LANES)
        return math.ceil(columns / (self.width * LANES))

    def row_groups(self, outputs: int) -> int:
        return math.ceil(outputs / self.rows)

    def sums_bytes(self, outputs: int) -> int:
        """Scratch memory for the sums of ``outputs`` rows of the weight."""
        return self.row_groups(outputs) * self.rows * self.sums_step

    def parts(self, outputs: int, panels: int) -> int:
        """Parts of the weight that one of so many panels may be multiplied by separately."""
        most = min(PARTS, math.ceil(_TASKS / panels))
        return max(min(self.row_groups(outputs) // _LEAST_PART, most), 1)


def schedules(
    zeros: ZeroPattern,
    depth: int,
    columns: int,
    unit: int = 1,
    run: int | None = None,
    pitch: int = 0,
) -> Iterator[Schedule]:
    """Schedules that may suit the zeros and so many columns.

    Blocks of depth are multiples of ``unit``. The last ``run`` columns, or all, are neighbours
    wherever they are copied from: a tail has no more. Where columns need not be copied, rows of
    them are ``pitch`` bytes apart.
    """
    for rows in rows_at_once(zeros):
        widths, tail, stays = _widths(rows, columns, run or columns, pitch)
        for width in widths:
            for block in depths(depth // unit, unit, width * VECTOR_BYTES * unit):
                yield Schedule(rows, width, block * unit, tail, stays)


def rows_at_once(zeros: ZeroPattern) -> list[int]:
    """How many rows of the weight may be worth computing together."""
    most = _WORTH_SHARING_COLUMNS * zeros.density(1)
    return [rows for rows in NEIGHBOURS if zeros.density(rows) <= most]


def depths(units: int, unit_steps: int, unit_bytes: int) -> list[int]:
    """Depths of blocks to try, in units of so many steps and bytes of a panel; none where one unit
    is too much."""
    most = MOST_STEPS // unit_steps
    if most == 0:
        return []
    fitting = [most, *(min(max(size // unit_bytes, 1), most) for size in _PANEL_BYTES)]
    return sorted({math.ceil(units / math.ceil(units / some)) for some in fitting})


def _widths(rows: int, columns: int, run: int, pitch: int) -> tuple[Sequence[int], int, int]:
    """Widths to try, their tail, and the pitch if panels of these widths stay where they are."""
    vectors, rest = divmod(columns, LANES)
    tail = next((lanes for lanes in _TAILS if 0 < rest <= min(lanes, run)), 0)
    whole = math.ceil(columns / LANES)
    widths = [width for width in _TAIL_WIDTHS if tail and vectors and vectors % width == 0]
    exact: list[int] = []
    if widths and _TAIL_COST == 1:
        # One that costs as much as a whole one is kept only if whole ones alone would take more
        # panels, or as many that are copied.
        most = vectors // max(widths) - (pitch == 0)
        exact = [width for width in WIDTHS[rows] if whole % width == 0 and whole // width <= most]
    if exact or not widths:
        tail, vectors = 0, whole
        widths = exact or _fitting(WIDTHS[rows], vectors)
    may_stay = _STAYING_WIDTHS if rows == 1 and not tail else widths
    staying = [width for width in may_stay if _stays(width, tail, vectors, pitch)]
    return (staying, tail, pitch) if staying else (widths, tail, 0)


def _fitting(widths: Sequence[int], vectors: int) -> list[int]:
    """The widths but for the first, where registers are few and a wider one wastes no more.

    A wider one reads the weights less often, and each takes kernels of its own to compile.
    """
    wasted = [-vectors % width for width in widths]
    if LANES == 16 or len(widths) == 1 or wasted[0] < min(wasted[1:]):
        return list(widths)
    return list(widths[1:])


def _stays(width: int, tail: int, vectors: int, pitch: int) -> bool:
    """Whether panels of rows so far apart can be read as fast as a copy that is dense.

    They are all whole, and rows start on cache lines, not always on those of the same few sets of
    the first cache.
    """
    lines, rest = divmod(pitch, LINE)
    if rest or vectors % width or pitch < (vectors + (tail > 0)) * VECTOR_BYTES:
        return False
    places = _SETS // math.gcd(lines, _SETS)
    return places * (width + (tail > 0)) * VECTOR_BYTES >= _SETS * LINE


def product_cycles(schedule: Schedule, zeros: ZeroPattern, outputs: int, depth: int) -> float:
    """Cycles to multiply one panel by a weight (outputs, depth), roughly."""
    width = schedule.width / VECTORS_PER_CYCLE
    load = 2.25 - 0.75 * min(1.0, _KEPT_BYTES / schedule.panel_bytes)
    load -= 0.5 * min(1.0, 4 * _KEPT_BYTES / schedule.panel_bytes)
    column = max(width * schedule.rows + 0.7, width * load + 0.5 + 0.7 * schedule.rows)
    blocks = math.ceil(depth / schedule.depth)
    waiting = (blocks - 1) * (8 + 3.5 * schedule.rows * width)
    columns = zeros.density(schedule.rows) * depth + blocks * (TWO - 1) / 2
    return schedule.row_groups(outputs) * (columns * column + 12 + waiting)


def panels_of(
    cycles: tuple[float, float], schedule: Schedule, columns: int
) -> tuple[tuple[float, float], ...]:
    """The cycles of all panels of so many columns, if ``cycles`` are those of one without a tail:
    to copy it, and of all its tasks."""
    panels = [cycles] * schedule.panels(columns)
    if schedule.tail:
        copy, tasks = cycles
        panels[-1] = (copy, tasks + (copy + tasks) * _TAIL_COST / schedule.width)
    return tuple(panels)


# -- the stream ----------------------------------------------------------------------------------


def pack_streams(
    blocks: Sequence[np.ndarray], schedule: Schedule, parts: int, steps: np.ndarray | None = None
) -> list[np.ndarray]:
    """Arrays for a kernel: where each stream starts, in bytes (int64), and all streams (int32).

    ``blocks`` are weights (outputs, steps of one block of depth). Stream ``block * parts + part``
    is that of a part of the row groups. ``steps`` are the places of a block's steps in the panel,
    if they do not simply follow one another.
    """
    if steps is None:
        steps = np.arange(schedule.depth)
    if steps.max() >= MOST_STEPS:
        raise ValueError(f"a panel has {steps.max() + 1} steps, a stream counts to {MOST_STEPS}")
    streams = [_streams(block, schedule, parts, steps) for block in blocks]
    sizes = [len(words) for words, _ in streams]
    before = np.cumsum([0, *sizes[:-1]])
    starts = aligned_empty((len(blocks), parts), np.int64)
    starts[...] = [4 * (first + own) for first, (_, own) in zip(before, streams, strict=True)]
    words = aligned_empty((sum(sizes),), np.int32)
    np.concatenate([words for words, _ in streams], out=words)
    return [starts.reshape(-1), words]


def _streams(
    matrix: np.ndarray, schedule: Schedule, parts: int, steps: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The streams of one block, and the word where that of each part starts.

    A stream has runs of row groups with equally many twos of columns: that number, how many
    groups, and for each group its number and its columns, four by four, perhaps two at the end:
    their steps in the panel, then the values of each row. A run of no groups ends it.
    """
    count = schedule.row_groups(len(matrix))
    rows = np.zeros((count, schedule.rows, matrix.shape[1]), np.float32)
    rows.reshape(-1, matrix.shape[1])[: len(matrix)] = matrix
    groups, columns, values = _in_twos(rows)
    twos = np.bincount(groups, minlength=count) // TWO
    part = np.repeat(np.arange(parts), np.diff(np.arange(parts + 1) * count // parts))
    order = np.lexsort((-twos, part))
    twos = twos[order]
    begins_part = np.diff(part, prepend=-1) != 0
    begins_run = begins_part | (np.diff(twos, prepend=-1) != 0)
    # A run has two words more, and so has the end of every part.
    sizes = 1 + twos * (two_bytes(schedule.rows) // 4)
    places = np.cumsum(sizes + 2 * begins_run + 2 * begins_part) - sizes - 2
    words = np.zeros(places[-1] + sizes[-1] + 2, np.int32)
    words[places] = order
    runs = np.flatnonzero(begins_run)
    words[places[runs] - 2] = twos[runs]
    words[places[runs] - 1] = np.diff(runs, append=count)
    _write_columns(words, places[np.argsort(order)] + 1, groups, steps[columns], values)
    return words, places[begins_part] - 2


def _in_twos(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The groups, columns and values (columns, rows) of what is not zero in ``rows``
    (groups, rows, columns): evenly many of each group.

    If a column is lacking, the largest weight is halved, and its products added twice; a zero would
    make NaN of an infinity.
    """
    groups, columns = np.nonzero((rows != 0).any(axis=1))
    lacking = np.bincount(groups, minlength=len(rows)) % TWO
    largest = np.abs(rows).max(axis=1).argmax(axis=1)
    shares = np.where(columns == largest[groups], 1 + lacking[groups], 1)
    groups, columns, shares = (array.repeat(shares) for array in (groups, columns, shares))
    return groups, columns, rows[groups, :, columns] / shares.astype(np.float32)[:, np.newaxis]


def _write_columns(
    words: np.ndarray,
    places: np.ndarray,
    groups: np.ndarray,
    steps: np.ndarray,
    values: np.ndarray,
) -> None:
    """Write columns to a stream in which those of each group begin at the word ``places``."""
    rows = values.shape[1]
    lengths = np.bincount(groups, minlength=len(places))
    four, lane = np.divmod(np.arange(len(groups)) - (np.cumsum(lengths) - lengths)[groups], FOUR)
    entries = places[groups] + four * (two_bytes(rows) // 4 * FOUR // TWO)
    # How many columns are written at once: two behind the last four.
    together = np.minimum(lengths[groups] - FOUR * four, FOUR)
    words.view(np.uint16)[2 * entries + lane] = steps
    for row in range(rows):
        words[entries + together // 2 + together * row + lane] = values[:, row].view(np.int32)


# -- the kernel ----------------------------------------------------------------------------------


def wait_line(schedule: Schedule, tail: bool) -> str:
    """The line that stores a tile at ``sums``; ``tail`` for a panel with one."""
    return f"store_sums(sums, {tile_name(tail)}, {_shape(schedule, tail)})"


def tile_name(tail: bool) -> str:
    """The variable that holds a tile, which is another where it has a tail."""
    return "longer" if tail else "tile"


def _shape(schedule: Schedule, tail: bool) -> str:
    """The last arguments of `multiply_stream` and `store_sums`."""
    lanes = schedule.tail if tail else 0
    return f"{schedule.rows}, {schedule.width}, {lanes}, {schedule.sums_step}"


def product_lines(
    schedule: Schedule,
    finish: Sequence[str],
    before: Sequence[str] = (),
    finish_tail: Sequence[str] = (),
    columns: str = "",
) -> list[str]:
    """Lines that multiply a panel by a stream.

    They expect the addresses ``panel``, ``p`` (of the stream) and ``all_sums`` (of the sums that
    wait, by row group), ``step``, the bytes from one step of the panel to the next, and
    ``first_block``, whether there are no sums yet; where the schedule has a tail, also ``has_tail``
    and the ``tail_step`` of the address ``tail``. ``before`` and ``finish`` (``finish_tail``
    for a panel with a tail) are the lines around each row group, with its ``number`` and the
    address ``sums`` of its own; at the end the variable `tile_name` is what `multiply_stream`
    returns. ``columns`` is the variable that says how many columns the panel has, if others are in
    memory that is not known.
    """
    parts = {"before": before, "tile": _tile_lines(schedule, finish, False, columns)}
    if schedule.tail:
        tail = _tile_lines(schedule, finish_tail, True, columns)
        parts["tile"] = ["if has_tail:", *indent(1, tail), "else:", *indent(1, parts["tile"])]
    sizes = {
        "SUMS": schedule.rows * schedule.sums_step,
        "TWOS": two_bytes(schedule.rows),
    }
    return fill(_BODY, parts, sizes)


def _tile_lines(schedule: Schedule, finish: Sequence[str], tail: bool, columns: str) -> list[str]:
    """Lines that multiply a row group, and what follows."""
    rows = "panel, step, tail, tail_step" if tail else "panel, step, panel, 0"
    filled = f"{columns} - {schedule.width - (not tail)} * LANES" if columns else "0"
    operands = f"p, twos, {rows}, sums, first_block, {filled}, {_shape(schedule, tail)}"
    return [f"{tile_name(tail)} = multiply_stream({operands})", *finish]


_BODY = """
members = read(p + 4, INT32)
while members > 0:
    twos = read(p, INT32)
    p += 8
    while members > 0:
        number = read(p, INT32)
        p += 4
        sums = all_sums + number * SUMS
        <before>
        <tile>
        p += twos * TWOS
        members -= 1
    members = read(p + 4, INT32)
"""
