"""Linear layers of uint8 rows with int8 weights.

Output features are in the lanes of vectors, the rows' bytes are broadcast as words of four. A
register tile of a few rows by a few vectors of features passes through the whole depth. One row is
bound by reading the weight, which lies in the order in which it is read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.kernels import source
from graphopt.kernels.integer_convolution import corrected_bias
from graphopt.kernels.integer_problems import IntegerMatmulProblem
from graphopt.kernels.loops import SHARE, Arguments, kernel_text
from graphopt.kernels.problem import GROUP
from graphopt.kernels.registry import (
    Argument,
    Candidate,
    Input,
    Output,
    Packed,
    Step,
    aligned_empty,
    register,
)
from graphopt.kernels.requantization import pack_numbers
from graphopt.kernels.simd import LANES
from graphopt.kernels.tile import CYCLES_PER_SECOND, WORTH_SHARING, TileShape, fill

VOCABULARY = ("simd", "words")
TILE = TileShape(4, 4) if LANES == 16 else TileShape(2, 4)
"""Rows by vectors of features that fit the registers."""
_MOST_DEPTH = 2**31 // (255 * 128)
_BYTES_PER_CYCLE = 6
"""Of a weight that comes from the main memory."""


@dataclass(frozen=True)
class IntegerMatmulCandidate(Candidate):
    """Register tiles of rows by features."""

    problem: IntegerMatmulProblem

    @property
    def _tiles(self) -> int:
        return math.ceil(self.problem.inputs[1].shape[0] / (TILE.width * LANES))

    def packing(self) -> tuple[()]:
        return ()

    def pack(self, constants: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        _, weight, multiplier, bias, numbers = constants
        assert weight is not None
        assert multiplier is not None
        assert bias is not None
        assert numbers is not None
        columns = TILE.width * LANES
        words = math.ceil(weight.shape[1] / GROUP)
        padded = np.zeros((self._tiles * columns, words * GROUP), np.int8)
        padded[: weight.shape[0], : weight.shape[1]] = weight
        packed = aligned_empty((self._tiles, words, columns, GROUP), np.int8)
        packed[...] = padded.reshape(self._tiles, columns, words, GROUP).swapaxes(1, 2)
        finish = aligned_empty((self._tiles, 2, columns), np.int32)
        rows = (corrected_bias(weight, bias, numbers), multiplier.view(np.int32))
        for place, row in enumerate(rows):
            whole = np.zeros(self._tiles * columns, np.int32)
            whole[: len(row)] = row
            finish[:, place] = whole.reshape(self._tiles, columns)
        return [packed, finish, pack_numbers(numbers)]

    def build(self, threads: int) -> tuple[Step, ...]:
        (y,) = self.problem.outputs
        outputs, depth = self.problem.inputs[1].shape
        rows = math.prod(y.shape[:-1])
        parallel = threads > 1 and self.estimate > WORTH_SHARING
        # Few tiles of features are shared by cutting the rows, too.
        blocks = math.ceil(threads / self._tiles) if parallel else 1
        values: dict[str, Argument] = {
            "x": Input(0), "weight": Packed(0), "finish": Packed(1), "numbers": Packed(2),
            "y": Output(0), "rows": rows, "depth": depth, "outputs": outputs,
            "words": math.ceil(depth / GROUP), "blocks": blocks, "tasks": self._tiles * blocks,
        }  # fmt: skip
        block = Arguments()
        for name, value in values.items():
            block.add(name, value)
        floating = y.dtype == "float32"
        text = kernel_text(block, _lines(floating), VOCABULARY)
        entry = source.build(f"integer_matmul_{y.dtype}", text)
        return (Step(entry, tuple(block.values), parallel),)


@register(IntegerMatmulProblem)
def candidates(problem: IntegerMatmulProblem) -> list[Candidate]:
    """Register tiles of rows by features."""
    problem.check()
    outputs, depth = problem.inputs[1].shape
    rows = math.prod(problem.outputs[0].shape[:-1])
    if not outputs or not depth or not rows or depth >= _MOST_DEPTH:
        return []
    tiles = math.ceil(outputs / (TILE.width * LANES))
    whole, rest = divmod(rows, TILE.height)
    steps = tiles * math.ceil(depth / GROUP) * TILE.width * (whole * TILE.height + rest * 1.2)
    finish = tiles * rows * TILE.width * 8
    seconds = max(steps + finish, outputs * depth / _BYTES_PER_CYCLE) / CYCLES_PER_SECOND
    return [IntegerMatmulCandidate("integer matmul", problem, seconds)]


def _lines(floating: bool) -> list[str]:
    """The kernel's body."""
    prologue = []
    if not floating:
        prologue = [
            "low = broadcast(read(numbers + 4, FLOAT32), FLOAT32)",
            "high = broadcast(read(numbers + 8, FLOAT32), FLOAT32)",
            "zero_point = broadcast(read(numbers + 24, INT32), INT32)",
        ]
    parts = {
        "prologue": prologue,
        "share": SHARE,
        "whole": _tile_lines(TILE.height, floating),
        "single": _tile_lines(1, floating),
    }
    sizes = {"HEIGHT": TILE.height, "COLUMNS": TILE.width * LANES, "ITEM": 4 if floating else 1}
    return fill(_BODY, parts, sizes)


def _tile_lines(height: int, floating: bool) -> list[str]:
    """Lines that multiply the ``height`` rows at ``a`` with the tile of the weight at ``b``."""
    rows, columns = range(height), range(TILE.width)

    def products(word: str) -> list[str]:
        lines = [f"v{column} = load(q + {4 * LANES * column}, INT32)" for column in columns]
        for row in rows:
            lines.append(f"x{row} = broadcast({word.format(row, row)}, INT32)")
            lines += [
                f"s{row}_{column} = dot(x{row}, v{column}, s{row}_{column})" for column in columns
            ]
        return lines

    begin = [
        f"s{row}_{column} = load(own + {4 * LANES * column}, INT32)"
        for row in rows
        for column in columns
    ]
    end: list[str] = []
    for column in columns:
        place = 4 * LANES * (TILE.width + column)
        end += [
            f"m = load(own + {place}, FLOAT32)",
            f"mask = mask_first(outputs - feature - {LANES * column}, FLOAT32)",
        ]
        for row in rows:
            target = f"c + {row} * c_row + {(4 if floating else 1) * LANES * column}"
            end.append(f"t = convert(s{row}_{column}, FLOAT32) * m")
            if not floating:
                end.append("bits = rounded_bits(at_most(at_least(t, low), high)) + zero_point")
                end.append("t = convert(bits, UINT8)")
            end.append(f"store_masked({target}, t, mask)")
    parts = {
        "begin": begin,
        "products": products("read(place + {} * depth, INT32)"),
        "rest": products("last_word(place + {} * depth, stop_place + {} * depth)"),
        "end": end,
    }
    return fill(_TILE, parts, {"STEP": 4 * LANES * TILE.width})


_TILE = """
q = b
place = a
stop_place = a + depth
<begin>
while place + 4 <= stop_place:
    prefetch(q + 4096)
    <products>
    q += STEP
    place += 4
if place < stop_place:
    <rest>
<end>
"""

_BODY = """
<prologue>
c_row = ITEM * outputs
<share>
while task < stop:
    tile = task // blocks
    row_block = task - tile * blocks
    row = row_block * rows // blocks
    last_row = (row_block + 1) * rows // blocks
    feature = tile * COLUMNS
    b = weight + tile * words * 4 * COLUMNS
    own = finish + tile * 8 * COLUMNS
    while row < last_row:
        a = x + row * depth
        c = y + row * c_row + ITEM * feature
        if row + HEIGHT <= last_row:
            <whole>
            row += HEIGHT
        else:
            <single>
            row += 1
    task += 1
"""
