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
from graphopt.kernels.operand import GROUP
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

    def packing(self) -> tuple[()]:
        return ()

    def pack(self, constants: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        _, weight, multiplier, bias, numbers = constants
        assert weight is not None
        assert multiplier is not None
        assert bias is not None
        assert numbers is not None
        rows = (corrected_bias(weight, bias, numbers), multiplier)
        return [pack_weight(weight), pack_features(rows), pack_numbers(numbers)]

    def build(self, threads: int) -> tuple[Step, ...]:
        (y,) = self.problem.outputs
        parallel = threads > 1 and self.estimate > WORTH_SHARING
        weight, rows = self.problem.inputs[1].shape, math.prod(y.shape[:-1])
        finish = "floating" if y.dtype == "float32" else "bytes"
        more: dict[str, Argument] = {"x": Input(0), "numbers": Packed(2)}
        return (product_step(weight, rows, finish, more, threads if parallel else 1),)


def pack_weight(weight: np.ndarray) -> np.ndarray:
    """An int8 weight (N, K) as (tile of features, word of the depth, feature, 4)."""
    tiles, columns = _tiles(len(weight)), TILE.width * LANES
    words = math.ceil(weight.shape[1] / GROUP)
    padded = np.zeros((tiles * columns, words * GROUP), np.int8)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    packed = aligned_empty((tiles, words, columns, GROUP), np.int8)
    packed[...] = padded.reshape(tiles, columns, words, GROUP).swapaxes(1, 2)
    return packed


def pack_features(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of words (N,) as (tile of features, row, feature)."""
    tiles, columns = _tiles(len(rows[0])), TILE.width * LANES
    packed = aligned_empty((tiles, len(rows), columns), np.int32)
    for place, row in enumerate(rows):
        whole = np.zeros(tiles * columns, np.int32)
        whole[: len(row)] = row.view(np.int32)
        packed[:, place] = whole.reshape(tiles, columns)
    return packed


def _tiles(outputs: int) -> int:
    return math.ceil(outputs / (TILE.width * LANES))


def product_step(
    weight: tuple[int, ...], rows: int, finish: str, more: dict[str, Argument], threads: int
) -> Step:
    """The step that multiplies ``rows`` rows of bytes with a weight (N, K).

    ``more`` has where the rows are, ``x``, and what ``finish`` needs: for ``bytes`` the
    ``numbers``, for ``dynamic`` the ``scales`` of the rows, for ``floating`` nothing.
    """
    outputs, depth = weight
    tiles = _tiles(outputs)
    # Few tiles of features are shared by cutting the rows, too.
    blocks = math.ceil(threads / tiles)
    values: dict[str, Argument] = {
        "weight": Packed(0), "finish": Packed(1), "y": Output(0), **more,
        "rows": rows, "depth": depth, "outputs": outputs,
        "words": math.ceil(depth / GROUP), "blocks": blocks, "tasks": tiles * blocks,
    }  # fmt: skip
    block = Arguments()
    block.add_all(values)
    entry = source.build(f"integer_matmul_{finish}", kernel_text(block, _lines(finish), VOCABULARY))
    return Step(entry, tuple(block.values), threads > 1, block.tasks)


@register(IntegerMatmulProblem)
def candidates(problem: IntegerMatmulProblem) -> list[Candidate]:
    """Register tiles of rows by features."""
    problem.check()
    outputs, depth = problem.inputs[1].shape
    rows = math.prod(problem.outputs[0].shape[:-1])
    if not outputs or not depth or not rows or depth >= _MOST_DEPTH:
        return []
    seconds = product_cycles(rows, depth, outputs) / CYCLES_PER_SECOND
    return [IntegerMatmulCandidate("integer matmul", problem, seconds)]


def product_cycles(rows: int, depth: int, outputs: int) -> float:
    """Cycles of all tasks together, roughly."""
    tiles = _tiles(outputs)
    whole, rest = divmod(rows, TILE.height)
    steps = tiles * math.ceil(depth / GROUP) * TILE.width * (whole * TILE.height + rest * 1.2)
    return max(steps + tiles * rows * TILE.width * 8, outputs * depth / _BYTES_PER_CYCLE)


def _lines(finish: str) -> list[str]:
    """The kernel's body."""
    prologue = []
    if finish == "bytes":
        prologue = [
            "low = broadcast(read(numbers + 4, FLOAT32), FLOAT32)",
            "high = broadcast(read(numbers + 8, FLOAT32), FLOAT32)",
            "zero_point = broadcast(read(numbers + 24, INT32), INT32)",
        ]
    parts = {
        "prologue": prologue,
        "share": SHARE,
        "whole": _tile_lines(TILE.height, finish),
        "single": _tile_lines(1, finish),
    }
    sizes = {
        "HEIGHT": TILE.height,
        "COLUMNS": TILE.width * LANES,
        "ITEM": 1 if finish == "bytes" else 4,
        "FINISH": 3 if finish == "dynamic" else 2,
    }
    return fill(_BODY, parts, sizes)


def _tile_lines(height: int, finish: str) -> list[str]:
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
    if finish == "dynamic":
        end = [
            f"scale{row} = broadcast(read(scales + 4 * (row + {row}), FLOAT32), FLOAT32)"
            for row in rows
        ]
    for column in columns:
        place = 4 * LANES * (TILE.width + column)
        end += [
            f"m = load(own + {place}, FLOAT32)",
            f"mask = mask_first(outputs - feature - {LANES * column}, FLOAT32)",
        ]
        if finish == "dynamic":
            end.append(f"bias = load(own + {place + 4 * LANES * TILE.width}, FLOAT32)")
        for row in rows:
            target = f"c + {row} * c_row + {(1 if finish == 'bytes' else 4) * LANES * column}"
            sum = f"convert(s{row}_{column}, FLOAT32)"
            if finish == "dynamic":
                end.append(f"t = {sum} * (m * scale{row}) + bias")
            else:
                end.append(f"t = {sum} * m")
            if finish == "bytes":
                end.append("bits = rounded_bits(at_most(at_least(t, low), high)) + zero_point")
                end.append("t = convert(bits, UINT8)")
            end.append(f"store_first({target}, t, mask)")
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
    own = finish + tile * 4 * FINISH * COLUMNS
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
