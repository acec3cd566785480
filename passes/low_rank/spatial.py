"""A column of taps, then a row of taps: singular values of the kernel as a matrix
[input channels x rows of taps, output channels x columns of taps].

Jaderberg, Vedaldi and Zisserman, "Speeding up convolutional neural networks with low rank
expansions", 2014; in closed form Tai et al., "Convolutional neural networks with low-rank
regularization", 2016.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from graphopt.passes.low_rank.factors import Chain, Factor, balanced
from graphopt.passes.low_rank.matrices import Spectrum, evbmf_rank


class Spatial:
    """See the module.

    Args:
        kernel: float64, [output channels, input channels, rows, columns].
        generator: for large matrices.
    """

    def __init__(self, kernel: Tensor, generator: torch.Generator) -> None:
        self._kernel, self._generator = kernel, generator

    @property
    def _sides(self) -> tuple[int, int]:
        out, channels, rows, columns = self._kernel.shape
        return out * columns, channels * rows

    @property
    def full(self) -> tuple[int]:
        return (min(self._sides),)

    @cached_property
    def _spectrum(self) -> Spectrum:
        matrix = self._kernel.permute(0, 3, 1, 2).reshape(self._sides)
        return Spectrum(matrix, self._generator)

    @property
    def at_hand(self) -> tuple[int]:
        return (self._spectrum.up_to().rank,)

    def error(self, ranks: tuple[int, ...]) -> float:
        return self._spectrum.error(ranks[0])

    def draft(self, ranks: tuple[int, ...]) -> Chain:
        out, channels, rows, columns = self._kernel.shape
        rank, known = ranks[0], self._spectrum.up_to(ranks[0])
        first, second = balanced(known.right[:rank], known.left[:, :rank])
        across = second.reshape(out, columns, rank).transpose(1, 2)
        return (
            Factor(first.reshape(rank, channels, rows, 1), 1, (0,)),
            Factor(across.reshape(out, rank, 1, columns), 1, (1,)),
        )

    chain = draft

    def ranks_for(self, energy: float) -> tuple[int]:
        return (self._spectrum.rank_for(energy),)

    def evbmf(self) -> tuple[int]:
        return (max(1, evbmf_rank(self._spectrum.up_to().all_values(), *self._sides)),)
