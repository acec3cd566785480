"""The SIMD vocabulary, one kernel per group of instructions, against numpy."""

from __future__ import annotations

import operator

import numpy as np
import pytest
from numba import njit, types
from support import call, guarded

from graphopt.kernels import source
from graphopt.kernels.operand import ITEM_BYTES
from graphopt.kernels.simd import LANES

IMPORTS = """
from numba import types
from graphopt.kernels.simd import *

"""


def run(body: str, *arguments: int, imports: str = "") -> None:
    """Run lines of kernel text with ``a0, a1, ...`` as arguments."""
    names = [f"    a{index} = arguments[{index}]" for index in range(len(arguments))]
    lines = [f"    {line}" for line in body.strip("\n").split("\n")]
    head = [IMPORTS + imports, "def kernel(arguments, thread, begin, end):"]
    call(source.build("simd_test", "\n".join([*head, *names, *lines, ""])), list(arguments))


@pytest.mark.parametrize("store", ["store_masked", "store_first"])
@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_masked_memory_touches_only_its_lanes(dtype: str, store: str) -> None:
    kind = dtype.upper()
    body = f"""
mask = mask_first(a2, {kind})
{store}(a1, load_masked(a0, {kind}, mask), mask)
"""
    for count in range(LANES + 1):
        for at_end in (True, False):
            values = (np.arange(count) % 2 if dtype == "bool" else np.arange(count)).astype(dtype)
            buffer, _ = guarded(values, at_end)
            target, written = guarded(np.zeros(count, dtype), at_end)
            run(body, buffer.address, target.address, count)
            np.testing.assert_array_equal(written, values)


@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_lanes_that_are_not_stored_over_are_kept(dtype: str) -> None:
    kind = dtype.upper()
    body = f"store_over(a1, load(a0, {kind}), ~mask_first(a2, {kind}))"
    values = (np.arange(LANES) % 2 == 0 if dtype == "bool" else np.arange(LANES)).astype(dtype)
    others = (np.arange(LANES) % 3 == 0 if dtype == "bool" else 50 + np.arange(LANES)).astype(dtype)
    imports = "from graphopt.kernels.memory import store_over\n"
    for count in range(LANES + 1):
        buffer, _ = guarded(values)
        target, written = guarded(others.copy())
        run(body, buffer.address, target.address, count, imports=imports)
        np.testing.assert_array_equal(written, [*others[:count], *values[count:]])


@pytest.mark.parametrize("step", [1, 2, 3])
def test_mask_between_is_that_of_the_lanes_inside(step: int) -> None:
    body = "store(a0, mask_between(a1, a2, a3, FLOAT32))"
    for start in (-(2**30), -3 * LANES, -LANES, -LANES + 1, -2, -1, 0, 1, LANES, 2**30):
        for stop in (0, 1, LANES - 1, LANES, 2 * LANES + 1, 2**30 + 3):
            target, written = guarded(np.zeros(LANES, bool))
            run(body, target.address, start, step, stop)
            places = start + step * np.arange(LANES)
            np.testing.assert_array_equal(written, (places >= 0) & (places < stop))


@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_lanes_that_are_not_loaded_are_kept(dtype: str) -> None:
    kind = dtype.upper()
    body = f"""
others = load(a1, {kind})
store(a1, load_over(a0, others, mask_first(a2, {kind})))
"""
    for count in range(LANES + 1):
        values = (np.arange(count) % 2 == 0 if dtype == "bool" else np.arange(count)).astype(dtype)
        others = (np.arange(LANES) % 2 if dtype == "bool" else 50 + np.arange(LANES)).astype(dtype)
        buffer, _ = guarded(values)
        target, written = guarded(others)
        run(body, buffer.address, target.address, count)
        np.testing.assert_array_equal(written, [*values, *others[count:]])


@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_strided_memory(dtype: str) -> None:
    kind, width = dtype.upper(), ITEM_BYTES[dtype]
    body = f"""
mask = mask_first(a2, {kind})
scatter(a1, -{3 * width}, gather(a0, {2 * width}, {kind}, mask), mask)
"""
    for count in (1, LANES - 1, LANES):
        values = np.arange(2 * count - 1)
        values = (values % 3 == 0 if dtype == "bool" else values).astype(dtype)
        buffer, _ = guarded(values)
        target, written = guarded(np.zeros(3 * count - 2, dtype), at_end=False)
        last = target.address + (3 * count - 3) * width
        run(body, buffer.address, last, count)
        np.testing.assert_array_equal(written[::-3], values[::2])
        assert not written[:-1][np.arange(3 * count - 3) % 3 != (3 * count - 3) % 3].any()


def test_interleaving() -> None:
    pairs = np.arange(2 * LANES, dtype=np.float32).reshape(LANES, 2)
    even, _ = guarded(pairs[:, 0])
    odd, _ = guarded(pairs[:, 1])
    target, written = guarded(np.zeros(2 * LANES, np.float32))
    body = """
even, odd = load(a0, FLOAT32), load(a1, FLOAT32)
store(a2, interleave_low(even, odd))
store(a2 + 4 * LANES, interleave_high(even, odd))
"""
    run(body, even.address, odd.address, target.address)
    np.testing.assert_array_equal(written, pairs.reshape(-1))


@pytest.mark.parametrize("kind", ["FLOAT32", "FLOAT64", "INT16", "INT8", "BOOL"])
def test_mask_first_clips_its_count(kind: str) -> None:
    counts = [-(2**40), -5, 0, 2, LANES, LANES + 7, 256, 2**16, 2**32, 2**40 + 1]
    target, written = guarded(np.zeros((len(counts), LANES), bool))
    body = "\n".join(
        f"store(a0 + {row} * LANES, mask_first(a{1 + row}, {kind}))" for row in range(len(counts))
    )
    run(body, target.address, *counts)
    np.testing.assert_array_equal(written, np.arange(LANES) < np.array(counts)[:, None])


def test_lane_index() -> None:
    numbers, counted = guarded(np.zeros(LANES, np.int32))
    run("store(a0, lane_index(INT32))", numbers.address)
    np.testing.assert_array_equal(counted, np.arange(LANES))


def test_scalars() -> None:
    source_buffer, _ = guarded(np.array([1.5, -2.25], np.float64))
    target, written = guarded(np.zeros(4, np.float32))
    body = """
write(a1, read(a0, FLOAT64) + read(a0 + 8, FLOAT64), FLOAT32)
write(a1 + 4, float32_from_bits(a2), FLOAT32)
write(a1 + 8, float64_from_bits(a3), FLOAT32)
write(a1 + 12, 7, FLOAT32)
"""
    single = int(np.float32(0.1).view(np.int32))
    double = int(np.float64(-3.5).view(np.int64))
    run(body, source_buffer.address, target.address, single, double)
    np.testing.assert_array_equal(written, np.array([-0.75, 0.1, -3.5, 7], np.float32))


def test_reductions_of_a_vector() -> None:
    values = np.random.default_rng(0).integers(-50, 50, LANES).astype(np.float32)
    buffer, inside = guarded(values)
    target, written = guarded(np.zeros(5, np.float32))
    body = """
x = load(a0, FLOAT32)
write(a1, reduce_add(x), FLOAT32)
write(a1 + 4, reduce_maximum(x), FLOAT32)
write(a1 + 8, reduce_minimum(x), FLOAT32)
write(a1 + 12, reduce_multiply(convert(x > 0, FLOAT32) + 1), FLOAT32)
write(a1 + 16, any_lane(x > 100), FLOAT32)
"""
    run(body, buffer.address, target.address)
    positive = 2.0 ** (values > 0).sum()
    np.testing.assert_array_equal(written, [values.sum(), values.max(), values.min(), positive, 0])
    inside[LANES - 1] = np.nan
    run(body, buffer.address, target.address)
    assert np.isnan(written[:3]).all()


def test_fma_rounds_once_where_the_cpu_has_it() -> None:
    x = np.full(LANES, 1 + 2.0**-12, np.float32)
    buffer, _ = guarded(x)
    target, written = guarded(np.zeros((2, LANES), np.float32))
    fused, flag = guarded(np.zeros(1, bool))
    body = """
x = load(a0, FLOAT32)
store(a1, fma(x, x, -1))
store(a1 + 4 * LANES, x * x + -1)
write(a2, FUSED, BOOL)
"""
    imports = "from graphopt.kernels.register import FUSED\n"
    run(body, buffer.address, target.address, fused.address, imports=imports)
    twice_rounded = np.float32(np.float32(x[0] * x[0]) - np.float32(1))
    once_rounded = np.float32(float(x[0]) ** 2 - 1)
    assert twice_rounded != once_rounded
    assert (written[1] == twice_rounded).all()
    assert (written[0] == (once_rounded if flag[0] else twice_rounded)).all()


def test_extrema_and_bounds_of_nan_and_zero() -> None:
    pairs = [(np.nan, 1), (1, np.nan), (np.nan, np.nan), (2, 3), (-0.0, 0.0), (np.inf, 1)]
    x, y = np.resize(np.array(pairs, np.float32), (2 * LANES, 2))[:LANES].T.copy()
    first, _ = guarded(x)
    second, _ = guarded(y)
    target, written = guarded(np.zeros((4, LANES), np.float32))
    body = """
x = load(a0, FLOAT32)
y = load(a1, FLOAT32)
store(a2, minimum(x, y))
store(a2 + 4 * LANES, maximum(x, y))
store(a2 + 8 * LANES, at_least(x, 1.5))
store(a2 + 12 * LANES, at_most(x, 1.5))
"""
    run(body, first.address, second.address, target.address)
    expected = [np.minimum(x, y), np.maximum(x, y), np.maximum(x, 1.5), np.minimum(x, 1.5)]
    np.testing.assert_array_equal(written, np.array(expected, np.float32))


def test_vectors_of_other_widths() -> None:
    values = np.arange(4 * LANES).astype(np.int8)
    buffer, _ = guarded(values)
    target, written = guarded(np.zeros(4 * LANES, np.int8))
    imports = "WIDE = Vector(types.int8, 4 * LANES)\n"
    body = """
x = load(a0, WIDE)
store(a1, select(x > 5, x + 1, -x))
"""
    run(body, buffer.address, target.address, imports=imports)
    np.testing.assert_array_equal(written, np.where(values > 5, values + 1, -values))


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_transposed_tiles(width: int) -> None:
    side = LANES if width <= 4 else LANES // 2
    dtype = f"int{8 * width}"
    values = (np.arange(side * (side + 3)) % 127).reshape(side, side + 3).astype(dtype)
    imports = f"TILE = Vector(types.{dtype}, {side})\n"
    buffer, _ = guarded(values)
    row, column = (side + 3) * width, side * width
    target, written = guarded(np.zeros((side, side), dtype))
    body = f"transpose_tile(a0, {row}, a1, {column}, TILE)"
    run(body, buffer.address, target.address, imports=imports)
    np.testing.assert_array_equal(written, values[:, :side].T)
    for rows, columns in ((1, 1), (side - 1, 2), (2, side), (side, side - 1)):
        corner, _ = guarded(values[:rows, :columns].copy())
        target, written = guarded(np.zeros((columns, rows), dtype))
        body = f"transpose_corner(a0, {columns * width}, a1, {rows * width}, a2, a3, TILE)"
        run(body, corner.address, target.address, rows, columns, imports=imports)
        np.testing.assert_array_equal(written, values[:rows, :columns].T)


_OPERATORS = (
    "add sub mul iadd isub imul floordiv mod and_ or_ xor lt le gt ge eq ne truediv".split()
)


@pytest.mark.parametrize("name", _OPERATORS)
def test_operators_on_integers_stay_those_of_python(name: str) -> None:
    python = getattr(operator, name)
    compiled = njit(lambda a, b: python(a, b))
    for a, b in [(7, 3), (-7, 3), (7, -3), (3, 3), (-(2**40), 2**20 + 1)]:
        made, expected = compiled(a, b), python(a, b)
        assert (made, type(made)) == (expected, type(expected))
    known = {"truediv": types.float64}.get(
        name, types.boolean if type(python(7, 3)) is bool else types.int64
    )
    assert [one.return_type for one in compiled.nopython_signatures] == [known]
