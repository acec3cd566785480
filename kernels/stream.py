"""The product of some rows of a sparse weight and a panel, in registers.

`nonzeros` says what a panel and a stream are. Functions here are called from generated kernels and
unroll what those would otherwise spell out, which Numba would be slow to read.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from graphopt.kernels.memory import LINE, VectorMemory, fetch_ahead, first_lanes, int64_constant
from graphopt.kernels.register import (
    AMD,
    FEATURES,
    FLOAT32,
    LANES,
    MASK_REGISTERS,
    VECTORS_PER_CYCLE,
    Register,
    Vector,
)

VECTOR_BYTES = 4 * LANES
FOUR = 4
"""Columns that are multiplied at once: one load brings their weights."""
TWO = 2
"""Columns that may be left over after fours."""
MOST_STEPS = 2**16
"""Steps of a panel: the numbers of columns have 16 bits."""
_CHAINS = 4 * VECTORS_PER_CYCLE if LANES == 16 else 12
"""Sums at once: an addition waits for the last one to the same sum, some four cycles. Where a tile
has few sums, each is made in parts.
"""
_AHEAD = 2048
"""Bytes of a stream that are fetched in advance: it comes from the main memory once a call."""

_INT64 = ir.IntType(64)


def two_bytes(rows: int) -> int:
    """Bytes of two columns of a stream: their numbers, then their weights, row by row. Four, which
    are together, take twice as many."""
    return TWO * (2 + 4 * rows)


@intrinsic(prefer_literal=True)
def multiply_stream(
    typing: Any,
    p: Any,
    twos: Any,
    panel: Any,
    step: Any,
    tail: Any,
    tail_step: Any,
    sums: Any,
    first_block: Any,
    filled: Any,
    rows: Any,
    width: Any,
    tail_lanes: Any,
    sums_step: Any,
) -> Any:
    """The products of ``rows`` rows of a weight with a panel, a tuple of vectors by row.

    ``p`` is the address of so many ``twos`` of columns in a stream, ``panel`` that of the panel,
    ``width`` vectors wide, whose rows are ``step`` bytes apart. Where ``tail_lanes`` is not 0, the
    panel has one narrower vector more, in rows ``tail_step`` bytes apart from ``tail`` on; then the
    tuple has one vector more per row, whose lanes beyond hold anything. Unless ``first_block``,
    products are added to the sums at ``sums``, whose rows are ``sums_step`` bytes apart. The last
    four are literal.

    ``filled`` is 0 (literal), or how many lanes of each step's last vector have something in the
    panel. Others then are not multiplied: many CPUs are slow to multiply denormal numbers, as what
    happens to be in memory may be.
    """
    shape = [one.literal_value for one in (rows, width, tail_lanes, sums_step)]

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> ir.Value:
        begin, twos, panel, step, tail, tail_step, sums = (
            context.cast(builder, value, kind, types.int64)
            for value, kind in zip(values[:7], sig.args, strict=False)
        )
        tile = _Tile(builder, *shape)
        if getattr(filled, "literal_value", None) != 0:
            tile.fill(context.cast(builder, values[8], sig.args[8], types.int64))
        tile.start(sums, context.cast(builder, values[7], sig.args[7], types.boolean))
        tile.multiply(begin, twos, _Rows(panel, step), _Rows(tail, tail_step))
        return context.make_tuple(builder, sig.return_type, tile.results())

    result = types.UniTuple(FLOAT32, shape[0] * (shape[1] + (shape[2] > 0)))
    own = (p, twos, panel, step, tail, tail_step, sums, first_block)
    return result(*own, filled, rows, width, tail_lanes, sums_step), generate


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


class _Rows(NamedTuple):
    """Rows in memory: the address of the first, and the bytes from one to the next."""

    address: ir.Value
    step: ir.Value


class _Tile:
    """The registers of `multiply_stream`, while code is generated."""

    def __init__(
        self, builder: ir.IRBuilder, rows: int, width: int, tail_lanes: int, sums_step: int
    ) -> None:
        self.builder = builder
        self.rows = rows
        self.width = width
        self.whole = VectorMemory(builder, FLOAT32)
        self.memories = [self.whole] * width
        if tail_lanes:
            self.memories.append(VectorMemory(builder, Vector(types.float32, tail_lanes)))
        self.sums_step = sums_step
        self.chains = max(_CHAINS // (rows * len(self.memories)), 1)
        self.sums: list[list[list[ir.Value]]] = []
        self.filled: Register | None = None

    def fill(self, lanes: ir.Value) -> None:
        """Multiply only so many lanes of the last vector."""
        self.filled = first_lanes(self.builder, self.memories[-1].vector, lanes)

    def start(self, sums: ir.Value, first_block: ir.Value) -> None:
        """Begin with zero, or with the sums that wait."""
        builder = self.builder
        self.sums = [
            [
                [
                    cgutils.alloca_once_value(builder, ir.Constant(memory.vector.llvm, None))
                    for memory in self.memories
                ]
                for _ in range(self.rows)
            ]
            for _ in range(self.chains)
        ]
        with builder.if_then(builder.not_(first_block)):
            for row, vector in self._places():
                known = self.memories[vector].load(self._sum_at(sums, row, vector))
                builder.store(known.value, self.sums[0][row][vector])

    def multiply(self, begin: ir.Value, twos: ir.Value, panel: _Rows, tail: _Rows) -> None:
        """Add the products of so many times two columns."""
        builder = self.builder
        size = two_bytes(self.rows)
        end = self._plus(begin, builder.mul(twos, int64_constant(size)))
        with self._walk(self._plus(begin, _AHEAD), self._plus(end, _AHEAD), LINE) as line:
            fetch_ahead(builder, line)
        left = builder.and_(twos, int64_constant(1))
        fours_end = builder.sub(end, builder.mul(left, int64_constant(size)))
        with self._walk(begin, fours_end, size * FOUR // TWO) as p:
            # One load for all, which take turns with those of the panel.
            self._multiply_columns(p, FOUR, panel, tail)
        with builder.if_then(builder.trunc(left, ir.IntType(1))):
            self._multiply_columns(fours_end, TWO, panel, tail)

    def _multiply_columns(self, p: ir.Value, count: int, panel: _Rows, tail: _Rows) -> None:
        """Add the products of so many columns, which are at ``p``."""
        builder = self.builder
        numbers = builder.zext(self._load(p, ir.IntType(16 * count)), _INT64)
        weights = [
            self._load_repeated(self._plus(p, (2 + 4 * row) * count), count)
            for row in range(self.rows)
        ]
        for lane in range(count):
            own = builder.lshr(numbers, int64_constant(16 * lane))
            number = builder.and_(own, int64_constant(MOST_STEPS - 1))
            start = self._plus(panel.address, builder.mul(number, panel.step))
            start = start if AMD else _in_register(builder, start)
            addresses = [self._plus(start, one * VECTOR_BYTES) for one in range(self.width)]
            addresses.append(self._plus(tail.address, builder.mul(number, tail.step)))
            alone = [_repeat_lane(weight, lane) for weight in weights]
            self._add_products(addresses, alone, lane % self.chains)

    def results(self) -> list[ir.Value]:
        """The sums, all of whole vectors."""
        return [self._total(row, vector).resize(LANES).value for row, vector in self._places()]

    def store(self, sums: ir.Value, made: list[Register]) -> None:
        """Store what `results` gave, a row ``sums_step`` after the other."""
        for number, register in enumerate(made):
            row, vector = divmod(number, len(self.memories))
            memory = self.memories[vector]
            narrow = register.resize(memory.vector.lanes)
            memory.store(self._sum_at(sums, row, vector), narrow)

    def _add_products(self, addresses: list[ir.Value], weights: list[Register], chain: int) -> None:
        """Add a row of the panel, whose vectors are at ``addresses``, times the weights."""
        for vector, (memory, address) in enumerate(zip(self.memories, addresses, strict=False)):
            value = memory.load(address)
            filled = self.filled if vector == len(self.memories) - 1 else None
            if filled is not None and not MASK_REGISTERS:
                value = filled.select(value, 0.0)
            for row, weight in enumerate(weights):
                factor = weight.resize(memory.vector.lanes)
                known = self._sum(chain, row, vector)
                total = value.fma(factor, known)
                if filled is not None and MASK_REGISTERS:
                    # One instruction, if LLVM does not join it with the next.
                    total = filled.select(total, known).llvm("llvm.arithmetic.fence")
                self.builder.store(total.value, self.sums[chain][row][vector])

    def _sum(self, chain: int, row: int, vector: int) -> Register:
        known = self.builder.load(self.sums[chain][row][vector])
        return Register(self.builder, self.memories[vector].vector, known)

    def _total(self, row: int, vector: int) -> Register:
        """What all chains have summed."""
        total = self._sum(0, row, vector)
        for chain in range(1, self.chains):
            total = total + self._sum(chain, row, vector)
        return total

    def _sum_at(self, sums: ir.Value, row: int, vector: int) -> ir.Value:
        """Where a sum waits."""
        return self._plus(sums, row * self.sums_step + vector * VECTOR_BYTES)

    def _places(self) -> Iterator[tuple[int, int]]:
        """The row and the vector of each sum."""
        return itertools.product(range(self.rows), range(len(self.memories)))

    @contextmanager
    def _walk(self, begin: ir.Value, end: ir.Value, step: int) -> Iterator[ir.Value]:
        """A loop over the addresses from ``begin`` on, before ``end``."""
        loop = cgutils.for_range_slice(self.builder, begin, end, int64_constant(step))
        with loop as (address, _):
            yield address

    def _plus(self, address: ir.Value, offset: ir.Value | int) -> ir.Value:
        more = int64_constant(offset) if isinstance(offset, int) else offset
        return self.builder.add(address, more)

    def _load(self, address: ir.Value, kind: ir.Type) -> ir.Value:
        pointer = self.builder.inttoptr(address, kind.as_pointer())
        return self.builder.load(pointer, align=4)

    def _load_repeated(self, address: ir.Value, count: int) -> Register:
        """So many numbers at ``address`` again and again."""
        some = VectorMemory(self.builder, Vector(types.float32, count))
        repeated = some.load(address).shuffle([lane % count for lane in range(LANES)])
        if "avx" in FEATURES:
            # Else LLVM loads each number again, and loads are what such loops wait for.
            repeated = repeated.llvm("llvm.arithmetic.fence")
        return repeated


def _in_register(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """An address that LLVM does not see as a sum: Intel's CPUs take an instruction apart that loads
    from one and multiplies, which then passes through them as two."""
    return builder.asm(ir.FunctionType(_INT64, [_INT64]), "", "=r,0", [address], False)


def _repeat_lane(repeated: Register, lane: int) -> Register:
    """The number ``lane`` of two or four that are repeated in every lane."""
    # Each four lanes are shuffled among themselves, which is cheapest.
    return repeated.shuffle([start + lane for start in range(0, LANES, FOUR) for _ in range(FOUR)])
