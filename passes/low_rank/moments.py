"""First and second moments of what flows into a layer and out of it, over calibration data."""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Means and covariances of pairs of vectors, accumulated in float64.

    Args:
        x_size, y_size: elements of the vectors; 0 for y where only x matters.

    Attributes:
        count: how many pairs there were.
    """

    def __init__(self, x_size: int, y_size: int) -> None:
        self.count = 0
        self._x = torch.zeros(x_size, dtype=torch.float64)
        self._y = torch.zeros(y_size, dtype=torch.float64)
        self._xx = torch.zeros(x_size, x_size, dtype=torch.float64)
        self._yx = torch.zeros(y_size, x_size, dtype=torch.float64)

    def add(self, x: Tensor, y: Tensor) -> None:
        """More pairs: [pairs, x_size] and [pairs, y_size]."""
        x, y = x.double(), y.double()
        self.count += len(x)
        self._x += x.sum(dim=0)
        self._y += y.sum(dim=0)
        self._xx.addmm_(x.T, x)
        if y.shape[1]:
            self._yx.addmm_(y.T, x)

    @property
    def has_pairs(self) -> bool:
        """Whether there is a y for every x."""
        return len(self._y) > 0

    @property
    def x_mean(self) -> Tensor:
        return self._x / max(self.count, 1)

    @property
    def y_mean(self) -> Tensor:
        return self._y / max(self.count, 1)

    @property
    def covariance(self) -> Tensor:
        """Of x: [x_size, x_size]."""
        return self._xx / max(self.count, 1) - torch.outer(self.x_mean, self.x_mean)

    @property
    def cross_covariance(self) -> Tensor:
        """Of y and x: [y_size, x_size]."""
        return self._yx / max(self.count, 1) - torch.outer(self.y_mean, self.x_mean)
