"""Register tiles of matrix products, on which convolutions and matrix products are built.

A tile is a few rows of results by a few vectors of columns, kept in registers over the whole
depth: each step of the depth reads the vectors of columns, broadcasts one number per row and adds
the product to every accumulator (K. Goto and R. van de Geijn, "Anatomy of high-performance matrix
multiplication", 2008). Where the depth is cut into blocks, each adds to the results in memory.
After the last block the epilogue runs over the tile, which is still in the first cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from graphopt.kernels.emission import emit, unsupported
from graphopt.kernels.expression import Expression
from graphopt.kernels.loops import broadcast_strides, indent
from graphopt.kernels.memory import LINE, VectorMemory, fetch_ahead, first_lanes, int64_constant
from graphopt.kernels.operand import ITEM_BYTES, Operand
from graphopt.kernels.register import LANES, Register, Vector

CYCLES_PER_SECOND = 3.5e9
VECTORS_PER_CYCLE = 1 if LANES == 16 else 2
"""Vectors that are multiplied, or loaded, per cycle: the widest often take two units at once."""
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


VOCABULARY = ("elementary", "panel", "simd", "tile")
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
        tile = _Tile(VectorMemory(builder, kind), *shape, named, extended)
        tile.multiply(whole, bool(once.literal_value))
        tile.store()
        return context.get_dummy_value()

    return types.void(
        a, a_row, a_step, padded, b, b_step, depth, c, c_row, accumulate, rows, columns,
        column, once, height, width, vector,
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
            if padded:
                fetch_ahead(
                    builder, builder.add(builder.add(starts[0], offset), int64_constant(_AHEAD))
                )
            for row in range(self.height):
                factor = memory.broadcast(builder.add(starts[row], offset))
                for column in range(self.width):
                    sum = self.sums[row][column]
                    known = Register(builder, memory.vector, builder.load(sum))
                    builder.store(b[column].fma(factor, known).value, sum)
            if self.column is not None and not _COLUMN_APART:
                self.column.add(builder.add(given["a"], offset), loop.index)
        if self.column is not None and _COLUMN_APART:
            self.column.multiply()

    def _row_start(self, row: int, padded: bool) -> ir.Value:
        builder, given = self.builder, self.operands
        number: ir.Value = int64_constant(row)
        if not padded:
            last = builder.sub(given["rows"], int64_constant(1))
            number = builder.select(builder.icmp_signed("<", number, last), number, last)
        return builder.add(given["a"], builder.mul(number, given["a_row"]))

    def store(self) -> None:
        """Store the part of the tile that exists, or add it to what is there."""
        builder, memory, given = self.builder, self.memory, self.operands
        places = [
            (sum, memory.at(given["c"], row, given["c_row"], column * memory.bytes), mask)
            for row, (sums, masks) in enumerate(zip(self.sums, self._masks(), strict=True))
            for column, (sum, mask) in enumerate(zip(sums, masks, strict=True))
        ]
        # What is not needed is not read even with an empty mask: the sums would wait for it.
        with builder.if_then(given["accumulate"]):
            for sum, address, mask in places:
                own = Register(builder, memory.vector, builder.load(sum))
                builder.store((own + memory.load_masked(address, mask)).value, sum)
        for sum, address, mask in places:
            own = Register(builder, memory.vector, builder.load(sum))
            memory.store_first(address, own, mask)
        if self.column is not None:
            offset = int64_constant(self.width * memory.bytes)
            self.column.store(builder.add(given["c"], offset))

    def _masks(self) -> list[list[ir.Value]]:
        """For each row, the masks of its vectors."""
        columns = [self._columns(column) for column in range(self.width)]
        none = ir.Constant(columns[0].type, None)
        masks = []
        for row in range(self.height):
            exists = self.builder.icmp_signed("<", int64_constant(row), self.operands["rows"])
            masks.append([self.builder.select(exists, mask, none) for mask in columns])
        return masks

    def _columns(self, column: int) -> ir.Value:
        """The mask of a vector's columns that exist."""
        vector = self.memory.vector
        first = int64_constant(column * vector.lanes)
        left = self.builder.sub(self.operands["columns"], first)
        return first_lanes(self.builder, vector, left).value


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


@dataclass(frozen=True)
class ExtraOperand:
    """An operand of an epilogue beside the product itself.

    ``along`` says whether it varies along a tile's columns, where it is contiguous.
    """

    dtype: str
    along: bool

    @property
    def width(self) -> int:
        """Bytes of an element."""
        return ITEM_BYTES[self.dtype]


def epilogue_supported(expression: Expression, extras: Sequence[Operand]) -> bool:
    """Whether a float32 product can be finished by ``expression`` exactly.

    Raises ValueError where the further inputs are not those of the expression.
    """
    if expression.inputs != ("float32", *(extra.dtype for extra in extras)):
        raise ValueError("the operands' dtypes are not those of the epilogue")
    return expression.result_dtypes == ("float32",) and unsupported(expression) is None


def image_strides(extra: Operand, y: Operand) -> tuple[int, int, int] | None:
    """Strides by (image, channel, pixel) of an epilogue's operand; None if there are no such.

    An operand of one dimension has an element per channel, others broadcast to ``y``.
    """
    if len(extra.shape) == 1:
        return (0, 1, 0)
    image, channel, *spatial = broadcast_strides(extra.shape, extra.strides, y.shape)
    varied = [axis for axis, size in enumerate(y.shape[2:]) if size != 1]
    if all(spatial[axis] == 0 for axis in varied):
        return (image, channel, 0)
    if all(spatial[axis] == y.strides[2 + axis] for axis in varied):
        return (image, channel, 1)
    return None


class Epilogue:
    """Kernel text that applies an expression to a finished tile in memory.

    The expression's first input is the product, the others are ``extras``. The text expects the
    tile's address ``c``, its ``c_row``, ``rows`` and ``columns``, and for extra i the address
    ``e{i}`` of what belongs to the tile's first element and ``e{i}_row`` from row to row.
    """

    def __init__(
        self, expression: Expression | None, extras: Sequence[ExtraOperand], argument: int
    ) -> None:
        self.expression = expression
        self.extras = extras
        names = ["product", *(f"v{index}" for index in range(len(extras)))]
        self.emission = emit(expression, names, argument, "step") if expression else None

    @property
    def immediates(self) -> tuple[int, ...]:
        """Values for the argument block, from the place given on."""
        return self.emission.immediates if self.emission else ()

    def prologue(self) -> list[str]:
        """Lines before all loops."""
        return list(self.emission.prologue) if self.emission else []

    def lines(self) -> list[str]:
        """Lines that finish one tile."""
        if self.emission is None:
            return ["pass"]
        return [
            "q = c",
            *(f"f{index} = e{index}" for index in range(len(self.extras))),
            "line = 0",
            "while line < rows:",
            *indent(1, self._constants("f")),
            "    i = 0",
            "    while i + LANES <= columns:",
            *indent(2, self._vector(masked=False)),
            "        i += LANES",
            "    if i < columns:",
            "        mask = mask_first(columns - i, FLOAT32)",
            *indent(2, self._vector(masked=True)),
            "    line += 1",
            "    q += c_row",
            *(f"    f{index} += e{index}_row" for index in range(len(self.extras))),
        ]

    def row_lines(self) -> list[str]:
        """Lines that read what is the same for a row of the tile, from the addresses ``e{i}``."""
        return self._constants("e")

    def register_lines(
        self, product: str, vector: int, mask: str = "", store: str = "store_first"
    ) -> list[str]:
        """Lines that finish a vector of a row, which ``product`` holds, and store it.

        They follow `row_lines`; ``c`` is the row's address. ``mask`` is that of the columns that
        exist, or nothing where all do; ``store`` is what stores with it.
        """
        lines, more = [], ""
        if mask:
            lines, more = [f"mask = {mask}"], ", mask"
        kind = "_masked" if mask else ""
        for index, extra in enumerate(self.extras):
            if extra.along:
                address = f"e{index} + {vector * LANES * extra.width}"
                lines.append(f"v{index} = load{kind}({address}, {extra.dtype.upper()}{more})")
        result = product
        if self.emission is not None:
            lines += [f"product = {product}", *self.emission.body]
            result = self.emission.results[0]
        store = store if mask else "store"
        return [*lines, f"{store}(c + {4 * vector * LANES}, {result}{more})"]

    def tile_lines(self, height: int, width: int, whole: int) -> list[str]:
        """Lines that finish and store a tile that the variables ``s{row}_{vector}`` hold.

        They change ``c`` and ``e{i}``. The first ``whole`` vectors are stored whole, of the others
        the part that exists.
        """
        lines: list[str] = []
        for row in range(height):
            inner = self.row_lines()
            for vector in range(width):
                masked = vector >= whole
                mask = f"mask_first(columns - {vector * LANES}, FLOAT32)" if masked else ""
                inner += self.register_lines(f"s{row}_{vector}", vector, mask)
            if row:
                step = ["c += c_row", *(f"e{i} += e{i}_row" for i in range(len(self.extras)))]
                inner = [f"if rows > {row}:", *indent(1, [*step, *inner])]
            lines += inner
        return lines

    def _constants(self, pointer: str) -> list[str]:
        return [
            f"v{index} = broadcast(read({pointer}{index}, {extra.dtype.upper()}),"
            f" {extra.dtype.upper()})"
            for index, extra in enumerate(self.extras)
            if not extra.along
        ]

    def _vector(self, masked: bool) -> list[str]:
        assert self.emission is not None
        operands = [("product", "q", "float32")]
        for index, extra in enumerate(self.extras):
            if extra.along:
                operands.append((f"v{index}", f"f{index}", extra.dtype))
        load = "{} = load_masked({} + {} * i, {}, mask)" if masked else "{} = load({} + {} * i, {})"
        lines = [
            load.format(name, start, ITEM_BYTES[dtype], dtype.upper())
            for name, start, dtype in operands
        ]
        result = self.emission.results[0]
        store = (
            f"store_first(q + 4 * i, {result}, mask)" if masked else f"store(q + 4 * i, {result})"
        )
        return [*lines, *self.emission.body, store]


def multiply_lines(
    tile: TileShape, a_row: str, a_step: str, padded: bool, column: str = "", once: bool = False
) -> list[str]:
    """Lines that call `multiply_tile` with as many vectors as ``filled`` says, at most all.

    ``padded`` and ``once`` are those of `multiply_tile`. ``column`` is an address, not 0 where
    there is one column more; only a tile that `takes_column` has it.
    """

    def call(width: int, column: str) -> list[str]:
        return [
            "multiply_tile(",
            f"    a, {a_row}, {a_step}, {padded}, b, b_step, depth, c, c_row, accumulate,",
            f"    rows, columns, {column}, {once}, {tile.height}, {width}, FLOAT32,",
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
