"""Moving vectors between registers and memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from graphopt.kernels.register import (
    MASK_REGISTERS,
    Register,
    Vector,
    call,
    scalar_bits,
    splat,
)


def named_vector(kind: types.Type) -> Vector | None:
    """The vector that a kernel named as an argument, or None."""
    named = getattr(kind, "instance_type", None)
    return named if isinstance(named, Vector) else None


def _in_memory(vector: Vector) -> ir.VectorType:
    return ir.VectorType(ir.IntType(8), vector.lanes) if vector.bits == 1 else vector.llvm


def _pointer(builder: ir.IRBuilder, address: ir.Value, pointee: ir.Type) -> ir.Value:
    return builder.inttoptr(address, pointee.as_pointer())


def _from_memory(builder: ir.IRBuilder, vector: Vector, value: ir.Value) -> ir.Value:
    if vector.bits == 1:
        return builder.icmp_unsigned("!=", value, ir.Constant(value.type, None))
    return value


def _to_memory(builder: ir.IRBuilder, vector: Vector, value: ir.Value) -> ir.Value:
    return builder.zext(value, _in_memory(vector)) if vector.bits == 1 else value


def _masked_suffix(vector: Vector) -> str:
    bits = max(vector.bits, 8)
    return f"v{vector.lanes}{'f' if vector.floating else 'i'}{bits}"


def _alignment(vector: Vector) -> ir.Constant:
    return ir.Constant(ir.IntType(32), max(vector.bits // 8, 1))


def int64_constant(value: int) -> ir.Constant:
    return ir.Constant(ir.IntType(64), value)


class VectorMemory:
    """Vectors of one type in memory, while code is generated."""

    def __init__(self, builder: ir.IRBuilder, vector: Vector) -> None:
        self.builder = builder
        self.vector = vector
        self.alignment = max(vector.bits // 8, 1)
        self.bytes = vector.lanes * self.alignment

    def at(self, address: ir.Value, row: int, row_bytes: ir.Value, offset: int = 0) -> ir.Value:
        """The address ``row`` rows and ``offset`` bytes further."""
        moved = self.builder.add(address, self.builder.mul(row_bytes, int64_constant(row)))
        return self.builder.add(moved, int64_constant(offset)) if offset else moved

    def load(self, address: ir.Value) -> Register:
        return self._register(self.builder.load(self._pointer(address), align=self.alignment))

    def store(self, address: ir.Value, value: Register) -> None:
        stored = _to_memory(self.builder, self.vector, value.value)
        self.builder.store(stored, self._pointer(address), align=self.alignment)

    def load_masked(
        self, address: ir.Value, mask: ir.Value, others: Register | None = None
    ) -> Register:
        """The elements that are in the mask; others are not read but zero, or those given."""
        kind = _in_memory(self.vector)
        kept = ir.Constant(kind, None)
        if others is not None:
            kept = _to_memory(self.builder, self.vector, others.value)
        arguments = [self._pointer(address), _alignment(self.vector), mask, kept]
        return self._register(call(self.builder, self._name("load"), kind, arguments))

    def store_masked(self, address: ir.Value, value: Register, mask: ir.Value) -> None:
        """Store the elements that are in the mask; what is at the others is not touched."""
        stored = _to_memory(self.builder, self.vector, value.value)
        arguments = [stored, self._pointer(address), _alignment(self.vector), mask]
        call(self.builder, self._name("store"), ir.VoidType(), arguments)

    def store_over(self, address: ir.Value, value: Register, mask: ir.Value) -> None:
        """`store_masked` where nobody else writes: the others may be stored again as they were."""
        if MASK_REGISTERS:
            self.store_masked(address, value, mask)
            return
        chosen = Register(self.builder, self.vector.of(types.boolean), mask)
        self.store(address, chosen.select(value, self.load(address)))

    def store_first(self, address: ir.Value, value: Register, mask: ir.Value) -> None:
        """`store_masked` of the first lanes: no lane is in the mask behind one that is not.

        CPUs without registers for masks are slow to store with one, AMD's need 20 cycles. There the
        vector is stored whole, if it is, else its halves, quarters and so forth.
        """
        if MASK_REGISTERS:
            self.store_masked(address, value, mask)
            return
        builder, lanes = self.builder, self.vector.lanes
        bits = builder.bitcast(mask, ir.IntType(lanes))
        whole = builder.icmp_unsigned("==", bits, ir.Constant(bits.type, -1))
        with builder.if_else(whole, likely=True) as (all_of_it, parts):
            with all_of_it:
                self.store(address, value)
            with parts:
                stored = _to_memory(builder, self.vector, value.value)
                self._store_parts(address, stored, builder.zext(bits, ir.IntType(64)))

    def _store_parts(self, address: ir.Value, rest: ir.Value, bits: ir.Value) -> None:
        """Store the first lanes of ``rest``, as many as ``bits`` are set."""
        builder, lanes = self.builder, self.vector.lanes // 2
        while lanes:
            numbers = [
                ir.Constant(ir.VectorType(ir.IntType(32), lanes), list(range(first, first + lanes)))
                for first in (0, lanes)
            ]
            low, high = (builder.shuffle_vector(rest, rest, half) for half in numbers)
            reached = builder.and_(bits, int64_constant(1 << (lanes - 1)))
            full = builder.icmp_unsigned("!=", reached, int64_constant(0))
            with builder.if_then(full):
                pointer = _pointer(builder, address, low.type)
                builder.store(low, pointer, align=self.alignment)
            beyond = builder.add(address, int64_constant(lanes * self.alignment))
            address = builder.select(full, beyond, address)
            rest = builder.select(full, high, low)
            bits = builder.select(full, builder.lshr(bits, int64_constant(lanes)), bits)
            lanes //= 2

    def broadcast(self, address: ir.Value) -> Register:
        """The number at ``address`` in every lane."""
        return splat(self.builder, self.vector, self.number(address))

    def number(self, address: ir.Value) -> ir.Value:
        """The single element at ``address``."""
        pointer = _pointer(self.builder, address, _in_memory(self.vector).element)
        value = self.builder.load(pointer, align=self.alignment)
        return _from_memory(self.builder, self.vector, value)

    def _name(self, verb: str) -> str:
        return f"llvm.masked.{verb}.{_masked_suffix(self.vector)}.p0"

    def _pointer(self, address: ir.Value) -> ir.Value:
        return _pointer(self.builder, address, _in_memory(self.vector))

    def _register(self, value: ir.Value) -> Register:
        return Register(self.builder, self.vector, _from_memory(self.builder, self.vector, value))


@intrinsic
def load(typing: Any, address: Any, vector: Any) -> Any:
    """The vector at ``address``: ``load(address, FLOAT32)``."""
    kind = named_vector(vector)
    if kind is None:
        return None

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> ir.Value:
        return VectorMemory(builder, kind).load(values[0]).value

    return kind(types.int64, vector), generate


@intrinsic
def load_masked(typing: Any, address: Any, vector: Any, mask: Any) -> Any:
    """The vector at ``address``; lanes outside ``mask`` are not read and are zero."""
    kind = named_vector(vector)
    if kind is None:
        return None

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> ir.Value:
        return VectorMemory(builder, kind).load_masked(values[0], values[2]).value

    return kind(types.int64, vector, mask), generate


@intrinsic
def load_over(typing: Any, address: Any, value: Any, mask: Any) -> Any:
    """A vector whose lanes in ``mask`` are those at ``address``; the others are not read."""
    if not isinstance(value, Vector):
        return None

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> ir.Value:
        others = Register(builder, value, values[1])
        return VectorMemory(builder, value).load_masked(values[0], values[2], others).value

    return value(types.int64, value, mask), generate


@intrinsic
def store(typing: Any, address: Any, value: Any) -> Any:
    """Store a vector at ``address``."""
    if not isinstance(value, Vector):
        return None

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> ir.Value:
        VectorMemory(builder, value).store(values[0], Register(builder, value, values[1]))
        return context.get_dummy_value()

    return types.void(types.int64, value), generate


def _storing(store: Callable[[VectorMemory, ir.Value, Register, ir.Value], None]) -> Any:
    """Make a method that stores a part of a vector callable from kernels."""

    def define(typing: Any, address: Any, value: Any, mask: Any) -> Any:
        if not isinstance(value, Vector):
            return None

        def generate(context: Any, builder: Any, sig: Any, values: Any) -> ir.Value:
            stored = Register(builder, value, values[1])
            store(VectorMemory(builder, value), values[0], stored, values[2])
            return context.get_dummy_value()

        return types.void(types.int64, value, mask), generate

    define.__name__ = define.__qualname__ = store.__name__
    define.__doc__ = store.__doc__
    return intrinsic(define)


store_masked = _storing(VectorMemory.store_masked)
store_over = _storing(VectorMemory.store_over)
store_first = _storing(VectorMemory.store_first)


LINE = 64
"""Bytes of a cache line."""


def fetch_ahead(
    builder: ir.IRBuilder, address: ir.Value, written: bool = False, level: int = 1
) -> None:
    """Bring the line at ``address``, which need not exist, into the caches from a level on, to read
    it or to write it."""
    pointer = _pointer(builder, address, ir.IntType(8))
    # The last says that it is data.
    flags = [ir.Constant(ir.IntType(32), number) for number in (int(written), 4 - level, 1)]
    call(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer, *flags])


def _fetching(written: bool) -> Callable[[Any, Any, Any, Any], ir.Value]:
    def generate(context: Any, builder: Any, sig: Any, values: Any) -> ir.Value:
        fetch_ahead(builder, values[0], written)
        return context.get_dummy_value()

    return generate


@intrinsic
def prefetch(typing: Any, address: Any) -> Any:
    """Bring the line at ``address``, which need not exist, into the caches."""
    return types.void(types.int64), _fetching(written=False)


@intrinsic
def prefetch_written(typing: Any, address: Any) -> Any:
    """`prefetch` of a line that will be written."""
    return types.void(types.int64), _fetching(written=True)


def lane_numbers(builder: ir.IRBuilder, lanes: int) -> Register:
    """An int64 vector 0, 1, 2, ..."""
    vector = Vector(types.int64, lanes)
    return Register(builder, vector, ir.Constant(vector.llvm, list(range(lanes))))


def first_lanes(builder: ir.IRBuilder, vector: Vector, count: ir.Value) -> Register:
    """The mask of the first ``count`` lanes (int64): none of a negative number, at most all.

    It is compared in elements of the vector's own width, in which it needs no conversion.
    """
    clipped = count
    for bound, name in ((0, "llvm.smax.i64"), (vector.lanes, "llvm.smin.i64")):
        clipped = call(builder, name, count.type, [clipped, ir.Constant(count.type, bound)])
    element = {1: types.int8, 8: types.int8, 16: types.int16}.get(vector.bits, types.int32)
    numbers = Vector(element, vector.lanes)
    lanes = Register(builder, numbers, ir.Constant(numbers.llvm, list(range(vector.lanes))))
    return lanes < splat(builder, numbers, builder.trunc(clipped, numbers.llvm_element))


def _lane_pointers(builder: Any, vector: Vector, address: ir.Value, stride: ir.Value) -> ir.Value:
    lanes = lane_numbers(builder, vector.lanes)
    addresses = splat(builder, lanes.type, address) + lanes * splat(builder, lanes.type, stride)
    pointer = _in_memory(vector).element.as_pointer()
    return builder.inttoptr(addresses.value, ir.VectorType(pointer, vector.lanes))


@intrinsic
def gather(typing: Any, address: Any, stride: Any, vector: Any, mask: Any) -> Any:
    """Lane i is read at ``address + i * stride`` (bytes) if in ``mask``, else zero.

    A vector in place of ``stride`` holds the distance of every lane from ``address``.
    """
    kind = named_vector(vector)
    if kind is None:
        return None
    scattered = isinstance(stride, Vector)

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> ir.Value:
        memory = _in_memory(kind)
        if scattered:
            numbers = Vector(types.int64, kind.lanes)
            distances = Register(builder, stride, values[1]).convert(types.int64)
            addresses = (splat(builder, numbers, values[0]) + distances).value
            pointer = memory.element.as_pointer()
            pointers = builder.inttoptr(addresses, ir.VectorType(pointer, kind.lanes))
        else:
            pointers = _lane_pointers(builder, kind, values[0], values[1])
        name = f"llvm.masked.gather.{_masked_suffix(kind)}.v{kind.lanes}p0"
        zero = ir.Constant(memory, None)
        value = call(builder, name, memory, [pointers, _alignment(kind), values[3], zero])
        return _from_memory(builder, kind, value)

    distance = stride if scattered else types.int64
    return kind(types.int64, distance, vector, mask), generate


@intrinsic
def load_even(typing: Any, address: Any, vector: Any, low: Any, high: Any) -> Any:
    """The elements 0, 2, 4, ... of two vectors at ``address``.

    Elements of the first outside the mask ``low``, and of the second outside ``high``, are not read
    and are zero.
    """
    kind = named_vector(vector)
    if kind is None:
        return None

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> ir.Value:
        first, second = _two_vectors(builder, kind, values[0], values[2:4])
        return first.shuffle(list(range(0, 2 * kind.lanes, 2)), second).value

    return kind(types.int64, vector, low, high), generate


@intrinsic
def load_three(typing: Any, address: Any, vector: Any, low: Any, high: Any, last: Any) -> Any:
    """As `load_even`, from the elements 0, 1 and 2 on; ``last`` is a mask whose first lane says
    whether there is an element behind the two vectors."""
    kind = named_vector(vector)
    if kind is None:
        return None

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> ir.Value:
        first, second = _two_vectors(builder, kind, values[0], values[2:4])
        evens, odds = (
            first.shuffle(list(range(start, 2 * kind.lanes, 2)), second) for start in (0, 1)
        )
        few = Vector(kind.element, 4)
        inside = ir.Constant(ir.VectorType(ir.IntType(32), few.lanes), list(range(few.lanes)))
        mask = builder.shuffle_vector(values[4], values[4], inside)
        behind = builder.add(values[0], int64_constant(2 * kind.lanes * kind.bits // 8))
        more = VectorMemory(builder, few).load_masked(behind, mask).resize(kind.lanes)
        shifted = evens.shuffle(list(range(1, kind.lanes + 1)), more)
        made = [register.value for register in (evens, odds, shifted)]
        return context.make_tuple(builder, sig.return_type, made)

    return types.UniTuple(kind, 3)(types.int64, vector, low, high, last), generate


def _two_vectors(
    builder: ir.IRBuilder, kind: Vector, address: ir.Value, masks: Sequence[ir.Value]
) -> list[Register]:
    """Two vectors that follow one another in memory, of the elements in each one's mask."""
    memory = VectorMemory(builder, kind)
    second = builder.add(address, int64_constant(memory.bytes))
    return [
        memory.load_masked(start, mask)
        for start, mask in zip((address, second), masks, strict=True)
    ]


@intrinsic
def scatter(typing: Any, address: Any, stride: Any, value: Any, mask: Any) -> Any:
    """Lane i is written at ``address + i * stride`` (bytes) if in ``mask``."""
    if not isinstance(value, Vector):
        return None

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> ir.Value:
        stored = _to_memory(builder, value, values[2])
        pointers = _lane_pointers(builder, value, values[0], values[1])
        name = f"llvm.masked.scatter.{_masked_suffix(value)}.v{value.lanes}p0"
        call(builder, name, ir.VoidType(), [stored, pointers, _alignment(value), values[3]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, value, mask), generate


@intrinsic
def read(typing: Any, address: Any, element: Any) -> Any:
    """The scalar at ``address``: ``read(address, FLOAT32)`` is a float32."""
    kind = named_vector(element)
    if kind is None:
        return None

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> ir.Value:
        return VectorMemory(builder, kind).number(values[0])

    return kind.element(types.int64, element), generate


@intrinsic
def write(typing: Any, address: Any, value: Any, element: Any) -> Any:
    """Store the scalar ``value``, converted: ``write(address, 1.5, FLOAT32)``."""
    kind = named_vector(element)
    if kind is None:
        return None

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> ir.Value:
        memory = _in_memory(kind).element
        bits = scalar_bits(context, builder, kind, values[1], sig.args[1])
        if kind.bits == 1:
            bits = builder.zext(bits, memory)
        builder.store(bits, _pointer(builder, values[0], memory), align=max(kind.bits // 8, 1))
        return context.get_dummy_value()

    return types.void(types.int64, value, element), generate
