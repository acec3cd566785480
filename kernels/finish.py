"""Tiles of products in registers are finished by the kernel's own epilogue, and stored.

Like `stream`, this unrolls what Numba would be slow to read, had the kernel to spell it out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from graphopt.kernels.memory import VectorMemory, first_lanes, int64_constant
from graphopt.kernels.register import FLOAT32, LANES, Register, Vector

inlined = njit(forceinline=True, error_model="numpy")
"""Decorates a function of a kernel that becomes a part of whatever calls it."""


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
    shape = len(tile) // width.literal_value, width.literal_value, whole.literal_value
    operands = [[each.types[2].instance_type for each in some.types] for some in (along, alone)]
    vectors = (*operands[0], *operands[1], *numbers.types)
    finished = typing.resolve_function_type(finish, (FLOAT32, *vectors), {})
    masked = isinstance(columns, Vector)

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> ir.Value:
        own = context.get_function(finish, finished)
        _, tile_value, *words, along_value, alone_value, number_values = values[:9]
        word_types = [types.int64] * 3 + [columns if masked else types.int64]
        c, c_row, rows, there = (
            context.cast(builder, value, kind, wanted)
            for value, kind, wanted in zip(words, sig.args[2:6], word_types, strict=True)
        )
        constants = cgutils.unpack_tuple(builder, number_values, len(numbers))
        tile = _Tile(
            builder,
            lambda *registers: Register(builder, FLOAT32, own(builder, [*registers, *constants])),
            [
                _operands(builder, value, kinds)
                for value, kinds in zip((along_value, alone_value), operands, strict=True)
            ],
            there,
            masked,
        )
        products = cgutils.unpack_tuple(builder, tile_value, shape[0] * shape[1])
        for row in range(shape[0]):
            exists = builder.icmp_signed("<", int64_constant(row), rows)
            with builder.if_then(exists):
                first = row * shape[1]
                address = builder.add(c, builder.mul(c_row, int64_constant(row)))
                tile.store_row(products[first : first + shape[1]], row, address, shape[2])
        return context.get_dummy_value()

    return types.void(
        finish, tile, c, c_row, rows, columns, along, alone, numbers, width, whole
    ), generate


@dataclass(frozen=True)
class _Operand:
    """What a row's results are made of beside the product."""

    memory: VectorMemory
    address: ir.Value
    row_bytes: ir.Value

    def load(self, place: ir.Value, mask: ir.Value | None) -> ir.Value:
        """The vector at an address, or what of it is in the mask."""
        memory = self.memory
        return (memory.load(place) if mask is None else memory.load_masked(place, mask)).value

    def row(self, row: int) -> ir.Value:
        """The address of what belongs to a row."""
        return self.memory.at(self.address, row, self.row_bytes)


def _operands(builder: ir.IRBuilder, value: ir.Value, kinds: Sequence[Vector]) -> list[_Operand]:
    triples = cgutils.unpack_tuple(builder, value, len(kinds))
    return [
        _Operand(
            VectorMemory(builder, kind),
            builder.extract_value(triple, 0),
            builder.extract_value(triple, 1),
        )
        for kind, triple in zip(kinds, triples, strict=True)
    ]


@dataclass(frozen=True)
class _Tile:
    """The body of `finish_tile`; ``operands`` are those along a row and those alone."""

    builder: ir.IRBuilder
    finish: Callable[..., Register]
    operands: Sequence[Sequence[_Operand]]
    columns: ir.Value
    masked: bool

    def store_row(
        self, products: Sequence[ir.Value], row: int, address: ir.Value, whole: int
    ) -> None:
        """Finish and store a row."""
        builder, memory = self.builder, VectorMemory(self.builder, FLOAT32)
        along, alone = self.operands
        starts = [operand.row(row) for operand in along]
        numbers = [operand.memory.broadcast(operand.row(row)).value for operand in alone]

        def store(product: ir.Value, vector: ir.Value, whole: bool) -> None:
            offset = builder.mul(vector, int64_constant(LANES))
            mask = None if whole else self._mask(offset)
            own = []
            for operand, start in zip(along, starts, strict=True):
                width = int64_constant(operand.memory.alignment)
                place = builder.add(start, builder.mul(offset, width))
                own.append(operand.load(place, mask))
            made = self.finish(product, *own, *numbers)
            place = builder.add(address, builder.mul(offset, int64_constant(4)))
            if mask is None:
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

    def _mask(self, offset: ir.Value) -> ir.Value:
        """The mask of the columns from one on that exist."""
        if self.masked:
            return self.columns
        return first_lanes(self.builder, FLOAT32, self.builder.sub(self.columns, offset)).value
