"""Patterns of zeros, against selection by brute force."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from graphopt.errors import PassError
from graphopt.passes.pruning.granularity import Blocks, Pattern, nearest, parse_granularity

EVERYTHING = torch.ones(1, 1, 1, 1, dtype=torch.bool)


def random_scores(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def all_of(scores: Tensor) -> Tensor:
    return EVERYTHING.expand(scores.shape)


@pytest.mark.parametrize(
    ("text", "parsed"),
    [("unstructured", Blocks(1, 1)), ("1x4", Blocks(1, 4)), ("4x4", Blocks(4, 4)),
     ("2:4", Pattern(2, 4)), ("1:16", Pattern(1, 16))],
)  # fmt: skip
def test_names(text: str, parsed: object) -> None:
    assert parse_granularity(text) == parsed
    assert str(parsed) == text


@pytest.mark.parametrize("text", ["4:4", "0:4", "5:4", "0x4", "2x0", "x4", "blocks", "1x4 ", ""])
def test_names_that_mean_nothing(text: str) -> None:
    with pytest.raises(PassError, match="granularity"):
        parse_granularity(text)


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 4), (4, 8), (3, 5)])
def test_a_pattern_keeps_the_best_n_of_every_m(n: int, m: int) -> None:
    scores = random_scores(2, 3, 2 * m, 4)
    mask = Pattern(n, m).mask(scores, all_of(scores), 0.5)
    for g, o, k, t in itertools.product(range(2), range(3), range(2), range(4)):
        kept, own = (x[g, o, k * m : (k + 1) * m, t] for x in (mask, scores))
        best = max(itertools.combinations(range(m), n), key=lambda places: own[list(places)].sum())
        assert kept.nonzero().flatten().tolist() == list(best)


def test_a_pattern_fills_up_its_last_group_and_counts_what_is_zero_already() -> None:
    scores = random_scores(1, 1, 6, 1)
    mask = Pattern(1, 4).mask(scores, all_of(scores), 0.75).flatten()
    assert mask[:4].sum() == 1
    assert mask[4:].sum() == 1
    zero = scores.clone()
    zero[0, 0, int(scores[0, 0, :4].argmax()), 0] = 0
    mask = Pattern(2, 4).mask(scores, zero != 0, 0.5)
    assert not mask[zero == 0].any()
    assert mask[0, 0, :4].sum() == 2
    assert torch.equal(Pattern(2, 4).mask(scores, zero != 0, 0.0), zero != 0)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 2), (2, 2), (2, 1)])
def test_blocks_are_the_brute_force_selection(rows: int, columns: int) -> None:
    scores = random_scores(1, 2, 4, 1)
    blocks = [(o, i) for o in range(0, 2, rows) for i in range(0, 4, columns)]

    def kept_by(chosen: tuple[tuple[int, int], ...]) -> Tensor:
        mask = torch.zeros(1, 2, 4, 1, dtype=torch.bool)
        for o, i in chosen:
            mask[0, o : o + rows, i : i + columns] = True
        return mask

    for count in range(len(blocks) + 1):
        options = [kept_by(chosen) for chosen in itertools.combinations(blocks, count)]
        best = max(options, key=lambda mask: scores[mask].sum())
        mask = Blocks(rows, columns).mask(scores, all_of(scores), 1 - count / len(blocks))
        assert torch.equal(mask, best)


def test_a_last_block_counts_with_the_weights_it_has() -> None:
    scores = torch.tensor([3.0, 3, 3, 3, 2, 9, 9, 9, 9, 1]).reshape(1, 2, 5, 1)
    granularity = Blocks(1, 4)
    assert granularity.sizes(scores.shape).flatten().tolist() == [4, 1, 4, 1]
    assert granularity.scores(scores).flatten().tolist() == [3, 2, 9, 1]
    mask = granularity.mask(scores, all_of(scores), 0.2)
    assert scores[~mask].tolist() == [2, 1]
    mask = granularity.mask(scores, all_of(scores), 0.6)
    assert scores[~mask].tolist() == [3, 3, 3, 3, 2, 1]


def test_blocks_of_zeros_stay_and_do_not_count() -> None:
    scores = random_scores(1, 4, 8, 1)
    remaining = all_of(scores).clone()
    remaining[0, :2] = False
    mask = Blocks(2, 4).mask(scores, remaining, 0.5)
    assert not mask[0, :2].any()
    assert mask[0, 2:].sum() == 8


def test_what_does_not_fit() -> None:
    assert "narrower" in (Blocks(4, 4).obstacle(torch.Size((1, 8, 3, 9))) or "")
    assert "fewer" in (Pattern(2, 4).obstacle(torch.Size((8, 1, 1, 9))) or "")
    assert Blocks(4, 4).obstacle(torch.Size((1, 5, 5, 1))) is None


@given(
    st.tuples(*[st.integers(1, 3), st.integers(1, 6), st.integers(1, 9), st.integers(1, 4)]),
    st.integers(1, 4),
    st.integers(1, 5),
    st.floats(0, 0.99),
    st.floats(0, 0.6),
    st.integers(0, 100),
)
def test_sparsity_of_what_remains_is_met_to_a_block(
    shape: tuple[int, ...], rows: int, columns: int, sparsity: float, zeros: float, seed: int
) -> None:
    scores = random_scores(*shape, seed=seed)
    remaining = random_scores(*shape, seed=seed + 1) >= zeros
    granularity = Blocks(rows, columns)
    sizes = granularity.sizes(scores.shape)
    alive = granularity.sums(remaining.double()) > 0
    mask = granularity.mask(scores, remaining, sparsity)
    kept = granularity.sums(mask.double())
    assert ((kept == 0) | (kept == sizes)).all()
    assert not kept[~alive].any()
    left = float((sizes * alive).sum())
    assert abs(left - float(kept.sum()) - sparsity * left) <= float(sizes.max()) / 2 + 1e-9
    gone = alive & (kept == 0)
    if gone.any() and (kept > 0).any():
        means = granularity.scores(scores)
        assert means[gone].max() <= means[kept > 0].min()


@given(st.lists(st.integers(1, 5), max_size=6), st.floats(-1, 30))
def test_nearest(items: list[int], wanted: float) -> None:
    sums = torch.tensor(items, dtype=torch.float64).cumsum(0)
    count = nearest(sums, wanted)
    reached = [0.0, *sums.tolist()]
    assert abs(reached[count] - wanted) <= min(abs(r - wanted) for r in reached) + 1e-12
