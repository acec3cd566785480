"""How much of each layer is pruned, so that all together meet a budget.

Sparsities are fractions of the weights that are not zero yet. A budget is an amount of cost that is
to go: every weight costs one where weights are counted, or the multiply-adds that it takes part in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from graphopt.errors import PassError
from graphopt.passes.pruning.layers_to_prune import PrunableLayer

MOST = 0.99
"""No layer loses more than this, or the network would be cut in two."""
LEVELS = (0.0, 0.25, 0.5, 0.625, 0.75, 0.85, 0.925, 0.97, MOST)
"""Sparsities at which layers are tried where their sensitivity or time is measured."""
GRID = 10_000
"""Steps of cost that the dynamic programming tells apart."""


@dataclass(frozen=True)
class Share:
    """A layer as the allocation sees it.

    Attributes:
        layer: whose it is.
        remaining: how many of its weights are not zero yet.
        cost: of one of its weights.
    """

    layer: PrunableLayer
    remaining: int
    cost: float

    @property
    def total(self) -> float:
        return self.remaining * self.cost


Sparsities = dict[PrunableLayer, float]


def uniform(shares: Sequence[Share], removed: float) -> Sparsities:
    """The same sparsity wherever weights cost anything."""
    sparsity = removed / max(sum(share.total for share in shares), 1e-30)
    return {share.layer: sparsity if share.cost else 0.0 for share in shares}


def erdos_renyi(shares: Sequence[Share], removed: float) -> Sparsities:
    """Densities proportional to the sum of a weight's sizes over their product (the Erdos-Renyi
    kernel of Evci et al., Rigging the Lottery, 2020), as far as they stay below one."""
    factors = []
    for share in shares:
        groups, outputs, inputs, taps = share.layer.taps(share.layer.weight.tensor).shape
        kernel = share.layer.kernel
        sizes = (groups * outputs, inputs, *kernel)
        factors.append(sum(sizes) / (groups * outputs * inputs * taps))
    totals = np.array([share.total for share in shares])
    wanted, factor = totals.sum() - removed, np.array(factors)
    low, high = 0.0, 1.0 / factor.min()
    for _ in range(100):
        scale = (low + high) / 2
        kept = float((totals * _between(scale * factor)).sum())
        low, high = (scale, high) if kept < wanted else (low, scale)
    densities = _between(high * factor)
    return {
        share.layer: 1 - float(density) if share.cost else 0.0
        for share, density in zip(shares, densities, strict=True)
    }


def by_score(
    shares: Sequence[Share],
    removed: float,
    scores: Mapping[PrunableLayer, tuple[Tensor, Tensor]],
) -> Sparsities:
    """The blocks of least score, relative to what they cost, wherever they are.

    Args:
        shares: the layers.
        removed: cost to remove.
        scores: per layer, the score of each block and how many weights it has, zero for blocks
            that are zero already. A score counts for every weight of its block.
    """
    ratios, costs, owners = [], [], []
    for place, share in enumerate(shares):
        score, sizes = (part.flatten() for part in scores[share.layer])
        alive = (sizes > 0) & (share.cost > 0)
        order = score[alive].argsort(stable=True)
        sorted_sizes = sizes[alive][order]
        allowed = sorted_sizes.cumsum(0) <= MOST * float(sizes.sum())
        ratios.append(score[alive][order][allowed].double() / max(share.cost, 1e-30))
        costs.append(sorted_sizes[allowed] * share.cost)
        owners.append(torch.full((int(allowed.sum()),), place))
    ratio, cost, owner = torch.cat(ratios), torch.cat(costs), torch.cat(owners)
    order = ratio.argsort(stable=True)
    count = int(torch.searchsorted(cost[order].cumsum(0), torch.tensor(removed * (1 - 1e-9))))
    chosen = order[: count + 1]
    gone = torch.zeros(len(shares), dtype=torch.float64)
    gone.index_add_(0, owner[chosen], cost[chosen])
    return {
        share.layer: float(g) / share.total if share.total else 0.0
        for share, g in zip(shares, gone, strict=True)
    }


def by_sensitivity(
    shares: Sequence[Share],
    removed: float,
    levels: Sequence[float],
    errors: Mapping[PrunableLayer, Sequence[float]],
    *,
    continuous: bool = True,
) -> Sparsities:
    """The levels with the least sum of errors that meet the budget.

    Args:
        shares: the layers.
        removed: cost to remove.
        levels: sparsities, ascending from 0.
        errors: per layer, the error at each level.
        continuous: whether sparsities between levels are possible: then what the levels remove
            too much is given back.
    """
    rising = [np.maximum.accumulate(errors[share.layer]).tolist() for share in shares]
    costs = [[share.total * (1 - level) for level in levels] for share in shares]
    budget = sum(share.total for share in shares) - removed
    places = choose_levels(rising, costs, budget)
    sparsities = [levels[place] for place in places]
    if continuous:
        slack = budget - sum(own[place] for own, place in zip(costs, places, strict=True))
        _give_back(sparsities, slack, shares, levels, rising)
    return {share.layer: s for share, s in zip(shares, sparsities, strict=True)}


def _give_back(
    sparsities: list[float],
    slack: float,
    shares: Sequence[Share],
    levels: Sequence[float],
    errors: Sequence[Sequence[float]],
) -> None:
    """Lower sparsities that are levels, where that helps most for its cost, by some cost in all."""
    places = [levels.index(sparsity) for sparsity in sparsities]

    def gain(k: int) -> float:
        high, low = places[k], places[k] - 1
        return (errors[k][high] - errors[k][low]) / (levels[high] - levels[low]) / shares[k].total

    able = {k for k, share in enumerate(shares) if places[k] > 0 and share.total > 0}
    while able and slack > 0:
        best = max(sorted(able), key=gain)
        lower = levels[places[best] - 1]
        step = (sparsities[best] - lower) * shares[best].total
        if step > slack:
            sparsities[best] -= slack / shares[best].total
            return
        slack -= step
        sparsities[best] = lower
        places[best] -= 1
        if places[best] == 0:
            able.remove(best)


def choose_levels(
    errors: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], budget: float
) -> list[int]:
    """One level per layer, with the least sum of errors and a sum of costs within the budget: a
    knapsack of several choices, solved by dynamic programming over a grid of costs.

    Costs are rounded up to the grid, so the budget is kept.

    Raises:
        PassError: even the cheapest levels cost more.
    """
    least = sum(min(own) for own in costs)
    if least > budget * (1 + 1e-9):
        raise PassError(f"the budget of {budget:g} is below the least possible cost of {least:g}")
    free = max(budget - least, 0.0)
    step = free / GRID if free > 1e-12 * budget else math.inf
    best = np.zeros(GRID + 1)
    chosen: list[np.ndarray] = []
    for own_errors, own_costs in zip(errors, costs, strict=True):
        base = min(own_costs)
        table = np.full((len(own_costs), GRID + 1), np.inf)
        for level, (error, cost) in enumerate(zip(own_errors, own_costs, strict=True)):
            steps = _steps(cost - base, step)
            if steps <= GRID:
                table[level, steps:] = best[: GRID + 1 - steps] + error
        chosen.append(table.argmin(axis=0))
        best = table.min(axis=0)
    places, left = [], GRID
    for choice, own_costs in zip(reversed(chosen), reversed(costs), strict=True):
        level = int(choice[left])
        places.append(level)
        left -= _steps(own_costs[level] - min(own_costs), step)
    return places[::-1]


def _steps(extra: float, step: float) -> int:
    """Steps of the grid that a cost above the least takes, rounded up."""
    if step == math.inf:
        return 0 if extra == 0 else GRID + 1
    return math.ceil(extra / step - 1e-9)


def _between(densities: np.ndarray) -> np.ndarray:
    return np.clip(densities, 1 - MOST, 1.0)
