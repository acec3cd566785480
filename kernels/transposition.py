"""Squares of vectors, transposed in registers on their way from memory to memory."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from graphopt.kernels.memory import VectorMemory, first_lanes, named_vector
from graphopt.kernels.register import Register, Vector


def _transposed(rows: list[Register]) -> list[Register]:
    """Rows of a square as its columns: blocks of 1, 2, 4, ... lanes change sides."""
    count = len(rows)
    step = 1
    while step < count:
        low = [lane if not lane & step else count + lane - step for lane in range(count)]
        high = [lane + step if not lane & step else count + lane for lane in range(count)]
        for first in (index for index in range(count) if not index & step):
            a, b = rows[first], rows[first + step]
            rows[first], rows[first + step] = a.shuffle(low, b), a.shuffle(high, b)
        step *= 2
    return rows


@intrinsic
def transpose_tile(
    typing: Any, source: Any, source_row: Any, target: Any, target_row: Any, vector: Any
) -> Any:
    """Transpose a square of as many rows as ``vector`` has lanes; rows are so many bytes apart."""
    kind = named_vector(vector)
    if kind is None:
        return None

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> ir.Value:
        memory = VectorMemory(builder, kind)
        rows = [memory.load(row) for row in _rows(builder, kind, values[0], values[1])]
        targets = _rows(builder, kind, values[2], values[3])
        for target, row in zip(targets, _transposed(rows), strict=True):
            memory.store(target, row)
        return context.get_dummy_value()

    addresses = (types.int64,) * 4
    return types.void(*addresses, vector), generate


@intrinsic
def transpose_corner(
    typing: Any,
    source: Any,
    source_row: Any,
    target: Any,
    target_row: Any,
    rows: Any,
    columns: Any,
    vector: Any,
) -> Any:
    """`transpose_tile` of the first ``rows`` by ``columns`` elements of the source's square."""
    kind = named_vector(vector)
    if kind is None:
        return None

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> ir.Value:
        height, width = values[4], values[5]
        across = first_lanes(builder, kind, width)
        down = first_lanes(builder, kind, height)
        memory = VectorMemory(builder, kind)
        rows = [
            memory.load_masked(row, _if_row(builder, across, number, height))
            for number, row in enumerate(_rows(builder, kind, values[0], values[1]))
        ]
        targets = _rows(builder, kind, values[2], values[3])
        for number, (target, row) in enumerate(zip(targets, _transposed(rows), strict=True)):
            memory.store_first(target, row, _if_row(builder, down, number, width))
        return context.get_dummy_value()

    addresses = (types.int64,) * 6
    return types.void(*addresses, vector), generate


def _rows(builder: Any, kind: Vector, start: ir.Value, row: ir.Value) -> list[ir.Value]:
    """The addresses of the rows of a square."""
    addresses = [start]
    for _ in range(kind.lanes - 1):
        addresses.append(builder.add(addresses[-1], row))
    return addresses


def _if_row(builder: Any, mask: Register, number: int, rows: ir.Value) -> ir.Value:
    """The mask for a row, empty if the row is beyond the last."""
    inside = builder.icmp_signed("<", ir.Constant(ir.IntType(64), number), rows)
    return builder.select(inside, mask.value, ir.Constant(mask.type.llvm, None))
