"""Convolutions with zeros in their weights whose panels are strips of the image."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layers import Convolution, chain, check, check_overwriting, numbers, pruned
from test_convolution import SAME
from test_sparse_convolution import check_arranged, extremes, with_residual

from graphopt.kernels.operand import Operand
from graphopt.kernels.registry import candidates
from graphopt.kernels.simd import LANES
from graphopt.kernels.sparse_strips import SparseStripsCandidate, Strips, tiles
from graphopt.kernels.zeros import zero_pattern


@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 8))
def test_tiles_cover_an_output_once(rows: int, columns: int, height: int) -> None:
    covered = np.zeros((rows + 4 * height, columns + LANES), int)
    for tile in tiles((rows, columns), height):
        for piece in range(LANES // tile.lanes):
            first = tile.row + piece * height
            covered[first : first + height, tile.column : tile.column + tile.lanes] += 1
    assert (covered[:rows, :columns] == 1).all()


@pytest.mark.skipif(LANES != 16, reason="counted for vectors of 16 lanes")
@pytest.mark.parametrize(("side", "count"), [(7, 1), (14, 2), (28, 7), (56, 28), (112, 112)])
def test_tiles_have_few_lanes_that_are_not_needed(side: int, count: int) -> None:
    assert len(tiles((side, side), 7)) == count


@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
def test_places_in_a_panel(height: int, stride: int, dilation: int, kernel: int) -> None:
    lines = height + (kernel - 1) * dilation // stride
    strips = Strips(lines, stride, range(0, stride, np.gcd(stride, dilation)), 3)
    # Which row of the image each vector of a panel holds, by column of the kernel.
    held = [
        (column, phase + line * stride)
        for column in range(3)
        for phase in strips.phases
        for line in range(lines)
    ]
    assert len(held) == strips.vectors
    for tap in range(kernel):
        for column in range(3):
            place = strips.place(tap * dilation, column)
            rows = [(column, row * stride + tap * dilation) for row in range(height)]
            assert held[place : place + height] == rows


CASES = {
    "one pixel": Convolution((1, 40, 1, 1), 9, (3, 3), padding=SAME),
    "whole vectors": Convolution((1, 9, 15, 2 * LANES), 19, (3, 3), padding=SAME),
    "halves of vectors": Convolution((2, 20, 17, LANES + LANES // 2), 5, (3, 3), padding=SAME),
    "quarters of vectors": Convolution(
        (1, 20, 30, LANES + 3 * LANES // 4), 5, (3, 3), padding=SAME
    ),
    "narrow": Convolution((1, 12, 41, 3), 7, (3, 2), padding=((1, 1), (1, 0))),
    "without padding": Convolution((1, 40, 14, 2 * LANES + 1), 10, (5, 3)),
    "only rows": Convolution((1, 60, 13, 11), 8, (4, 1), padding=((2, 1), (0, 0))),
    "stride 2": Convolution((1, 40, 27, 35), 12, (3, 3), stride=(2, 2), padding=SAME),
    "other strides": Convolution((2, 40, 20, 37), 6, (5, 3), stride=(3, 2), groups=2),
    "dilation": Convolution((1, 30, 19, 21), 9, (3, 3), dilation=(2, 3), padding=((2, 2), (3, 3))),
    "dilation and stride": Convolution((1, 30, 30, 21), 9, (5, 3), stride=(4, 1), dilation=(2, 1)),
    "blocks of depth": Convolution((1, 211, 4, 5), 10, (3, 3), padding=SAME),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_shapes(name: str, rows: int) -> None:
    problem, inputs, expected, magnitude = with_residual(CASES[name], rows)
    found = [one for one in candidates(problem) if isinstance(one, SparseStripsCandidate)]
    assert found
    check(problem, inputs, expected, magnitude, found=extremes(found))


HALVES = {
    "14 x 14": Convolution((1, 40, 14, 14), 9, (3, 3), padding=SAME),
    "28 x 28": Convolution((1, 20, 28, 28), 9, (3, 3), padding=SAME),
    "pieces of rows": Convolution((1, 20, 56, LANES + LANES // 4), 5, (3, 3), padding=SAME),
    "without padding": Convolution((1, 20, 30, 2 * LANES + 1), 10, (3, 3)),
    "stride 2": Convolution((1, 40, 28, 35), 12, (3, 3), stride=(2, 2), padding=SAME),
    "stride 2 in pieces": Convolution(
        (1, 40, 56, LANES - 3), 12, (3, 3), stride=(2, 2), padding=SAME
    ),
    "five columns": Convolution((1, 20, 56, 21), 8, (5, 5), padding=((2, 2), (2, 2))),
    "dilation": Convolution((1, 30, 28, 21), 9, (3, 3), dilation=(2, 3), padding=((2, 2), (3, 3))),
}
"""Convolutions whose images have halves, and tiles that fit those of the results."""


@pytest.mark.parametrize("name", HALVES)
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("places", [(0, 2, -1), (0,), (2, -1)])
def test_halves(name: str, rows: int, places: tuple[int, ...]) -> None:
    check_arranged(HALVES[name], rows, places, SparseStripsCandidate, halves=True)


def test_values_per_channel_and_per_pixel() -> None:
    case = Convolution((2, 40, 9, LANES + 3), 11, (3, 3), padding=SAME)
    x, weight = numbers(case.x), pruned(case.weight, 0.2)
    y = case.convolve(x, weight)
    bias, mask = numbers((11,), 2), numbers((1, 1, *y.shape[2:]), 3)
    problem = case.problem(
        y.shape,
        chain(("add", "e0"), ("mul", "e1"), extras=2),
        [Operand.plain("float32", bias.shape), Operand.plain("float32", mask.shape)],
        zero_pattern(weight),
    )
    expected = (y + bias[:, None, None]) * mask
    magnitude = 20 * (1 + case.convolve(np.abs(x), np.abs(weight))) * (1 + np.abs(mask))
    found = [one for one in candidates(problem) if isinstance(one, SparseStripsCandidate)]
    check(problem, [x, weight, bias, mask], expected, magnitude, found=found[:2])


@pytest.mark.parametrize("rows", [1, 4])
def test_a_residual_that_is_overwritten(rows: int) -> None:
    case = Convolution((1, 40, 9, LANES + 5), 21, (3, 3), padding=SAME)
    check_overwriting(case, SparseStripsCandidate, 0.2, rows)


def test_rows_that_do_not_overlap_are_left_to_other_kernels() -> None:
    for case in (
        Convolution((1, 40, 9, 9), 8, (1, 1)),
        Convolution((1, 40, 9, 9), 8, (1, 3)),
        Convolution((1, 40, 40), 8, (3,)),
        Convolution((1, 40, 12, 12), 8, (3, 3), stride=(3, 3)),
    ):
        weight = pruned(case.weight, 0.2)
        y = case.convolve(np.zeros(case.x), weight)
        found = candidates(case.problem(y.shape, zeros=zero_pattern(weight)))
        assert found
        assert not any(isinstance(one, SparseStripsCandidate) for one in found)
