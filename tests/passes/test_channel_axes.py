"""What a reshape makes of a row of channels, against the elements themselves."""

from __future__ import annotations

from math import prod

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from graphopt.passes.pruning.axes import Axis, kept_ranges, pieces

SIZES = st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4)


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[list[int], int, list[int]]:
    """A shape, one of its dimensions, and another shape of as many elements."""
    shape = draw(SIZES)
    left, result = prod(shape), []
    while left > 1 and draw(st.booleans()):
        divisors = [d for d in range(1, left + 1) if left % d == 0]
        result.append(draw(st.sampled_from(divisors)))
        left //= result[-1]
    return shape, draw(st.integers(0, len(shape) - 1)), [*result, left]


def channel_of_elements(axis: Axis, before: int, after: int) -> np.ndarray:
    flat = axis.flat()
    assert flat is not None
    return np.broadcast_to(flat[None, :, None], (before, len(flat), after)).reshape(-1)


@given(reshapes(), st.sampled_from([(1, 1), (2, 1), (1, 3)]))
def test_pieces_say_where_the_channels_are(
    case: tuple[list[int], int, list[int]], repeats: tuple[int, int]
) -> None:
    shape, place, result = case
    outer, inner = repeats
    count = shape[place]
    axis = Axis((outer,), np.arange(count), (inner,))
    shape = [*shape[:place], outer * count * inner, *shape[place + 1 :]]
    result = [result[0] * outer * inner, *result[1:]]
    before, after = prod(shape[:place]), prod(shape[place + 1 :])
    channels = channel_of_elements(axis, before, after)
    found = pieces(axis, (after,), [result])
    if found is None:
        return
    indices = np.indices(result).reshape(len(result), -1)
    assert prod(piece.size for piece in found) == count
    for piece in found:
        index = indices[piece.dimension]
        assert result[piece.dimension] == piece.outer[0] * piece.size * piece.inner[0]
        inside = index // piece.inner[0] % piece.size
        assert (inside == piece.coordinates(count)[channels]).all()


def test_splitting_and_merging_whole_dimensions_is_always_understood() -> None:
    row = Axis((1, 1), np.arange(12), (1, 1))
    assert pieces(row, (5, 5), [(2, 12, 5), (3, 12, 5)]) is not None
    split = pieces(row, (5, 5), [(2, 3, 4, 5), (3, 3, 4, 5)])
    assert split is not None
    assert [(p.dimension, p.size, p.stride) for p in split] == [(1, 3, 4), (2, 4, 1)]
    merged = pieces(row, (5, 5), [(2 * 12, 5), (3 * 12, 5)])
    assert merged is not None
    assert [(p.dimension, p.outer) for p in merged] == [(0, (2, 3))]


def test_channels_that_fall_between_indices_are_not_understood() -> None:
    row = Axis((1,), np.arange(6), (1,))
    assert pieces(row, (1,), [(4, 3)]) is not None  # two rows of six are four halves
    assert pieces(row, (1,), [(3, 4)]) is None
    assert pieces(row, (2,), [(3, 4)]) is not None  # a pair of each channel
    assert pieces(row, (3,), [(9, 4)]) is None


def test_a_split_that_depends_on_a_free_size_is_not_understood() -> None:
    row = Axis((1, 1), np.arange(12), (1, 1))
    assert pieces(row, (1, 1), [(2, 12), (3, 8)]) is None


def test_kept_ranges() -> None:
    kept = np.array([True, False, True, True, False, False, True])
    assert list(kept_ranges(kept, [2, 4, 1])) == [1, 2, 1]
