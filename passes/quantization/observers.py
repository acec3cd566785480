"""Observers: the range of a tensor from the data that flows through it, in constant memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

BINS = 4096
"""Bins of a histogram; zero is the edge in the middle."""

LEAST_LIMIT = 1e-30

Range = tuple[float, float]


class Observer(Protocol):
    """Sees tensors batch by batch, then tells the range that is worth quantizing."""

    def __call__(self, x: Tensor) -> None: ...

    def range(self) -> Range: ...


@dataclass
class MinMax:
    """The least and the largest number seen."""

    low: float = 0.0
    high: float = 0.0

    def __call__(self, x: Tensor) -> None:
        if x.numel():
            low, high = torch.aminmax(x)
            self.low, self.high = min(self.low, low.item()), max(self.high, high.item())

    def range(self) -> Range:
        return self.low, self.high


@dataclass
class MovingAverage:
    """Exponentially weighted means of each batch's least and largest number."""

    momentum: float = 0.9
    low: float = 0.0
    high: float = 0.0
    started: bool = False

    def __call__(self, x: Tensor) -> None:
        if not x.numel():
            return
        low, high = (bound.item() for bound in torch.aminmax(x))
        keep = self.momentum if self.started else 0.0
        self.low = keep * self.low + (1 - keep) * low
        self.high = keep * self.high + (1 - keep) * high
        self.started = True

    def range(self) -> Range:
        return min(self.low, 0.0), max(self.high, 0.0)


@dataclass
class Histogram:
    """Counts in equal bins from -limit to limit. A number beyond doubles the limit: neighbouring
    bins become one, so that the memory stays what it is and no count is lost."""

    limit: float = 0.0
    counts: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.float64))
    low: float = 0.0
    high: float = 0.0
    zeros: int = 0

    def __call__(self, x: Tensor) -> None:
        x = x.detach().flatten().float()
        if not x.numel():
            return
        low, high = (bound.item() for bound in torch.aminmax(x))
        self.low, self.high = min(self.low, low), max(self.high, high)
        largest = max(-low, high)
        if self.limit == 0:
            if largest == 0:
                self.zeros += x.numel()
                return
            self.limit = max(largest, LEAST_LIMIT)
            self.counts[BINS // 2] = self.zeros
        while largest > self.limit:
            self._double()
        self.counts += torch.histc(x, BINS, -self.limit, self.limit).double()

    def _double(self) -> None:
        quarter = BINS // 4
        merged = self.counts.reshape(-1, 2).sum(1)
        self.counts = torch.zeros_like(self.counts)
        self.counts[quarter : BINS - quarter] = merged
        self.limit *= 2

    @property
    def centres(self) -> Tensor:
        """The middle of each bin, [bins]."""
        return (torch.arange(BINS, dtype=torch.float64) + 0.5) * self.width - self.limit

    @property
    def width(self) -> float:
        return 2 * self.limit / BINS


@dataclass
class Percentile(Histogram):
    """The range that leaves out a share of the numbers, half of it at either end where both have
    any."""

    percentage: float = 99.99

    def range(self) -> Range:
        total = self.counts.sum()
        if total == 0:
            return self.low, self.high
        outside = 1 - self.percentage / 100
        share = outside / 2 if self.low < 0 < self.high else outside
        below = self.counts.cumsum(0) / total
        edges = torch.arange(1, BINS + 1) * self.width - self.limit
        low = edges[(below > share).nonzero()[0]].item() - self.width
        high = edges[(below >= 1 - share).nonzero()[0]].item()
        return min(max(low, self.low), 0.0), max(min(high, self.high), 0.0)


@dataclass
class MeanSquaredError(Histogram):
    """The range with the least expected squared error of quantization, clipping included.

    Either end is shrunk separately, in steps of a hundredth of what was seen.
    """

    levels: int = 256
    least: float = 0.3

    def range(self) -> Range:
        return self._search(self._error)

    def _search(self, cost: Callable[[float, float], float]) -> Range:
        """The best shares of both ends, by coordinate descent from the whole range."""
        if self.counts.sum() == 0 or self.low == self.high:
            return self.low, self.high
        shares = [self.least + 0.01 * step for step in range(round((1 - self.least) * 100) + 1)]
        low, high = self.low, self.high
        for _ in range(3):
            before = low, high
            if self.high > 0:
                high = min((self.high * s for s in shares), key=lambda h: (cost(low, h), -h))
            if self.low < 0:
                low = min((self.low * s for s in shares), key=lambda bound: cost(bound, high))
            if (low, high) == before:
                break
        return low, high

    def _error(self, low: float, high: float) -> float:
        step = (high - low) / (self.levels - 1)
        kept = self.counts > 0
        x, counts = self.centres[kept], self.counts[kept]
        zero = round(-low / step)
        rounded = ((x / step).round() + zero).clamp(0, self.levels - 1) - zero
        return float((counts * (rounded * step - x).square()).sum())


@dataclass
class Entropy(MeanSquaredError):
    """The range with the least Kullback-Leibler divergence of the quantized distribution from the
    one that was seen (Migacz, "8-bit inference with TensorRT", 2017)."""

    def range(self) -> Range:
        return self._search(self._divergence)

    def _divergence(self, low: float, high: float) -> float:
        centres = self.centres
        kept = self.counts > 0
        clipped = centres.clamp(low, high)
        # What is beyond an end counts in the outermost bins of the reference.
        place = ((clipped + self.limit) / self.width - 1e-9).long().clamp(0, BINS - 1)
        p = torch.zeros_like(self.counts).index_add_(0, place, self.counts)
        inside = torch.where((centres >= low) & (centres <= high), self.counts, 0.0)
        step = (high - low) / (self.levels - 1)
        level = ((centres - low) / step).round().long().clamp(0, self.levels - 1)
        mass = torch.zeros(self.levels, dtype=torch.float64).index_add_(0, level, inside)
        spread = torch.zeros_like(mass).index_add_(0, level, (kept & (p > 0)).double())
        q = torch.where(p > 0, (mass / spread.clamp_min(1))[level], 0.0)
        p, q = p / p.sum(), q / q.sum().clamp_min(1e-300)
        used = p > 0
        return float((p[used] * (p[used] / q[used].clamp_min(1e-12)).log()).sum())


OBSERVERS: dict[str, Callable[[], Observer]] = {
    "min-max": MinMax,
    "moving-average": MovingAverage,
    "percentile": Percentile,
    "mse": MeanSquaredError,
    "entropy": Entropy,
}
