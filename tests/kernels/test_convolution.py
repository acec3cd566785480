"""Convolutions against torch in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import Convolution, chain, check, numbers, of_kind
from support import execute

from graphopt.kernels.convolution import ConvolutionCandidate
from graphopt.kernels.operand import Layout, Operand
from graphopt.kernels.registry import Candidate, candidates
from graphopt.kernels.simd import LANES
from graphopt.kernels.tile import TILES

HEIGHT, WIDTH = TILES[0].height, TILES[0].width


SAME = ((1, 1), (1, 1))
CASES = {
    "one": Convolution((1, 1, 1, 1), 1, (1, 1)),
    "point": Convolution((2, 5, 7, 7), 11, (1, 1)),
    "point, whole tiles": Convolution((1, 3, 4, 4 * LANES), 2 * HEIGHT, (1, 1)),
    "point, a pixel more": Convolution((1, 3, 1, WIDTH * LANES + 1), HEIGHT + 1, (1, 1)),
    "point, a pixel less": Convolution((1, 3, 1, WIDTH * LANES - 1), HEIGHT - 1, (1, 1)),
    "point, padded": Convolution((1, 3, 5, 6), 4, (1, 1), padding=((0, 2), (1, 0))),
    "point, padded below": Convolution((1, 3, 5, 6), 4, (1, 1), padding=((0, 2), (0, 0))),
    "point, strided": Convolution((1, 3, 9, 2 * LANES + 5), 4, (1, 1), stride=(2, 2)),
    "3 x 3": Convolution((2, 3, 9, 10), 8, (3, 3), padding=SAME),
    "3 x 3, rows of vectors": Convolution((1, 3, 4, 3 * LANES), 8, (3, 3), padding=SAME),
    "3 x 3, one pixel": Convolution((1, 3, 1, 1), 8, (3, 3), padding=SAME),
    "3 x 3, strided": Convolution((1, 4, 15, 3 * LANES), 9, (3, 3), stride=(2, 2), padding=SAME),
    "3 x 3, stride 3": Convolution((1, 2, 15, 4 * LANES), 3, (3, 3), stride=(1, 3), padding=SAME),
    "7 x 7": Convolution((1, 3, 31, 30), 5, (7, 7), stride=(2, 2), padding=((3, 3), (3, 3))),
    "patches": Convolution((1, 3, 32, 48), 10, (16, 16), stride=(16, 16)),
    "one row": Convolution((1, 3, 5, 40), 6, (1, 7), padding=((0, 0), (3, 3))),
    "one column": Convolution((1, 3, 40, 5), 6, (7, 1), padding=((3, 3), (0, 0))),
    "same as TensorFlow": Convolution(
        (1, 3, 8, 8), 6, (3, 3), stride=(2, 2), padding=((0, 1), (0, 1))
    ),
    "dilated": Convolution((1, 3, 13, 17), 4, (3, 3), padding=((2, 2), (3, 3)), dilation=(2, 3)),
    "more padding than image": Convolution((1, 2, 3, 2), 3, (5, 5), padding=((9, 4), (4, 9))),
    "grouped": Convolution((2, 12, 6, 5), 15, (3, 3), padding=SAME, groups=3),
    "a group per channel": Convolution((1, 6, 6, 5), 6, (3, 3), padding=SAME, groups=6),
    "deep": Convolution((1, 530, 3, 3), 9, (3, 3), padding=SAME),
    "sequence": Convolution((2, 4, 50), 6, (5,), padding=((4, 0),)),
    "sequence, strided": Convolution(
        (2, 4, 50), 6, (5,), stride=(4,), padding=((2, 2),), dilation=(2,)
    ),
    "image of one pixel": Convolution((3, 40, 1, 1), 70, (1, 1)),
    "as large as the kernel": Convolution((2, 5, 4, 3), 2 * LANES + 1, (4, 3)),
    "kernel wider than its image": Convolution((1, 3, 2, 2), 4, (2, 2), (4, 4), ((1, 1), (1, 1))),
    "stride and padding that leave the size": Convolution(
        (1, 3, 1, 64), 8, (1, 1), (1, 2), ((0, 0), (0, 64))
    ),
    "dilated, as many pixels as taps": Convolution(
        (1, 2, 1, 2), 4, (1, 2), (1, 1), ((0, 0), (0, 2)), (1, 3)
    ),
    "sequence as long as the kernel": Convolution((2, 3, 6), 5, (6,)),
    "no image": Convolution((0, 4, 5, 5), 6, (3, 3)),
}


@pytest.mark.parametrize("name", CASES)
def test_shapes(name: str) -> None:
    CASES[name].check()


@pytest.mark.parametrize("places", [(0, -1), (0,), (-1,)])
@pytest.mark.parametrize("name", sorted(set(CASES) - {"no image"}))
def test_padded_planes(name: str, places: tuple[int, ...]) -> None:
    CASES[name].check(places=places)


@st.composite
def cases(draw: st.DrawFn) -> Convolution:
    groups = draw(st.integers(1, 3))

    def pair(low: int, high: int) -> tuple[int, int]:
        return (draw(st.integers(low, high)), draw(st.integers(low, high)))

    kernel, dilation, padding = pair(1, 4), pair(1, 3), (pair(0, 3), pair(0, 3))
    spatial = tuple(
        max(1, draw(st.integers(1, 25)), reach * (size - 1) + 1 - sum(around))
        for size, reach, around in zip(kernel, dilation, padding, strict=True)
    )
    x = (draw(st.integers(1, 2)), groups * draw(st.integers(1, 20)), *spatial)
    outputs = groups * draw(st.integers(1, 20))
    return Convolution(x, outputs, kernel, pair(1, 4), padding, dilation, groups)


@given(cases())
def test_any_shape(case: Convolution) -> None:
    case.check()


POINT = Convolution((2, 5, 3, 7), 11, (1, 1))
EPILOGUES = {
    "bias": (chain(("add", "e0"), extras=1), [(11,)]),
    "bias, relu": (chain(("add", "e0"), ("relu",), extras=1), [(11,)]),
    "bias, residual, relu": (
        chain(("add", "e0"), ("add", "e1"), ("relu",), extras=2),
        [(11,), (2, 11, 3, 7)],
    ),
    "scale per image": (chain(("mul", "e0"), ("silu",), extras=1), [(2, 11, 1, 1)]),
    "one residual for all images": (chain(("sub", "e0"), extras=1), [(1, 11, 3, 7)]),
    "scalar": (chain(("mul", "e0"), extras=1), [()]),
    "clamp": (chain(("clamp", -0.5, 1.5)), []),
}


def check_epilogue(name: str, case: Convolution, kind: type[Candidate]) -> None:
    """Candidates of a kind make of an epilogue what the packed kernels, tested here, make of it."""
    epilogue, shapes = EPILOGUES[name]
    x, weight = numbers(case.x), numbers(case.weight, 1)
    product = case.convolve(x, weight)
    size = product.shape[2:]
    shapes = [(*shape[:2], *size) if shape[2:] == (3, 7) else shape for shape in shapes]
    inputs = [x, weight, *(numbers(shape, 2 + index) for index, shape in enumerate(shapes))]
    extras = [Operand.plain("float32", shape) for shape in shapes]
    problem = case.problem(product.shape, epilogue, extras)
    (expected,) = execute(of_kind(problem, ConvolutionCandidate)[0], inputs)
    magnitude = 20 * (1 + case.convolve(np.abs(x), np.abs(weight)))
    check(problem, inputs, expected, magnitude, found=of_kind(problem, kind))


@pytest.mark.parametrize("name", EPILOGUES)
@pytest.mark.parametrize("case", [POINT, Convolution((2, 150, 3, 7), 11, (3, 3), padding=SAME)])
def test_epilogues(name: str, case: Convolution) -> None:
    epilogue, shapes = EPILOGUES[name]
    x, weight = numbers(case.x), numbers(case.weight, 1)
    others = [numbers(shape, 2 + index) for index, shape in enumerate(shapes)]
    product = torch.tensor(case.convolve(x, weight))
    result = product
    for step in epilogue.instructions:
        operands = []
        for operand in step.operands[1:]:
            if isinstance(operand, float):
                operands.append(operand)
                continue
            other = torch.tensor(others[operand.index - 1]).double()
            operands.append(other[:, None, None] if other.dim() == 1 else other)
        function = getattr(torch.nn.functional, step.op, None) or getattr(torch, step.op)
        result = function(result, *operands)
    magnitude = 10 * (1 + case.convolve(np.abs(x), np.abs(weight)))
    extras = [Operand.plain("float32", shape) for shape in shapes]
    problem = case.problem(tuple(product.shape), epilogue, extras)
    check(problem, [x, weight, *others], result.numpy(), magnitude)


def test_epilogues_of_one_pixel() -> None:
    case = Convolution((2, 40, 1, 1), 11, (1, 1))
    x, weight = numbers(case.x), numbers(case.weight, 1)
    bias, scale, residual = numbers((11,), 2), numbers((11, 1, 1), 3), numbers((2, 11, 1, 1), 4)
    product = case.convolve(x, weight)
    expected = (product + bias[:, None, None]) * scale + residual
    epilogue = chain(("add", "e0"), ("mul", "e1"), ("add", "e2"), extras=3)
    extras = [Operand.plain("float32", other.shape) for other in (bias, scale, residual)]
    problem = case.problem(product.shape, epilogue, extras)
    magnitude = 10 * (1 + case.convolve(np.abs(x), np.abs(weight)))
    check(problem, [x, weight, bias, scale, residual], expected, magnitude)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_special_values_stay_where_they_belong(value: float) -> None:
    for case in (POINT, CASES["3 x 3"], CASES["3 x 3, strided"], CASES["patches"]):
        case.check_special(value)


def test_accuracy_is_that_of_torch() -> None:
    case = Convolution((1, 512, 7, 7), 32, (3, 3), padding=SAME)
    x, weight = numbers(case.x), numbers(case.weight, 1)
    exact = case.convolve(x, weight)
    theirs = torch.conv2d(torch.tensor(x), torch.tensor(weight), padding=1).numpy()
    for candidate in candidates(case.problem(exact.shape)):
        (result,) = execute(candidate, [x, weight])
        assert np.abs(result - exact).mean() < 2 * np.abs(theirs - exact).mean()


def test_what_is_left_to_others() -> None:
    case = CASES["3 x 3"]
    shape = (2, 8, 9, 10)
    rounded = chain(("add", "e0"), extras=1)
    last = Operand(shape, Layout("float32", (0, 2, 3, 1)))
    varying_rows = Operand.plain("float32", (9, 1))
    assert candidates(case.problem(shape))
    assert not candidates(case.problem(shape, chain(("no such operator",))))
    assert not candidates(case.problem(shape, rounded, [last]))
    assert not candidates(case.problem(shape, rounded, [varying_rows]))


def test_malformed_problems_are_refused() -> None:
    case = CASES["3 x 3"]
    with pytest.raises(ValueError, match="should be"):
        candidates(case.problem((2, 8, 9, 9)))
    with pytest.raises(ValueError, match="dtypes"):
        candidates(case.problem((2, 8, 9, 10), chain(("add", "e0"), extras=1)))
    with pytest.raises(ValueError, match="divide"):
        candidates(
            Convolution((2, 3, 9, 10), 8, (3, 3), padding=SAME, groups=2).problem((2, 8, 9, 10))
        )
