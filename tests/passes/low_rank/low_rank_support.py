"""What the tests of low-rank decompositions share."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphopt.passes.low_rank.methods import METHODS


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def methods_for(shape: Sequence[int]) -> tuple[str, ...]:
    """The methods that apply to a kernel [output channels, input channels, *taps], if its groups
    of channels come out even."""
    taps = shape[2:]
    if all(extent == 1 for extent in taps):
        return ("svd",)
    has_rows_and_columns = len(taps) == 2 and 1 not in taps
    return tuple(method for method in METHODS if method != "spatial" or has_rows_and_columns)
