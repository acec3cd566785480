"""Budgets are met, and joint choices are the best by brute force."""

from __future__ import annotations

import functools
import itertools
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pruning_networks import batches, network, pruned, traced

import graphopt
from graphopt.errors import PassError
from graphopt.passes import Prune
from graphopt.passes.pruning import allocation
from graphopt.passes.pruning.allocation import Share, choose_levels
from graphopt.passes.pruning.layers_to_prune import prunable_layers
from graphopt.report import totals


@functools.cache
def shares(by_macs: bool = False) -> list[Share]:
    layers, _ = prunable_layers(traced())
    return [
        Share(layer, layer.weight.tensor.numel(), layer.macs_per_weight if by_macs else 1.0)
        for layer in layers
    ]


def removed_by(given_shares: list[Share], sparsities: allocation.Sparsities) -> float:
    return sum(share.total * sparsities[share.layer] for share in given_shares)


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("by_macs", [False, True])
def test_budgets_are_met(fraction: float, by_macs: bool) -> None:
    given_shares = shares(by_macs)
    removed = fraction * sum(share.total for share in given_shares)
    errors = {s.layer: [level**2 * k for level in allocation.LEVELS]
              for k, s in enumerate(given_shares, 1)}  # fmt: skip
    results = {
        "uniform": allocation.uniform(given_shares, removed),
        "erk": allocation.erdos_renyi(given_shares, removed),
        "sensitivity": allocation.by_sensitivity(given_shares, removed, allocation.LEVELS, errors),
    }
    for name, sparsities in results.items():
        assert removed_by(given_shares, sparsities) == pytest.approx(removed, rel=1e-3), name
        assert all(0 <= s <= 1 for s in sparsities.values()), name


def test_erdos_renyi_kernel_densities() -> None:
    """Densities are in the proportion of the paper's formula where none is capped."""
    given_shares = shares()
    removed = 0.9 * sum(share.total for share in given_shares)
    sparsities = allocation.erdos_renyi(given_shares, removed)
    ratios = []
    for share in given_shares:
        shape = share.layer.weight.tensor.shape
        outputs = shape[1] if share.layer.is_transposed else shape[0] // share.layer.groups
        inputs = shape[0] if share.layer.is_transposed else shape[1]
        kernel = shape[2:]
        wide = outputs * share.layer.groups
        factor = (wide + inputs + sum(kernel)) / (wide * inputs * torch.Size(kernel).numel())
        density = 1 - sparsities[share.layer]
        if density < 1:
            ratios.append(density / factor)
    assert len(ratios) >= 2
    assert max(ratios) == pytest.approx(min(ratios), rel=1e-3)


@given(st.integers(0, 10_000), st.floats(0.0, 0.95))
def test_sensitivities_of_any_shape_meet_the_budget(seed: int, fraction: float) -> None:
    chance, given_shares = random.Random(seed), shares()
    errors = {s.layer: [0.0, *(chance.random() for _ in allocation.LEVELS[1:])]
              for s in given_shares}  # fmt: skip
    removed = fraction * sum(share.total for share in given_shares)
    found = allocation.by_sensitivity(given_shares, removed, allocation.LEVELS, errors)
    assert removed_by(given_shares, found) == pytest.approx(removed, abs=1e-6)
    assert all(0 <= s <= allocation.MOST for s in found.values())


def all_weights(graph: graphopt.Graph) -> torch.Tensor:
    layers, _ = prunable_layers(graph)
    return torch.cat([layer.weight.tensor.flatten() for layer in layers])


def test_global_prunes_the_smallest_weights_anywhere() -> None:
    graph = traced()
    dense = all_weights(graph)
    pruned(graph, Prune(0.4, allocation="global"))
    smallest = dense.abs().argsort()[: round(0.4 * len(dense))]
    gone = (all_weights(graph) == 0).nonzero().flatten()
    assert set(gone.tolist()) == set(smallest.tolist())


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(2, 4))
def test_levels_are_the_best_of_all_combinations(seed: int, layers: int, levels: int) -> None:
    chance = random.Random(seed)
    costs = [sorted((chance.uniform(1, 10) for _ in range(levels)), reverse=True)
             for _ in range(layers)]  # fmt: skip
    errors = [sorted(chance.uniform(0, 5) for _ in range(levels)) for _ in range(layers)]
    least, most = (sum(map(f, costs)) for f in (min, max))
    budget = least + chance.random() * (most - least)
    found = choose_levels(errors, costs, budget)
    cost = sum(own[k] for own, k in zip(costs, found, strict=True))
    error = sum(own[k] for own, k in zip(errors, found, strict=True))
    assert cost <= budget + 1e-9
    slack = layers * (budget - least) / allocation.GRID
    best = min(
        sum(own[k] for own, k in zip(errors, places, strict=True))
        for places in itertools.product(range(levels), repeat=layers)
        if sum(own[k] for own, k in zip(costs, places, strict=True)) <= budget - slack
        or list(places) == found
    )
    assert error <= best + 1e-9


def test_a_budget_that_nothing_meets() -> None:
    with pytest.raises(PassError, match="below the least possible cost of 3"):
        choose_levels([[0, 1], [0, 1]], [[2, 1], [3, 2]], 2.5)


@pytest.mark.parametrize("how", ["uniform", "global", "erk", "sensitivity"])
@pytest.mark.parametrize("wanted", [0.9, 0.6])
def test_macs_and_parameters(how: str, wanted: float) -> None:
    data = batches() if how == "sensitivity" else None
    graph = traced()
    dense = totals(graph)
    pruned(graph, Prune(parameters=wanted, allocation=how, data=data))
    assert totals(graph).nonzeros == pytest.approx(wanted * dense.parameters, abs=6)

    graph = traced()
    report = pruned(graph, Prune(macs=wanted, allocation=how, data=data))
    before, after = (report.columns.index(f"MACs {w}") for w in ("before", "after"))
    saved = sum(row[before] - row[after] for row in report.rows)
    assert saved == pytest.approx((1 - wanted) * dense.macs, abs=0.01 * dense.macs)


def test_patterns_go_where_they_cost_least() -> None:
    graph = traced()
    dense = totals(graph)
    report = pruned(graph, Prune(macs=0.8, granularity="1:2"))
    got = {row[0]: row[3] for row in report.rows}
    assert set(got.values()) == {0.0, 0.5}
    before, after = (report.columns.index(f"MACs {w}") for w in ("before", "after"))
    assert sum(row[before] - row[after] for row in report.rows) >= 0.2 * dense.macs


def test_a_budget_out_of_reach() -> None:
    model = network()
    with pytest.raises(PassError, match="budget cannot be met"):
        pruned(traced(model), Prune(macs=0.01, ignore=["0", "6"]))
    with pytest.raises(PassError, match=r"budget cannot be met.*50%"):
        pruned(traced(model), Prune(macs=0.4, granularity="2:4"))


def test_a_budget_that_is_met_already() -> None:
    graph = traced()
    text = graph.to_text()
    report = pruned(graph, Prune(parameters=1.0))
    assert graph.to_text() == text
    assert {row[3] for row in report.rows} == {0.0}
