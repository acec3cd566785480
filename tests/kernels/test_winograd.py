"""Convolutions by minimal filtering against torch in float64."""

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
from graphopt.kernels.winograd import WEIGHT_TRANSFORM, candidates

SAME = ((1, 1), (1, 1))

PIXEL_TRANSFORM = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])
RESULT_TRANSFORM = np.array([[1, 1, 1, 0], [0, 1, -1, -1]])
"""``B.T`` and ``A.T`` of Lavin and Gray."""

CASES = {
    "one pixel": Convolution((1, 16, 1, 1), 16, (3, 3), padding=SAME),
    "no padding": Convolution((1, 16, 3, 3), 16, (3, 3)),
    "one tile": Convolution((1, 16, 2, 2), 17, (3, 3), padding=SAME),
    "odd sizes": Convolution((2, 17, 7, 5), 16, (3, 3), padding=SAME),
    "a vector of tiles": Convolution((1, 16, 4, 2 * LANES), 16, (3, 3), padding=SAME),
    "a tile more": Convolution((1, 16, 5, 2 * LANES + 1), 16, (3, 3), padding=SAME),
    "a tile less": Convolution((1, 16, 3, 2 * LANES - 2), 16, (3, 3), padding=SAME),
    "long rows": Convolution((1, 16, 3, 5 * LANES), 16, (3, 3), padding=SAME),
    "many rows": Convolution((1, 16, 90, 3), 16, (3, 3), padding=SAME),
    "one side": Convolution((1, 16, 8, 9), 16, (3, 3), padding=((0, 1), (1, 0))),
    "more padding than image": Convolution((1, 16, 2, 3), 16, (3, 3), padding=((5, 4), (4, 9))),
    "two blocks of depth": Convolution((1, 131, 4, 4), 16, (3, 3), padding=SAME),
    "two chunks": Convolution((1, 16, 6, 6), 67, (3, 3), padding=SAME),
    "grouped": Convolution((2, 48, 6, 5), 51, (3, 3), padding=SAME, groups=3),
    "many images": Convolution((7, 16, 4, 4), 16, (3, 3), padding=SAME),
}


def transformed(case: Convolution, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The same algorithm in float64, of absolute values: its errors are proportional to this."""
    (top, bottom), (left, right) = case.padding or ((0, 0), (0, 0))
    padded = np.pad(np.abs(x).astype(float), ((0, 0), (0, 0), (top, bottom + 1), (left, right + 1)))
    n, _, height, width = padded.shape
    rows, columns = (height - 2) // 2, (width - 2) // 2
    pixels, kernel, result = map(np.abs, (PIXEL_TRANSFORM, WEIGHT_TRANSFORM, RESULT_TRANSFORM))
    tiles = np.lib.stride_tricks.sliding_window_view(padded, (4, 4), (2, 3))[:, :, ::2, ::2]
    turned = np.einsum("ik,ncrskl,jl->nijrsc", pixels, tiles[:, :, :rows, :columns], pixels)
    weights = np.einsum("ik,ockl,jl->ijoc", kernel, np.abs(weight), kernel)
    turned = turned.reshape(n, 4, 4, rows, columns, case.groups, -1)
    weights = weights.reshape(4, 4, case.groups, -1, weight.shape[1])
    products = np.einsum("nijrsgc,ijgoc->ngoijrs", turned, weights)
    made = np.einsum("ai,ngoijrs,bj->ngorasb", result, products, result)
    made = made.reshape(n, case.outputs, 2 * rows, 2 * columns)
    return made[:, :, : height - 3, : width - 3]


@pytest.mark.parametrize("name", CASES)
def test_shapes(name: str) -> None:
    verify(CASES[name], candidates, transformed)


@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    draw = data.draw
    groups = draw(st.integers(1, 2))
    channels, outputs = (groups * draw(st.integers(16, 40)) for _ in range(2))
    padding = tuple((draw(st.integers(0, 3)), draw(st.integers(0, 3))) for _ in range(2))
    size = tuple(max(3 - sum(around), draw(st.integers(1, 40))) for around in padding)
    x = (draw(st.integers(1, 2)), channels, *size)
    case = Convolution(x, outputs, (3, 3), padding=padding, groups=groups)
    settings = [(draw(st.integers(1, 3)), draw(st.booleans()), draw(st.sampled_from([0, 4])))]
    verify(case, candidates, transformed, settings)


def test_the_transformations_are_a_convolution() -> None:
    """The reference above, without absolute values, on one tile and one kernel."""
    d, g = numbers((4, 4)).astype(float), numbers((3, 3), 1).astype(float)
    turned = (PIXEL_TRANSFORM @ d @ PIXEL_TRANSFORM.T) * (WEIGHT_TRANSFORM @ g @ WEIGHT_TRANSFORM.T)
    windows = np.lib.stride_tricks.sliding_window_view(d, (3, 3))
    direct = np.einsum("abkl,kl->ab", windows, g)
    result = RESULT_TRANSFORM @ turned @ RESULT_TRANSFORM.T
    np.testing.assert_allclose(result, direct, rtol=0, atol=1e-12)


def test_epilogue() -> None:
    case = Convolution((2, 18, 7, 2 * LANES + 3), 19, (3, 3), padding=SAME)
    verify_epilogue(case, candidates, transformed)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_special_values_stay_in_the_tiles_that_contain_them(value: float) -> None:
    case = Convolution((1, 16, 12, 13), 16, (3, 3), padding=SAME)
    x, weight = numbers(case.x), numbers(case.weight, 1)
    x[0, 3, 6, 7] = value
    exact = case.convolve(x, weight)
    (found,) = candidates(case.problem(exact.shape))
    (result,) = execute(found, [x, weight])
    touched = np.zeros((12, 13), bool)
    touched[4:8, 6:10] = True  # tiles begin at even results and see a pixel before and after
    assert not np.isfinite(result[:, :, ~np.isfinite(exact)[0, 0]]).any()
    assert np.isfinite(result[:, :, ~touched]).all()


@pytest.mark.parametrize("channels", [16, 128, 512])
def test_accuracy_is_that_of_torch(channels: int) -> None:
    case = Convolution((1, channels, 14, 14), 32, (3, 3), padding=SAME)
    x, weight = numbers(case.x), numbers(case.weight, 1)
    exact = case.convolve(x, weight)
    (found,) = candidates(case.problem(exact.shape))
    (result,) = execute(found, [x, weight])
    theirs = torch.conv2d(torch.tensor(x), torch.tensor(weight), padding=1).numpy()
    assert np.abs(result - exact).mean() < 2 * np.abs(theirs - exact).mean()


def test_what_is_left_to_others() -> None:
    def found(case: Convolution) -> list:
        shape = case.convolve(np.zeros(case.x), np.zeros(case.weight)).shape
        return candidates(case.problem(shape))

    image = (1, 16, 9, 9)
    assert found(Convolution(image, 16, (3, 3)))
    assert not found(Convolution(image, 16, (3, 3), stride=(1, 2)))
    assert not found(Convolution(image, 16, (3, 3), dilation=(2, 2)))
    assert not found(Convolution(image, 16, (3, 1)))
    assert not found(Convolution(image, 8, (3, 3)))
    assert not found(Convolution((0, 16, 9, 9), 16, (3, 3)))
