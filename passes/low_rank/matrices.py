"""The best approximation of a matrix by one of low rank, and how much rank its noise leaves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from graphopt.passes.low_rank.search import smallest

LARGEST_EXACT = 2048
"""Matrices of which the smaller side is longer are decomposed by random projection."""
RANDOM_SHARE = 4
"""Random projection finds this part of the smaller side's singular values, one in so many."""


@dataclass(frozen=True)
class Decomposition:
    """``left @ right`` approximates a matrix, or each of several, with any number of leading
    components.

    Attributes:
        left: [..., rows, components].
        right: [..., components, columns]; the vectors on the shorter side are orthonormal, those
            on the other one are as long as the singular values.
        values: the singular values, descending: [..., components].
        square: the sum of the squares of all matrices.
    """

    left: Tensor
    right: Tensor
    values: Tensor
    square: float

    @property
    def rank(self) -> int:
        """The largest rank that there are components for."""
        return self.values.shape[-1]

    @property
    def full(self) -> int:
        """The largest rank of such matrices."""
        return min(self.left.shape[-2], self.right.shape[-1])

    @cached_property
    def _tails(self) -> list[float]:
        """The squared error by rank."""
        squares = self.values.square().reshape(-1, self.rank).sum(dim=0)
        rest = max(0.0, self.square - squares.sum().item()) if self.rank < self.full else 0.0
        tails = torch.nn.functional.pad(squares.flip(0).cumsum(0), (1, 0)).flip(0) + rest
        result: list[float] = tails.tolist()
        return result

    def error(self, rank: int) -> float:
        """The squared error of approximations of some rank, relative to the square."""
        return self._tails[min(rank, self.rank)] / self.square if self.square else 0.0

    def all_values(self) -> Tensor:
        """As many singular values as one matrix has; of those that were not computed only the
        sum of squares is known, so they are taken as equal."""
        missing = self.full - self.rank
        if not missing:
            return self.values
        rest = (self._tails[-1] / missing) ** 0.5
        return torch.cat([self.values, self.values.new_full((missing,), rest)])


class Spectrum:
    """The decomposition of a matrix, or of several, with as many components as were asked for.

    Args:
        matrix: float64, [..., rows, columns].
        generator: for large matrices.
    """

    def __init__(self, matrix: Tensor, generator: torch.Generator) -> None:
        self._matrix, self._generator = matrix, generator
        self._known: Decomposition | None = None

    def up_to(self, rank: int = 1) -> Decomposition:
        """With components for a rank at least; all of a large matrix only where many are needed."""
        if self._known is None:
            self._known = decompose(self._matrix, self._generator)
        if rank > self._known.rank and self._known.rank < self._known.full:
            self._known = decompose(self._matrix, self._generator, exact=True)
        return self._known

    def error(self, rank: int) -> float:
        """See `Decomposition.error`."""
        return self.up_to(rank).error(rank)

    def rank_for(self, energy: float) -> int:
        """The least rank that keeps a share of the square."""
        known = self.up_to()
        if known.error(known.rank) > 1 - energy:
            known = self.up_to(known.full)
        return smallest(lambda rank: known.error(rank) <= 1 - energy, known.rank)


def decompose(matrix: Tensor, generator: torch.Generator, *, exact: bool = False) -> Decomposition:
    """The singular value decomposition in float64 of a matrix, or of several [..., rows, columns].

    The singular vectors on the shorter side are eigenvectors of the product of the matrix with its
    transpose; the matrix is projected on them. That is several times faster than to take the
    matrix itself, and the projection's squared error is as exact, to rounding in the squares.

    Unless ``exact``, a single matrix whose shorter side is longer than `LARGEST_EXACT` is
    projected on a random subspace that two power iterations turn towards the leading singular
    vectors (Halko, Martinsson and Tropp, "Finding structure with randomness", 2011, algorithms 4.4
    and 5.1); it has a quarter of the components then. `Decomposition.error` is the exact error of
    the factors in either case; that of a random projection exceeds the least possible one by a
    factor that is close to 1.
    """
    rows, columns = matrix.shape[-2:]
    if rows > columns:
        other = decompose(matrix.mT, generator, exact=exact)
        return Decomposition(other.right.mT, other.left.mT, other.values, other.square)
    square = matrix.square().sum().item()
    is_large = matrix.dim() == 2 and rows > LARGEST_EXACT and not exact
    basis = _random(matrix, generator) if is_large else _orthonormal(matrix)
    right = basis.mT @ matrix
    return Decomposition(basis, right, right.norm(dim=-1), square)


def _orthonormal(matrix: Tensor) -> Tensor:
    """All left singular vectors, the leading one first."""
    return torch.linalg.eigh(matrix @ matrix.mT).eigenvectors.flip(-1)


def _random(matrix: Tensor, generator: torch.Generator) -> Tensor:
    """The leading quarter of the left singular vectors, nearly."""
    count = len(matrix) // RANDOM_SHARE
    start = torch.randn(matrix.shape[1], count + 16, dtype=matrix.dtype, generator=generator)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(2):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    return (basis @ _orthonormal(basis.T @ matrix))[:, :count]


def evbmf_rank(values: Tensor, rows: int, columns: int) -> int:
    """The rank that a matrix has beside its noise, by empirical variational Bayes.

    The global solution of empirical variational Bayesian matrix factorisation, with the variance
    of the noise that minimises the free energy (Nakajima, Sugiyama, Babacan and Tomioka, "Global
    analytic solution of fully-observed variational Bayesian matrix factorization", JMLR 2013).

    Args:
        values: the singular values, descending; all min(rows, columns) of them.
        rows, columns: of the matrix.
    """
    short, long = sorted((rows, columns))
    squares = values.double().square()[:short]
    total = squares.sum().item()
    if total == 0:
        return 0
    squares = squares / total  # the rank does not depend on the scale
    alpha = short / long
    tau = 2.5129 * math.sqrt(alpha)
    limit = (1 + tau) * (1 + alpha / tau)
    variance = _noise_variance(squares, short, long, limit)
    return int((squares > long * variance * limit).sum())


def _noise_variance(squares: Tensor, short: int, long: int, limit: float) -> float:
    """The minimum of the free energy over the variance: on a grid, then by sections."""
    alpha = short / long
    most = max(0, min(math.ceil(short / (1 + alpha)) - 1, short) - 1)
    tail = squares[most + 1 :] if most + 1 < short else squares[-1:]
    low = max(tail[0].item() / (long * limit), tail.mean().item() / long)
    high = squares.sum().item() / (short * long)
    low = min(max(low, 1e-14 * high), high)
    ends = math.log(low), math.log(high)
    for _ in range(4):
        grid = torch.linspace(*ends, 101, dtype=torch.float64)
        energies = _free_energy(squares, grid.exp(), short, long, limit)
        best = int(energies.argmin())
        ends = grid[max(best - 1, 0)].item(), grid[min(best + 1, 100)].item()
    return math.exp(grid[best].item())


def _free_energy(squares: Tensor, variances: Tensor, short: int, long: int, limit: float) -> Tensor:
    """The free energy of every variance, but for constants."""
    alpha = short / long
    x = squares / (long * variances[:, None])
    signal = x > limit
    large = torch.where(signal, x, 4.0 * limit)
    shifted = large - (1 + alpha)
    tau = (shifted + (shifted.square() - 4 * alpha).clamp_min(0).sqrt()) / 2
    of_signal = large - tau + ((tau + 1) / large).log() + alpha * (tau / alpha + 1).log()
    small = x.clamp_min(torch.finfo(x.dtype).tiny)
    return torch.where(signal, of_signal, small - small.log()).sum(dim=1)
