"""GPTQ: rounding column by column, the rest of a row making good for the error of each.

Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ: accurate post-training quantization for generative
pre-trained transformers", 2023.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.errors import PassError

BLOCK = 64
"""Columns that are rounded before what they left behind reaches the columns after them."""

DAMPING = 1e-3
"""Added to the diagonal of the covariance, relative to its mean."""


def round_gptq(weight: Tensor, scale: Tensor, covariance: Tensor, limit: int) -> Tensor:
    """Steps (float64) with a small error ``(w - w') covariance (w - w')^T`` of every row, at most
    that of rounding to the nearest step. Zeros of the weight stay zeros.

    Args:
        weight: [groups, channels, inputs].
        scale: of a step, broadcastable to the weight.
        covariance: of the inputs, [groups, inputs, inputs].
        limit: largest magnitude of a step.
    """
    weight = weight.double()
    scale = scale.double().expand_as(weight)
    nearest = (weight / scale).round().clamp(-limit, limit)
    covariance = damped(covariance)
    # Inputs with the largest variance first: later columns have fewer left to make good for them.
    order = covariance.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    across = order[:, None].expand_as(weight)
    permuted = covariance.gather(1, order[:, :, None].expand_as(covariance))
    permuted = permuted.gather(2, order[:, None].expand_as(covariance))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(permuted))
    factor = torch.linalg.cholesky(inverse, upper=True)
    steps = _columns(weight.gather(2, across), scale.gather(2, across), factor, limit)
    found = steps.gather(2, order.argsort(1)[:, None].expand_as(weight))
    better = row_errors(weight, found * scale, covariance) < row_errors(
        weight, nearest * scale, covariance
    )
    return torch.where(better[..., None], found, nearest)


def _columns(weight: Tensor, scale: Tensor, factor: Tensor, limit: int) -> Tensor:
    kept = weight != 0
    weight = weight.clone()
    steps = torch.zeros_like(weight)
    inputs = weight.shape[2]
    for start in range(0, inputs, BLOCK):
        end = min(start + BLOCK, inputs)
        errors = torch.zeros_like(weight[:, :, start:end])
        for j in range(start, end):
            column = weight[:, :, j]
            rounded = (column / scale[:, :, j]).round().clamp(-limit, limit) * kept[:, :, j]
            steps[:, :, j] = rounded
            error = (column - rounded * scale[:, :, j]) / factor[:, j, j, None]
            weight[:, :, j:end] -= error[:, :, None] * factor[:, j, None, j:end]
            errors[:, :, j - start] = error
        weight[:, :, end:] -= errors @ factor[:, start:end, end:]
    return steps


def damped(covariance: Tensor) -> Tensor:
    """A covariance that has an inverse, also where inputs never vary and rounding leaves what is
    not quite zero.

    Raises:
        PassError: it is not finite.
    """
    if not covariance.isfinite().all():
        raise PassError("with this calibration data, values in the network are not finite")
    covariance = covariance.double()
    diagonal = covariance.diagonal(dim1=1, dim2=2)
    least = torch.finfo(torch.float64).eps * diagonal.abs().amax(1)
    extra = torch.maximum(DAMPING * diagonal.mean(1), least)
    extra = extra.clamp_min(torch.finfo(torch.float32).tiny)[:, None, None]
    identity = torch.eye(covariance.shape[1], dtype=torch.float64)
    while (failed := torch.linalg.cholesky_ex(covariance + extra * identity).info != 0).any():
        extra = torch.where(failed[:, None, None], 10 * extra, extra)
    return covariance + extra * identity


def row_errors(weight: Tensor, rounded: Tensor, covariance: Tensor) -> Tensor:
    """The mean squared error of each channel's output, [groups, channels]."""
    difference = weight - rounded
    return ((difference @ covariance) * difference).sum(-1)
