"""Chains of convolutions in bands of rows, against torch in float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import Convolution, chain, check, constant, numbers, pruned, with_padded
from support import execute

from graphopt.kernels import convolution_chain
from graphopt.kernels.convolution import ConvolutionCandidate
from graphopt.kernels.convolution_chain import ChainCandidate
from graphopt.kernels.direct_convolution import DirectCandidate
from graphopt.kernels.operand import Operand
from graphopt.kernels.problem import ConvolutionChainProblem, ConvolutionProblem
from graphopt.kernels.registry import candidates
from graphopt.kernels.simd import LANES
from graphopt.kernels.tile import TILES
from graphopt.kernels.zeros import zero_pattern


@dataclass(frozen=True)
class Block:
    """Convolutions with a bias and, but the last one, a relu; what follows may be added to it."""

    convolutions: tuple[Convolution, ...]
    density: float = 1.0
    residual: bool = False

    @property
    def weights(self) -> list[np.ndarray]:
        return [
            pruned(one.weight, self.density if one.groups == 1 else 1.0, seed=1 + place)
            for place, one in enumerate(self.convolutions)
        ]

    def problems(self) -> tuple[list[ConvolutionProblem], list[np.ndarray]]:
        """The problems, and the inputs of their chain."""
        problems, inputs = [], [numbers(self.convolutions[0].x)]
        for place, (one, weight) in enumerate(zip(self.convolutions, self.weights, strict=True)):
            last = place + 1 == len(self.convolutions)
            y = one.convolve(np.zeros(one.x), weight).shape
            inputs += [weight, numbers(y[1:2], 20 + place)]
            extras = [constant(y[1:2])]
            steps = [("add", "e0")] if last else [("add", "e0"), ("relu",)]
            if last and self.residual:
                steps.append(("add", "e1"))
                extras.append(Operand.plain("float32", y))
                inputs.append(numbers(y, 30))
            epilogue = chain(*steps, extras=len(extras))
            problems.append(one.problem(y, epilogue, extras, zero_pattern(weight)))
        return problems, inputs

    def results(self, inputs: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """What torch computes, and the magnitude of what is summed up for it."""
        given = iter(inputs)
        y = next(given).astype(np.float64)
        magnitude = np.abs(y)
        for place, one in enumerate(self.convolutions):
            weight, bias = next(given), next(given).reshape(-1, 1, 1)
            y = one.convolve(y, weight) + bias
            magnitude = one.convolve(magnitude, np.abs(weight)) + np.abs(bias)
            if place + 1 < len(self.convolutions):
                y = np.maximum(y, 0)
        if self.residual:
            residual = next(given)
            y, magnitude = y + residual, magnitude + np.abs(residual)
        return y, magnitude

    def check(self) -> list[ChainCandidate]:
        """Check all candidates, which are returned."""
        problems, inputs = self.problems()
        problem = ConvolutionChainProblem.of(problems)
        assert problem.convolutions == tuple(problems)
        found = chain_candidates(problem)
        assert found
        # Each convolution adds its own roundings.
        y, magnitude = self.results(inputs)
        check(problem, inputs, y, len(problems) * magnitude)
        return found


def chain_candidates(problem: ConvolutionChainProblem) -> list[ChainCandidate]:
    return [one for one in candidates(problem) if isinstance(one, ChainCandidate)]


def inverted_residual(
    channels: tuple[int, int, int],
    size: tuple[int, int],
    kernel: int = 3,
    stride: int = 1,
    density: float = 1.0,
    residual: bool = False,
) -> Block:
    """Expand, depthwise, project, with so many channels before, between and after."""
    first, inside, last = channels
    out_size = tuple((one - 1) // stride + 1 for one in size)
    sides = ((kernel // 2, kernel // 2),) * 2
    expand = Convolution((1, first, *size), inside, (1, 1))
    depthwise = Convolution(
        (1, inside, *size), inside, (kernel, kernel), (stride, stride), sides, groups=inside
    )
    project = Convolution((1, inside, *out_size), last, (1, 1))
    return Block((expand, depthwise, project), density, residual)


@contextmanager
def bands_of(size: int) -> Iterator[None]:
    """Meanwhile bands have so many bytes between their convolutions, or are a row high."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution_chain, "_BETWEEN", (size,))
        convolution_chain._candidates.cache_clear()
        yield
    convolution_chain._candidates.cache_clear()


@pytest.fixture(params=[1, 2**14, 2**20], ids=["a row", "some rows", "many rows"])
def _bytes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Bands of several heights."""
    with bands_of(request.param):
        yield


BLOCKS = {
    "wide": inverted_residual((5, 13, 9), (12, 4 * LANES), residual=True),
    "narrow": inverted_residual((8, 24, 8), (14, 14), residual=True),
    "stride 2": inverted_residual((5, 13, 9), (28, 2 * LANES + 3), stride=2),
    "odd size, stride 2": inverted_residual((3, 8, 4), (13, 29), stride=2),
    "5x5": inverted_residual((5, 13, 9), (14, 3 * LANES + 1), kernel=5),
    "5x5, stride 2": inverted_residual((5, 13, 9), (24, 33), kernel=5, stride=2),
    "prime height": inverted_residual((5, 13, 9), (7, 7)),
    "sparse": inverted_residual((24, 64, 40), (14, 14), density=0.2, residual=True),
    "sparse, stride 2": inverted_residual((24, 64, 40), (28, 28), stride=2, density=0.1),
    "first layer": Block(
        (
            Convolution((1, 3, 24, 40), 16, (3, 3), (2, 2), ((1, 1), (1, 1))),
            Convolution((1, 16, 12, 20), 16, (3, 3), (1, 1), ((1, 1), (1, 1)), groups=16),
            Convolution((1, 16, 12, 20), 8, (1, 1)),
        )
    ),
    "no expansion": Block(
        (
            Convolution((1, 16, 12, 20), 16, (3, 3), (1, 1), ((1, 1), (1, 1)), groups=16),
            Convolution((1, 16, 12, 20), 8, (1, 1)),
        )
    ),
    "dilated": Block(
        (
            Convolution((1, 5, 16, 20), 12, (1, 1)),
            Convolution((1, 12, 16, 20), 12, (3, 3), (1, 1), ((2, 2), (2, 2)), (2, 2), groups=12),
        )
    ),
    "padding on one side": Block(
        (
            Convolution((1, 5, 16, 20), 12, (1, 1)),
            Convolution((1, 12, 16, 20), 12, (3, 3), (2, 2), ((0, 1), (0, 1)), groups=12),
            Convolution((1, 12, 8, 10), 7, (1, 1)),
        )
    ),
    "bottleneck": Block(
        (
            Convolution((1, 12, 12, 18), 8, (1, 1)),
            Convolution((1, 8, 12, 18), 8, (3, 3), (1, 1), ((1, 1), (1, 1))),
            Convolution((1, 8, 12, 18), 12, (1, 1)),
        ),
        residual=True,
    ),
}


@pytest.mark.usefixtures("_bytes")
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name: str) -> None:
    BLOCKS[name].check()


@settings(max_examples=settings().max_examples // 4)
@given(st.data())
def test_any_block(data: st.DataObject) -> None:
    number = st.integers(1, 20)
    block = inverted_residual(
        data.draw(st.tuples(number, st.integers(2, 20), number)),
        data.draw(st.tuples(st.integers(2, 24), st.integers(1, 40))),
        data.draw(st.sampled_from((3, 5))),
        data.draw(st.sampled_from((1, 2))),
        data.draw(st.sampled_from((1.0, 0.2))),
        data.draw(st.booleans()),
    )
    with bands_of(data.draw(st.sampled_from((1, 2**14)))):
        problems, inputs = block.problems()
        problem = ConvolutionChainProblem.of(problems)
        found = chain_candidates(problem)
        rows = problem.outputs[0].shape[2]
        assert bool(found) is (rows > 1)
        y, magnitude = block.results(inputs)
        for one in found:
            check(problem, inputs, y, len(problems) * magnitude, found=[one])


@pytest.mark.usefixtures("_bytes")
@pytest.mark.parametrize("places", [(0,), (-1,), (0, -1)])
def test_padded_planes(places: tuple[int, ...]) -> None:
    block = inverted_residual((8, 24, 8), (14, 14), residual=True)
    problems, inputs = block.problems()
    problems[0] = with_padded(problems[0], [place for place in places if place == 0])
    # The residual is what came in, so it lies as that does.
    last = [3] * (0 in places) + [-1] * (-1 in places)
    problems[-1] = with_padded(problems[-1], last)
    problem = ConvolutionChainProblem.of(problems)
    y, magnitude = block.results(inputs)
    check(problem, inputs, y, len(problems) * magnitude, found=chain_candidates(problem))


@pytest.mark.usefixtures("_bytes")
@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_special_values_stay_where_they_belong(value: float) -> None:
    # Nothing of a band, nor of what another one left in a thread's memory, reaches the next.
    block = inverted_residual((4, 8, 4), (12, 20))
    problems, inputs = block.problems()
    problem = ConvolutionChainProblem.of(problems)
    x = inputs[0]
    x[0, 2, 5, 7] = value
    # The relu of a NaN is one, that of minus infinity is 0.
    inputs[1] = np.abs(inputs[1])
    with np.errstate(invalid="ignore"):
        y, _ = block.results(inputs)
    assert 0 < np.isfinite(y).sum() < y.size
    _, magnitude = block.results([np.nan_to_num(x, posinf=0), *inputs[1:]])
    check(problem, inputs, y, len(problems) * magnitude, found=chain_candidates(problem))


def test_the_same_for_every_team() -> None:
    problems, inputs = BLOCKS["sparse"].problems()
    for one in chain_candidates(ConvolutionChainProblem.of(problems)):
        (alone,) = execute(one, inputs, 1)
        for threads in (2, 3, 5):
            (result,) = execute(one, inputs, threads)
            np.testing.assert_array_equal(result, alone)


def test_kernels_of_other_families_pack_otherwise() -> None:
    # Each describes what it packs by its tile.
    problems, _ = inverted_residual((24, 96, 24), (14, 4 * LANES)).problems()
    first = chain_candidates(ConvolutionChainProblem.of(problems))[0]
    packings = set()
    for kind in (ConvolutionCandidate, DirectCandidate):
        expand = [
            next(
                one
                for one in candidates(band[0].problem)
                if isinstance(one, kind) and one.tile == TILES[0]
            )
            for band in first.bands
        ]
        packings.add(replace(first, stages=(tuple(expand), *first.stages[1:])).packing())
    assert len(packings) == 2


def test_bands_have_all_rows_once_and_what_these_need() -> None:
    problems, _ = inverted_residual((5, 13, 9), (28, 20), kernel=5, stride=2).problems()
    for one in chain_candidates(ConvolutionChainProblem.of(problems)):
        rows = [band[-1].out_rows for band in one.bands]
        assert [row for first, last in rows for row in range(first, last)] == list(range(14))
        for expand, depthwise, project in one.bands:
            assert expand.out_rows == depthwise.rows
            assert depthwise.out_rows == project.rows
            first, last = depthwise.out_rows
            needed = {2 * row + tap - 2 for row in range(first, last) for tap in range(5)}
            inside = sorted(needed & set(range(28)))
            assert depthwise.rows == (inside[0], inside[-1] + 1)


def test_what_is_left_to_others() -> None:
    problems, _ = inverted_residual((5, 13, 9), (12, 20)).problems()
    assert not candidates(ConvolutionChainProblem.of(problems[:1]))
    flat, _ = inverted_residual((5, 13, 9), (1, 20)).problems()
    assert not candidates(ConvolutionChainProblem.of(flat))
    # Several images: a batch is computed in parts.
    images = [replace(one, x=(2, *one.x[1:])) for one in BLOCKS["no expansion"].convolutions]
    several, _ = Block(tuple(images)).problems()
    assert not candidates(ConvolutionChainProblem.of(several))
    # A window that has no row of the image.
    beyond = Convolution((1, 12, 9, 20), 12, (3, 3), (1, 1), ((3, 3), (1, 1)), groups=12)
    outside, _ = Block((Convolution((1, 5, 9, 20), 12, (1, 1)), beyond)).problems()
    assert not candidates(ConvolutionChainProblem.of(outside))


def test_convolutions_that_do_not_follow_one_another() -> None:
    problems, _ = inverted_residual((5, 13, 9), (12, 20)).problems()
    with pytest.raises(ValueError, match="is followed by"):
        ConvolutionChainProblem.of([problems[0], problems[2], problems[1]])
