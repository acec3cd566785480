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

from graphopt.kernels.memory import fetch_ahead
from graphopt.kernels.register import FEATURES, FLOAT32, LANES, Register, Vector, splat

VECTOR_BYTES = 4 * LANES
FOUR = 4
"""Columns that are multiplied at once: one load brings their weights."""
_AHEAD = 2048
"""Bytes of a stream that are fetched in advance: it comes from the main memory once a call."""
_LINE = 64

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
        self.kinds = [FLOAT32] * width
        if tail_lanes:
            self.kinds.append(Vector(types.float32, tail_lanes))
        self.sums_step = sums_step
        self.sums: list[list[ir.Value]] = []

    def start(self, sums: ir.Value, first_block: ir.Value) -> None:
        """Begin with zero, or with the sums that wait."""
        builder = self.builder
        self.sums = [
            [
                cgutils.alloca_once_value(builder, ir.Constant(kind.llvm, None))
                for kind in self.kinds
            ]
            for _ in range(self.rows)
        ]
        with builder.if_else(first_block) as (zero, resume):
            with zero:
                for place, _, vector in self._places():
                    builder.store(ir.Constant(self.kinds[vector].llvm, None), place)
            with resume:
                for place, row, vector in self._places():
                    address = self._plus(sums, row * self.sums_step + vector * VECTOR_BYTES)
                    builder.store(self._load(address, self.kinds[vector]).value, place)

    def multiply(
        self, begin: ir.Value, count: ir.Value, panel: ir.Value, tail: ir.Value, shift: int
    ) -> None:
        """Add the products of ``count`` columns, of which the first come in fours."""
        builder = self.builder

        def multiply_column(place: ir.Value, weights: list[Register]) -> None:
            offset = self._offset(place)
            start = self._plus(panel, offset)
            addresses = [self._plus(start, number * VECTOR_BYTES) for number in range(self.width)]
            addresses.append(self._plus(tail, builder.ashr(offset, _number(shift))))
            self._add_products(addresses, weights)

        entry = 4 + 4 * self.rows
        end = self._plus(begin, builder.mul(count, _number(entry)))
        fours = builder.and_(count, _number(-FOUR))
        last_four = self._plus(begin, builder.mul(fours, _number(entry)))
        with self._walk(self._plus(begin, _AHEAD), self._plus(end, _AHEAD), _LINE) as line:
            fetch_ahead(builder, line)
        with self._walk(begin, last_four, FOUR * entry) as p:
            weights = [
                self._load_repeated(self._plus(p, 4 * FOUR * (1 + row))) for row in range(self.rows)
            ]
            for lane in range(FOUR):
                spread = [_repeat_lane(weight, lane) for weight in weights]
                multiply_column(self._plus(p, 4 * lane), spread)
        with self._walk(last_four, end, entry) as p:
            weights = [self._broadcast(self._plus(p, 4 + 4 * row)) for row in range(self.rows)]
            multiply_column(p, weights)

    def results(self) -> list[ir.Value]:
        """The sums, all of whole vectors."""
        return [
            Register(self.builder, self.kinds[vector], self.builder.load(place)).resize(LANES).value
            for place, _, vector in self._places()
        ]

    def store(self, sums: ir.Value, made: list[Register]) -> None:
        """Store what `results` gave, a row ``sums_step`` after the other."""
        for number, register in enumerate(made):
            row, vector = divmod(number, len(self.kinds))
            narrow = register.resize(self.kinds[vector].lanes)
            address = self._plus(sums, row * self.sums_step + vector * VECTOR_BYTES)
            pointer = self.builder.inttoptr(address, narrow.type.llvm.as_pointer())
            self.builder.store(narrow.value, pointer, align=4)

    def _add_products(self, addresses: list[ir.Value], weights: list[Register]) -> None:
        """Add a row of the panel, whose vectors are at ``addresses``, times the weights."""
        builder = self.builder
        for vector, (kind, address) in enumerate(zip(self.kinds, addresses, strict=False)):
            value = self._load(address, kind)
            for row, weight in enumerate(weights):
                place = self.sums[row][vector]
                known = Register(builder, kind, builder.load(place))
                builder.store(value.fma(weight.resize(kind.lanes), known).value, place)

    def _places(self) -> Iterator[tuple[ir.Value, int, int]]:
        """Where each sum is kept, with its row and its vector."""
        for row, places in enumerate(self.sums):
            for vector, place in enumerate(places):
                yield place, row, vector

    @contextmanager
    def _walk(self, begin: ir.Value, end: ir.Value, step: int) -> Iterator[ir.Value]:
        """A loop over the addresses from ``begin`` on, before ``end``."""
        with cgutils.for_range_slice(self.builder, begin, end, _number(step)) as (address, _):
            yield address

    def _plus(self, address: ir.Value, offset: ir.Value | int) -> ir.Value:
        more = _number(offset) if isinstance(offset, int) else offset
        return self.builder.add(address, more)

    def _pointer(self, address: ir.Value, pointee: ir.Type) -> ir.Value:
        return self.builder.inttoptr(address, pointee.as_pointer())

    def _load(self, address: ir.Value, kind: Vector) -> Register:
        value = self.builder.load(self._pointer(address, kind.llvm), align=4)
        return Register(self.builder, kind, value)

    def _offset(self, address: ir.Value) -> ir.Value:
        """The offset of a column, of 32 bits."""
        value = self.builder.load(self._pointer(address, ir.IntType(32)), align=4)
        return self.builder.sext(value, _INT64)

    def _broadcast(self, address: ir.Value) -> Register:
        value = self.builder.load(self._pointer(address, ir.FloatType()), align=4)
        return splat(self.builder, FLOAT32, value)

    def _load_repeated(self, address: ir.Value) -> Register:
        """The four numbers at ``address`` again and again."""
        loaded = self._load(address, Vector(types.float32, FOUR))
        repeated = loaded.shuffle([lane % FOUR for lane in range(LANES)])
        if "avx512f" in FEATURES:
            # Else LLVM loads each number again, and loads are what such loops wait for.
            repeated = repeated.llvm("llvm.arithmetic.fence")
        return repeated


def _repeat_lane(repeated: Register, lane: int) -> Register:
    """The number ``lane`` of four that are repeated in every lane."""
    # Each four lanes are shuffled among themselves, which is cheapest.
    return repeated.shuffle([start + lane for start in range(0, LANES, FOUR) for _ in range(FOUR)])


def _number(value: int) -> ir.Constant:
    return ir.Constant(_INT64, value)
