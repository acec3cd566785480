"""Which layers are decomposed: the gate of measured time, and budgets."""

from __future__ import annotations

import math

import pytest
import torch
from low_rank_support import X, applied, by_macs, flat, macs_of, network, parameters_of

import graphopt
from graphopt.errors import PassError
from graphopt.flops import count_flops
from graphopt.ir import Graph
from graphopt.passes import LowRank
from graphopt.target import Target

# -- the gate ------------------------------------------------------------------------------------


def test_chains_that_are_not_faster_are_not_applied_and_the_report_has_both_times():
    graph, report = applied(network(), X, LowRank("svd", rank=0.25), target=Target(time=flat))
    assert len([n for n in graph.nodes if n.op.startswith("aten.conv")]) == 4
    assert report.rows == ()
    assert "2 stays: svd of rank 8 takes 2 ms, the layer 1 ms" in str(report)


def test_chains_that_are_faster_are_applied_and_the_report_has_both_times():
    one = LowRank("svd", rank={"2": 4})
    graph, report = applied(network(), X, one, target=Target(time=by_macs))
    (row,) = report.rows
    layer, method, rank, *_ = row
    assert (layer, method, rank) == ("2", "svd", "4")
    before, after = 1e-9 * 32 * 32 * 9 * 144 + 1e-7, 1e-9 * (32 * 4 * 9 + 4 * 32) * 144 + 2e-7
    assert row[8] == pytest.approx(1e3 * before)
    assert row[9] == pytest.approx(1e3 * after)
    assert macs_of(graph) < macs_of(graphopt.trace(network(), X))


def test_zeros_of_the_layer_count():
    """A sparse layer is timed with its zeros, as the engine would run it."""
    model = network()
    with torch.no_grad():
        model[2].weight[:, 2:] = 0

    def skips_zeros(fragment: Graph) -> float:
        total = 0.0
        for node in fragment.nodes:
            weight = node["weight"].constant
            total += count_flops(node) * (weight != 0).double().mean().item()
        return 1e-9 * total

    one = LowRank("svd", rank={"2": 16})
    _, report = applied(model, X, one, target=Target(time=skips_zeros))
    assert report.rows == ()
    _, report = applied(network(), X, one, target=Target(time=skips_zeros))
    assert len(report.rows) == 1


def test_without_a_clock_the_error_says_what_to_do():
    with pytest.raises(PassError, match="cannot measure time"):
        applied(network(), X, LowRank("svd", rank=0.25))


# -- budgets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("method", ["auto", "svd", "tucker2", ("spatial", "grouped")])
def test_a_budget_of_multiply_adds_is_met(method, share):
    one = LowRank(method, macs=share, only_faster=False)
    graph, report = applied(network(), X, one)
    before = macs_of(graphopt.trace(network(), X))
    assert 0.8 * share * before < macs_of(graph) <= share * before
    saved = sum(row[5] - row[6] for row in report.rows)
    assert "merged" in str(report) or before - saved == macs_of(graph)


def test_a_budget_of_parameters_is_met():
    graph, _ = applied(network(), X, LowRank(parameters=0.4, only_faster=False))
    assert parameters_of(graph) <= 0.4 * parameters_of(graphopt.trace(network(), X))


@pytest.mark.parametrize("speedup", [1.2, 2.0, 3.0])
def test_a_budget_of_time_is_met(speedup):
    target = Target(time=by_macs)
    graph, report = applied(network(), X, LowRank(speedup=speedup), target=target)
    before = by_macs(graphopt.trace(network(), X))
    assert before / speedup >= by_macs(graph) > 0.7 * before / speedup
    assert all(row[9] < row[8] for row in report.rows)


def test_budgets_of_several_costs_are_met_together():
    target = Target(time=by_macs)
    before = graphopt.trace(network(), X)
    one = LowRank(macs=0.45, parameters=0.35, speedup=1.5)
    graph, _ = applied(network(), X, one, target=target)
    assert macs_of(graph) <= 0.45 * macs_of(before)
    assert by_macs(graph) <= by_macs(before) / 1.5
    assert parameters_of(graph) <= 0.35 * parameters_of(before)


def test_a_larger_budget_has_a_smaller_error():
    losses = []
    for share in (0.3, 0.5, 0.8):
        _, report = applied(network(), X, LowRank(macs=share, only_faster=False))
        losses.append(sum(-math.log(1 - row[7] ** 2) for row in report.rows))
    assert losses == sorted(losses, reverse=True)


def test_layers_without_a_gain_stay_under_a_budget():
    """Where 1x1 convolutions cost nothing, the others bear the budget alone."""

    def pointwise_is_free(fragment: Graph) -> float:
        taps = [
            node for node in fragment.nodes if "conv2d" in node.op and node["weight"].shape[2] > 1
        ]
        return 1e-6 + 1e-9 * sum(count_flops(node) for node in taps)

    target = Target(time=pointwise_is_free)
    graph, report = applied(network(), X, LowRank("svd", macs=0.5), target=target)
    assert {row[0] for row in report.rows} <= {"0", "2", "6"}
    assert macs_of(graph) <= 0.5 * macs_of(graphopt.trace(network(), X))


def test_a_budget_that_cannot_be_met():
    with pytest.raises(PassError, match=r"keeps [\d.]+% of its multiply-adds; .* macs=0\.\d+"):
        applied(network(), X, LowRank("svd", macs=0.001, only_faster=False))
    with pytest.raises(PassError, match=r"that are faster than their layers .* at most speedup="):
        applied(network(), X, LowRank("svd", speedup=2.0), target=Target(time=flat))
