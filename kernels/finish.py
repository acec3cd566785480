"""Tiles of products in registers are finished by the kernel's own epilogue, and stored.

Like `stream`, this unrolls what Numba would be slow to read, had the kernel to spell it out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from graphopt.kernels.memory import VectorMemory, first_lanes, int64_constant
from graphopt.kernels.register import FLOAT32, LANES, Register, Vector


@intrinsic(prefer_literal=True)
def finish_tile(
    typing: Any,
    finish: Any,
    tile: Any,
    c: Any,
    c_row: Any,
    rows: Any,
    columns: Any,
    along: Any,
    alone: Any,
    numbers: Any,
    width: Any,
    whole: Any,
) -> Any:
    """Store ``finish(product, *along, *alone, *numbers)`` of every vector of a tile.

    Args:
        finish: an `inlined` function of vectors.
        tile: a tuple of vectors, ``width`` (literal) of each row after those of the row before.
        c: address of the first row's results, of which ``c_row`` bytes lead to the next row's.
        rows: how many rows exist.
        columns: how many columns exist; or the mask of those that do, where a row is one vector.
        along: for each operand that varies along a row the address of what belongs to the first
            element, the bytes from row to row, and its type of vector.
        alone: the same for those that do not.
        numbers: vectors that are the same everywhere.
        whole: how many vectors of a row exist whole, literal.
    """
    if not isinstance(tile, types.UniTuple):
        return None
    in_row, in_whole = width.literal_value, whole.literal_value
    kinds = [[each.types[2].instance_type for each in some.types] for some in (along, alone)]
    operands = (FLOAT32, *kinds[0], *kinds[1], *numbers.types)
    finished = typing.resolve_function_type(finish, operands, {})
    masked = isinstance(columns, Vector)

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> ir.Value:
        own = context.get_function(finish, finished)
        words = [types.int64] * 3 + [columns if masked else types.int64]
        c, c_row, rows, there = (
            context.cast(builder, value, given, wanted)
            for value, given, wanted in zip(values[2:6], sig.args[2:6], words, strict=True)
        )
        constants = cgutils.unpack_tuple(builder, values[8], len(numbers))
        made = _Tile(
            lambda *registers: Register(builder, FLOAT32, own(builder, [*registers, *constants])),
            _Rows(VectorMemory(builder, FLOAT32), c, c_row),
            _operands(builder, values[6], kinds[0]),
            _operands(builder, values[7], kinds[1]),
            there,
            masked,
        )
        products = cgutils.unpack_tuple(builder, values[1], len(tile))
        for row in range(len(tile) // in_row):
            with builder.if_then(builder.icmp_signed("<", int64_constant(row), rows)):
                made.store_row(products[row * in_row : (row + 1) * in_row], row, in_whole)
        return context.get_dummy_value()

    return types.void(
        finish, tile, c, c_row, rows, columns, along, alone, numbers, width, whole
    ), generate


@dataclass(frozen=True)
class _Rows:
    """The results, or what they are made of beside the product, in memory."""

    memory: VectorMemory
    address: ir.Value
    row_bytes: ir.Value

    def start(self, row: int) -> ir.Value:
        """The address of a row."""
        return self.memory.at(self.address, row, self.row_bytes)

    def at(self, start: ir.Value, column: ir.Value) -> ir.Value:
        """The address of a column of the row at ``start``."""
        builder, width = self.memory.builder, int64_constant(self.memory.alignment)
        return builder.add(start, builder.mul(column, width))


def _operands(builder: ir.IRBuilder, value: ir.Value, kinds: Sequence[Vector]) -> list[_Rows]:
    triples = cgutils.unpack_tuple(builder, value, len(kinds))
    return [
        _Rows(
            VectorMemory(builder, kind),
            builder.extract_value(triple, 0),
            builder.extract_value(triple, 1),
        )
        for kind, triple in zip(kinds, triples, strict=True)
    ]


@dataclass(frozen=True)
class _Tile:
    """The body of `finish_tile`."""

    finish: Callable[..., Register]
    results: _Rows
    along: Sequence[_Rows]
    alone: Sequence[_Rows]
    columns: ir.Value
    masked: bool

    def store_row(self, products: Sequence[ir.Value], row: int, whole: int) -> None:
        """Finish and store a row."""
        builder, memory = self.results.memory.builder, self.results.memory
        target = self.results.start(row)
        starts = [operand.start(row) for operand in self.along]
        numbers = [operand.memory.broadcast(operand.start(row)).value for operand in self.alone]

        def store(product: ir.Value, vector: ir.Value, whole: bool) -> None:
            column = builder.mul(vector, int64_constant(LANES))
            mask = None if whole else self._mask(column)
            own = []
            for operand, start in zip(self.along, starts, strict=True):
                place, source = operand.at(start, column), operand.memory
                value = source.load(place) if whole else source.load_masked(place, mask)
                own.append(value.value)
            made = self.finish(product, *own, *numbers)
            place = self.results.at(target, column)
            if whole:
                memory.store(place, made)
            elif self.masked:
                memory.store_masked(place, made, mask)
            else:
                memory.store_first(place, made, mask)

        for vector, product in enumerate(products[:whole]):
            store(product, int64_constant(vector), whole=True)
        rest = products[whole:]
        if len(rest) == 1:
            store(rest[0], int64_constant(whole), whole=False)
        elif rest:
            # Few tiles are not whole: what finishes a vector is not written out for each of theirs.
            kept = cgutils.alloca_once(builder, ir.ArrayType(FLOAT32.llvm, len(rest)))
            for number, product in enumerate(rest):
                builder.store(product, cgutils.gep_inbounds(builder, kept, 0, number))
            with cgutils.for_range(builder, int64_constant(len(rest))) as loop:
                product = builder.load(cgutils.gep_inbounds(builder, kept, 0, loop.index))
                store(product, builder.add(loop.index, int64_constant(whole)), whole=False)

    def _mask(self, column: ir.Value) -> ir.Value:
        """The mask of the columns from one on that exist."""
        if self.masked:
            return self.columns
        left = self.results.memory.builder.sub(self.columns, column)
        return first_lanes(self.results.memory.builder, FLOAT32, left).value
