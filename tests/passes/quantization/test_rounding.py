"""GPTQ and rounding by reconstruction against brute force and closed forms."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphopt.errors import PassError
from graphopt.passes.quantization.gptq import damped, round_gptq, row_errors
from graphopt.passes.quantization.rounding import round_by_reconstruction
from graphopt.passes.quantization.statistics import shrunk

Method = Callable[[Tensor, Tensor, Tensor, int], Tensor]
METHODS: list[Method] = [round_gptq, round_by_reconstruction]


def problem(
    seed: int, groups: int = 1, channels: int = 3, inputs: int = 6, samples: int = 40
) -> tuple[Tensor, Tensor]:
    """A weight [groups, channels, inputs] and the second moments of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(groups, channels, inputs, generator=generator, dtype=torch.float64)
    mixing = torch.randn(groups, inputs, inputs, generator=generator, dtype=torch.float64)
    x = torch.randn(groups, samples, inputs, generator=generator, dtype=torch.float64) @ mixing
    return weight, x.transpose(1, 2) @ x / samples


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), groups=st.integers(1, 3), inputs=st.integers(1, 70))
def test_never_worse_than_the_nearest_steps(
    method: Method, seed: int, groups: int, inputs: int
) -> None:
    weight, covariance = problem(seed, groups, inputs=inputs)
    scale = torch.full((groups, 3, 1), 0.3)
    steps = method(weight, scale, covariance, 7)
    assert steps.abs().max() <= 7
    assert (steps == steps.round()).all()
    nearest = (weight / 0.3).round().clamp(-7, 7)
    found = row_errors(weight, steps * scale.double(), damped(covariance))
    simple = row_errors(weight, nearest * scale.double(), damped(covariance))
    assert (found <= simple * (1 + 1e-9)).all()


@pytest.mark.parametrize("method", METHODS)
def test_independent_inputs_round_to_the_nearest_step(method: Method) -> None:
    weight, _ = problem(1)
    covariance = torch.diag(torch.tensor([1.0, 2.0, 3.0, 0.5, 9.0, 0.1]))[None]
    steps = method(weight, torch.full((1, 3, 1), 0.25), covariance, 127)
    assert torch.equal(steps, (weight / 0.25).round())


def test_reconstruction_is_near_the_best_of_all() -> None:
    """All roundings up or down of 6 columns, tried one by one."""
    ratios = []
    for seed in range(12):
        weight, covariance = problem(seed, channels=1)
        scale = 0.5
        low = (weight / scale).floor()
        choices = [low[0, 0] + torch.tensor(c) for c in itertools.product((0, 1), repeat=6)]
        every = torch.stack(choices)[None]
        errors = row_errors(weight, every * scale, damped(covariance))
        best, simple = errors.min(), row_errors(
            weight, (weight / scale).round() * scale, damped(covariance)
        )  # fmt: skip
        found = round_by_reconstruction(weight, torch.full((1, 1, 1), scale), covariance, 127)
        error = row_errors(weight, found * scale, damped(covariance))
        ratios.append(((error - best) / (simple - best + 1e-12)).item())
    assert sum(ratios) / len(ratios) < 0.25


def test_no_single_step_improves_a_reconstruction() -> None:
    weight, covariance = problem(3)
    scale = torch.full((1, 3, 1), 0.4)
    steps = round_by_reconstruction(weight, scale, covariance, 7, sweeps=100)
    error = row_errors(weight, steps * 0.4, damped(covariance))
    for j, change in itertools.product(range(6), (-1, 1)):
        other = steps.clone()
        other[:, :, j] = (other[:, :, j] + change).clamp(-7, 7)
        changed = row_errors(weight, other * 0.4, damped(covariance))
        assert (changed >= error * (1 - 1e-6)).all()


@pytest.mark.parametrize("method", METHODS)
def test_zeros_stay_zeros_and_dead_inputs_do_no_harm(method: Method) -> None:
    weight, covariance = problem(4, groups=2)
    weight[:, :, ::2] = 0
    covariance[0] = 0
    covariance[1, 3] = covariance[1, :, 3] = 0
    steps = method(weight, torch.full((2, 3, 1), 0.1), covariance, 127)
    assert steps.isfinite().all()
    assert (steps[:, :, ::2] == 0).all()
    assert torch.equal(steps[0], (weight[0] / 0.1).round())


@pytest.mark.parametrize("method", METHODS)
def test_zeros_do_not_make_good_for_weights_that_are_clipped(method: Method) -> None:
    """Almost equal inputs, so that they could."""
    weight, _ = problem(0, channels=20, inputs=12)
    weight[:, :, ::2] = 0
    covariance = torch.full((1, 12, 12), 0.9) + 0.1 * torch.eye(12)
    steps = method(weight, torch.full((1, 20, 1), 0.5), covariance, 1)
    assert (steps[:, :, ::2] == 0).all()


def test_shrinking_by_the_formula() -> None:
    """Chen et al. 2010, equation 23, spelled out for one matrix."""
    matrix = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    p, n = 2, 5
    trace, square = 3.0, 4 + 0.25 + 0.25 + 1
    share = ((1 - 2 / p) * square + trace**2) / ((n + 1 - 2 / p) * (square - trace**2 / p))
    expected = (1 - min(share, 1)) * matrix + min(share, 1) * trace / p * torch.eye(2)
    torch.testing.assert_close(shrunk(matrix, n), expected.double())
    torch.testing.assert_close(shrunk(matrix, 10**9), matrix, rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("level", [0.0, -1e-15, 1e-300])
def test_inputs_that_never_vary(method: Method, level: float) -> None:
    """What is left of their covariance is rounding, and may be negative."""
    weight, _ = problem(0)
    scale = torch.full((1, 3, 1), 0.3)
    steps = method(weight, scale, level * torch.eye(6, dtype=torch.float64)[None], 127)
    assert (steps * 0.3 - weight).abs().max() <= 0.3


def test_moments_that_are_not_finite() -> None:
    with pytest.raises(PassError, match="not finite"):
        damped(torch.full((1, 2, 2), torch.nan, dtype=torch.float64))
