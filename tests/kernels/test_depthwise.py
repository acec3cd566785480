"""Depthwise convolutions against torch in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import Convolution, chain, check, numbers

from graphopt.kernels.depthwise import StripCandidate, WindowCandidate
from graphopt.kernels.operand import Operand
from graphopt.kernels.registry import candidates
from graphopt.kernels.simd import LANES

SAME = ((1, 1), (1, 1))
WIDE = ((2, 2), (2, 2))
CASES = {
    "one": Convolution((1, 1, 1, 1), 1, (1, 1)),
    "3 x 3": Convolution((2, 5, 7, 7), 5, (3, 3), padding=SAME, groups=5),
    "whole vectors": Convolution((1, 3, 8, 2 * LANES), 3, (3, 3), padding=SAME, groups=3),
    "a pixel more": Convolution((1, 3, 9, 2 * LANES + 1), 3, (3, 3), padding=SAME, groups=3),
    "strided": Convolution((1, 3, 15, 40), 3, (3, 3), (2, 2), SAME, groups=3),
    "5 x 5, strided": Convolution((1, 3, 14, 14), 3, (5, 5), (2, 2), ((1, 2), (1, 2)), groups=3),
    "stride 3": Convolution((1, 3, 20, 70), 3, (3, 3), (3, 3), SAME, groups=3),
    "uneven strides": Convolution((1, 3, 20, 70), 3, (3, 3), (1, 4), SAME, groups=3),
    "dilated": Convolution((1, 3, 20, 40), 3, (3, 3), (2, 2), WIDE, (2, 3), groups=3),
    "dilated, two outputs each": Convolution((2, 3, 9, 19), 6, (3, 3), (), WIDE, (2, 2), groups=3),
    "two outputs each": Convolution((2, 3, 9, 9), 6, (3, 3), padding=SAME, groups=3),
    "more padding than image": Convolution((1, 2, 2, 3), 2, (5, 5), (), ((9, 4), (4, 9)), groups=2),
    "7 x 7": Convolution((1, 2, 11, 18), 2, (7, 7), padding=((3, 3), (3, 3)), groups=2),
    "whole strips": Convolution((1, 2, 14, 14), 2, (3, 3), padding=SAME, groups=2),
    "one row": Convolution((1, 2, 1, 20), 2, (3, 3), padding=SAME, groups=2),
    "many planes": Convolution((2, 40, 9, 5), 40, (3, 3), padding=SAME, groups=40),
    "sequence": Convolution((2, 4, 50), 4, (7,), padding=((6, 0),), groups=4),
    "many blocks": Convolution((1, 1, 300, 300), 1, (3, 3), padding=SAME, groups=1),
    "many blocks, strided": Convolution((1, 1, 500, 301), 1, (5, 5), (2, 2), WIDE, groups=1),
}


@pytest.mark.parametrize("name", CASES)
def test_shapes(name: str) -> None:
    case = CASES[name]
    shape = case.convolve(np.zeros(case.x), np.zeros(case.weight)).shape
    found = candidates(case.problem(shape))
    strips = max(case.stride, default=1) <= 2 and max(case.dilation, default=1) == 1
    kind = StripCandidate if strips else WindowCandidate
    assert any(isinstance(candidate, kind) for candidate in found)
    case.check()


@pytest.mark.parametrize("name", ["3 x 3", "strided", "two outputs each", "many planes"])
@pytest.mark.parametrize("places", [(0, -1), (0,), (-1,)])
def test_padded_planes(name: str, places: tuple[int, ...]) -> None:
    CASES[name].check(places=places)


@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    def pair(low: int, high: int) -> tuple[int, int]:
        return data.draw(st.tuples(st.integers(low, high), st.integers(low, high)))

    channels, multiple = pair(1, 3)
    kernel, dilation, padding = pair(1, 5), pair(1, 3), (pair(0, 4), pair(0, 4))
    height, width = (
        max(1, data.draw(st.integers(1, 40)), reach * (size - 1) + 1 - sum(around))
        for size, reach, around in zip(kernel, dilation, padding, strict=True)
    )
    Convolution(
        (data.draw(st.integers(1, 2)), channels, height, width),
        channels * multiple,
        kernel,
        pair(1, 4),
        padding,
        dilation,
        channels,
    ).check()


def test_epilogue() -> None:
    case = Convolution((2, 3, 9, 19), 6, (3, 3), padding=SAME, groups=3)
    x, weight = numbers(case.x), numbers(case.weight, 1)
    product = case.convolve(x, weight)
    magnitude = 10 + 10 * case.convolve(np.abs(x), np.abs(weight))
    bias, residual, scale = numbers((6,), 2), numbers((2, 6, 9, 19), 3), numbers((2, 6, 1, 1), 4)
    extras = [Operand.plain("float32", other.shape) for other in (bias, residual, scale)]
    epilogue = chain(("add", "e0"), ("silu",), ("add", "e1"), ("mul", "e2"), extras=3)
    activated = torch.nn.functional.silu(torch.tensor(product + bias[:, None, None])).numpy()
    problem = case.problem(product.shape, epilogue, extras)
    expected = (activated + residual) * scale
    check(problem, [x, weight, bias, residual, scale], expected, magnitude)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_special_values_stay_where_they_belong(value: float) -> None:
    for case in (CASES["3 x 3"], CASES["strided"], CASES["sequence"]):
        case.check_special(value)
