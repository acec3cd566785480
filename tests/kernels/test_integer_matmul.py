"""Linear layers of bytes, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from integer_layers import Numbers, constant, requantized
from support import execute

from graphopt.kernels.integer_problems import IntegerMatmulProblem
from graphopt.kernels.operand import Operand
from graphopt.kernels.registry import Candidate, candidates

SETTINGS = [(1, True, 0), (2, False, 0), (3, True, 0)]


def check(
    rows: tuple[int, ...],
    depth: int,
    outputs: int,
    floating: bool,
    extreme: bool = False,
    halves: bool = False,
    density: float = 1.0,
    block: int = 1,
    choose: Callable[[list[Candidate]], list[Candidate]] = lambda found: found,
) -> None:
    """Every chosen candidate gives the exact result. Blocks of ``block`` x 4 weights are zero but
    for a share ``density``."""
    random = np.random.default_rng(depth)
    x = random.integers(0, 256, (*rows, depth), np.uint8)
    weight = random.integers(-127, 128, (outputs, depth), np.int8)
    if extreme:
        x[...], weight[...] = 255, np.sign(weight) * 127
    kept = random.random((-(-outputs // block), -(-depth // 4))) < density
    weight *= kept.repeat(block, 0)[:outputs].repeat(4, 1)[:, :depth]
    bias = random.integers(-20000, 20000, outputs).astype(np.int32)
    multiplier = (random.uniform(0.2, 1.5, outputs) / (100 * depth**0.5)).astype(np.float32)
    if halves:
        weight, bias[...], multiplier[...] = np.sign(weight), 0, 0.5
    numbers = Numbers(77, 130, 4, 240)
    sums = (x.astype(np.int64) - 77) @ weight.T.astype(np.int64) + bias
    flat = sums.reshape(-1, outputs).astype(np.int32)
    expected = requantized(flat, multiplier, numbers, floating=floating).reshape(sums.shape)
    constants = [weight, multiplier, bias, numbers.array]
    problem = IntegerMatmulProblem(
        (Operand.plain("uint8", x.shape), *map(constant, constants)),
        (Operand.plain("float32" if floating else "uint8", expected.shape),),
    )
    chosen = choose(candidates(problem))
    assert chosen
    for candidate in chosen:
        for setting in SETTINGS:
            (result,) = execute(candidate, [x, *constants], *setting)
            np.testing.assert_array_equal(result, expected, candidate.kernel)


@pytest.mark.parametrize("floating", [True, False])
@pytest.mark.parametrize("rows", [(1,), (3,), (4,), (2, 5), (9,)])
@pytest.mark.parametrize(("depth", "outputs"), [(4, 16), (7, 3), (130, 65), (1, 1), (64, 200)])
def test_sizes(rows: tuple[int, ...], depth: int, outputs: int, floating: bool) -> None:
    check(rows, depth, outputs, floating)


def test_nothing_saturates_in_between() -> None:
    check((5,), 1000, 40, floating=True, extreme=True)


def test_halves_round_to_even() -> None:
    check((5,), 20, 70, floating=False, halves=True)


@settings(max_examples=50)
@given(st.integers(1, 12), st.integers(1, 300), st.integers(1, 150), st.booleans(), st.booleans())
def test_any_linear(rows: int, depth: int, outputs: int, floating: bool, extreme: bool) -> None:
    check((rows,), depth, outputs, floating, extreme)
