"""Decompositions for data: against the closed form, brute force, and the plain ones."""

from __future__ import annotations

import pytest
import torch
from low_rank_support import generator, random
from torch import nn

import graphopt
from graphopt.ir.patterns import Decline
from graphopt.passes import LowRank
from graphopt.passes.low_rank.factors import compose
from graphopt.passes.low_rank.gathering import add_inputs, empty
from graphopt.passes.low_rank.methods import METHODS, family
from graphopt.passes.low_rank.moments import Moments
from graphopt.passes.low_rank.splitting import Splitting
from graphopt.passes.low_rank.subjects import subject_of
from graphopt.passes.low_rank.whitening import (
    RIDGE,
    OutputError,
    PrincipalOutputs,
    Refined,
    refitted,
    regression_of,
)
from graphopt.pipeline import Context, Pipeline


def correlated(count: int, size: int, seed: int = 1) -> torch.Tensor:
    """Vectors of which a few directions hold most, with a mean: [count, size]."""
    scales = torch.logspace(0, -2, size, dtype=torch.float64)
    mixing = torch.linalg.qr(random(size, size, seed=seed)).Q
    return (random(count, size, seed=seed + 1) * scales) @ mixing + 0.5


def moments_of(x: torch.Tensor, y: torch.Tensor | None = None) -> Moments:
    moments = Moments(x.shape[1], 0 if y is None else y.shape[1])
    for part, target in zip(
        x.chunk(3), x.new_zeros(len(x), 0).chunk(3) if y is None else y.chunk(3), strict=True
    ):
        moments.add(part, target)
    return moments


# -- moments -------------------------------------------------------------------------------------


def test_moments_over_batches_are_those_of_all_data():
    x, y = correlated(50, 4), random(50, 3, seed=9)
    moments = moments_of(x, y)
    whole = torch.cov(torch.cat([x, y], dim=1).T, correction=0)
    assert moments.count == 50
    torch.testing.assert_close(moments.covariance, whole[:4, :4])
    torch.testing.assert_close(moments.cross_covariance, whole[4:, :4])
    torch.testing.assert_close(moments.x_mean, x.mean(dim=0))


@pytest.mark.parametrize("pad", ["same", "valid", 1])
def test_sampled_inputs_belong_to_the_outputs(pad):
    """Regressing outputs on the inputs at the same positions gives the weight back."""
    model = nn.Conv2d(4, 6, (3, 2), padding=pad, groups=2).double()
    x = random(3, 4, 40, 41)
    graph = graphopt.trace(model, x)
    subject = subject_of(graph, graph.nodes[0])
    assert subject is not None
    assert not isinstance(subject, Decline)
    moments = empty(subject, inputs=True, outputs=False, pairs=True)
    with torch.no_grad():
        add_inputs(subject, moments, x, model(x), generator())
    for one, kernel in zip(moments.inputs, subject.kernels(), strict=True):
        assert one.count == 3 * 1024
        found = torch.linalg.solve(one.covariance, one.cross_covariance.T).T
        torch.testing.assert_close(found, kernel.flatten(1))


# -- matrix products: the closed form ------------------------------------------------------------


def output_error(kernel, approximation, x):
    """Mean squared error of the outputs but for their mean, relative to their variance."""
    centred = x - x.mean(dim=0)
    lost = (centred @ (kernel - approximation).flatten(1).T).square().sum()
    return (lost / (centred @ kernel.flatten(1).T).square().sum()).item()


def test_principal_outputs_are_the_analytic_optimum():
    """By whitening: W C^(1/2) has the rank-r approximation that its singular values give."""
    kernel, x = random(6, 5), correlated(400, 5)
    one = PrincipalOutputs(Splitting(kernel, 1, generator()), kernel, moments_of(x @ kernel.T))
    values, vectors = torch.linalg.eigh(torch.cov(x.T, correction=0))
    whitened = torch.linalg.svdvals(kernel @ vectors * values.clamp_min(0).sqrt())
    for rank in range(1, 6):
        tail = (whitened[rank:].square().sum() / whitened.square().sum()).item()
        error = output_error(kernel, compose(one.chain((rank,))), x)
        assert error == pytest.approx(tail, abs=1e-9)
        assert one.error((rank,)) == pytest.approx(tail, abs=RIDGE)


def test_reduced_rank_regression_beats_every_other_map():
    """Inputs carry an error; the outputs wanted are those of the inputs without it."""
    kernel, x = random(5, 4), correlated(500, 4)
    disturbed = x + 0.3 * random(500, 4, seed=8)
    wanted, now = x @ kernel.T, disturbed @ kernel.T
    one = PrincipalOutputs(Splitting(kernel, 1, generator()), kernel, moments_of(now, wanted))
    chain = one.chain((2,))
    found = disturbed @ compose(chain).T + one.shift((2,), chain)
    least = (wanted - found).square().mean().item()
    plain = PrincipalOutputs(Splitting(kernel, 1, generator()), kernel, moments_of(now))
    other = disturbed @ compose(plain.chain((2,))).T + plain.shift((2,), plain.chain((2,)))
    assert least < (wanted - other).square().mean().item()
    for seed in range(20):  # no map of the same rank nearby is better
        left, right = chain[1].weight, chain[0].weight
        near = (left + 0.02 * random(*left.shape, seed=seed)) @ (
            right + 0.02 * random(*right.shape, seed=seed + 50)
        )
        moved = disturbed @ near.T
        residual = wanted - moved
        assert (residual - residual.mean(dim=0)).square().mean().item() >= least - 1e-9


def test_the_means_are_met():
    kernel, x = random(6, 5), correlated(300, 5)
    outputs = x @ kernel.T
    one = PrincipalOutputs(Splitting(kernel, 1, generator()), kernel, moments_of(outputs))
    chain = one.chain((2,))
    found = x @ compose(chain).T + one.shift((2,), chain)
    torch.testing.assert_close(found.mean(dim=0), outputs.mean(dim=0))


def test_regression():
    x = random(200, 4, seed=3) + 0.5
    y = x @ random(4, 4).T + 0.1 * random(200, 4, seed=5)
    moments = moments_of(x, y)
    found = regression_of(moments.cross_covariance, moments.covariance)
    exact = torch.linalg.lstsq(x - x.mean(dim=0), y - y.mean(dim=0)).solution.T
    torch.testing.assert_close(found, exact, rtol=0, atol=10 * RIDGE)
    silent = regression_of(torch.zeros(3, 3).double(), torch.zeros(3, 3).double())
    torch.testing.assert_close(silent, torch.eye(3).double())


def test_refitted_is_least_squares():
    kernel, x = random(3, 4), random(200, 4, seed=3) + 0.5
    y = x @ random(4, 3, seed=6)
    moments = moments_of(x, y)
    found = refitted(kernel, moments.cross_covariance, moments.covariance)
    torch.testing.assert_close(found, random(4, 3, seed=6).T, rtol=0, atol=10 * RIDGE)


# -- alternating least squares -------------------------------------------------------------------


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("svd", "channel")])
def test_on_data_the_output_is_nearer_than_with_the_plain_decomposition(method):
    kernel, x = random(6, 4, 3, 3), correlated(400, 36)
    plain = family(method, kernel, generator())
    assert not isinstance(plain, Decline)
    one = Refined(plain, kernel, moments_of(x))
    ranks = tuple(max(1, full // 4) for full in plain.full)
    before = output_error(kernel, compose(plain.chain(ranks)), x)
    drafted = output_error(kernel, compose(one.draft(ranks)), x)
    chain = one.chain(ranks)
    after = output_error(kernel, compose(chain), x)
    assert after <= min(before, drafted) + 1e-9
    assert after < 0.8 * before
    assert one.error(ranks) == pytest.approx(drafted, abs=10 * RIDGE)
    shifted = x @ compose(chain).flatten(1).T + one.shift(ranks, chain)
    torch.testing.assert_close(shifted.mean(dim=0), (x @ kernel.flatten(1).T).mean(dim=0))


def test_alternating_least_squares_comes_near_the_analytic_optimum():
    """For two factors the optimum is known; the iteration starts away from it."""
    kernel, x = random(6, 5), correlated(400, 5)
    problem = OutputError(kernel, torch.cov(x.T, correction=0))
    plain = Splitting(kernel, 1, generator())
    chain = plain.chain((2,))
    for _ in range(30):
        chain = problem.improve(chain)
    best = PrincipalOutputs(plain, kernel, moments_of(x @ kernel.T)).error((2,))
    assert problem.error(chain) == pytest.approx(best, rel=1e-3)


# -- through the pass ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(5, 8, 1), nn.Conv2d(5, 8, 3, padding=1, stride=2), nn.Conv2d(5, 8, (1, 3))]
)
def test_a_layer_with_batch_norm_gets_the_analytic_optimum_of_its_inputs(layer):
    """The inputs are gathered by torch, the optimum comes from a Cholesky factor of their
    covariance: the error that the pass reports, and that of the chain it puts in place."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8)
    for tensor in (norm.running_mean, norm.bias, norm.running_var, norm.weight):
        nn.init.uniform_(tensor, 0.5, 2)
    model = nn.Sequential(layer, norm).double().eval()
    mixing = random(5, 5, seed=4) * torch.logspace(0, -1.5, 5, dtype=torch.float64)
    x = torch.einsum("oi,bihw->bohw", mixing, random(4, 5, 12, 12)) + 1
    graph = graphopt.trace(model, x)
    ctx = Context()
    one = LowRank("svd", rank=3, data=[x[:2], x[2:]], only_faster=False)
    Pipeline(["fold-batch-norm", one]).run(graph, ctx)

    taps, padding, stride = layer.kernel_size, layer.padding, layer.stride
    seen = nn.functional.unfold(x, taps, padding=padding, stride=stride)
    covariance = torch.cov(seen.transpose(0, 1).flatten(1), correction=0)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    kernel = (layer.weight * scale.reshape(-1, 1, 1, 1)).detach().flatten(1)
    whitened = torch.linalg.svdvals(kernel @ torch.linalg.cholesky(covariance))
    least = (whitened[3:].square().sum() / whitened.square().sum()).item()

    with torch.no_grad():
        exact = model(x)
    lost = graphopt.reference.run(graph, [x])[0] - exact
    variance = (exact - exact.mean(dim=(0, 2, 3), keepdim=True)).square().sum()
    assert (lost.square().sum() / variance).item() == pytest.approx(least, rel=1e-4)
    assert ctx.reports[-1].rows[0][7] ** 2 == pytest.approx(least, abs=RIDGE)  # its share of it


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, padding="same"),
        nn.ReLU(),
        nn.Conv2d(24, 24, 3, groups=2),
        nn.ReLU(),
        nn.Conv2d(24, 32, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 20),
    ).eval()


def images(count: int, seed: int) -> torch.Tensor:
    """Smooth images, as photographs are."""
    noise = torch.randn(count, 3, 6, 6, generator=generator(seed))
    return nn.functional.interpolate(noise, size=(24, 24), mode="bilinear")


def error_of(x: torch.Tensor, data, **options) -> float:
    model = network()
    graph = graphopt.trace(model, x)
    Pipeline([LowRank(only_faster=False, data=data, **options)]).run(graph, Context())
    with torch.no_grad():
        exact = model(x)
    return ((graphopt.reference.run(graph, [x])[0] - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize(
    "options",
    [
        {"method": "svd", "rank": 0.4},
        {"method": "tucker2", "rank": 0.4},
        {"method": "spatial", "rank": 0.3},
        {"macs": 0.5},
    ],
)
def test_data_makes_the_network_better_on_data(options):
    x = images(8, seed=1)
    plain = error_of(x, None, **options)
    on_data = error_of(x, [images(8, seed=2), images(8, seed=3)], **options)
    assert on_data < 0.8 * plain


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_a_single_channel_and_on_groups(method, asymmetric):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(128, 6)
    ).eval()
    x = torch.randn(6, 1, 8, 8, generator=generator())
    graph = graphopt.trace(model, x)
    ctx = Context()
    one = LowRank((method, "svd"), energy=0.9999, data=[x], asymmetric=asymmetric,
                  only_faster=False)  # fmt: skip
    Pipeline([one]).run(graph, ctx)
    with torch.no_grad():
        exact = model(x)
    assert len(ctx.reports[-1].rows) == 3
    error = (graphopt.reference.run(graph, [x])[0] - exact).norm() / exact.norm()
    assert error < 0.05


def test_the_asymmetric_variant_makes_up_for_earlier_layers():
    x = images(16, seed=1)
    data = [images(16, seed=2), images(16, seed=3)]
    options = {"method": "svd", "rank": 0.3}
    symmetric = error_of(x, data, **options)
    assert error_of(x, data, asymmetric=True, **options) < symmetric


def test_an_embedding_is_weighted_by_how_often_its_entries_are_used():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 12), nn.Linear(12, 4)).eval()
    often = torch.randint(0, 6, (40, 10), generator=generator())
    graph = graphopt.trace(model, often)
    graph_on_data = graph.clone()
    for one, data in ((graph, None), (graph_on_data, [often])):
        Pipeline([LowRank("svd", rank={"0": 6}, data=data, only_faster=False)]).run(one, Context())
    with torch.no_grad():
        exact = model(often)
    plain, on_data = (
        (graphopt.reference.run(one, [often])[0] - exact).norm() for one in (graph, graph_on_data)
    )
    assert on_data < 0.2 * plain
