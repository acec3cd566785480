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
from graphopt.passes.low_rank.matrices import Decomposition, decompose, evbmf_rank
from graphopt.passes.low_rank.search import smallest


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
    def _decomposition(self) -> Decomposition:
        matrix = self._kernel.permute(0, 3, 1, 2).reshape(self._sides)
        return decompose(matrix, self._generator)

    def error(self, ranks: tuple[int, ...]) -> float:
        return self._decomposition.error(ranks[0])

    def draft(self, ranks: tuple[int, ...]) -> Chain:
        out, channels, rows, columns = self._kernel.shape
        rank = min(ranks[0], self._decomposition.rank)
        first, second = balanced(
            self._decomposition.right[:rank], self._decomposition.left[:, :rank]
        )
        across = second.reshape(out, columns, rank).transpose(1, 2)
        return (
            Factor(first.reshape(rank, channels, rows, 1), 1, (0,)),
            Factor(across.reshape(out, rank, 1, columns), 1, (1,)),
        )

    chain = draft

    def ranks_for(self, energy: float) -> tuple[int]:
        largest = self._decomposition.rank
        return (smallest(lambda rank: self.error((rank,)) <= 1 - energy, largest),)

    def evbmf(self) -> tuple[int]:
        return (max(1, evbmf_rank(self._decomposition.all_values(), *self._sides)),)
