"""Streams of non-zeros, read back by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layers import pruned

from graphopt.kernels.nonzeros import Schedule, pack_streams, schedules
from graphopt.kernels.simd import LANES
from graphopt.kernels.stream import MOST_STEPS, VECTOR_BYTES
from graphopt.kernels.zeros import zero_pattern


@pytest.mark.skipif(LANES != 16, reason="shorter vectors have no tails")
@given(st.sampled_from([1, 2, 4]), st.integers(1, 9), st.integers(1, 99), st.sampled_from([4, 8]))
def test_rows_of_a_tail(rows: int, width: int, depth: int, tail: int) -> None:
    schedule = Schedule(rows, width, depth, tail)
    places = np.arange(depth) * schedule.tail_step
    np.testing.assert_array_equal(places // 64, (places + 4 * tail - 1) // 64, "one cache line")
    assert schedule.tail_start + places[-1] + VECTOR_BYTES <= schedule.panel_bytes


def test_steps_have_16_bits() -> None:
    zeros = zero_pattern(pruned((4, 70000), 0.1))
    assert zeros is not None
    found = list(schedules(zeros, 70000, 64))
    assert 35000 in {one.depth for one in found}
    assert max(one.depth for one in found) <= MOST_STEPS
    assert not list(schedules(zeros, 70000, 64, unit=70000))
    with pytest.raises(ValueError, match="70000 steps"):
        pack_streams([np.ones((1, 70000), np.float32)], Schedule(1, 4, 70000), 1)


def read_back(words: np.ndarray, start: int, schedule: Schedule, matrix: np.ndarray) -> list[int]:
    """Add what a stream holds to ``matrix``; the row groups that it has, in order."""
    place, seen, longest = start // 4, [], 2**30
    while words[place + 1]:
        twos, members = words[place : place + 2]
        assert twos < longest, "runs are sorted, and each length has one"
        longest, place = twos, place + 2
        for _ in range(members):
            seen.append(int(words[place]))
            place += 1
            first = seen[-1] * schedule.rows
            rows = matrix[first : first + schedule.rows]
            for count in [4] * (twos // 2) + [2] * (twos % 2):
                # The numbers of two columns are in a word.
                weights = place + count // 2
                columns = words[place:weights].view(np.uint16)
                place = weights + count * schedule.rows
                values = words[weights:place].view(np.float32).reshape(-1, count)
                np.add.at(rows, (slice(None), columns), values[: len(rows)])
    return seen


@given(
    st.integers(1, 40),
    st.integers(1, 20),
    st.integers(1, 9),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([0.0, 0.2, 1.0]),
    st.integers(1, 5),
)
def test_streams_hold_the_weight(
    outputs: int, depth: int, block: int, rows: int, density: float, parts: int
) -> None:
    schedule = Schedule(rows, 3, block)
    count = schedule.row_groups(outputs)
    parts = min(parts, count)
    weight = pruned((outputs, depth), density)
    blocks = [weight[:, first : first + block] for first in range(0, depth, block)]
    starts, words = pack_streams(blocks, schedule, parts)
    assert starts.shape == (len(blocks) * parts,)
    found = np.zeros_like(weight)
    for number in range(len(blocks)):
        for part in range(parts):
            columns = found[:, number * block : (number + 1) * block]
            seen = read_back(words, starts[number * parts + part], schedule, columns)
            assert sorted(seen) == list(range(part * count // parts, (part + 1) * count // parts))
    np.testing.assert_array_equal(found, weight)
