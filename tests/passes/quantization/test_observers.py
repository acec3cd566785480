"""Observers against closed forms and brute force."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphopt.passes.quantization.observers import (
    BINS,
    OBSERVERS,
    Entropy,
    Histogram,
    MeanSquaredError,
    MinMax,
    MovingAverage,
    Percentile,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_min_max_has_zero_in_its_range() -> None:
    observer = MinMax()
    observer(torch.tensor([2.0, 3.0]))
    assert observer.range() == (0.0, 3.0)
    observer(torch.tensor([[-1.0, 0.5]]))
    assert observer.range() == (-1.0, 3.0)


def test_moving_average_closed_form() -> None:
    observer = MovingAverage(momentum=0.5)
    for low, high in ((-4.0, 8.0), (-2.0, 4.0), (0.0, 0.0)):
        observer(torch.tensor([low, high]))
    assert observer.range() == (((-4 + -2) / 2 + 0) / 2, ((8 + 4) / 2 + 0) / 2)


@settings(max_examples=50)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40), st.data())
def test_a_histogram_loses_no_count(numbers: list[float], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(numbers)))
    histogram = Histogram()
    for part in (numbers[:cut], numbers[cut:]):
        histogram(torch.tensor(part, dtype=torch.float32))
    if max(map(abs, numbers)) > 0:
        assert histogram.counts.sum() == len(numbers)
        assert histogram.limit >= max(map(abs, numbers))
        mean = (histogram.counts * histogram.centres).sum() / len(numbers)
        assert mean == pytest.approx(sum(numbers) / len(numbers), abs=histogram.width)


def test_percentile_of_uniform_numbers() -> None:
    observer = Percentile(percentage=90.0)
    observer(torch.linspace(-1, 1, 200_001))
    low, high = observer.range()
    assert low == pytest.approx(-0.9, abs=2 / BINS)
    assert high == pytest.approx(0.9, abs=2 / BINS)


def test_percentile_of_numbers_without_sign_cuts_one_end() -> None:
    observer = Percentile(percentage=90.0)
    observer(torch.linspace(0, 1, 100_001))
    assert observer.range() == (0.0, pytest.approx(0.9, abs=2 / BINS))


def error(x: Tensor, low: float, high: float, levels: int = 256) -> float:
    step = (high - low) / (levels - 1)
    zero = round(-low / step)
    rounded = ((x.double() / step).round() + zero).clamp(0, levels - 1) - zero
    return float((rounded * step - x.double()).square().mean())


@pytest.mark.parametrize("positive", [True, False])
def test_mean_squared_error_finds_what_brute_force_finds(positive: bool) -> None:
    x = normal(20_000) ** 3
    x = x.abs() if positive else x
    observer = MeanSquaredError(levels=16, least=0.02)
    observer(x)
    least, most = x.min().item(), x.max().item()
    shares = [0.02 * k for k in range(1, 51)]
    best = min(error(x, min(least, 0) * (s if not positive else 1), most * t, 16)
               for s in (shares if not positive else [1.0]) for t in shares)  # fmt: skip
    low, high = observer.range()
    assert error(x, low, high, 16) <= 1.05 * best
    assert error(x, low, high, 16) < 0.7 * error(x, min(least, 0), most, 16)


def test_entropy_keeps_a_uniform_range_and_cuts_a_lone_outlier() -> None:
    even = Entropy()
    even(torch.linspace(-1, 1, 100_000))
    assert even.range() == (pytest.approx(-1, abs=0.05), pytest.approx(1, abs=0.05))
    lone = Entropy()
    lone(torch.cat([normal(100_000), torch.tensor([30.0])]))
    assert lone.range()[1] < 15


@pytest.mark.parametrize("name", list(OBSERVERS))
def test_nothing_zeros_and_shifts(name: str) -> None:
    for tensors in ([torch.zeros(0)], [torch.zeros(3)], [torch.tensor([2.0]), torch.zeros(2)]):
        observer = OBSERVERS[name]()
        for tensor in tensors:
            observer(tensor)
        low, high = observer.range()
        assert low <= 0 <= high
        assert math.isfinite(high - low)


@pytest.mark.parametrize("name", list(OBSERVERS))
def test_memory_does_not_grow_with_the_data(name: str) -> None:
    def size(count: int) -> int:
        observer = OBSERVERS[name]()
        for k in range(count):
            observer(normal(100, seed=k) * (k + 1))
        held = vars(observer).values()
        return sum(x.nbytes if isinstance(x, Tensor) else sys.getsizeof(x) for x in held)

    assert size(2) == size(60)
