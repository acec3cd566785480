"""One of several options per layer, so that the network as a whole stays within a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

STEPS = 20_000
"""Into how many parts the budget is divided; costs are rounded up to them."""
ROUNDING = 1e-12


@dataclass(frozen=True)
class Option:
    """What may be done with a layer: a cost, and a loss that adds up over layers."""

    cost: float
    loss: float


def choose(layers: Sequence[Sequence[Option]], budget: float) -> list[int] | None:
    """The option of every layer such that all costs together are within the budget and the losses
    add up to the least possible.

    By dynamic programming over layers and parts of the budget (the multiple-choice knapsack
    problem). It never exceeds the budget; the loss is the least possible for a budget that is
    smaller by a part per layer, of which there are `STEPS`.

    Returns:
        The place of the option of every layer; None if even the cheapest do not fit.
    """
    cheapest = [min(range(len(options)), key=lambda k: options[k].cost) for options in layers]
    fixed = [options[k].cost for options, k in zip(layers, cheapest, strict=True)]
    room = budget - sum(fixed)
    if room < -ROUNDING * abs(budget):
        return None
    part = max(room / STEPS, 1e-300)
    least = np.zeros(STEPS + 1)
    choices = []
    for options, base in zip(layers, fixed, strict=True):
        extended = np.full(STEPS + 1, np.inf)
        choice = np.zeros(STEPS + 1, dtype=np.int32)
        for place, option in enumerate(options):
            parts = int(np.ceil((option.cost - base) / part - 1e-9))
            if parts > STEPS:
                continue
            shifted = least[: STEPS + 1 - parts] + option.loss
            better = shifted < extended[parts:]
            extended[parts:][better] = shifted[better]
            choice[parts:][better] = place
        least = extended
        choices.append((choice, base))
    chosen, left = [], STEPS
    for options, (choice, base) in zip(reversed(layers), reversed(choices), strict=True):
        place = int(choice[left])
        chosen.append(place)
        left -= int(np.ceil((options[place].cost - base) / part - 1e-9))
    return chosen[::-1]
