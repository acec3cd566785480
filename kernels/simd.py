"""What kernels say about SIMD vectors.

Kernels hold vectors in ordinary local variables and move them by *address* (an int64, in bytes):

    x = load(source + 4 * i, FLOAT32)              # one vector; no alignment is assumed
    y = fma(x, weight, y)                          # one rounding where the CPU has the instruction
    store_first(target + 4 * i, y, mask_first(count - i, FLOAT32))

A ``Vector(element, lanes)`` is both the Numba type and what a kernel names to say "as this kind
of vector". `LANES` is the number of float32 lanes in one register of the CPU that Numba compiles
for (16 with AVX-512, 8 with AVX, else 4; ``NUMBA_CPU_NAME`` and ``NUMBA_CPU_FEATURES`` are
respected), and the constants FLOAT32, FLOAT64, INT64, ..., BOOL all have that many lanes: a
float64 or int64 vector then spans two registers and an int8 one a quarter, so that element i of
one is always in the same lane as element i of another. A BOOL vector is a mask of bits in
registers and a byte per element in memory, as in torch. ``Vector(types.int8, 4 * LANES)`` and the
like are as good.

``+ - * / & | ^ ~ < <= > >= == !=`` work on vectors of one type; an operand may also be a number,
which is converted to the vector's element type (so ``x + 1`` and ``fma(x, 0.5, y)`` work).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from graphopt.kernels.calls import align_stack, call_step, inlined
from graphopt.kernels.memory import (
    first_lanes,
    gather,
    load,
    load_even,
    load_masked,
    load_over,
    named_vector,
    prefetch,
    prefetch_written,
    read,
    scatter,
    store,
    store_first,
    store_masked,
    write,
)
from graphopt.kernels.register import (
    BOOL,
    FEATURES,
    FLOAT32,
    FLOAT64,
    INT8,
    INT16,
    INT32,
    INT64,
    LANES,
    MASK_REGISTERS,
    UINT8,
    VECTORS,
    Register,
    Vector,
    operation,
    scalar_bits,
    splat,
)
from graphopt.kernels.transposition import transpose_corner, transpose_tile

__all__ = [
    "BOOL",
    "FEATURES",
    "FLOAT32",
    "FLOAT64",
    "INT8",
    "INT16",
    "INT32",
    "INT64",
    "LANES",
    "UINT8",
    "VECTORS",
    "Register",
    "Vector",
    "absolute",
    "align_stack",
    "any_lane",
    "at_least",
    "at_most",
    "broadcast",
    "call_step",
    "ceil",
    "convert",
    "copysign",
    "float32_from_bits",
    "float64_from_bits",
    "floor",
    "fma",
    "gather",
    "inlined",
    "interleave_high",
    "interleave_low",
    "lane_index",
    "load",
    "load_even",
    "load_masked",
    "load_over",
    "mask_between",
    "mask_first",
    "maximum",
    "minimum",
    "nearest",
    "operation",
    "prefetch",
    "prefetch_written",
    "read",
    "reduce_add",
    "reduce_maximum",
    "reduce_minimum",
    "reduce_multiply",
    "scatter",
    "select",
    "sqrt",
    "store",
    "store_first",
    "store_masked",
    "transpose_corner",
    "transpose_tile",
    "truncate",
    "unliteral",
    "write",
]


# Arithmetic -----------------------------------------------------------------------------------


@operation
def fma(a: Register, b: Register, c: Register) -> Register:
    """``a * b + c``, rounded once where the CPU has the instruction."""
    return a.fma(b, c)


@operation
def minimum(a: Register, b: Register) -> Register:
    """The smaller of each pair; NaN if either is NaN."""
    return a.minimum(b)


@operation
def maximum(a: Register, b: Register) -> Register:
    """The larger of each pair; NaN if either is NaN."""
    return a.maximum(b)


@operation
def at_least(a: Register, bound: Register) -> Register:
    """The larger of each pair in one instruction; NaN if ``a`` is, ``bound`` must not be."""
    return (bound > a).select(bound, a)


@operation
def at_most(a: Register, bound: Register) -> Register:
    """The smaller of each pair in one instruction; NaN if ``a`` is, ``bound`` must not be."""
    return (bound < a).select(bound, a)


@operation
def select(mask: Register, chosen: Register, otherwise: Register) -> Register:
    """``chosen`` where ``mask`` is set, else ``otherwise``; at least one of them a vector."""
    return mask.select(chosen, otherwise)


@operation
def absolute(a: Register) -> Register:
    return abs(a)


@operation
def copysign(magnitude: Register, sign: Register) -> Register:
    return magnitude.copysign(sign)


@operation
def sqrt(a: Register) -> Register:
    return a.llvm("llvm.sqrt")


@operation
def floor(a: Register) -> Register:
    return a.llvm("llvm.floor")


@operation
def ceil(a: Register) -> Register:
    return a.llvm("llvm.ceil")


@operation
def truncate(a: Register) -> Register:
    return a.llvm("llvm.trunc")


@operation
def nearest(a: Register) -> Register:
    """Round to the nearest integer, halves to even."""
    return a.llvm("llvm.rint")


@operation
def interleave_low(a: Register, b: Register) -> Register:
    """a[0], b[0], a[1], b[1], ... as far as they fit a vector."""
    half, lanes = a.type.lanes // 2, a.type.lanes
    return a.shuffle([lane for i in range(half) for lane in (i, lanes + i)], b)


@operation
def interleave_high(a: Register, b: Register) -> Register:
    """What follows `interleave_low`."""
    half, lanes = a.type.lanes // 2, a.type.lanes
    return a.shuffle([lane for i in range(half, lanes) for lane in (i, lanes + i)], b)


# Making, converting and combining vectors ------------------------------------------------------


@intrinsic
def broadcast(typing: Any, scalar: Any, vector: Any) -> Any:
    """A number in every lane: ``broadcast(0.0, FLOAT32)``."""
    kind = named_vector(vector)
    if kind is None:
        return None

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> ir.Value:
        bits = scalar_bits(context, builder, kind, values[0], sig.args[0])
        return splat(builder, kind, bits).value

    return kind(scalar, vector), generate


@intrinsic
def unliteral(typing: Any, value: Any) -> Any:
    """An int64 that is no literal to Numba, which compiles functions anew for each of those."""

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> ir.Value:
        return values[0]

    return types.int64(types.int64), generate


@intrinsic
def lane_index(typing: Any, vector: Any) -> Any:
    """An integer vector 0, 1, 2, ...: ``lane_index(INT32)``."""
    kind = named_vector(vector)
    if kind is None or kind.floating:
        return None

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> ir.Value:
        return ir.Constant(kind.llvm, list(range(kind.lanes)))

    return kind(vector), generate


@intrinsic
def mask_first(typing: Any, count: Any, vector: Any) -> Any:
    """The mask of the first ``count`` lanes; none for a negative count, at most all."""
    kind = named_vector(vector)
    if kind is None:
        return None

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> ir.Value:
        return first_lanes(builder, kind, values[0]).value

    return kind.of(types.boolean)(types.int64, vector), generate


@intrinsic
def mask_between(typing: Any, start: Any, step: Any, stop: Any, vector: Any) -> Any:
    """The mask of the lanes i with ``0 <= start + i * step < stop``; all of these below 2**31."""
    kind = named_vector(vector)
    if kind is None:
        return None

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> ir.Value:
        numbers = Vector(types.uint32 if MASK_REGISTERS else types.int32, kind.lanes)
        lanes = Register(builder, numbers, ir.Constant(numbers.llvm, list(range(kind.lanes))))
        narrow = [builder.trunc(value, ir.IntType(32)) for value in values[:3]]
        first, distance, limit = (splat(builder, numbers, value) for value in narrow)
        place = first + lanes * distance
        # Without registers for masks, instructions look at signs; AVX2 has no unsigned comparison.
        return (place < limit if MASK_REGISTERS else ((place - limit) & ~place) < 0).value

    return kind.of(types.boolean)(types.int64, types.int64, types.int64, vector), generate


@intrinsic
def convert(typing: Any, value: Any, vector: Any) -> Any:
    """Each element converted to another type; floating to integer truncates and saturates."""
    kind = named_vector(vector)
    if kind is None or not isinstance(value, Vector) or kind.lanes != value.lanes:
        return None

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> ir.Value:
        return Register(builder, value, values[0]).convert(kind.element).value

    return kind(value, vector), generate


def _bits(element: Any) -> Any:
    def define(typing: Any, bits: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, values: Any) -> ir.Value:
            narrow = ir.IntType(element.bitwidth)
            word = values[0] if element.bitwidth == 64 else builder.trunc(values[0], narrow)
            return builder.bitcast(word, context.get_value_type(element))

        return element(types.int64), generate

    define.__name__ = define.__qualname__ = f"{element}_from_bits"
    return intrinsic(define)


float32_from_bits = _bits(types.float32)
"""The float32 whose pattern is in the low 32 bits of an int64 (a kernel's float argument)."""
float64_from_bits = _bits(types.float64)
"""The float64 whose pattern an int64 holds."""


def _reduction(name: str, combine: Any) -> Any:
    def define(typing: Any, value: Any) -> Any:
        if not isinstance(value, Vector):
            return None

        def generate(context: Any, builder: Any, sig: Any, values: Any) -> ir.Value:
            return Register(builder, value, values[0]).reduce(combine)

        return value.element(value), generate

    define.__name__ = define.__qualname__ = name
    return intrinsic(define)


reduce_add = _reduction("reduce_add", lambda a, b: a + b)
reduce_multiply = _reduction("reduce_multiply", lambda a, b: a * b)
reduce_maximum = _reduction("reduce_maximum", lambda a, b: a.maximum(b))
reduce_minimum = _reduction("reduce_minimum", lambda a, b: a.minimum(b))
any_lane = _reduction("any_lane", lambda a, b: a | b)
