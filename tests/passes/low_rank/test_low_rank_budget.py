"""Options within a budget, against all combinations."""

from __future__ import annotations

import itertools

import pytest
import torch

from graphopt.passes.low_rank.budget import Option, choose


@pytest.mark.parametrize("seed", range(12))
def test_a_budget_is_met_with_the_least_loss(seed):
    draw = torch.Generator().manual_seed(seed)

    def number() -> float:
        return torch.rand((), generator=draw).item()

    layers = [[Option(number(), number() ** 3) for _ in range(4)] for _ in range(5)]
    cheapest = sum(min(option.cost for option in options) for options in layers)
    budget = cheapest + number()
    found = choose(layers, budget)
    assert found is not None
    options = [row[place] for row, place in zip(layers, found, strict=True)]
    assert sum(option.cost for option in options) <= budget + 1e-12
    every = itertools.product(*layers)
    tight = budget - 5 * (budget - cheapest) / 20_000
    least = min(sum(o.loss for o in some) for some in every if sum(o.cost for o in some) <= tight)
    assert sum(option.loss for option in options) <= least + 1e-12


def test_budgets_that_leave_no_choice():
    layers = [[Option(2, 0.0), Option(1, 5.0)], [Option(4, 0.0), Option(3, 1.0)]]
    assert choose(layers, 4) == [1, 1]
    assert choose(layers, 3.9) is None
    assert choose(layers, 6) == [0, 0]
    assert choose(layers, 5) == [0, 1]
    assert choose([], 1) == []
