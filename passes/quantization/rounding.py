"""Rounding by reconstruction: steps are changed one column at a time while outputs get better.

The objective is AdaRound's, the error of a layer's outputs as a quadratic form of the weights'
errors (Nagel et al., "Up or down? Adaptive rounding for post-training quantization", 2020). It is
descended exactly, coordinate by coordinate, and not only between the two nearest steps (Behdin et
al., "QuantEase", 2023), starting from GPTQ's solution.
"""

from __future__ import annotations

from torch import Tensor

from graphopt.passes.quantization.gptq import damped, round_gptq

SWEEPS = 4


def round_by_reconstruction(
    weight: Tensor, scale: Tensor, covariance: Tensor, limit: int, sweeps: int = SWEEPS
) -> Tensor:
    """Steps (float64) whose error ``(w - w') covariance (w - w')^T`` no change of a single step
    makes smaller, if ``sweeps`` are enough. Zeros of the weight stay zeros.

    Args:
        weight: [groups, channels, inputs].
        scale: of a step, broadcastable to the weight.
        covariance: of the inputs, [groups, inputs, inputs].
        limit: largest magnitude of a step.
        sweeps: how often all columns are gone through.
    """
    steps = round_gptq(weight, scale, covariance, limit)
    weight = weight.double()
    scale = scale.double().expand_as(weight)
    covariance = damped(covariance)
    diagonal = covariance.diagonal(dim1=1, dim2=2)
    kept = weight != 0
    gradient = (weight - steps * scale) @ covariance
    for _ in range(sweeps):
        changed = False
        for j in range(weight.shape[2]):
            step, old = scale[:, :, j], steps[:, :, j]
            wanted = old + gradient[:, :, j] / (diagonal[:, j, None] * step)
            new = wanted.round().clamp(-limit, limit) * kept[:, :, j]
            # A tie would go back and forth.
            new = new.where((new - wanted).abs() < (old - wanted).abs() - 1e-9, old)
            if new.equal(old):
                continue
            changed = True
            gradient -= ((new - old) * step)[:, :, None] * covariance[:, j, None, :]
            steps[:, :, j] = new
        if not changed:
            break
    return steps
