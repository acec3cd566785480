"""Five thousand random shapes of int8 layers, many with the largest sums there are: bit for bit.

Code is generated per size of a depthwise kernel and per schedule of a sparse one, so both take few.
"""

from __future__ import annotations

import numpy as np
import pytest
from integer_layers import IntegerConvolution, ungrouped
from support import execute
from test_integer_matmul import check as check_linear

from graphopt.kernels.registry import candidates

SHAPES = 1000
"""In each of five parts."""


def random_convolution(random: np.random.Generator, seed: int) -> IntegerConvolution:
    def pair(low: int, high: int) -> tuple[int, int]:
        first, second = random.integers(low, high + 1, 2).tolist()
        return first, second

    kind = random.choice(["single pixels", "window", "depthwise", "groups", "sparse"])
    kernel = {"single pixels": (1, 1), "depthwise": (3, 3)}.get(kind) or pair(1, 3)
    dilation, padding = pair(1, 2), (pair(0, 2), pair(0, 2))
    stride = pair(1, 2) if kind == "depthwise" else pair(1, 3)
    size = [
        reach * (k - 1) + 1 + int(random.integers(16))
        for k, reach in zip(kernel, dilation, strict=True)
    ]
    groups = int(random.integers(1, 10)) if kind in ("depthwise", "groups") else 1
    channels = groups if kind == "depthwise" else groups * int(random.integers(1, 24))
    outputs = groups if kind == "depthwise" else groups * int(random.integers(1, 16))
    finish = random.choice(["bytes", "residual", "floating"])
    return IntegerConvolution(
        (int(random.integers(1, 3)), channels, size[0], size[1]),
        outputs,
        kernel,
        stride,
        padding,
        dilation,
        groups,
        residual=finish == "residual" and kind != "sparse",
        floating=finish == "floating" and kind != "sparse",
        extreme=bool(random.random() < 0.4),
        density=0.3 if kind == "sparse" else 1.0,
        block=int(random.choice([1, 2, 4])),
        seed=seed,
    )


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_convolutions(part: int) -> None:
    random = np.random.default_rng(part)
    for number in range(SHAPES):
        case = random_convolution(random, SHAPES * part + number)
        problem, inputs, expected = case.case()
        for candidate in candidates(problem):
            (result,) = execute(candidate, inputs, threads=1 + number % 2)
            own = result if case.floating else ungrouped(result, expected.shape)
            np.testing.assert_array_equal(own, expected, f"{candidate.kernel}: {case}")


@pytest.mark.slow
def test_linear_layers() -> None:
    random = np.random.default_rng(4)
    for _ in range(SHAPES):
        rows, depth, outputs = random.integers(1, [40, 200, 150]).tolist()
        floating, extreme, is_sparse = (random.random(3) < 0.5).tolist()
        if is_sparse:
            depth, outputs = 4 * -(-depth // 4), 4 * -(-outputs // 4)
        density, block = 0.3 if is_sparse else 1.0, int(random.choice([1, 2, 4]))
        check_linear((rows,), depth, outputs, floating, extreme, density=density, block=block)
