"""From int32 sums to bytes: the kernel text that finishes integer layers.

`integer_problems` says exactly what is computed. Rounding is an addition: a float32 plus 1.5 times
2**23 has the integer in its low bits, with halves rounded to even. Four channels of a pixel are
brought into a word by shifts and additions, whose constant parts are subtracted at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.kernels.integer_problems import NUMBERS
from graphopt.kernels.loops import indent
from graphopt.kernels.operand import GROUP
from graphopt.kernels.registry import aligned_empty
from graphopt.kernels.simd import LANES
from graphopt.kernels.words import ROUNDING_BITS

WORD = 0x01010101
"""A byte times this is a word of it."""


def pack_numbers(numbers: np.ndarray) -> np.ndarray:
    """The numbers of a problem as kernels read them."""
    named = dict(zip(NUMBERS, numbers.tolist(), strict=True))
    zero_point = int(named["y_zero_point"])
    offset = sum((zero_point - ROUNDING_BITS) << (8 * byte) for byte in range(GROUP))
    packed = aligned_empty((16,), np.uint32)
    packed[...] = 0
    packed[0] = int(named["x_zero_point"]) * WORD
    packed[3] = offset % 2**32
    packed[6] = (zero_point - ROUNDING_BITS) % 2**32
    floats = packed.view(np.float32)
    floats[1] = named["low"] - zero_point
    floats[2] = named["high"] - zero_point
    floats[4] = named["residual_zero_point"]
    floats[5] = named["residual_multiplier"]
    return packed.view(np.int32)


@dataclass(frozen=True)
class Requantization:
    """What follows the sums of a kernel.

    Attributes:
        residual: whether a residual is added.
        floating: whether results are float32 in plain order, not bytes in words.
        masked: whether words beyond the last pixel must not be touched.
    """

    residual: bool = False
    floating: bool = False
    masked: bool = False

    @property
    def name(self) -> str:
        """For the names of kernels."""
        flags = ("residual", "floating", "masked")
        return "".join(f"_{flag}" for flag in flags if getattr(self, flag))

    def prologue(self) -> list[str]:
        """Lines before all loops; ``numbers`` is the address of what `pack_numbers` made."""
        lines = ["outside = broadcast(read(numbers, INT32), INT32)"]
        if not self.floating:
            lines += [
                "low = broadcast(read(numbers + 4, FLOAT32), FLOAT32)",
                "high = broadcast(read(numbers + 8, FLOAT32), FLOAT32)",
                "offset = broadcast(read(numbers + 12, INT32), INT32)",
            ]
        if self.residual:
            lines += [
                "residual_zero = broadcast(read(numbers + 16, FLOAT32), FLOAT32)",
                "residual_scale = broadcast(read(numbers + 20, FLOAT32), FLOAT32)",
            ]
        return lines

    def tile_lines(self, sums: Sequence[Sequence[str]], first: int = 0) -> list[str]:
        """Lines that finish and store the sums of four channels, ``sums[vector][channel]``.

        The multipliers of the channels are in m0 to m3. ``c`` is where the first vector goes, and
        ``e`` where the residual's is; ``columns`` pixels exist. Float32 channels are ``out_plane``
        apart, and those from ``rows - first`` on do not exist.
        """
        lines: list[str] = []
        if self.floating:
            for channel in range(GROUP):
                inner = [
                    f"store_first(c + {channel} * out_plane + {4 * LANES * vector},"
                    f" convert({own[channel]}, FLOAT32) * m{channel},"
                    f" mask_first(columns - {LANES * vector}, FLOAT32))"
                    for vector, own in enumerate(sums)
                ]
                lines += [f"if rows > {first + channel}:", *indent(1, inner)] if channel else inner
            return lines
        for vector, own in enumerate(sums):
            mask = f", mask_first(columns - {LANES * vector}, INT32)" if self.masked else ""
            kind, store = ("_masked", "store_first") if self.masked else ("", "store")
            place = f"{4 * LANES * vector}"
            if self.residual:
                lines.append(f"other = load{kind}(e + {place}, INT32{mask})")
            lines += self.word_lines(own)
            lines.append(f"{store}(c + {place}, word{mask})")
        return lines

    def word_lines(self, sums: Sequence[str]) -> list[str]:
        """Lines that make ``word`` of the sums of four channels, and of the residual ``other``."""
        lines: list[str] = []
        for byte, sum in enumerate(sums):
            lines.append(f"t = convert({sum}, FLOAT32) * m{byte}")
            if self.residual:
                lines += [
                    f"r = convert(unsigned_byte(other, {byte}), FLOAT32) - residual_zero",
                    "t = t + r * residual_scale",
                ]
            lines.append("bits = rounded_bits(at_most(at_least(t, low), high))")
            lines.append(f"word += bits * {256**byte}" if byte else "word = bits + offset")
        return lines
