"""Tiles that are finished by an expression of the kernel's own, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
from support import call, guarded

from graphopt.kernels import source
from graphopt.kernels.simd import LANES

HEIGHT = 3
TEXT = """
from graphopt.kernels.finish import *
from graphopt.kernels.simd import *


@inlined
def finish(product, residual, kept, bias, factor):
    return select(kept, (product + residual + bias) * factor, product)


def kernel(arguments, thread, begin, end):
    tile = arguments[0]
    residual = arguments[1]
    kept = arguments[2]
    bias = arguments[3]
    c = arguments[4]
    row = arguments[5]
    rows = arguments[6]
    columns = arguments[7]
    factor = broadcast(3.0, FLOAT32)
    mask = mask_first(columns, FLOAT32) & ~mask_first(1, FLOAT32)
    finish_tile(
        finish, (SUMS), c, 4 * row, rows, COLUMNS,
        ((residual, 4 * row, FLOAT32), (kept, row, BOOL)), ((bias, 4, FLOAT32),), (factor,),
        WIDTH, WHOLE,
    )
"""


def text(width: int, whole: int, columns: str) -> str:
    sums = "".join(
        f"load(tile + {4 * LANES * number}, FLOAT32), " for number in range(HEIGHT * width)
    )
    made = TEXT.replace("SUMS", sums).replace("WIDTH", str(width)).replace("WHOLE", str(whole))
    return made.replace("COLUMNS", columns)


def finished(entry: source.Entry, width: int, rows: int, columns: int, stored: slice) -> None:
    """Check what a tile leaves in memory, of which only ``stored`` may be touched in each row."""
    random = np.random.default_rng(columns)
    exact = random.integers(-9, 9, (HEIGHT, width * LANES)).astype(np.float32)
    tile, _ = guarded(exact)
    there = max(min(rows, HEIGHT), 1)
    residual, added = guarded(random.integers(-9, 9, (there, columns)).astype(np.float32))
    kept, mask = guarded(random.integers(0, 2, (there, columns)).astype(bool))
    bias, each = guarded(random.integers(-9, 9, (there, 1)).astype(np.float32))
    target, result = guarded(np.full((there, columns), np.nan, np.float32))
    buffers = [one.address for one in (tile, residual, kept, bias, target)]
    call(entry, [*buffers, columns, rows, columns])
    product = exact[:there, :columns]
    expected = np.full_like(product, np.nan)
    if rows > 0:
        made = np.where(mask, (product + added + each) * 3, product)
        expected[:, stored] = made[:, stored]
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize(
    ("width", "whole"), [(1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1), (3, 3)]
)
def test_rows_and_columns(width: int, whole: int) -> None:
    entry = source.build("finish_test", text(width, whole, "columns"))
    first, last = whole * LANES, width * LANES
    for columns in {first, first + 1, first + LANES // 2, last - 1, last} - {0}:
        if first <= columns <= last:
            for rows in range(HEIGHT + 2):
                finished(entry, width, rows, columns, slice(0, columns))


def test_a_mask_of_columns() -> None:
    entry = source.build("finish_test", text(1, 0, "mask"))
    for columns in (2, 3, LANES):
        finished(entry, 1, HEIGHT, columns, slice(1, columns))
