"""First and second moments of what flows into a layer and out of it, over calibration data."""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Means and covariances of pairs of vectors, accumulated in float64.

    The vectors come in samples, such as the positions of an image. Those of a sample have much in
    common, so how well the data tells a covariance depends on the number of samples. Every sample
    counts the same.

    Args:
        x_size, y_size: elements of the vectors; 0 for y where only x matters.

    Attributes:
        count: how many samples there were.
    """

    def __init__(self, x_size: int, y_size: int) -> None:
        self.count = 0
        self._origin: Tensor | None = None  # near the mean, so that few digits cancel
        self._x = torch.zeros(x_size, dtype=torch.float64)
        self._y = torch.zeros(y_size, dtype=torch.float64)
        self._xx = torch.zeros(x_size, x_size, dtype=torch.float64)
        self._yx = torch.zeros(y_size, x_size, dtype=torch.float64)
        # What the spread of the samples' own moments takes, see `_spread`.
        self._squares = 0.0
        self._turned = torch.zeros(x_size, dtype=torch.float64)
        self._means = torch.zeros(0, x_size, dtype=torch.float64)

    def add(self, x: Tensor, y: Tensor) -> None:
        """More samples: [samples, vectors, x_size] and [samples, vectors, y_size]."""
        samples, vectors, size = x.shape
        if not samples * vectors:
            return
        x, y = x.double(), y.double()
        if self._origin is None:
            self._origin = x.mean(dim=(0, 1))
        x = x - self._origin
        means = x.mean(dim=1)
        self.count += samples
        self._x += means.sum(dim=0)
        self._y += y.mean(dim=1).sum(dim=0)
        if y.shape[2]:
            self._yx.addmm_(y.flatten(0, 1).T, x.flatten(0, 1), alpha=1 / vectors)
        if vectors > size:
            products = x.mT @ x / vectors
            self._xx += products.sum(dim=0)
        else:  # of the same norm, and smaller
            products = x @ x.mT / vectors
            self._xx.addmm_(x.flatten(0, 1).T, x.flatten(0, 1), alpha=1 / vectors)
        self._squares += products.square().sum().item()
        self._turned += (x.mT @ (x @ means[:, :, None])).sum(dim=(0, 2)) / vectors
        self._means = torch.cat([self._means, means])
        if len(self._means) > 2 * size:
            self._means = torch.linalg.qr(self._means, mode="r").R

    @property
    def has_pairs(self) -> bool:
        """Whether there is a y for every x."""
        return len(self._y) > 0

    @property
    def x_mean(self) -> Tensor:
        return self._offset if self._origin is None else self._origin + self._offset

    @property
    def y_mean(self) -> Tensor:
        return self._y / max(self.count, 1)

    @property
    def covariance(self) -> Tensor:
        """Of x: [x_size, x_size]."""
        return self._xx / max(self.count, 1) - torch.outer(self._offset, self._offset)

    @property
    def cross_covariance(self) -> Tensor:
        """Of y and x: [y_size, x_size]."""
        return self._yx / max(self.count, 1) - torch.outer(self.y_mean, self._offset)

    def shrinkage(self, target: Tensor) -> tuple[float, float]:
        """How far the covariance of x is to be moved towards a multiple of a matrix so that the
        expected squared error is the least, the samples being drawn independently.

        Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance matrices",
        2004, where the target is the identity and a sample is a single vector.

        Args:
            target: float64, [x_size, x_size].

        Returns:
            The part of the target from 0 to 1, and its multiple; 0 for a single sample, of which
            nothing is known about how samples differ.
        """
        covariance, count = self.covariance, max(self.count, 1)
        square = target.square().sum().item()
        multiple = (covariance * target).sum().item() / square if square else 0.0
        distance = (covariance - multiple * target).square().sum().item()
        variance = (self._spread() / count - covariance.square().sum().item()) / count
        if variance <= 0:
            return 0.0, multiple
        return (variance / distance if variance < distance else 1.0), multiple

    @property
    def _offset(self) -> Tensor:
        """The mean from the origin."""
        return self._x / max(self.count, 1)

    def _spread(self) -> float:
        """The sum over samples of the squared norms of their own moments about the mean.

        With the mean m of all, and the mean s and second moment G of a sample, that is
        ``|G - m s.T - s m.T + m m.T|^2``; it is multiplied out, as m is known only at last.
        """
        mean, count = self._offset, self.count
        length = mean.square().sum().item()
        return (
            self._squares
            + 2 * length * self._means.square().sum().item()
            + 2 * (self._means @ mean).square().sum().item()
            - 4 * (mean @ self._turned).item()
            + 2 * (mean @ self._xx @ mean).item()
            - 3 * count * length**2
        )
