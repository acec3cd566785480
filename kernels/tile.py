"""Register tiles of matrix products, on which convolutions and matrix products are built.

A tile is a few rows of results by a few vectors of columns, kept in registers over the whole
depth: each step of the depth reads the vectors of columns, broadcasts one number per row and adds
the product to every accumulator (K. Goto and R. van de Geijn, "Anatomy of high-performance matrix
multiplication", 2008). Where the depth is cut into blocks, each adds to the results in memory.
After the last block the epilogue (`epilogue`) runs over the tile, which is still in the first
cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from graphopt.kernels.loops import indent
from graphopt.kernels.memory import LINE, VectorMemory, fetch_ahead, first_lanes, int64_constant
from graphopt.kernels.register import LANES, VECTORS_PER_CYCLE, Register, Vector

CYCLES_PER_SECOND = 3.5e9
WORTH_SHARING = 4e-6
"""Seconds of work from which a team of threads is used."""
DEPTH = 384 if LANES == 16 else 256
"""Steps of depth after which panels are renewed, so that they stay in the second cache, those
of short vectors in the first."""

PARTS = 16
"""Parts of the output channels of which threads get shares, the same for every team."""

_COLUMN_APART = LANES < 16
"""Whether one more column is multiplied after the others: 16 registers are full with those."""
_COLUMN_SUMS = 4

_AHEAD = 8192
"""Bytes of a constant that are fetched in advance: its order in memory crosses pages too often for
the CPU to do so, and weights come from the main memory once per inference.
"""


@dataclass(frozen=True)
class TileShape:
    """Rows, and vectors of columns, that a register tile has."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"

    @property
    def cycles(self) -> float:
        """Cycles per step of the depth."""
        loads = self.height / 2 + self.width / VECTORS_PER_CYCLE
        return max(self.height * self.width / VECTORS_PER_CYCLE, loads)

    @property
    def takes_column(self) -> bool:
        """Whether one more column is worth computing, whose rows fill a vector."""
        return self.height in (4, 8) and self.height * self.width <= 3 * LANES // 2


VOCABULARY = ("elementary", "finish", "panel", "simd", "tile")
"""Modules whose names the kernels use that are made of tiles."""

TILES = (TileShape(8, 3), TileShape(6, 4)) if LANES == 16 else (TileShape(4, 3), TileShape(6, 2))
"""Shapes whose accumulators and columns fit the registers."""


@intrinsic(prefer_literal=True)
def multiply_tile(
    typing: Any,
    a: Any,
    a_row: Any,
    a_step: Any,
    padded: Any,
    b: Any,
    b_step: Any,
    depth: Any,
    c: Any,
    c_row: Any,
    accumulate: Any,
    rows: Any,
    columns: Any,
    column: Any,
    once: Any,
    ahead: Any,
    height: Any,
    width: Any,
    vector: Any,
) -> Any:
    """``c = a @ b``, or ``c += a @ b`` where ``accumulate``, for a tile that fits the registers.

    The tile has ``height`` rows and ``width`` vectors (both literal) of columns, of which the
    first ``rows`` and ``columns`` are stored. Element (row, step) of ``a`` is at
    ``a + row * a_row + step * a_step``; the vectors of step ``step`` of ``b`` start at
    ``b + step * b_step`` and are read whole. If ``padded`` (literal), ``a`` has ``height`` rows in
    memory, else ``rows`` of them. Rows of ``c`` are ``c_row`` apart; everything in bytes.
    ``column`` is 0 (literal), or where one more column of ``b`` is, a number per step; then the
    rows of ``a`` must be neighbours, and all vectors of ``c`` whole. ``once`` (literal) says that
    ``b`` is a constant that is read only here, so that it is fetched from the main memory.
    ``ahead`` is 0 (literal), or the bytes from each step of ``b`` to a line that is brought into
    the second cache meanwhile.
    """
    kind = vector.instance_type
    shape = height.literal_value, width.literal_value
    whole = bool(padded.literal_value)
    extended = getattr(column, "literal_value", None) != 0

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> ir.Value:
        named = dict(zip(_MULTIPLY_OPERANDS, values, strict=False))
        for name, numba in zip(_MULTIPLY_OPERANDS, sig.args, strict=False):
            wanted = types.boolean if name == "accumulate" else types.int64
            named[name] = context.cast(builder, named[name], numba, wanted)
        if getattr(ahead, "literal_value", None) != 0:
            named["ahead"] = context.cast(builder, values[14], sig.args[14], types.int64)
        tile = _Tile(VectorMemory(builder, kind), *shape, named, extended)
        tile.multiply(whole, bool(once.literal_value))
        tile.store()
        return context.get_dummy_value()

    return types.void(
        a, a_row, a_step, padded, b, b_step, depth, c, c_row, accumulate, rows, columns,
        column, once, ahead, height, width, vector,
    ), generate  # fmt: skip


_MULTIPLY_OPERANDS = (
    "a", "a_row", "a_step", "padded", "b", "b_step", "depth", "c", "c_row", "accumulate", "rows",
    "columns", "column",
)  # fmt: skip


class _Tile:
    """The body of `multiply_tile`."""

    def __init__(
        self,
        memory: VectorMemory,
        height: int,
        width: int,
        operands: dict[str, ir.Value],
        extended: bool,
    ) -> None:
        self.memory = memory
        self.builder = memory.builder
        self.height = height
        self.width = width
        self.operands = operands
        zero = ir.Constant(memory.vector.llvm, None)
        self.sums = [
            [cgutils.alloca_once_value(self.builder, zero) for _ in range(width)]
            for _ in range(height)
        ]
        self.column = _Column(self.builder, height, operands) if extended else None

    def multiply(self, padded: bool, once: bool) -> None:
        """Make the sums of products."""
        builder, memory, given = self.builder, self.memory, self.operands
        starts = [self._row_start(row, padded) for row in range(self.height)]
        with cgutils.for_range(builder, given["depth"]) as loop:
            step = builder.add(given["b"], builder.mul(loop.index, given["b_step"]))
            b = [
                memory.load(builder.add(step, int64_constant(column * memory.bytes)))
                for column in range(self.width)
            ]
            if once:
                for line in range(0, self.width * memory.bytes, LINE):
                    fetch_ahead(builder, builder.add(step, int64_constant(_AHEAD + line)))
            offset = builder.mul(loop.index, given["a_step"])
            if "ahead" in given:
                fetch_ahead(builder, builder.add(step, given["ahead"]), level=2)
            if padded:
                fetch_ahead(
                    builder, builder.add(builder.add(starts[0], offset), int64_constant(_AHEAD))
                )
            for row in range(self.height):
                factor = memory.broadcast(builder.add(starts[row], offset))
                for column in range(self.width):
                    sum = self.sums[row][column]
                    builder.store(b[column].fma(factor, self._register(sum)).value, sum)
            if self.column is not None and not _COLUMN_APART:
                self.column.add(builder.add(given["a"], offset), loop.index)
        if self.column is not None and _COLUMN_APART:
            self.column.multiply()

    def _row_start(self, row: int, padded: bool) -> ir.Value:
        builder, given = self.builder, self.operands
        number: ir.Value = int64_constant(row)
        if not padded:
            number = _smaller(builder, number, builder.sub(given["rows"], int64_constant(1)))
        return builder.add(given["a"], builder.mul(number, given["a_row"]))

    def store(self) -> None:
        """Store the part of the tile that exists, or add it to what is there."""
        builder, memory, given = self.builder, self.memory, self.operands
        columns = int64_constant(self.width * memory.vector.lanes)
        whole = builder.and_(
            builder.icmp_signed(">=", given["rows"], int64_constant(self.height)),
            builder.icmp_signed(">=", given["columns"], columns),
        )
        with builder.if_else(whole, likely=True) as (all_of_it, part):
            with all_of_it:
                self._store_whole()
            with part:
                self._store_part()
        if self.column is not None:
            offset = int64_constant(self.width * memory.bytes)
            self.column.store(builder.add(given["c"], offset))

    def _store_whole(self) -> None:
        builder, memory, given = self.builder, self.memory, self.operands
        places = [
            (sum, memory.at(given["c"], row, given["c_row"], column * memory.bytes))
            for row, sums in enumerate(self.sums)
            for column, sum in enumerate(sums)
        ]
        with builder.if_then(given["accumulate"]):
            for sum, address in places:
                total = self._register(sum) + memory.load(address)
                builder.store(total.value, sum)
        for sum, address in places:
            memory.store(address, self._register(sum))

    def _store_part(self) -> None:
        # Row by row from memory: few tiles are not whole, and masks for each of their vectors were
        # most of the code.
        builder, memory, given = self.builder, self.memory, self.operands
        masks = [self._columns(column) for column in range(self.width)]
        kind = ir.ArrayType(ir.ArrayType(memory.vector.llvm, self.width), self.height)
        kept = cgutils.alloca_once(builder, kind)
        for row, sums in enumerate(self.sums):
            for column, sum in enumerate(sums):
                place = cgutils.gep_inbounds(builder, kept, 0, row, column)
                builder.store(builder.load(sum), place)
        rows = _smaller(builder, given["rows"], int64_constant(self.height))
        with cgutils.for_range(builder, rows) as loop:
            start = builder.add(given["c"], builder.mul(loop.index, given["c_row"]))
            for column, mask in enumerate(masks):
                address = builder.add(start, int64_constant(column * memory.bytes))
                sum = cgutils.gep_inbounds(builder, kept, 0, loop.index, column)
                with builder.if_then(given["accumulate"]):
                    total = self._register(sum) + memory.load_masked(address, mask)
                    builder.store(total.value, sum)
                memory.store_first(address, self._register(sum), mask)

    def _register(self, sum: ir.Value) -> Register:
        """The sum that is kept at a pointer."""
        return Register(self.builder, self.memory.vector, self.builder.load(sum))

    def _columns(self, column: int) -> ir.Value:
        """The mask of a vector's columns that exist."""
        vector = self.memory.vector
        first = int64_constant(column * vector.lanes)
        left = self.builder.sub(self.operands["columns"], first)
        return first_lanes(self.builder, vector, left).value


def _smaller(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.select(builder.icmp_signed("<", a, b), a, b)


class _Column:
    """One more column of a tile, whose rows are in the lanes of a vector of their own."""

    def __init__(self, builder: ir.IRBuilder, height: int, operands: dict[str, ir.Value]) -> None:
        self.memory = VectorMemory(builder, Vector(types.float32, height))
        self.builder = builder
        self.operands = operands
        zero = ir.Constant(self.memory.vector.llvm, None)
        # Where nothing else is added meanwhile, sums in turn, which need not wait for one another.
        count = _COLUMN_SUMS if _COLUMN_APART else 1
        self.sums = [cgutils.alloca_once_value(builder, zero) for _ in range(count)]

    def add(self, a: ir.Value, step: ir.Value, number: int = 0) -> None:
        """Add the product of the rows at ``a`` with the column's number of that step."""
        builder, memory = self.builder, self.memory
        place = builder.add(self.operands["column"], builder.mul(step, int64_constant(4)))
        known = Register(builder, memory.vector, builder.load(self.sums[number]))
        product = memory.load(a).fma(memory.broadcast(place), known)
        builder.store(product.value, self.sums[number])

    def multiply(self) -> None:
        """Add the products of all steps."""
        builder, given, count = self.builder, self.operands, int64_constant(len(self.sums))

        def add(step: ir.Value, number: int) -> None:
            offset = builder.mul(step, given["a_step"])
            self.add(builder.add(given["a"], offset), step, number)

        turns = builder.sdiv(given["depth"], count)
        with cgutils.for_range(builder, turns) as loop:
            first = builder.mul(loop.index, count)
            for number in range(len(self.sums)):
                add(builder.add(first, int64_constant(number)), number)
        done = builder.mul(turns, count)
        with cgutils.for_range(builder, builder.sub(given["depth"], done)) as loop:
            add(builder.add(done, loop.index), 0)

    def _total(self) -> ir.Value:
        vector = self.memory.vector
        total, *others = (
            Register(self.builder, vector, self.builder.load(sum)) for sum in self.sums
        )
        for other in others:
            total = total + other
        return total.value

    def store(self, c: ir.Value) -> None:
        """Store the rows that exist, or add them to what is at ``c`` and below."""
        builder, given = self.builder, self.operands
        column = self._total()
        for row in range(self.memory.vector.lanes):
            with builder.if_then(builder.icmp_signed("<", int64_constant(row), given["rows"])):
                address = self.memory.at(c, row, given["c_row"])
                pointer = builder.inttoptr(address, ir.FloatType().as_pointer())
                own = builder.extract_element(column, ir.Constant(ir.IntType(32), row))
                with builder.if_else(given["accumulate"]) as (more, first):
                    with more:
                        total = builder.fadd(own, builder.load(pointer))
                        builder.store(total, pointer)
                    with first:
                        builder.store(own, pointer)


PANEL = [
    "start = panel * vectors // panels",
    "filled = (panel + 1) * vectors // panels - start",
]
"""Lines that find the first of a ``panel``'s vectors and how many it has, where all ``vectors`` are
cut into ``panels`` that differ by one vector at most."""


def multiply_lines(
    tile: TileShape,
    a_row: str,
    a_step: str,
    padded: bool,
    column: str = "",
    once: bool = False,
    ahead: str = "0",
) -> list[str]:
    """Lines that call `multiply_tile` with as many vectors as ``filled`` says, at most all.

    ``padded``, ``once`` and ``ahead`` are those of `multiply_tile`. ``column`` is an address, not 0
    where there is one column more; only a tile that `takes_column` has it.
    """

    def call(width: int, column: str) -> list[str]:
        return [
            "multiply_tile(",
            f"    a, {a_row}, {a_step}, {padded}, b, b_step, depth, c, c_row, accumulate,",
            f"    rows, columns, {column}, {once}, {ahead}, {tile.height}, {width}, FLOAT32,",
            ")",
        ]

    lines = [f"if {column} != 0:", *indent(1, call(tile.width, column))] if column else []
    for width in range(tile.width, 0, -1):
        lines.append(f"{'elif' if lines else 'if'} filled == {width}:")
        lines += indent(1, call(width, "0"))
    return lines


def fill(template: str, parts: Mapping[str, Sequence[str]], sizes: Mapping[str, int]) -> list[str]:
    """The lines of a kernel's ``template``.

    A line ``<name>`` becomes the lines ``parts[name]``, with its indentation; the words that
    ``sizes`` names become numbers.
    """
    for word, number in sizes.items():
        template = template.replace(word, str(number))
    lines = []
    for line in template.strip().splitlines():
        word = line.strip()
        if word.startswith("<") and word.endswith(">"):
            margin = line[: -len(word)]
            lines += [margin + inner for inner in parts[word[1:-1]]]
        else:
            lines.append(line)
    return lines
