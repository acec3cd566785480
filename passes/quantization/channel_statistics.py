"""What data says of the channels of a tensor: largest magnitudes, means and variances."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class ChannelRange:
    """The largest magnitude of every channel.

    Args:
        dimension: which one holds the channels.
    """

    def __init__(self, dimension: int) -> None:
        self._dimension = dimension
        self.largest: Tensor | None = None

    def __call__(self, x: Tensor) -> None:
        largest = _over_others(torch.amax, x.abs(), self._dimension)
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)


class ChannelMean:
    """The mean of every channel, [channels] in float64.

    Args:
        dimension: which one holds the channels.
    """

    def __init__(self, dimension: int) -> None:
        self._dimension = dimension
        self._count = 0
        self._sum: Tensor | float = 0.0

    def __call__(self, x: Tensor) -> None:
        self._count += x.numel() // max(x.shape[self._dimension], 1)
        self._sum = self._sum + _over_others(torch.sum, x.double(), self._dimension)

    def mean(self) -> Tensor:
        assert isinstance(self._sum, Tensor)
        return self._sum / self._count


class ChannelMoments(ChannelMean):
    """The mean and the variance of every channel, [channels] in float64."""

    def __init__(self, dimension: int) -> None:
        super().__init__(dimension)
        self._squares: Tensor | float = 0.0

    def __call__(self, x: Tensor) -> None:
        super().__call__(x)
        squares = x.double().square()
        self._squares = self._squares + _over_others(torch.sum, squares, self._dimension)

    def variance(self) -> Tensor:
        """Without bias, as running statistics of batch normalisation are."""
        unbiased = self._count / max(self._count - 1, 1)
        variance = (self._squares / self._count - self.mean().square()) * unbiased
        return variance.clamp_min(0)


def _over_others(
    reduce: Callable[[Tensor, list[int]], Tensor], x: Tensor, dimension: int
) -> Tensor:
    """Reduce all dimensions but one. (For no dimensions, torch would reduce all.)"""
    others = [d for d in range(x.dim()) if d != dimension]
    return reduce(x, others) if others else x
