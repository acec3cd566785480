"""The product of some rows of a sparse weight and a panel, in registers.

`nonzeros` says what a panel and a stream are. Functions here are called from generated kernels and
unroll what those would otherwise spell out, which Numba would be slow to read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from graphopt.kernels.memory import VectorMemory, fetch_ahead, int64_constant
from graphopt.kernels.register import FEATURES, FLOAT32, LANES, Register, Vector

VECTOR_BYTES = 4 * LANES
FOUR = 4
"""Columns that are multiplied at once: one load brings their weights."""
_AHEAD = 2048
"""Bytes of a stream that are fetched in advance: it comes from the main memory once a call."""
LINE = 64
"""Bytes of a cache line."""

_INT64 = ir.IntType(64)


@intrinsic(prefer_literal=True)
def multiply_stream(
    typing: Any,
    p: Any,
    count: Any,
    panel: Any,
    tail: Any,
    sums: Any,
    first_block: Any,
    shift: Any,
    rows: Any,
    width: Any,
    tail_lanes: Any,
    sums_step: Any,
) -> Any:
    """The products of ``rows`` rows of a weight with a panel, a tuple of vectors by row.

    ``p`` is the address of ``count`` columns in a stream, ``panel`` that of the panel, ``width``
    vectors wide. Where ``tail_lanes`` is not 0, the panel has one narrower vector more, from
    ``tail`` on where its offset, shifted right by ``shift``, says; then the tuple has one vector
    more per row, whose lanes beyond hold anything. Unless ``first_block``, products are added to
    the sums at ``sums``, whose rows are ``sums_step`` bytes apart. The last five are literal.
    """
    shape = [one.literal_value for one in (rows, width, tail_lanes, sums_step)]

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> ir.Value:
        numbers = [
            context.cast(builder, value, kind, types.int64)
            for value, kind in zip(values[:5], sig.args, strict=False)
        ]
        tile = _Tile(builder, *shape)
        begin, count, panel, tail, sums = numbers
        tile.start(sums, context.cast(builder, values[5], sig.args[5], types.boolean))
        tile.multiply(begin, count, panel, tail, shift.literal_value)
        return context.make_tuple(builder, sig.return_type, tile.results())

    result = types.UniTuple(FLOAT32, shape[0] * (shape[1] + (shape[2] > 0)))
    return result(
        p, count, panel, tail, sums, first_block, shift, rows, width, tail_lanes, sums_step
    ), generate


@intrinsic(prefer_literal=True)
def store_sums(
    typing: Any, sums: Any, tile: Any, rows: Any, width: Any, tail_lanes: Any, sums_step: Any
) -> Any:
    """Store what `multiply_stream` made where it will be found as ``sums``."""
    shape = [one.literal_value for one in (rows, width, tail_lanes, sums_step)]

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> ir.Value:
        made = cgutils.unpack_tuple(builder, values[1], tile.count)
        address = context.cast(builder, values[0], sig.args[0], types.int64)
        _Tile(builder, *shape).store(address, [Register(builder, FLOAT32, value) for value in made])
        return context.get_dummy_value()

    return types.void(sums, tile, rows, width, tail_lanes, sums_step), generate


class _Tile:
    """The registers of `multiply_stream`, while code is generated."""

    def __init__(
        self, builder: ir.IRBuilder, rows: int, width: int, tail_lanes: int, sums_step: int
    ) -> None:
        self.builder = builder
        self.rows = rows
        self.width = width
        self.whole = VectorMemory(builder, FLOAT32)
        self.four = VectorMemory(builder, Vector(types.float32, FOUR))
        self.memories = [self.whole] * width
        if tail_lanes:
            self.memories.append(VectorMemory(builder, Vector(types.float32, tail_lanes)))
        self.sums_step = sums_step
        self.sums: list[list[ir.Value]] = []

    def start(self, sums: ir.Value, first_block: ir.Value) -> None:
        """Begin with zero, or with the sums that wait."""
        builder = self.builder
        self.sums = [
            [
                cgutils.alloca_once_value(builder, ir.Constant(memory.vector.llvm, None))
                for memory in self.memories
            ]
            for _ in range(self.rows)
        ]
        with builder.if_then(builder.not_(first_block)):
            for place, row, vector in self._places():
                known = self.memories[vector].load(self._sum_at(sums, row, vector))
                builder.store(known.value, place)

    def multiply(
        self, begin: ir.Value, count: ir.Value, panel: ir.Value, tail: ir.Value, shift: int
    ) -> None:
        """Add the products of ``count`` columns, of which the first come in fours."""
        builder = self.builder

        def multiply_column(place: ir.Value, weights: list[Register]) -> None:
            offset = self._offset(place)
            start = self._plus(panel, offset)
            addresses = [self._plus(start, number * VECTOR_BYTES) for number in range(self.width)]
            addresses.append(self._plus(tail, builder.ashr(offset, int64_constant(shift))))
            self._add_products(addresses, weights)

        entry = 4 + 4 * self.rows
        end = self._plus(begin, builder.mul(count, int64_constant(entry)))
        fours = builder.and_(count, int64_constant(-FOUR))
        last_four = self._plus(begin, builder.mul(fours, int64_constant(entry)))
        with self._walk(self._plus(begin, _AHEAD), self._plus(end, _AHEAD), LINE) as line:
            fetch_ahead(builder, line)
        with self._walk(begin, last_four, FOUR * entry) as p:
            weights = [
                self._load_repeated(self._plus(p, 4 * FOUR * (1 + row))) for row in range(self.rows)
            ]
            for lane in range(FOUR):
                spread = [_repeat_lane(weight, lane) for weight in weights]
                multiply_column(self._plus(p, 4 * lane), spread)
        with self._walk(last_four, end, entry) as p:
            weights = [self.whole.broadcast(self._plus(p, 4 + 4 * row)) for row in range(self.rows)]
            multiply_column(p, weights)

    def results(self) -> list[ir.Value]:
        """The sums, all of whole vectors."""
        return [self._sum(row, vector).resize(LANES).value for _, row, vector in self._places()]

    def store(self, sums: ir.Value, made: list[Register]) -> None:
        """Store what `results` gave, a row ``sums_step`` after the other."""
        for number, register in enumerate(made):
            row, vector = divmod(number, len(self.memories))
            memory = self.memories[vector]
            narrow = register.resize(memory.vector.lanes)
            memory.store(self._sum_at(sums, row, vector), narrow)

    def _add_products(self, addresses: list[ir.Value], weights: list[Register]) -> None:
        """Add a row of the panel, whose vectors are at ``addresses``, times the weights."""
        for vector, (memory, address) in enumerate(zip(self.memories, addresses, strict=False)):
            value = memory.load(address)
            for row, weight in enumerate(weights):
                factor = weight.resize(memory.vector.lanes)
                total = value.fma(factor, self._sum(row, vector))
                self.builder.store(total.value, self.sums[row][vector])

    def _sum(self, row: int, vector: int) -> Register:
        place = self.sums[row][vector]
        return Register(self.builder, self.memories[vector].vector, self.builder.load(place))

    def _sum_at(self, sums: ir.Value, row: int, vector: int) -> ir.Value:
        """Where a sum waits."""
        return self._plus(sums, row * self.sums_step + vector * VECTOR_BYTES)

    def _places(self) -> Iterator[tuple[ir.Value, int, int]]:
        """Where each sum is kept, with its row and its vector."""
        for row, places in enumerate(self.sums):
            for vector, place in enumerate(places):
                yield place, row, vector

    @contextmanager
    def _walk(self, begin: ir.Value, end: ir.Value, step: int) -> Iterator[ir.Value]:
        """A loop over the addresses from ``begin`` on, before ``end``."""
        loop = cgutils.for_range_slice(self.builder, begin, end, int64_constant(step))
        with loop as (address, _):
            yield address

    def _plus(self, address: ir.Value, offset: ir.Value | int) -> ir.Value:
        more = int64_constant(offset) if isinstance(offset, int) else offset
        return self.builder.add(address, more)

    def _offset(self, address: ir.Value) -> ir.Value:
        """The offset of a column, of 32 bits."""
        pointer = self.builder.inttoptr(address, ir.IntType(32).as_pointer())
        return self.builder.sext(self.builder.load(pointer, align=4), _INT64)

    def _load_repeated(self, address: ir.Value) -> Register:
        """The four numbers at ``address`` again and again."""
        repeated = self.four.load(address).shuffle([lane % FOUR for lane in range(LANES)])
        if "avx512f" in FEATURES:
            # Else LLVM loads each number again, and loads are what such loops wait for.
            repeated = repeated.llvm("llvm.arithmetic.fence")
        return repeated


def _repeat_lane(repeated: Register, lane: int) -> Register:
    """The number ``lane`` of four that are repeated in every lane."""
    # Each four lanes are shuffled among themselves, which is cheapest.
    return repeated.shuffle([start + lane for start in range(0, LANES, FOUR) for _ in range(FOUR)])
