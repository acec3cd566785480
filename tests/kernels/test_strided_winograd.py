"""7 x 7 convolutions with stride 2 by minimal filtering against torch in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from filtering import verify, verify_epilogue
from hypothesis import given
from hypothesis import strategies as st
from layers import Convolution, numbers
from support import execute

from graphopt.kernels.simd import LANES
from graphopt.kernels.strided_winograd import COLUMN_TRANSFORM, ROW_TRANSFORM, candidates

AROUND = ((3, 3), (3, 3))

PIXEL_ROWS = np.array(
    [[1, 1.5, -2, -1.5, 1, 0], [0, -1, -2.5, -0.5, 1, 0], [0, 1, 0.5, -2.5, 1, 0],
     [0, -0.5, -1, 0.5, 1, 0], [0, 2, -1, -2, 1, 0], [0, 1, 1.5, -2, -1.5, 1]]
)  # fmt: skip
PIXEL_COLUMNS = np.array(
    [[0.5, -1, -0.5, 1, 0], [0, -0.5, 0.5, 1, 0], [0, 0.5, -1.5, 1, 0], [0, -1, 0, 1, 0],
     [0, 0.5, -1, -0.5, 1]]
)  # fmt: skip
RESULT_ROWS = np.array([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -0.5, 0], [0, 1, 1, 4, 0.25, 1]])
RESULT_COLUMNS = np.array([[1, 1, 1, 1, 0], [0, 1, -1, 0.5, 1]])
"""``B.T`` and ``A.T`` of minimal filtering F(3, 4) over the points 0, 1, -1, 2, -1/2, infinity, and
F(2, 4) over the points 0, 1, -1, 1/2, infinity."""


def layer(x: tuple[int, ...], outputs: int, padding: tuple = AROUND) -> Convolution:
    return Convolution(x, outputs, (7, 7), stride=(2, 2), padding=padding)


CASES = {
    "one pixel": layer((1, 3, 1, 1), 16),
    "no padding": layer((1, 3, 7, 7), 16, ((0, 0), (0, 0))),
    "one tile": layer((1, 3, 4, 4), 17),
    "odd sizes": layer((2, 1, 13, 9), 16),
    "a vector of tiles": layer((1, 3, 8, 4 * LANES), 16),
    "a tile more": layer((1, 3, 9, 4 * LANES + 1), 16),
    "a tile less": layer((1, 3, 5, 4 * LANES - 4), 16),
    "long rows": layer((1, 3, 5, 9 * LANES + 3), 16),
    "many rows": layer((1, 3, 151, 6), 16),
    "one side": layer((1, 4, 16, 19), 16, ((0, 1), (2, 0))),
    "more padding than image": layer((1, 3, 2, 3), 16, ((9, 8), (6, 11))),
    "many channels": layer((1, 16, 11, 12), 19),
    "two chunks": layer((1, 3, 11, 10), 67),
    "many images": layer((7, 3, 8, 7), 16),
}


def transformed(case: Convolution, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The same algorithm in float64, of absolute values: its errors are proportional to this."""
    (top, bottom), (left, right) = case.padding or ((0, 0), (0, 0))
    around = ((0, 0), (0, 0), (top, bottom + 14), (left, right + 9))
    padded = np.pad(np.abs(x).astype(float), around)
    height, width = (n + sum(p) for n, p in zip(x.shape[2:], case.padding or AROUND, strict=True))
    out = ((height - 7) // 2 + 1, (width - 7) // 2 + 1)
    kernels = np.zeros((*weight.shape[:2], 8, 8))
    kernels[:, :, :7, :7] = weight
    rows, columns = map(np.abs, (PIXEL_ROWS, PIXEL_COLUMNS))
    turn_rows, turn_columns = map(np.abs, (ROW_TRANSFORM, COLUMN_TRANSFORM))
    back_rows, back_columns = map(np.abs, (RESULT_ROWS, RESULT_COLUMNS))
    result = np.zeros((len(x), len(weight), 3 * -(-out[0] // 3), 2 * -(-out[1] // 2)))
    for a in range(2):
        for b in range(2):
            phase = padded[:, :, a::2, b::2]
            tiles = np.lib.stride_tricks.sliding_window_view(phase, (6, 5), (2, 3))[:, :, ::3, ::2]
            tiles = tiles[:, :, : result.shape[2] // 3, : result.shape[3] // 2]
            kernel = np.abs(kernels[:, :, a::2, b::2])
            g = np.einsum("ik,ockl,jl->ijoc", turn_rows, kernel, turn_columns)
            d = np.einsum("ik,ncrskl,jl->nijrsc", rows, tiles, columns)
            products = np.einsum("nijrsc,ijoc->noijrs", d, g)
            made = np.einsum("ai,noijrs,bj->norasb", back_rows, products, back_columns)
            result += made.reshape(result.shape)
    return result[:, :, : out[0], : out[1]]


@pytest.mark.parametrize("name", CASES)
def test_shapes(name: str) -> None:
    verify(CASES[name], candidates, transformed)


@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    draw = data.draw
    padding = tuple((draw(st.integers(0, 5)), draw(st.integers(0, 5))) for _ in range(2))
    size = tuple(max(7 - sum(around), draw(st.integers(1, 80))) for around in padding)
    x = (draw(st.integers(1, 2)), draw(st.integers(1, 16)), *size)
    case = layer(x, draw(st.integers(16, 40)), padding)
    settings = [(draw(st.integers(1, 3)), draw(st.booleans()), draw(st.sampled_from([0, 4])))]
    verify(case, candidates, transformed, settings)


def test_the_transformations_are_a_convolution() -> None:
    """F(3, 4) by F(2, 4), on one tile and one kernel."""
    d, g = numbers((6, 5)).astype(float), numbers((4, 4), 1).astype(float)
    turned = (PIXEL_ROWS @ d @ PIXEL_COLUMNS.T) * (ROW_TRANSFORM @ g @ COLUMN_TRANSFORM.T)
    windows = np.lib.stride_tricks.sliding_window_view(d, (4, 4))
    direct = np.einsum("abkl,kl->ab", windows, g)
    result = RESULT_ROWS @ turned @ RESULT_COLUMNS.T
    np.testing.assert_allclose(result, direct, rtol=0, atol=1e-12)


def test_epilogue() -> None:
    verify_epilogue(layer((2, 3, 9, 4 * LANES + 7), 19), candidates, transformed)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_special_values_stay_in_the_tiles_that_contain_them(value: float) -> None:
    case = layer((1, 3, 25, 27), 16)
    x, weight = numbers(case.x), numbers(case.weight, 1)
    x[0, 1, 12, 14] = value
    exact = case.convolve(x, weight)
    (found,) = candidates(case.problem(exact.shape))
    (result,) = execute(found, [x, weight])
    touched = np.zeros(exact.shape[2:], bool)
    touched[3:9, 6:10] = True  # of tiles that see eleven by nine pixels, from -3 on
    assert not np.isfinite(result[:, :, ~np.isfinite(exact)[0, 0]]).any()
    assert np.isfinite(result[:, :, ~touched]).all()


def test_accuracy_is_nearly_that_of_torch() -> None:
    case = layer((1, 3, 64, 64), 64)
    x, weight = numbers(case.x), numbers(case.weight, 1)
    exact = case.convolve(x, weight)
    (found,) = candidates(case.problem(exact.shape))
    (result,) = execute(found, [x, weight])
    theirs = torch.conv2d(torch.tensor(x), torch.tensor(weight), stride=2, padding=3).numpy()
    assert np.abs(result - exact).mean() < 4 * np.abs(theirs - exact).mean()


def test_what_is_left_to_others() -> None:
    def found(case: Convolution) -> list:
        shape = case.convolve(np.zeros(case.x), np.zeros(case.weight)).shape
        return candidates(case.problem(shape))

    image = (1, 3, 19, 19)
    assert found(Convolution(image, 16, (7, 7), stride=(2, 2)))
    assert not found(Convolution(image, 16, (7, 7)))
    assert not found(Convolution(image, 16, (7, 7), stride=(2, 2), dilation=(2, 2)))
    assert not found(Convolution(image, 16, (7, 5), stride=(2, 2)))
    assert not found(Convolution(image, 8, (7, 7), stride=(2, 2)))
    assert not found(Convolution((1, 17, 19, 19), 16, (7, 7), stride=(2, 2)))
    assert not found(Convolution((0, 3, 19, 19), 16, (7, 7), stride=(2, 2)))
    assert not found(Convolution((1, 4, 19, 19), 32, (7, 7), stride=(2, 2), groups=2))
