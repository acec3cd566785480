"""The decompositions of a kernel against closed forms, brute force and each other."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from low_rank_support import generator, methods_for, random

from graphopt.ir.patterns import Decline
from graphopt.passes.low_rank import matrices
from graphopt.passes.low_rank.cp import (
    alternating_least_squares,
    normal_equations,
    sensitivity,
    stabilize,
)
from graphopt.passes.low_rank.factors import (
    Factor,
    compose,
    dense,
    multiply_adds,
    parameters,
    relative_error,
    side_by_side,
)
from graphopt.passes.low_rank.matrices import decompose, evbmf_rank
from graphopt.passes.low_rank.methods import METHODS, Family, family
from graphopt.passes.low_rank.search import smallest
from graphopt.passes.low_rank.spatial import Spatial
from graphopt.passes.low_rank.splitting import Splitting
from graphopt.passes.low_rank.tucker import Tucker

SHAPES = [(8, 6, 3, 3), (6, 8, 3, 2), (5, 6, 1, 3), (7, 4, 5), (4, 4, 2, 3, 2), (9, 4)]
CASES = [(method, shape) for shape in SHAPES for method in methods_for(shape)]


def made(method: str, kernel: torch.Tensor) -> Family:
    one = family(method, kernel, generator())
    assert not isinstance(one, Decline), one.reason
    return one


# -- matrices ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6), (1, 4)])
def test_the_error_is_the_tail_of_the_singular_values(shape):
    matrix = random(*shape)
    values = torch.linalg.svdvals(matrix)
    found = decompose(matrix, generator())
    torch.testing.assert_close(found.values, values, rtol=0, atol=1e-13)
    for rank in range(1, min(shape) + 1):
        tail = (values[rank:].square().sum() / values.square().sum()).item()
        assert found.error(rank) == pytest.approx(tail, abs=1e-12)
        product = found.left[:, :rank] @ found.right[:rank]
        assert relative_error(matrix, product) == pytest.approx(tail, abs=1e-12)


def test_large_matrices_are_projected_within_a_few_percent_of_the_least_error(monkeypatch):
    monkeypatch.setattr(matrices, "LARGEST_EXACT", 32)
    matrix = random(64, 96)
    exact = torch.linalg.svdvals(matrix)
    found = decompose(matrix, generator())
    assert found.rank == 16
    for rank in (4, 16):
        product = found.left[:, :rank] @ found.right[:rank]
        assert found.error(rank) == pytest.approx(relative_error(matrix, product), abs=1e-12)
        least = (exact[rank:].square().sum() / exact.square().sum()).item()
        assert least <= found.error(rank) <= 1.03 * least
    assert len(found.all_values()) == 64
    assert found.all_values().square().sum() == pytest.approx(matrix.square().sum().item())


def test_all_components_of_a_large_matrix_where_they_are_needed(monkeypatch):
    monkeypatch.setattr(matrices, "LARGEST_EXACT", 16)
    kernel = random(24, 32)
    one = Splitting(kernel, 1, generator())
    assert one.at_hand == (6,)
    tail = torch.linalg.svdvals(kernel)[10:].square().sum() / kernel.square().sum()
    assert one.error((10,)) == pytest.approx(tail.item())
    assert relative_error(kernel, compose(one.chain((24,)))) < 1e-20
    for energy in (0.2, 0.95):
        (rank,) = Splitting(kernel, 1, generator()).ranks_for(energy)
        assert one.error((rank,)) <= 1 - energy


def test_a_matrix_of_zeros():
    found = decompose(torch.zeros(3, 4, dtype=torch.float64), generator())
    assert found.error(1) == 0
    assert evbmf_rank(found.values, 3, 4) == 0


@pytest.mark.parametrize(("rows", "columns"), [(60, 80), (80, 60), (50, 200)])
@pytest.mark.parametrize("rank", [0, 1, 5, 12])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_evbmf_finds_planted_ranks(rows, columns, rank, scale):
    noise = 0.3 * random(rows, columns, seed=3)
    planted = random(rows, rank, seed=4) @ random(rank, columns, seed=5) + noise
    values = torch.linalg.svdvals(scale * planted)
    assert evbmf_rank(values, rows, columns) == rank


def test_evbmf_without_noise():
    values = torch.linalg.svdvals(random(20, 4) @ random(4, 30, seed=2))
    assert evbmf_rank(values, 20, 30) == 4


def test_evbmf_ignores_components_within_the_noise():
    """The largest singular value of noise alone is about sqrt(rows) + sqrt(columns), and what is
    planted well below that leaves no trace (Nakajima et al. 2013, section 5)."""
    left, right = random(60, 1, seed=4), random(1, 80, seed=5)
    faint = left / left.norm() @ (right / right.norm())
    noise = random(60, 80, seed=3)
    edge = math.sqrt(60) + math.sqrt(80)
    for strength, rank in ((0.2 * edge, 0), (3 * edge, 1)):
        values = torch.linalg.svdvals(noise + strength * faint)
        assert evbmf_rank(values, 60, 80) == rank


@given(st.integers(1, 200), st.integers(1, 200))
def test_smallest(wanted, largest):
    assert smallest(lambda n: n >= wanted, largest) == min(wanted, largest)


# -- chains --------------------------------------------------------------------------------------


def test_a_chain_composes_to_what_torch_computes():
    """Grouped, with taps in different dimensions; an impulse response has all of the kernel."""
    chain = (
        Factor(random(6, 2, 3, 1), groups=2),
        Factor(random(6, 1, 1, 2, seed=2), groups=6),
        Factor(random(5, 6, 1, 1, seed=3)),
    )
    x = random(2, 4, 5, 6, seed=4)
    y = x
    for factor in chain:
        y = torch.nn.functional.conv2d(y, factor.weight, groups=factor.groups)
    whole = torch.nn.functional.conv2d(x, compose(chain))
    torch.testing.assert_close(y, whole)
    torch.testing.assert_close(
        torch.nn.functional.conv2d(x, dense(chain[0])),
        torch.nn.functional.conv2d(x, chain[0].weight, groups=2),
    )


def test_groups_side_by_side():
    chains = [
        (Factor(random(2, 3, 3, seed=k), 1, (0,)), Factor(random(4, 2, 1, seed=9 + k)))
        for k in range(3)
    ]
    first, second = side_by_side(chains)
    assert (first.groups, second.groups, first.dimensions) == (3, 3, (0,))
    x = random(1, 9, 8)
    y = torch.nn.functional.conv1d(x, first.weight, groups=3)
    y = torch.nn.functional.conv1d(y, second.weight, groups=3)
    parts = [
        torch.nn.functional.conv1d(part, compose(chain))
        for part, chain in zip(x.chunk(3, dim=1), chains, strict=True)
    ]
    torch.testing.assert_close(y, torch.cat(parts, dim=1))


def test_multiply_adds_follow_the_sizes_between_the_factors():
    chain = (Factor(random(3, 4, 3, 1), 1, (0,)), Factor(random(5, 3, 1, 3), 1, (1,)))
    first, second = 3 * 4 * 3 * (5 * 12), 5 * 3 * 3 * (5 * 6)
    assert multiply_adds(chain, (10, 12), (5, 6), rows=2) == 2 * (first + second)
    assert parameters(chain) == 3 * 4 * 3 + 5 * 3 * 3


# -- families ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "shape"), CASES)
def test_full_rank_reproduces_the_kernel(method, shape):
    """To rounding; what makes "cp" stable may cost 1e-14 of the kernel's square."""
    kernel = random(*shape)
    one = made(method, kernel)
    chain = one.chain(one.full)
    least = 1.1e-7 if method == "cp" else 1e-13
    assert math.sqrt(relative_error(kernel, compose(chain))) <= least
    assert sorted(d for factor in chain for d in factor.dimensions) == list(range(len(shape) - 2))


@pytest.mark.parametrize(("method", "shape"), CASES)
def test_the_error_is_that_of_the_draft_and_the_chain_is_no_worse(method, shape):
    kernel = random(*shape)
    one = made(method, kernel)
    for share in (0.3, 0.7):
        ranks = tuple(max(1, int(share * full)) for full in one.full)
        drafted = relative_error(kernel, compose(one.draft(ranks)))
        assert one.error(ranks) == pytest.approx(drafted, abs=1e-12)
        assert relative_error(kernel, compose(one.chain(ranks))) <= drafted + 1e-12


@pytest.mark.parametrize("energy", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("method", METHODS)
def test_energy_is_kept_by_the_least_rank(method, energy):
    kernel = random(8, 6, 3, 3)
    one = made(method, kernel)
    ranks = one.ranks_for(energy)
    if method == "cp" and energy == 1.0:
        assert ranks == (8 * 6 * 9 // (8 + 6 + 3 + 3),)  # where nothing is saved
        return
    assert one.error(ranks) <= 1 - energy + 1e-12
    if len(ranks) == 1 and ranks[0] > 1 and method != "cp":
        assert one.error((ranks[0] - 1,)) > 1 - energy


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_splitting_is_the_best_for_every_group(groups):
    kernel = random(8, 6, 3, 3)
    one = Splitting(kernel, groups, generator())
    lost = 0.0
    for part in kernel.chunk(groups, dim=1):
        lost += torch.linalg.svdvals(part.flatten(1))[2:].square().sum().item()
    assert one.error((2,)) * kernel.square().sum().item() == pytest.approx(lost)
    first, second = one.chain((2,))
    assert first.weight.shape == (2 * groups, 6 // groups, 3, 3)
    assert second.weight.shape == (8, 2 * groups, 1, 1)


def test_spatial_is_the_best_for_the_matrix_of_columns_and_rows():
    kernel = random(4, 3, 3, 2)
    matrix = torch.stack(
        [kernel[o, :, :, w].flatten() for o, w in itertools.product(range(4), range(2))]
    )
    tail = torch.linalg.svdvals(matrix)[3:].square().sum() / matrix.square().sum()
    assert Spatial(kernel, generator()).error((3,)) == pytest.approx(tail.item())


@given(st.integers(0, 1000), st.integers(1, 5), st.integers(1, 6))
def test_hooi_lowers_the_error_of_the_higher_order_svd(seed, into, out_of):
    kernel = random(6, 5, 3, seed=seed)
    bases, errors = Tucker(kernel).iterate((into, out_of))
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(errors))
    final = relative_error(kernel, compose(Tucker(kernel).chain((into, out_of))))
    assert final == pytest.approx(errors[-1], abs=1e-12)
    assert final <= errors[0] + 1e-12
    for basis in bases:
        torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]).double())


def test_tucker_finds_a_planted_subspace_and_its_ranks():
    core = random(3, 2, 3, 3)
    kernel = torch.einsum("qphw,oq,ip->oihw", core, random(12, 3, seed=2), random(10, 2, seed=3))
    noise = random(12, 10, 3, 3, seed=4)
    one = Tucker(kernel + 1e-3 * noise)
    assert one.evbmf() == (2, 3)
    assert one.error((2, 3)) < 1e-5


def test_cp_finds_planted_products():
    vectors = [random(n, 3, seed=n) for n in (9, 8, 3, 4)]
    tensor = torch.einsum("or,ir,hr,wr->oihw", *vectors)
    one = made("cp", tensor)
    assert one.error((3,)) < 1e-6
    assert one.evbmf() == (3,)


@pytest.mark.parametrize("shape", [(5, 4, 3), (4, 6, 2, 3), (3, 3, 5, 2)])
def test_normal_equations_are_those_of_the_products_of_the_other_vectors(shape):
    tensor, vectors = random(*shape), [random(n, 7, seed=n) for n in shape]
    for d in range(len(shape)):
        gram, product = normal_equations(tensor, vectors, d)
        others = torch.ones(1, 7).double()
        for k, vector in enumerate(vectors):
            if k != d:
                others = torch.einsum("ar,br->abr", others, vector).flatten(0, 1)
        torch.testing.assert_close(gram, others.T @ others)
        torch.testing.assert_close(product, tensor.movedim(d, 0).flatten(1) @ others)


def test_alternating_least_squares_survives_more_products_than_the_tensor_needs():
    """The least-squares problems have no single solution then."""
    tensor = torch.einsum("or,ir,hr->oih", *(random(n, 2, seed=n) for n in (7, 6, 3)))
    vectors = alternating_least_squares(tensor, 9, generator())
    found = torch.einsum("or,ir,hr->oih", *vectors)
    assert relative_error(tensor, found) < 1e-6


def test_the_stable_decomposition_is_less_sensitive_and_as_near():
    tensor = random(8, 8, 3, 3)
    plain = alternating_least_squares(tensor, 14, generator())
    stable = stabilize(tensor, list(plain))

    def error(vectors):
        return relative_error(tensor, torch.einsum("or,ir,hr,wr->oihw", *vectors))

    assert error(stable) <= error(plain) * 1.001 + 1e-12
    assert sensitivity(stable) < 0.9 * sensitivity(plain)


def test_sensitivity_is_the_expected_change():
    vectors = [random(n, 2, seed=n) for n in (3, 4, 2)]
    exact = torch.einsum("ar,br,cr->abc", *vectors)
    noise = generator(7)
    changes = []
    for _ in range(4000):
        moved = [v + 1e-4 * torch.randn(v.shape, generator=noise).double() for v in vectors]
        change = torch.einsum("ar,br,cr->abc", *moved) - exact
        changes.append(change.square().sum().item() / 1e-8)
    assert sensitivity(vectors) == pytest.approx(sum(changes) / len(changes), rel=0.05)


def test_methods_that_do_not_apply_say_why():
    def reason(method, *shape, splits=2):
        one = family(method, random(*shape), generator(), splits)
        assert isinstance(one, Decline)
        return one.reason

    assert "more than one tap" in reason("tucker2", 4, 4, 1, 1)
    assert "more than one tap" in reason("channel", 4, 4)
    assert "rows and columns" in reason("spatial", 4, 4, 1, 3)
    assert "rows and columns" in reason("spatial", 4, 4, 3)
    assert "5 input channels make no 2 groups" in reason("grouped", 4, 5, 3)
