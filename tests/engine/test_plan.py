"""The memory plan against brute force, and against cases whose optimum is known."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.engine import plan as planner
from graphopt.engine.plan import ALIGNMENT, SLACK, Lifetime, MemoryPlan, plan_memory, verify_plan


@st.composite
def lifetimes(draw: st.DrawFn) -> list[Lifetime]:
    buffers = []
    for _ in range(draw(st.integers(0, 25))):
        first = draw(st.integers(0, 20))
        last = first + draw(st.integers(0, 6))
        buffers.append(Lifetime(draw(st.integers(0, 1000)), first, last))
    return buffers


def bytes_at(buffers: list[Lifetime], plan: MemoryPlan, step: int) -> list[int]:
    """Every byte that belongs to a buffer, or to the slack after it, at one step."""
    taken: list[int] = []
    for buffer, offset in zip(buffers, plan.offsets, strict=True):
        if buffer.size and buffer.first <= step <= buffer.last:
            taken += range(offset, offset + buffer.size + SLACK)
    return taken


@given(lifetimes())
def test_no_byte_has_two_owners(buffers: list[Lifetime]) -> None:
    plan = plan_memory(buffers)
    assert all(offset % ALIGNMENT == 0 for offset in plan.offsets)
    for step in range(28):
        taken = bytes_at(buffers, plan, step)
        assert len(taken) == len(set(taken))
        assert not taken or max(taken) < plan.size


@given(lifetimes())
def test_arena_is_between_its_bounds(buffers: list[Lifetime]) -> None:
    plan = plan_memory(buffers)
    padded = [-(-(b.size + SLACK) // ALIGNMENT) * ALIGNMENT if b.size else 0 for b in buffers]
    live = [
        sum(p for p, b in zip(padded, buffers, strict=True) if b.first <= step <= b.last)
        for step in range(28)
    ]
    assert plan.lower_bound == max(live)
    assert plan.lower_bound <= plan.size <= sum(padded)


@pytest.mark.parametrize("sizes", [[64] * 9, [1000, 64, 500, 64, 1000], [300, 200, 100]])
def test_chain_needs_its_largest_neighbours(sizes: list[int]) -> None:
    buffers = [Lifetime(size, i, i + 1) for i, size in enumerate(sizes)]
    plan = plan_memory(buffers)
    assert plan.size == plan.lower_bound


def test_same_lifetime_packs_without_gaps() -> None:
    plan = plan_memory([Lifetime(100 * i + 1, 0, 3) for i in range(10)])
    assert plan.size == plan.lower_bound


def test_disjoint_lifetimes_share_one_place() -> None:
    plan = plan_memory([Lifetime(128, i, i) for i in range(50)])
    assert set(plan.offsets) == {0}
    assert plan.size == 192


def test_best_gap_is_the_smallest_that_fits() -> None:
    # A tower of four at step 0, of which the second and fourth make room at step 1.
    tower = [Lifetime(1000, 0, 1), Lifetime(800, 0, 0), Lifetime(600, 0, 1), Lifetime(400, 0, 0)]
    plan = plan_memory([*tower, Lifetime(300, 1, 1), Lifetime(700, 1, 1)])
    assert plan.offsets[5] == plan.offsets[1]
    assert plan.offsets[4] == plan.offsets[3]
    assert plan.size == plan.lower_bound


def test_other_orders_where_the_largest_first_leaves_gaps() -> None:
    # The largest at the bottom would push the last, which outlives the others, above a gap.
    buffers = [Lifetime(200, 0, 0), Lifetime(100, 0, 1), Lifetime(300, 2, 5), Lifetime(100, 1, 3)]
    plan = plan_memory(buffers)
    assert plan.size == plan.lower_bound


def test_the_highest_goes_first_where_every_order_leaves_gaps() -> None:
    # Where the second is at the bottom, the third has to leave a gap that the last does not fit.
    buffers = [Lifetime(256, 0, 1), Lifetime(256, 4, 6), Lifetime(192, 3, 6), Lifetime(256, 1, 3)]
    plan = plan_memory(buffers)
    assert plan.size == plan.lower_bound


def test_empty_buffers_take_nothing() -> None:
    assert plan_memory([]).size == 0
    assert plan_memory([Lifetime(0, 0, 5)]) == MemoryPlan((0,), 0, 0)


@pytest.mark.parametrize("wrong", [Lifetime(-1, 0, 0), Lifetime(8, 3, 2)])
def test_impossible_lifetime_is_refused(wrong: Lifetime) -> None:
    with pytest.raises(ValueError, match="buffer 0"):
        plan_memory([wrong])


@given(lifetimes(), st.data())
def test_verifier_finds_every_overlap(buffers: list[Lifetime], data: st.DataObject) -> None:
    offsets = [data.draw(st.integers(0, 30)) * ALIGNMENT for _ in buffers]
    plan = MemoryPlan(tuple(offsets), 10**6, 0)
    overlapping = False
    for step in range(28):
        taken = bytes_at(buffers, plan, step)
        overlapping |= len(taken) != len(set(taken))
    if overlapping:
        with pytest.raises(RuntimeError, match="overlap"):
            verify_plan(buffers, plan)
    elif all(buffer.size % ALIGNMENT == 0 for buffer in buffers):
        verify_plan(buffers, plan)


def test_verifier_wants_alignment_and_the_arena() -> None:
    buffer = [Lifetime(64, 0, 0)]
    for plan in (MemoryPlan((32,), 256, 128), MemoryPlan((192,), 256, 128), MemoryPlan((), 0, 0)):
        with pytest.raises(RuntimeError):
            verify_plan(buffer, plan)


def test_planted_overlap_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "_greedy", lambda buffers, order: ([0] * len(buffers), 2**20))
    with pytest.raises(RuntimeError, match="buffers 0 and 1 overlap"):
        plan_memory([Lifetime(64, 0, 1), Lifetime(64, 1, 2)])
