"""Decompositions for data: against the closed form, brute force, and the plain ones."""

from __future__ import annotations

import math

import pytest
import torch
from low_rank_support import generator, random
from torch import nn

import graphopt
from graphopt.ir.patterns import Decline
from graphopt.passes import LowRank
from graphopt.passes.low_rank.factors import compose
from graphopt.passes.low_rank.gathering import add_inputs, empty, in_samples
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
    shrunk,
)
from graphopt.pipeline import Context, Pipeline


def correlated(count: int, size: int, seed: int = 1, least: float = 0.01) -> torch.Tensor:
    """Vectors of which a few directions hold most, with a mean: [count, size]. Deviations along
    the directions are from 1 to the least one."""
    scales = torch.logspace(0, math.log10(least), size, dtype=torch.float64)
    mixing = torch.linalg.qr(random(size, size, seed=seed)).Q
    return (random(count, size, seed=seed + 1) * scales) @ mixing + 0.5


def moments_of(x: torch.Tensor, y: torch.Tensor | None = None, samples: int = 1) -> Moments:
    """Of vectors [count, size] in so many equal samples, which come in batches of four."""
    y = x.new_zeros(len(x), 0) if y is None else y
    moments = Moments(x.shape[1], y.shape[1])
    for batch in torch.arange(len(x)).reshape(samples, -1).split(4):
        moments.add(x[batch], y[batch])
    return moments


# -- moments -------------------------------------------------------------------------------------


def test_moments_over_batches_are_those_of_all_data():
    x, y = correlated(50, 4), random(50, 3, seed=9)
    moments = moments_of(x, y, samples=10)
    whole = torch.cov(torch.cat([x, y], dim=1).T, correction=0)
    assert moments.count == 10
    torch.testing.assert_close(moments.covariance, whole[:4, :4])
    torch.testing.assert_close(moments.cross_covariance, whole[4:, :4])
    torch.testing.assert_close(moments.x_mean, x.mean(dim=0))


def test_images_count_the_same_whatever_their_size():
    small, large = correlated(3, 4), correlated(11, 4, seed=5)
    moments = Moments(4, 0)
    for image in (small, large):
        moments.add(image[None], image.new_zeros(1, len(image), 0))
    centred = [image - (small.mean(dim=0) + large.mean(dim=0)) / 2 for image in (small, large)]
    each = [image.T @ image / len(image) for image in centred]
    torch.testing.assert_close(moments.covariance, (each[0] + each[1]) / 2)


@pytest.mark.parametrize(
    ("shape", "spatial", "expected"),
    [
        ((2, 3, 4, 5), 2, (2, 20, 3)),
        ((3, 4, 5), 2, (1, 20, 3)),
        ((2, 3, 7), 1, (2, 7, 3)),
        ((2, 6, 3), 0, (2, 6, 3)),
        ((2, 4, 6, 3), 0, (2, 24, 3)),
        ((2, 3), 0, (2, 1, 3)),
        ((3,), 0, (1, 1, 3)),
    ],
)
def test_values_image_by_image(shape, spatial, expected):
    x = random(*shape)
    found = in_samples(x, spatial)
    channels_last = x.movedim(-spatial - 1, -1) if spatial else x
    assert found.shape == expected
    torch.testing.assert_close(found, channels_last.reshape(expected), rtol=0, atol=0)


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
        assert one.count == 3
        found = torch.linalg.solve(one.covariance, one.cross_covariance.T).T
        torch.testing.assert_close(found, kernel.flatten(1))


# -- shrinking -----------------------------------------------------------------------------------


def shrunk_by_definition(
    x: torch.Tensor, samples: int, target: torch.Tensor
) -> tuple[float, float, torch.Tensor]:
    """Ledoit and Wolf's estimate from the moments of all samples, which are kept: the part of the
    target, its multiple, and the covariance."""
    centred = (x - x.mean(dim=0)).reshape(samples, -1, x.shape[1])
    each = centred.mT @ centred / centred.shape[1]
    covariance = each.mean(dim=0)
    multiple = (covariance * target).sum() / target.square().sum()
    variance = sum((one - covariance).square().sum() for one in each) / samples**2
    share = min(1.0, (variance / (covariance - multiple * target).square().sum()).item())
    return share, multiple.item(), (1 - share) * covariance + share * multiple * target


@pytest.mark.parametrize("shift", [0.0, 1000.0])
@pytest.mark.parametrize(("samples", "vectors"), [(3, 1), (17, 1), (8, 3), (9, 12), (40, 5)])
def test_shrinkage_is_ledoit_and_wolfs(samples, vectors, shift):
    factor = random(6, 6, seed=7)
    x = correlated(samples * vectors, 6) + shift
    x = (x.reshape(samples, vectors, 6) + 0.3 * random(samples, 1, 6, seed=4)).flatten(0, 1)
    for target in (torch.eye(6).double(), factor @ factor.T):
        share, multiple, covariance = shrunk_by_definition(x, samples, target)
        moments = moments_of(x, samples=samples)
        assert moments.shrinkage(target) == pytest.approx((share, multiple), rel=1e-6)
        found = shrunk(moments, target, target)[0]
        torch.testing.assert_close(found, covariance, rtol=1e-6, atol=1e-9)
        assert 0 < share <= 1


def test_shrinkage_comes_near_the_best_that_knows_the_truth():
    """For independent normal vectors the expected error of their covariance is known, and with it
    the least one of any part of the identity."""
    deviations = torch.logspace(0, -0.5, 40, dtype=torch.float64)
    truth, identity = deviations.square().diag(), torch.eye(40).double()
    unshrunk = ((truth.square().sum() + truth.trace() ** 2) / 40).item()
    distance = (truth - truth.trace() / 40 * identity).square().sum().item()
    share, least = 0.0, unshrunk * distance / (unshrunk + distance)
    error = 0.0
    for seed in range(20):
        moments = moments_of(random(40, 40, seed=seed) * deviations, samples=40)
        share += moments.shrinkage(identity)[0] / 20
        found = shrunk(moments, identity, identity)[0]
        error += (found - truth).square().sum().item() / 20
    assert share == pytest.approx(unshrunk / (unshrunk + distance), rel=0.1)
    assert least < 0.4 * unshrunk
    assert error == pytest.approx(least, rel=0.1)


def test_much_data_and_a_single_sample_are_taken_as_they_are():
    identity = torch.eye(4).double()
    x = random(20_000, 4) * torch.tensor([2.0, 1, 1, 0.5])
    few, many = (moments_of(x[:n], samples=n).shrinkage(identity)[0] for n in (200, 20_000))
    assert few / many == pytest.approx(100, rel=0.3)
    assert many < 1e-3
    assert moments_of(x[:9]).shrinkage(identity)[0] == 0
    assert moments_of(torch.ones(8, 4).double(), samples=8).shrinkage(identity) == (0, 0)


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


@pytest.mark.parametrize("vectors", [1, 4])
@pytest.mark.parametrize(("out", "size"), [(9, 7), (6, 12)])
def test_of_few_samples_the_shrunk_covariance_has_its_analytic_optimum(out, size, vectors):
    """By whitening with the shrunk covariance of the inputs. On the data itself that still loses
    no more than the plain decomposition."""
    kernel, x = random(out, size), correlated(8 * vectors, size)
    plain = Splitting(kernel, 1, generator())
    one = PrincipalOutputs(plain, kernel, moments_of(x @ kernel.T, samples=8))
    target = kernel @ kernel.T
    share, multiple, _ = shrunk_by_definition(x @ kernel.T, 8, target)
    covariance = (1 - share) * torch.cov(x.T, correction=0)
    covariance += share * multiple * torch.eye(size)
    whitened = torch.linalg.svdvals(kernel @ torch.linalg.cholesky(covariance)).square()
    for rank in range(1, min(out, size)):
        lost = kernel - compose(one.chain((rank,)))
        error = ((lost @ covariance) * lost).sum().item() / whitened.sum().item()
        least = whitened[rank:].sum().item() / whitened.sum().item()
        assert error == pytest.approx(least, abs=RIDGE)
        assert one.error((rank,)) == pytest.approx(least, abs=RIDGE)
        on_data = output_error(kernel, compose(one.chain((rank,))), x)
        assert on_data <= output_error(kernel, compose(plain.chain((rank,))), x) + RIDGE


def test_fewer_samples_than_inputs_still_help_on_other_data():
    """A vector per sample, as the last layer of a network sees it."""
    kernel, x = random(30, 40), correlated(2000, 40, least=0.1)
    seen, others = x[:24], x[24:]
    plain = Splitting(kernel, 1, generator())
    shrunken, trusting = (
        PrincipalOutputs(plain, kernel, moments_of(seen @ kernel.T, samples=n)) for n in (24, 1)
    )
    assert trusting.error((24,)) < RIDGE < 1e-3 < shrunken.error((24,))
    errors = [
        output_error(kernel, compose(one.chain((24,))), others)
        for one in (shrunken, trusting, plain)
    ]
    assert errors[0] < 0.85 * min(errors[1:])


def test_regression_on_few_samples_does_not_follow_their_noise():
    kernel, x = random(30, 40), correlated(2000, 40)
    wanted, now = x @ kernel.T, (x + 0.02 * random(2000, 40, seed=8)) @ kernel.T
    errors = []
    for samples in (40, 1):
        moments = moments_of(now[:40], wanted[:40], samples=samples)
        one = PrincipalOutputs(Splitting(kernel, 1, generator()), kernel, moments)
        basis = compose(one.chain((25,))) @ torch.linalg.pinv(kernel)
        found = now[40:] @ basis.T + one.shift((25,), one.chain((25,)))
        errors.append((wanted[40:] - found).square().mean().item())
    assert errors[0] < 0.8 * errors[1]


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


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("svd", "channel")])
def test_on_few_samples_the_output_is_no_farther_than_with_the_plain_decomposition(method):
    kernel, x = random(6, 4, 3, 3), correlated(12, 36)
    plain = family(method, kernel, generator())
    assert not isinstance(plain, Decline)
    one = Refined(plain, kernel, moments_of(x, samples=12))
    for part in (4, 2):
        ranks = tuple(max(1, full // part) for full in plain.full)
        before = output_error(kernel, compose(plain.chain(ranks)), x)
        assert output_error(kernel, compose(one.chain(ranks)), x) <= before + RIDGE


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
    covariance, shrunk as far as four images ask for: the error that the pass reports, and that of
    the chain it puts in place."""
    torch.manual_seed(0)
    layer.reset_parameters()  # what it was made with is another one in every process
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
    outputs = (kernel @ seen).mT.flatten(0, 1)
    share, multiple, of_outputs = shrunk_by_definition(outputs, 4, kernel @ kernel.T)
    assert share > 1e-4
    covariance = (1 - share) * covariance + share * multiple * torch.eye(len(covariance))
    whitened = torch.linalg.svdvals(kernel @ torch.linalg.cholesky(covariance)).square()
    least = whitened[3:].sum().item() / whitened.sum().item()
    assert ctx.reports[-1].rows[0][7] ** 2 == pytest.approx(least, abs=RIDGE)  # its share of it

    best = torch.linalg.eigh(of_outputs).eigenvectors[:, -3:]
    centred = outputs - outputs.mean(dim=0)
    with torch.no_grad():
        exact = model(x)
    lost = graphopt.reference.run(graph, [x])[0] - exact
    expected = (centred - centred @ best @ best.T).square().sum()
    torch.testing.assert_close(lost.square().sum(), expected, rtol=1e-4, atol=0)


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
