"""A 1x1 convolution to fewer channels, the taps among these, and a 1x1 convolution back: Tucker
decomposition in the two dimensions of channels.

Kim et al., "Compression of deep convolutional neural networks for fast and low power mobile
applications", 2016; the subspaces by higher-order orthogonal iteration (De Lathauwer, De Moor and
Vandewalle, "On the best rank-1 and rank-(R1, ..., RN) approximation of higher-order tensors",
2000), which starts from those of the higher-order SVD.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from graphopt.passes.low_rank.factors import Chain, Factor
from graphopt.passes.low_rank.matrices import evbmf_rank

SWEEPS = 10
CONVERGED = 1e-5
"""Iteration ends when a sweep lowers the error by less than this part of the kernel's square."""


class Tucker:
    """See the module. Ranks are those of the input and of the output channels.

    Args:
        kernel: float64, [output channels, input channels, *taps].
    """

    def __init__(self, kernel: Tensor) -> None:
        self._kernel = kernel
        self._flat = kernel.flatten(2)
        self._square = kernel.square().sum().item()

    @property
    def full(self) -> tuple[int, int]:
        out, channels, taps = self._flat.shape
        return min(channels, out * taps), min(out, channels * taps)

    @property
    def at_hand(self) -> tuple[int, int]:
        return self.full

    @cached_property
    def _subspaces(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Singular values and vectors of the unfoldings along input and output channels."""
        return _leading(self._flat.transpose(0, 1)), _leading(self._flat)

    @cached_property
    def _core(self) -> Tensor:
        """Of the higher-order SVD: [output rank, input rank, taps]."""
        (_, into), (_, out_of) = self._subspaces
        return _project(self._flat, into, out_of)

    @cached_property
    def _kept(self) -> Tensor:
        """The square that the higher-order SVD keeps: [input rank + 1, output rank + 1]."""
        squares = self._core.square().sum(dim=2).T
        return torch.nn.functional.pad(squares.cumsum(0).cumsum(1), (1, 0, 1, 0))

    def error(self, ranks: tuple[int, ...]) -> float:
        if self._square == 0:
            return 0.0
        return max(0.0, 1.0 - self._kept[ranks[0], ranks[1]].item() / self._square)

    def draft(self, ranks: tuple[int, ...]) -> Chain:
        (_, into), (_, out_of) = self._subspaces
        core = self._core[: ranks[1], : ranks[0]]
        return self._chain(into[:, : ranks[0]], core, out_of[:, : ranks[1]])

    def chain(self, ranks: tuple[int, ...]) -> Chain:
        into, out_of = self.iterate(ranks)[0]
        return self._chain(into, _project(self._flat, into, out_of), out_of)

    def iterate(self, ranks: tuple[int, ...]) -> tuple[tuple[Tensor, Tensor], list[float]]:
        """Higher-order orthogonal iteration.

        Returns:
            The bases [input channels, rank] and [output channels, rank], and the relative squared
            errors of the higher-order SVD and after every sweep.
        """
        (_, into), (_, out_of) = self._subspaces
        into, out_of = into[:, : ranks[0]], out_of[:, : ranks[1]]
        errors = [self.error(ranks)]
        if self._square == 0:
            return (into, out_of), errors
        for _ in range(SWEEPS):
            projected = torch.einsum("oit,oq->iqt", self._flat, out_of)
            into = _leading(projected)[1][:, : ranks[0]]
            projected = torch.einsum("oit,ip->opt", self._flat, into)
            values, out_of = _leading(projected)
            out_of = out_of[:, : ranks[1]]
            kept = values[: ranks[1]].sum().item()
            errors.append(max(0.0, 1.0 - kept / self._square))
            if errors[-2] - errors[-1] < CONVERGED:
                break
        return (into, out_of), errors

    def _chain(self, into: Tensor, core: Tensor, out_of: Tensor) -> Chain:
        taps = self._kernel.shape[2:]
        ones = [1] * len(taps)
        return (
            Factor(into.T.reshape(into.shape[1], into.shape[0], *ones)),
            Factor(core.reshape(*core.shape[:2], *taps), 1, tuple(range(len(taps)))),
            Factor(out_of.reshape(*out_of.shape, *ones)),
        )

    def ranks_for(self, energy: float) -> tuple[int, int]:
        """Each subspace loses half of what may be lost, so that both together lose no more."""
        lost = (1 - energy) / 2 * self._square
        found = []
        for (squares, _), largest in zip(self._subspaces, self.full, strict=True):
            tails = torch.nn.functional.pad(squares.flip(0).cumsum(0), (1, 0)).flip(0)
            found.append(min(largest, max(1, int((tails > lost).sum()))))
        return found[0], found[1]

    def evbmf(self) -> tuple[int, int]:
        out, channels, taps = self._flat.shape
        (of_input, _), (of_output, _) = self._subspaces
        return (
            max(1, evbmf_rank(of_input.sqrt(), channels, out * taps)),
            max(1, evbmf_rank(of_output.sqrt(), out, channels * taps)),
        )


def _project(kernel: Tensor, into: Tensor, out_of: Tensor) -> Tensor:
    """The kernel [output, input channels, taps] in the bases of the subspaces."""
    return torch.einsum("oit,oq,ip->qpt", kernel, out_of, into)


def _leading(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The squares of the singular values of a tensor's unfolding along its first dimension,
    descending, and the left singular vectors."""
    matrix = tensor.flatten(1)
    squares, vectors = torch.linalg.eigh(matrix @ matrix.T)
    return squares.flip(0).clamp_min(0), vectors.flip(1)
