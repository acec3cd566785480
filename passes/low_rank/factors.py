"""Chains of small convolutions that stand for a large one, as their kernels in float64.

Everything here is about one kernel [output channels, input channels, *taps], without groups: a
linear layer has no taps, and the groups of a grouped convolution are decomposed one by one and put
side by side at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factor:
    """One convolution of a chain.

    Attributes:
        weight: float64, [output channels, input channels / groups, *taps]; the extent of a
            dimension is the whole layer's or 1.
        groups: of its channels.
        dimensions: the spatial dimensions whose stride, padding and dilation it takes over. Every
            dimension belongs to one factor of a chain.
    """

    weight: Tensor
    groups: int = 1
    dimensions: tuple[int, ...] = ()


Chain = tuple[Factor, ...]


def dense(factor: Factor) -> Tensor:
    """The kernel without groups: [output channels, input channels, *taps], zeros between groups."""
    if factor.groups == 1:
        return factor.weight
    out, within, *taps = factor.weight.shape
    groups, each = factor.groups, out // factor.groups
    kernel = factor.weight.new_zeros((groups, each, groups, within, *taps))
    place = torch.arange(groups)
    kernel[place, :, place] = factor.weight.reshape(groups, each, within, *taps)
    return kernel.reshape(out, groups * within, *taps)


def compose(chain: Chain) -> Tensor:
    """The kernel that a chain of convolutions is equal to, [output, input channels, *taps].

    In every dimension one factor at most has taps, so taps multiply where they meet.
    """
    kernel = _taps_first(dense(chain[0]))
    for factor in chain[1:]:
        kernel = _taps_first(dense(factor)) @ kernel
    return kernel.movedim((-2, -1), (0, 1))


def side_by_side(chains: Sequence[Chain]) -> Chain:
    """The chains of the groups of a convolution as one chain of grouped convolutions."""
    if len(chains) == 1:
        return chains[0]
    return tuple(
        Factor(
            torch.cat([factor.weight for factor in factors]),
            len(factors) * factors[0].groups,
            factors[0].dimensions,
        )
        for factors in zip(*chains, strict=True)
    )


def parameters(chain: Chain) -> int:
    """The number of weights."""
    return sum(factor.weight.numel() for factor in chain)


def multiply_adds(chain: Chain, inputs: Sequence[int], outputs: Sequence[int], rows: int) -> int:
    """Multiply-adds of a chain.

    Args:
        chain: the factors.
        inputs, outputs: the spatial sizes before and after the whole chain.
        rows: how often it is applied: the batch, or the tokens.
    """
    sizes, total = list(inputs), 0
    for factor in chain:
        for dimension in factor.dimensions:
            sizes[dimension] = outputs[dimension]
        total += rows * prod(sizes) * factor.weight.numel()
    return total


def relative_error(kernel: Tensor, approximation: Tensor) -> float:
    """The squared error of a kernel relative to its square; 0 for a kernel of zeros."""
    square = kernel.square().sum().item()
    return (kernel - approximation).square().sum().item() / square if square else 0.0


def balanced(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two factors [rank, n] and [m, rank] of the same product, in which every component has equal
    norms on both sides, so that neither over- nor underflows, nor is hard to quantize."""
    before, after = first.norm(dim=1), second.norm(dim=0)
    scale = torch.where((before > 0) & (after > 0), (after / before).sqrt(), 1.0)
    return first * scale[:, None], second / scale


def _taps_first(kernel: Tensor) -> Tensor:
    return kernel.movedim((0, 1), (-2, -1))
