"""Products of sparse rows in registers, against numpy on whole numbers, which are exact."""

from __future__ import annotations

import numpy as np
import pytest
from support import call, guarded

from graphopt.kernels import source
from graphopt.kernels.nonzeros import Schedule, pack_streams
from graphopt.kernels.simd import LANES

DEPTH = 23
TEXT = """
from graphopt.kernels.simd import *
from graphopt.kernels.stream import *


def kernel(arguments, thread, begin, end):
    words = arguments[0]
    panel = arguments[1]
    tail = arguments[2]
    sums = arguments[3]
    first_block = arguments[4] != 0
    target = arguments[5]
    step = arguments[6]
    p = words + 12
    twos = read(words, INT32)
    tile = multiply_stream(p, twos, panel, step, tail, TAIL, sums, first_block, FILLED, SHAPE)
    store_sums(target, tile, SHAPE)
"""


@pytest.mark.parametrize("first_block", [True, False])
@pytest.mark.parametrize("tail", [0, *(lanes for lanes in (4, 8) if lanes < LANES)])
@pytest.mark.parametrize("lacking", [0, 1, 3])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (1, 3), (1, 5), (1, 7), (2, 3), (4, 4)])
def test_sums_of_products(
    rows: int, width: int, lacking: int, tail: int, first_block: bool
) -> None:
    schedule = Schedule(rows, width, DEPTH, tail)
    shape = f"{rows}, {width}, {tail}, {schedule.sums_step}"
    text = TEXT.replace("TAIL", str(schedule.tail_step)).replace("SHAPE", shape)
    text = text.replace("FILLED", "arguments[7]" if lacking else "0")
    entry = source.build("stream_test", text)
    random = np.random.default_rng(0)
    lanes = width * LANES + tail
    for count in (0, 1, 2, 3, 4, 5, 6, 8, 14, DEPTH):
        weight = np.zeros((rows, DEPTH), np.float32)
        columns = random.choice(DEPTH, count, replace=False)
        weight[:, columns] = random.integers(1, 9, (rows, count))
        values = random.integers(-9, 9, (DEPTH, lanes)).astype(np.float32)
        known = random.integers(-99, 99, (rows, lanes)).astype(np.float32)
        if lacking:
            # What is not in the panel adds nothing.
            values[:, -lacking:] = np.nan
        _, stream = pack_streams([weight], schedule, 1)
        words, _ = guarded(stream)
        panel, _ = guarded(values[:, : width * LANES])
        tails, inside = guarded(np.full((DEPTH, max(schedule.tail_step // 4, 1)), np.nan, "f4"))
        inside[:, :tail] = values[:, width * LANES :]
        step = schedule.sums_step // 4
        # The last row's tail is a narrow vector, with nothing behind it that may be touched.
        size = (rows - 1) * step + lanes
        places = np.arange(rows)[:, None] * step + np.arange(lanes)
        sums, waiting = guarded(np.full(size, np.nan, np.float32))
        waiting[places] = np.nan if first_block else known
        target, result = guarded(np.full(size, np.nan, np.float32))
        buffers = [words.address, panel.address, tails.address, sums.address]
        filled = (tail or LANES) - lacking
        call(entry, [*buffers, int(first_block), target.address, schedule.row_bytes, filled])
        expected = weight @ np.nan_to_num(values) + (0 if first_block else known)
        np.testing.assert_array_equal(result[places], expected)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6, 7])
def test_an_infinity_times_a_weight_in_several_columns(count: int) -> None:
    weight = np.zeros((1, DEPTH), np.float32)
    weight[0, :count] = [-1, 9, 3, 5, 2, 7, 8][:count]
    schedule = Schedule(1, 1, DEPTH)
    text = TEXT.replace("TAIL", "0").replace("SHAPE", f"1, 1, 0, {schedule.sums_step}")
    text = text.replace("FILLED", "0")
    entry = source.build("stream_test", text)
    _, stream = pack_streams([weight], schedule, 1)
    for column in range(count):
        values = np.ones((DEPTH, LANES), np.float32)
        values[column], values[count:] = np.inf, np.nan
        words, panel, target = (guarded(one) for one in (stream, values, np.zeros(LANES, "f4")))
        addresses = [words[0].address, panel[0].address, panel[0].address, panel[0].address]
        call(entry, [*addresses, 1, target[0].address, schedule.row_bytes])
        np.testing.assert_array_equal(target[1], weight[0, column] * np.inf)
