"""What integer kernels say about words: the four channels of a pixel, or four weights, as 32 bits.

Functions here are called from generated kernels. Addresses, strides and pitches are in bytes; an
image is a plane of words, as `Layout.grouped` has them.
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba import types

from graphopt.kernels import memory, simd
from graphopt.kernels.calls import inlined
from graphopt.kernels.panel import put
from graphopt.kernels.register import (
    FEATURES,
    INT32,
    LANES,
    UINT8,
    Register,
    Vector,
    call,
    operation,
)

# A type checker sees the first parameter of an intrinsic, which its callers do not give.
gather: Any = memory.gather
load_even: Any = memory.load_even
load_masked: Any = memory.load_masked
mask_between: Any = simd.mask_between
mask_first: Any = simd.mask_first
read: Any = memory.read
select: Any = simd.select
store: Any = memory.store

ROUNDING = 12582912.0
"""1.5 * 2**23: a float32 within 2**22 of 0 plus this is rounded to an integer, halves to even,
which then is in the low bits."""
ROUNDING_BITS = 0x4B400000


def _has_dot(lanes: int) -> bool:
    """Whether the CPU multiplies and adds bytes in vectors of so many words."""
    if lanes == 16:
        return "avx512vnni" in FEATURES
    return lanes == 8 and ({"avx512vnni", "avx512vl"} <= FEATURES or "avxvnni" in FEATURES)


@operation
def dot(words: Register, weights: Register, sums: Register) -> Register:
    """``sums`` plus, in each lane, the four unsigned bytes of ``words`` times the signed ones of
    ``weights``, exactly (modulo 2**32)."""
    bits = 32 * words.type.lanes
    if _has_dot(words.type.lanes):
        return _dot_instruction(words, weights, sums, bits)
    multiply = _PAIRS.get(bits)
    if multiply is not None and multiply[0] in FEATURES:
        return _dot_of_pairs(words, weights, sums, multiply[1])
    for byte in range(4):
        value = words.reinterpret(types.uint32) >> (8 * byte)
        weight = (weights << (24 - 8 * byte)) >> 24
        sums = sums + (value & 255).reinterpret(types.int32) * weight
    return sums


# By the bits of a vector: the feature, and the intrinsic that multiplies int16 and adds pairs.
_PAIRS = {
    128: ("sse2", "llvm.x86.sse2.pmadd.wd"),
    256: ("avx2", "llvm.x86.avx2.pmadd.wd"),
    512: ("avx512bw", "llvm.x86.avx512.pmaddw.d.512"),
}


def _dot_instruction(words: Register, weights: Register, sums: Register, bits: int) -> Register:
    builder = words.builder
    operands = [words.value, weights.value]
    if binding.llvm_version_info[0] >= 22:
        octets = ir.VectorType(ir.IntType(8), bits // 8)
        operands = [builder.bitcast(value, octets) for value in operands]
    name = f"llvm.x86.avx512.vpdpbusd.{bits}"
    value = call(builder, name, sums.type.llvm, [sums.value, *operands])
    return Register(builder, sums.type, value)


def _dot_of_pairs(words: Register, weights: Register, sums: Register, name: str) -> Register:
    """The even and the odd bytes as int16, whose products are added in int32: nothing saturates,
    as it would if bytes were multiplied and added in int16."""
    builder = words.builder
    halves = Vector(types.int16, 2 * words.type.lanes)

    def as_halves(register: Register, element: Any) -> Register:
        kind = halves.of(element)
        return Register(builder, kind, builder.bitcast(register.value, kind.llvm))

    value, weight = as_halves(words, types.uint16), as_halves(weights, types.int16)
    for unsigned, signed in (
        (value & 255, (weight << 8) >> 8),
        (value >> 8, weight >> 8),
    ):
        product = call(builder, name, sums.type.llvm, [unsigned.value, signed.value])
        sums = sums + Register(builder, sums.type, product)
    return sums


@operation
def rounded_bits(value: Register) -> Register:
    """The bits of `ROUNDING` plus ``value`` rounded to an integer, halves to even."""
    return (value + ROUNDING).reinterpret(types.int32)


@operation
def byte_maximum(a: Register, b: Register) -> Register:
    """The larger of each pair of unsigned bytes of two vectors of words."""
    builder = a.builder
    octets = Vector(types.uint8, 4 * a.type.lanes)
    left, right = (
        Register(builder, octets, builder.bitcast(value.value, octets.llvm)) for value in (a, b)
    )
    larger = (left > right).select(left, right)
    return Register(builder, a.type, builder.bitcast(larger.value, a.type.llvm))


@operation
def unsigned_byte(words: Register, byte: Register) -> Register:
    """Byte number ``byte`` of each word, from 0 to 255."""
    shifted = words.reinterpret(types.uint32) >> (byte.reinterpret(types.uint32) * 8)
    return (shifted & 255).reinterpret(types.int32)


@operation
def signed_nibble(words: Register, number: Register) -> Register:
    """Nibble ``number`` of each word, from -8 to 7, as float32."""
    if words.type.lanes == 16 and "avx512f" in FEATURES:
        builder = words.builder
        floats = words.type.of(types.float32)
        table = ir.Constant(floats.llvm, [float((n + 8) % 16 - 8) for n in range(16)])
        # Of an index, the instruction looks at the low nibble only.
        index = words.reinterpret(types.uint32) >> (number.reinterpret(types.uint32) * 4)
        name = "llvm.x86.avx512.permvar.sf.512"
        value = call(builder, name, floats.llvm, [table, index.value])
        return Register(builder, floats, value)
    return ((words << (number * -4 + 28)) >> 28).convert(types.float32)


@inlined
def last_word(place: int, stop: int) -> int:
    """The bytes from ``place`` to ``stop``, at most three, as the low ones of a word."""
    word = 0
    shift = 0
    while place < stop:
        word += int(read(place, UINT8)) << shift
        shift += 8
        place += 1
    return word


@inlined
def pack_words(
    panel: int,
    pitch: int,
    image: int,
    plane: int,
    planes: int,
    height: int,
    width: int,
    out_width: int,
    pixels: int,
    first: int,
    vectors: int,
    kernel_height: int,
    kernel_width: int,
    stride_height: int,
    stride_width: int,
    dilation_height: int,
    dilation_width: int,
    top: int,
    left: int,
    outside: Any,
) -> None:
    """What a convolution multiplies for ``vectors`` vectors of output pixels from ``first`` on.

    The panel's rows are ordered by kernel position, then plane. Pixels outside the image are
    those of the vector ``outside``, columns from ``pixels`` on anything. ``top`` and ``left`` are
    the padding. Planes of ``image`` are ``plane`` bytes apart.
    """
    for vector in range(vectors):
        start = first + vector * LANES
        count = min(pixels - start, LANES)
        row = start // out_width
        column = start - row * out_width
        lane = 0
        while lane < count:
            # One piece of an output row; the next overwrites what follows it in the vector.
            target = panel + 4 * vector * LANES
            for y in range(kernel_height):
                source_row = row * stride_height + y * dilation_height - top
                inside = width if 0 <= source_row < height else 0
                for x in range(kernel_width):
                    source_column = (column - lane) * stride_width + x * dilation_width - left
                    _pack_pixels(
                        target,
                        pitch,
                        image + 4 * (source_row * width + source_column),
                        plane,
                        planes,
                        source_column,
                        stride_width,
                        inside,
                        lane,
                        outside,
                    )
                    target += planes * pitch
            lane += out_width - column
            column = 0
            row += 1


@inlined
def _pack_pixels(
    target: int,
    pitch: int,
    source: int,
    plane: int,
    planes: int,
    start: int,
    stride: int,
    width: int,
    lane: int,
    outside: Any,
) -> None:
    """A vector of the columns from ``start`` on in steps of ``stride``, of every plane.

    Lanes before ``lane`` are kept, columns outside 0 to ``width`` are ``outside``.
    """
    written = ~mask_first(lane, INT32)
    inside = mask_between(start, stride, width, INT32)
    if stride == 1:
        for _ in range(planes):
            value = select(inside, load_masked(source, INT32, inside), outside)
            put(target, value, lane, written)
            source += plane
            target += pitch
    elif stride == 2:
        low = mask_between(start, 1, width, INT32)
        high = mask_between(start + LANES, 1, width, INT32)
        for _ in range(planes):
            value = select(inside, load_even(source, INT32, low, high), outside)
            put(target, value, lane, written)
            source += plane
            target += pitch
    else:
        for _ in range(planes):
            value = select(inside, gather(source, 4 * stride, INT32, inside), outside)
            put(target, value, lane, written)
            source += plane
            target += pitch


@inlined
def pad_words(
    target: int,
    pitch: int,
    rows: int,
    phase_pitch: int,
    source: int,
    height: int,
    width: int,
    top: int,
    left: int,
    stride: int,
    outside: Any,
) -> None:
    """``rows`` rows of a plane with ``top`` rows and ``left`` columns of ``outside`` around it.

    A row holds the columns 0, ``stride``, 2 ``stride``, ... first, ``phase_pitch`` bytes further
    those from 1 on, and so forth, so that windows ``stride`` apart are neighbours. ``top`` may be
    negative: the rows start inside the image.
    """
    first = min(max(top, 0), rows)
    last = max(min(top + height, rows), first)
    for phase in range(stride):
        for column in range(0, phase_pitch // 4, LANES):
            start = column * stride + phase - left
            place = target + phase * phase_pitch + 4 * column
            for _ in range(first):
                store(place, outside)
                place += pitch
            origin = source + 4 * ((first - top) * width + start)
            inside = mask_between(start, stride, width, INT32)
            low = mask_between(start, 1, width, INT32)
            high = mask_between(start + LANES, 1, width, INT32)
            for _ in range(first, last):
                if stride == 1:
                    value = load_masked(origin, INT32, inside)
                elif stride == 2:
                    value = load_even(origin, INT32, low, high)
                else:
                    value = gather(origin, 4 * stride, INT32, inside)
                store(place, select(inside, value, outside))
                origin += 4 * width
                place += pitch
            for _ in range(last, rows):
                store(place, outside)
                place += pitch


__all__ = [
    "byte_maximum",
    "dot",
    "last_word",
    "pack_words",
    "pad_words",
    "rounded_bits",
    "signed_nibble",
    "unsigned_byte",
]
