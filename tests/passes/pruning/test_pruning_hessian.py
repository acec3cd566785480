"""Pruning with weight update, against least squares in float64 and enumeration."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pruning_networks import batches, pruned, traced
from torch import Tensor, nn

from graphopt import reference
from graphopt.passes import Prune
from graphopt.passes.pruning import hessian
from graphopt.passes.pruning.granularity import Blocks, Granularity, Pattern
from graphopt.passes.pruning.hessian import Problem
from graphopt.passes.pruning.layer_inputs import as_matrix, columns, from_matrix
from graphopt.passes.pruning.layers_to_prune import prunable_layers

SHAPES = [Blocks(), Blocks(1, 4), Blocks(2, 2), Pattern(2, 4)]


def problem(rows: int, channels: int, taps: int = 1, seed: int = 0, samples: int = 40) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    size = channels * taps
    mixing = torch.randn(size, size, generator=generator, dtype=torch.float64)
    x = mixing @ torch.randn(size, samples, generator=generator, dtype=torch.float64)
    weight = torch.randn(rows, size, generator=generator, dtype=torch.float64)
    return Problem(weight, hessian.damped(x @ x.T, 0.01), weight != 0, taps)


def least_squares(given: Problem, mask: Tensor) -> Tensor:
    """Row by row, by solving the normal equations on the support."""
    result = torch.zeros_like(given.weight)
    for row, kept in enumerate(mask):
        h = given.hessian[kept]
        result[row, kept] = torch.linalg.solve(h[:, kept], h @ given.weight[row])
    return result


@pytest.mark.parametrize("granularity", SHAPES, ids=str)
@pytest.mark.parametrize("taps", [1, 3])
def test_weights_that_stay_are_the_least_squares_solution(
    granularity: Granularity, taps: int
) -> None:
    given = problem(6, 8, taps)
    found = hessian.prune(given, granularity, 0.5)
    exact = least_squares(given, found != 0)
    assert given.error(found) <= given.error(exact) * 1.01
    assert (found - exact).norm() <= 0.05 * exact.norm()


@pytest.mark.parametrize("seed", range(8))
def test_the_mask_is_near_the_best_of_all(seed: int) -> None:
    given = problem(1, 8, seed=seed)
    errors = []
    for places in itertools.combinations(range(8), 4):
        mask = torch.zeros(1, 8, dtype=torch.bool)
        mask[0, list(places)] = True
        errors.append(given.error(least_squares(given, mask)))
    found = hessian.prune(given, Blocks(), 0.5)
    assert int((found != 0).sum()) == 4
    ranked = sorted(errors)
    assert given.error(found) <= ranked[4] * 1.001, "not among the best 5 of 70 masks"


def test_uncorrelated_inputs_have_the_best_mask_and_no_update() -> None:
    given = problem(1, 8)
    given = Problem(given.weight, torch.diag(torch.arange(1.0, 9).double()), given.remaining, 1)
    found = hessian.prune(given, Blocks(), 0.5)
    costs = (given.weight.square() * given.hessian.diagonal()).flatten()
    assert set(found.flatten().nonzero().flatten().tolist()) == set(costs.topk(4).indices.tolist())
    assert torch.allclose(found[found != 0], given.weight[found != 0])


@settings(max_examples=60)
@given(
    st.integers(1, 6), st.integers(4, 12), st.integers(1, 3), st.sampled_from(SHAPES),
    st.floats(0.05, 0.95), st.integers(0, 1000), st.integers(2, 60),
)  # fmt: skip
def test_never_worse_than_magnitude_in_the_same_pattern(
    rows: int,
    channels: int,
    taps: int,
    granularity: Granularity,
    sparsity: float,
    seed: int,
    samples: int,
) -> None:
    given = problem(rows, channels, taps, seed, samples)
    found = hessian.prune(given, granularity, sparsity)
    magnitude = granularity.mask(
        given.as_taps(given.weight.abs()), given.as_taps(given.remaining), sparsity
    )
    plain = given.weight * given.as_matrix(magnitude)
    assert given.error(found) <= given.error(plain) * (1 + 1e-9)
    if isinstance(granularity, Pattern):
        kept = given.as_taps(found != 0)
        spare = -channels % granularity.m
        filled = torch.nn.functional.pad(kept, (0, 0, 0, spare))
        assert (filled.reshape(1, rows, -1, granularity.m, taps).sum(3) <= granularity.n).all()
    else:
        sizes = granularity.sizes(given.as_taps(found).shape)
        zeros = sizes[granularity.sums(given.as_taps(found).abs()) == 0].sum()
        assert abs(float(zeros) - sparsity * found.numel()) <= float(sizes.max()) + 1e-9


def test_zeros_stay_zero_and_inputs_that_are_zero_do_no_harm() -> None:
    given = problem(4, 8)
    weight = given.weight.clone()
    weight[:, :3] = 0
    moment = given.hessian.clone()
    moment[5] = moment[:, 5] = 0
    silent = Problem(weight, hessian.damped(moment, 0.01), weight != 0, 1)
    found = hessian.prune(silent, Blocks(), 0.5)
    assert not found[:, :3].any()
    assert int((found != 0).sum()) == 10
    assert found.isfinite().all()


CONVOLUTIONS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2, bias=False), (4, 11, 9)),
    (nn.Conv2d(3, 4, (2, 3), padding="same", bias=False), (3, 6, 7)),
    (nn.Conv1d(4, 6, 3, padding=2, bias=False), (4, 9)),
    (nn.Conv3d(2, 4, 2, stride=2, bias=False), (2, 4, 6, 5)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2, bias=False),
     (4, 5, 6)),
    (nn.ConvTranspose2d(3, 4, (3, 2), dilation=(1, 2), padding=(2, 0), bias=False), (3, 5, 6)),
    (nn.ConvTranspose1d(3, 4, 4, stride=3, bias=False), (3, 5)),
    (nn.Linear(5, 6, bias=False), (3, 5)),
]  # fmt: skip


@pytest.mark.parametrize(("module", "shape"), CONVOLUTIONS, ids=lambda x: type(x).__name__)
def test_a_layer_is_its_weight_times_the_columns(module: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(2, *shape)
    graph = traced(module, x)
    (layer,), _ = prunable_layers(graph)
    taps = layer.taps(layer.weight.tensor)
    assert torch.equal(layer.stored(taps), layer.weight.tensor)
    assert torch.equal(from_matrix(as_matrix(taps), taps.shape), taps)
    (given,) = columns(layer.node, x, layer.kernel)
    product = as_matrix(taps) @ given
    expected = module(x)
    if isinstance(module, nn.Linear):
        expected = expected.flatten(0, 1).T
    else:
        expected = expected.transpose(0, 1).flatten(1)
    assert torch.allclose(product.flatten(0, 1), expected, atol=1e-5)


@pytest.mark.parametrize("granularity", ["unstructured", "2x2", "2:4"])
@pytest.mark.parametrize("sequential", [True, False])
def test_a_network_loses_less_than_by_magnitude(granularity: str, sequential: bool) -> None:
    data = batches(4, 16)
    exact = reference.run(traced(), [data[0][0]])[0]
    errors = {}
    for criterion in ("magnitude", "hessian"):
        graph = traced()
        options = {"sparsity": 0.5} if granularity != "2:4" else {}
        one = Prune(**options, granularity=granularity, criterion=criterion, data=data,
                    sequential=sequential)  # fmt: skip
        pruned(graph, one)
        errors[criterion] = float((reference.run(graph, [data[0][0]])[0] - exact).norm())
    assert errors["hessian"] < 0.7 * errors["magnitude"]


def test_the_bias_takes_up_the_mean() -> None:
    """Inputs that are all alike: the bias alone can make up for any weight."""
    layer = nn.Linear(6, 3)
    x = torch.randn(1, 6).expand(8, 6) + 0.0
    graph = traced(layer, x)
    exact = reference.run(graph, [x])[0]
    pruned(graph, Prune(0.5, criterion="hessian", data=[x]))
    assert torch.allclose(reference.run(graph, [x])[0], exact, atol=1e-5)
