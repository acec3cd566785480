"""A kernel with fewer output channels, then a 1x1 convolution back to all: singular values of the
kernel as a matrix [output channels, input channels x taps].

Without taps that is the decomposition of a linear layer; with them it is channel decomposition
(Zhang, Zou, He and Sun, "Accelerating very deep convolutional networks", 2015). Where the input
channels are split into groups with a decomposition each, the first convolution is a grouped one
(Peng et al., "Extreme network compression via filter group approximation", 2018); a group per
channel makes it depthwise separable.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from graphopt.passes.low_rank.factors import Chain, Factor, balanced
from graphopt.passes.low_rank.matrices import Spectrum, evbmf_rank


class Splitting:
    """See the module.

    Args:
        kernel: float64, [output channels, input channels, *taps].
        splits: groups of the input channels; the rank is that of each group.
        generator: for large matrices.
    """

    def __init__(self, kernel: Tensor, splits: int, generator: torch.Generator) -> None:
        self.splits, self._kernel, self._generator = splits, kernel, generator

    @property
    def full(self) -> tuple[int]:
        return (min(self._sides),)

    @property
    def _sides(self) -> tuple[int, int]:
        return self._kernel.shape[0], self._kernel[0].numel() // self.splits

    @cached_property
    def _parts(self) -> Spectrum:
        """Of the groups, one after the other."""
        parts = [part.flatten(1) for part in self._kernel.chunk(self.splits, dim=1)]
        together = parts[0] if self.splits == 1 else torch.stack(parts)
        return Spectrum(together, self._generator)

    @property
    def at_hand(self) -> tuple[int]:
        return (self._parts.up_to().rank,)

    def error(self, ranks: tuple[int, ...]) -> float:
        return self._parts.error(ranks[0])

    def draft(self, ranks: tuple[int, ...]) -> Chain:
        rank, (rows, columns) = ranks[0], self._sides
        parts = self._parts.up_to(rank)
        left = parts.left[..., :rank].reshape(self.splits, rows, rank)
        right = parts.right[..., :rank, :].reshape(self.splits, rank, columns)
        return self.factors(list(zip(left, right, strict=True)))

    chain = draft

    def factors(self, parts: list[tuple[Tensor, Tensor]]) -> Chain:
        """The chain of a left and a right factor per group of input channels."""
        pairs = [balanced(right, left) for left, right in parts]
        taps = self._kernel.shape[2:]
        first = torch.cat([pair[0] for pair in pairs])
        second = torch.cat([pair[1] for pair in pairs], dim=1)
        within = self._kernel.shape[1] // self.splits
        return (
            Factor(first.reshape(-1, within, *taps), self.splits, tuple(range(len(taps)))),
            Factor(second.reshape(*second.shape, *[1] * len(taps))),
        )

    def ranks_for(self, energy: float) -> tuple[int]:
        return (self._parts.rank_for(energy),)

    def evbmf(self) -> tuple[int]:
        values = self._parts.up_to().all_values()
        found = [evbmf_rank(one, *self._sides) for one in values.reshape(self.splits, -1)]
        return (max([1, *found]),)
