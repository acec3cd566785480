"""What the families of decompositions have in common, and which there are.

Each family is a file: `splitting` (singular values of the kernel as a matrix), `spatial`,
`tucker` and `cp`.
"""

from __future__ import annotations

from math import prod
from typing import Protocol

import torch
from torch import Tensor

from graphopt.ir.patterns import Decline
from graphopt.passes.low_rank.cp import Cp
from graphopt.passes.low_rank.factors import Chain
from graphopt.passes.low_rank.spatial import Spatial
from graphopt.passes.low_rank.splitting import Splitting
from graphopt.passes.low_rank.tucker import Tucker

Ranks = tuple[int, ...]


class Family(Protocol):
    """The decompositions of one kernel by one method, at every rank.

    Attributes:
        full: the ranks at which the kernel is reproduced.
        at_hand: the ranks up to which drafts come at no great cost.
    """

    @property
    def full(self) -> Ranks: ...

    @property
    def at_hand(self) -> Ranks: ...

    def error(self, ranks: Ranks) -> float:
        """The squared error of `draft`, relative to the kernel's square."""
        ...

    def draft(self, ranks: Ranks) -> Chain:
        """A decomposition that is cheap to have."""
        ...

    def chain(self, ranks: Ranks) -> Chain:
        """The decomposition, its error at most that of the draft."""
        ...

    def ranks_for(self, energy: float) -> Ranks:
        """The least ranks that keep a share of the kernel's square."""
        ...

    def evbmf(self) -> Ranks:
        """Ranks by empirical variational Bayes."""
        ...


METHODS = ("svd", "channel", "grouped", "depthwise_separable", "spatial", "tucker2", "cp")
AUTOMATIC = ("svd", "grouped", "depthwise_separable", "spatial", "tucker2")
"""What ``method="auto"`` chooses from: all that are known at every rank after one decomposition."""


PRODUCTS = ("svd", "channel")
"""Those that split the kernel into a single matrix product, of which only the layer's outputs need
be known to fit it to data."""


def family(
    method: str, kernel: Tensor, generator: torch.Generator, splits: int = 2
) -> Family | Decline:
    """The decompositions of a kernel, or why the method does not apply to it.

    Args:
        method: one of `METHODS`.
        kernel: float64, [output channels, input channels, *taps].
        generator: of random starts and projections.
        splits: how many groups the first convolution of ``"grouped"`` has.
    """
    channels, taps = kernel.shape[1], kernel.shape[2:]
    if method == "svd":
        return Splitting(kernel, 1, generator)
    if prod(taps) == 1:
        return Decline(f"{method} is for convolutions with more than one tap")
    if method == "channel":
        return Splitting(kernel, 1, generator)
    if method == "depthwise_separable":
        return Splitting(kernel, channels, generator)
    if method == "grouped":
        if channels % splits or channels == splits:
            return Decline(f"its {channels} input channels make no {splits} groups")
        return Splitting(kernel, splits, generator)
    if method == "spatial":
        if len(taps) != 2 or 1 in taps:
            return Decline("spatial decomposition is for kernels with rows and columns of taps")
        return Spatial(kernel, generator)
    return Tucker(kernel) if method == "tucker2" else Cp(kernel, generator)
