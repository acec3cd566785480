"""Pruning one layer so that the weights that stay make up for those that go.

With inputs ``X`` and ``H = X X^T``, a weight ``W`` that becomes ``V`` changes the layer's output by
``tr (V - W) H (V - W)^T`` in squared error. Optimal Brain Surgeon (Hassibi and Stork, 1992) prunes
where that costs least and updates the other weights; SparseGPT (Frantar and Alistarh, 2023) does so
for all rows at once, one block of columns after the other. What it leaves is then improved on: the
weights that stay become the least-squares solution, and pairs of pruned and kept blocks are
exchanged as long as that pays. Errors of output channels can count differently; that changes which
weights stay, not what they become.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.passes.pruning.granularity import Blocks, Granularity
from graphopt.passes.pruning.layer_inputs import as_matrix, from_matrix

COLUMNS = 128
"""How many columns SparseGPT chooses at once."""
ITERATIONS = 50
TOLERANCE = 1e-4
"""Conjugate gradients end where a step lowers the error by less than this fraction of it."""
ROUGH = 1e-3
"""The same while masks are still being compared."""
EXCHANGES = 4
TRUST = 0.5
"""How far the gains are believed that pruned weights promise to bring."""


@dataclass(frozen=True)
class Problem:
    """One group of a layer.

    Attributes:
        weight: [output channels, taps * input channels], the channels running fastest, float64.
        hessian: [taps * input channels, taps * input channels], float64, positive definite.
        remaining: which weights are not zero yet.
        taps: how many positions the kernel has.
        importance: what the squared error of each output channel counts, [output channels, 1].
    """

    weight: Tensor
    hessian: Tensor
    remaining: Tensor
    taps: int
    importance: Tensor | float = 1.0

    def error(self, pruned: Tensor) -> float:
        """Squared error of the output."""
        difference = pruned - self.weight
        return float((difference @ self.hessian * difference * self.importance).sum())

    def as_taps(self, matrix: Tensor) -> Tensor:
        """[1, output channels, input channels, taps]."""
        outputs, columns = matrix.shape
        shape = torch.Size((1, outputs, columns // self.taps, self.taps))
        return from_matrix(matrix.unsqueeze(0), shape)

    def as_matrix(self, taps: Tensor) -> Tensor:
        return as_matrix(taps)[0]


def damped(moment: Tensor, damping: float, rounding: float = 0.0) -> Tensor:
    """A second moment made positive definite.

    Args:
        moment: [n, n], float64, symmetric.
        damping: fraction of the mean of its diagonal that is added to the diagonal.
        rounding: size of the errors that the moment may have; so much is added at least.

    Inputs that are always zero count as one. Where more is needed, more is added.
    """
    diagonal = moment.diagonal()
    added = torch.full_like(diagonal, damping * float(diagonal.clamp_min(0).mean()) + rounding)
    added[diagonal + added <= 0] = 1.0
    result = moment.clone()
    result.diagonal().add_(added)
    while torch.linalg.cholesky_ex(result).info:
        result.diagonal().add_(9 * added)
        added = added * 10
    return result


def prune(problem: Problem, granularity: Granularity, sparsity: float) -> Tensor:
    """A sparse weight with little error of the output.

    Args:
        problem: what is to be pruned.
        granularity: shape of the zeros.
        sparsity: fraction of the remaining weights to prune; for a `Pattern`, zero or any other.

    Returns:
        The new weight; its error is never larger than that of removing the smallest weights, or
        those of least magnitude times input, in the same pattern.
    """
    if sparsity == 0 or not problem.remaining.any():
        return problem.weight * problem.remaining
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(problem.hessian))
    found, kept = sparse_gpt(problem, granularity, sparsity, inverse)
    best = least_squares(problem, found, kept, ROUGH)
    best, kept = exchange(problem, granularity, best, kept, inverse)
    best = least_squares(problem, best, kept)
    return _not_worse_than_magnitude(problem, granularity, sparsity, best)


def _not_worse_than_magnitude(
    problem: Problem, granularity: Granularity, sparsity: float, best: Tensor
) -> Tensor:
    """Where plain masks happen to be better, their least-squares solution."""
    error = problem.error(best)
    magnitude = problem.weight.abs()
    squares = magnitude.square() * problem.importance
    for scores in (magnitude, squares * problem.hessian.diagonal()):
        mask = _mask(problem, granularity, scores, sparsity)
        if problem.error(problem.weight * mask) < error:
            candidate = least_squares(problem, problem.weight, mask)
            if problem.error(candidate) < error:
                best, error = candidate, problem.error(candidate)
    return best


def _mask(problem: Problem, granularity: Granularity, scores: Tensor, sparsity: float) -> Tensor:
    taps, remaining = problem.as_taps(scores), problem.as_taps(problem.remaining)
    mask = granularity.mask(taps, remaining, sparsity)
    return problem.as_matrix(mask) & problem.remaining


def _count(problem: Problem, granularity: Granularity, kept: Tensor | None = None) -> int:
    """How many weights count as not zero, or as kept."""
    which = problem.remaining if kept is None else kept
    return int(granularity.counted(problem.as_taps(which)).sum())


def sparse_gpt(
    problem: Problem, granularity: Granularity, sparsity: float, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """The blocked update of SparseGPT: masks by what removing costs now, chosen for some columns
    at a time; later columns then make up for the error.

    The cost of a block of weights ``w`` within a row is ``w P^-1 w^T``, where P is its part of the
    inverse Hessian of the columns not decided yet: what removing all of them together costs.

    Returns:
        The weight, and which of it is kept.
    """
    weight, size = problem.weight.clone(), len(problem.hessian)
    factor = torch.linalg.cholesky(inverse, upper=True)
    channels = size // problem.taps
    kept = torch.zeros_like(problem.remaining)
    wanted = taken = 0.0
    for first, last in _chunks(channels, problem.taps, granularity):
        part = factor[first:last, first:last]
        scores = _joint_cost(weight[:, first:last], part.T @ part, granularity, channels)
        scores = scores * problem.importance
        alive = problem.remaining[:, first:last]
        chunk = Problem(scores, part, alive, max(1, (last - first) // channels))
        count = _count(chunk, granularity)
        wanted += sparsity * count
        share = sparsity
        if isinstance(granularity, Blocks):  # what rounding left over, the next columns make up for
            share = min(1.0, max(0.0, (wanted - taken) / max(1, count)))
        kept[:, first:last] = _mask(chunk, granularity, scores, share)
        taken += count - _count(chunk, granularity, kept[:, first:last])
        errors = torch.empty_like(weight[:, first:last])
        gone = (~kept[:, first:last]).to(weight.dtype)
        for column in range(first, last):
            error = weight[:, column] * gone[:, column - first] / factor[column, column]
            errors[:, column - first] = error
            weight[:, column:last] -= error.unsqueeze(1) * factor[column, column:last]
        weight[:, last:] -= errors @ factor[first:last, last:]
    return weight * kept, kept


def _chunks(channels: int, taps: int, granularity: Granularity) -> list[tuple[int, int]]:
    """Columns that are decided together: whole taps, or parts of one in whole blocks."""
    width = granularity.columns if isinstance(granularity, Blocks) else granularity.m
    if channels <= COLUMNS:
        step = max(1, COLUMNS // channels) * channels
        return [(a, min(a + step, channels * taps)) for a in range(0, channels * taps, step)]
    step = max(1, COLUMNS // width) * width
    return [
        (tap * channels + a, tap * channels + min(a + step, channels))
        for tap in range(taps)
        for a in range(0, channels, step)
    ]


def _joint_cost(weight: Tensor, inverse: Tensor, granularity: Granularity, channels: int) -> Tensor:
    """``w P^-1 w^T`` of each row of each block, shared out to its weights."""
    width = granularity.columns if isinstance(granularity, Blocks) else 1
    if width == 1:
        return weight.square() / inverse.diagonal()
    size = weight.shape[1]
    block = torch.arange(size) // min(channels, size) * size + (
        torch.arange(size) % min(channels, size) // width
    )
    together = block.unsqueeze(0) == block.unsqueeze(1)
    return weight * (weight @ torch.linalg.inv(inverse * together))


def least_squares(
    problem: Problem, start: Tensor, kept: Tensor, tolerance: float = TOLERANCE
) -> Tensor:
    """The weights that stay, such that the output's error is least: conjugate gradients for all
    rows at once, with the Hessian's diagonal as preconditioner.

    Single precision is enough for the steps; the residual is exact at the start.

    Args:
        problem: what is solved.
        start: a first guess.
        kept: which weights stay.
        tolerance: the iteration ends when a step lowers the error by less than this fraction.
    """
    weight, hessian, mask = start * kept, problem.hessian.float(), kept.float()
    difference = problem.weight - weight
    gradient = difference @ problem.hessian
    error = float((gradient * difference).sum())
    residual, diagonal = gradient.float() * mask, hessian.diagonal()
    scaled = residual / diagonal
    direction, product = scaled, (residual * scaled).sum(dim=1, keepdim=True)
    moved = torch.zeros_like(residual)
    for _ in range(ITERATIONS):
        image = direction @ hessian * mask
        curvature = (direction * image).sum(dim=1, keepdim=True)
        step = torch.where(curvature > 0, product / curvature, 0.0)
        moved.addcmul_(step, direction)
        residual.addcmul_(step, image, value=-1)
        gain = float((step * product).sum())
        error -= gain
        if gain <= tolerance * max(error, 0.0):
            break
        scaled = residual / diagonal
        previous, product = product, (residual * scaled).sum(dim=1, keepdim=True)
        ratio = torch.where(previous > 0, product / previous, 0.0)
        direction = scaled + ratio * direction
    return weight + moved.double()


def exchange(
    problem: Problem, granularity: Granularity, weight: Tensor, kept: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """Exchange pruned blocks for kept ones while that lowers the error.

    A pruned weight alone would gain ``gradient ** 2 / H_ii``, a kept one costs about ``weight ** 2
    / (H^-1)_ii``; by these the mask is chosen again, of the same sparsity. Where the error has
    grown after that, gains are trusted less.

    Returns:
        The weight, and which of it is kept.
    """
    sparsity = 1 - _count(problem, granularity, kept) / _count(problem, granularity)
    diagonal, trust, error = problem.hessian.diagonal(), TRUST, problem.error(weight)
    for _ in range(EXCHANGES):
        gradient = (problem.weight - weight) @ problem.hessian
        gains = trust * gradient.square() / diagonal
        scores = torch.where(kept, weight.square() / inverse.diagonal(), gains)
        scores = scores * problem.importance
        mask = _mask(problem, granularity, scores, sparsity)
        if torch.equal(mask, kept):
            break
        candidate = least_squares(problem, weight, mask, ROUGH)
        if (found := problem.error(candidate)) < error:
            weight, kept, error = candidate, mask, found
        else:
            trust /= 2
    return weight, kept
