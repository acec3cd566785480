"""A 1x1 convolution, depthwise columns and rows of taps, and a 1x1 convolution: the kernel as a sum
of products of vectors (canonical polyadic decomposition).

Lebedev et al., "Speeding-up convolutional neural networks using fine-tuned CP-decomposition",
2015. Alternating least squares alone tends to components that are huge and cancel each other,
which amplify every later error. So the least sensitive decomposition with (almost) the same error
is looked for after it: Phan et al., "Stable low-rank tensor decomposition for compression of
convolutional neural network", 2020.

Where components are nearly dependent the least-squares problems are, too; a small term holds the
vectors near those before: Navasca, De Lathauwer and Kindermann, "Swamp reducing technique for
tensor decomposition", 2008.
"""

from __future__ import annotations

from functools import reduce
from math import prod

import torch
from torch import Tensor

from graphopt.passes.low_rank.factors import Chain, Factor, compose, parameters, relative_error
from graphopt.passes.low_rank.search import smallest
from graphopt.passes.low_rank.tucker import Tucker

SWEEPS = 60
STABLE_SWEEPS = 15
CONVERGED = 1e-6
"""Iteration ends when a sweep lowers the error by less than this part of the kernel's square."""
PROXIMITY = 1e-10
"""Weight of that term, relative to the mean of the normal equations' diagonal."""
SLACK = 1e-3
"""By which part the error may grow to make the decomposition less sensitive."""


class Cp:
    """See the module.

    Args:
        kernel: float64, [output channels, input channels, *taps], more than one tap.
        generator: of the random start.
    """

    def __init__(self, kernel: Tensor, generator: torch.Generator) -> None:
        self._kernel, self._generator = kernel, generator
        self._tensor = kernel.reshape([size for d, size in enumerate(kernel.shape)
                                       if d < 2 or size > 1])  # fmt: skip
        self._chains: dict[int, tuple[Chain, float]] = {}

    @property
    def full(self) -> tuple[int]:
        """A rank at which every kernel of this shape is reproduced."""
        sizes = self._tensor.shape
        return (prod(sizes) // max(sizes),)

    @property
    def at_hand(self) -> tuple[int]:
        return self.full

    def error(self, ranks: tuple[int, ...]) -> float:
        self.chain(ranks)
        return self._chains[ranks[0]][1]

    def chain(self, ranks: tuple[int, ...]) -> Chain:
        rank = ranks[0]
        if rank not in self._chains:
            vectors = alternating_least_squares(self._tensor, rank, self._generator)
            chain = self._chain(stabilize(self._tensor, vectors))
            self._chains[rank] = chain, relative_error(self._kernel, compose(chain))
        return self._chains[rank][0]

    draft = chain

    def ranks_for(self, energy: float) -> tuple[int]:
        """At most the rank at which the chain has as many weights as the kernel."""
        largest = min(*self.full, self._kernel.numel() // parameters(self.chain((1,))))
        return (smallest(lambda rank: self.error((rank,)) <= 1 - energy, largest),)

    def evbmf(self) -> tuple[int]:
        """The larger one of the ranks of the two unfoldings along channels, which is a lower bound
        of the tensor's rank."""
        return (max(Tucker(self._kernel).evbmf()),)

    def _chain(self, vectors: list[Tensor]) -> Chain:
        out_of, into, *taps = _equal_norms(vectors)
        rank, spatial = into.shape[1], self._kernel.dim() - 2
        extents = self._kernel.shape[2:]
        with_taps = [d for d in range(spatial) if extents[d] > 1]
        without = tuple(d for d in range(spatial) if extents[d] == 1)
        factors = [Factor(into.T.reshape(rank, -1, *[1] * spatial))]
        for place, (dimension, vector) in enumerate(zip(with_taps, taps, strict=True)):
            shape = [rank, 1, *[1] * spatial]
            shape[2 + dimension] = extents[dimension]
            own = (*without, dimension) if place == 0 else (dimension,)
            factors.append(Factor(vector.T.reshape(shape), rank, own))
        return (*factors, Factor(out_of.reshape(-1, rank, *[1] * spatial)))


def alternating_least_squares(
    tensor: Tensor, rank: int, generator: torch.Generator
) -> list[Tensor]:
    """Vectors [size, rank] per dimension whose products sum up to a tensor, nearly.

    Args:
        tensor: in float64.
        rank: how many products.
        generator: of the start.
    """
    order = sorted(range(tensor.dim()), key=lambda d: tensor.shape[d])
    if rank == tensor.numel() // max(tensor.shape):
        return _fibres(tensor, order[-1])
    vectors = [
        torch.randn(size, rank, dtype=tensor.dtype, generator=generator) for size in tensor.shape
    ]
    square = tensor.square().sum().item()
    before = float("inf")
    for _ in range(SWEEPS):
        for d in order:
            gram, product = normal_equations(tensor, vectors, d)
            vectors[d] = _solve(gram, product, vectors[d])
        error = _error(square, gram, product, vectors[order[-1]])
        if before - error < CONVERGED * square:
            break
        before = error
        vectors = _equal_norms(vectors)
    return vectors


def _solve(gram: Tensor, product: Tensor, before: Tensor) -> Tensor:
    """Vectors with ``vectors @ gram = product``, nearly, and near those before."""
    weight = PROXIMITY * gram.diagonal().mean()
    diagonal = weight.expand(len(gram)).diag()
    factor, failed = torch.linalg.cholesky_ex(gram + diagonal)
    if failed:
        return product @ torch.linalg.pinv(gram, hermitian=True, rtol=1e-13)
    return torch.cholesky_solve((product + weight * before).T, factor).T


def _fibres(tensor: Tensor, d: int) -> list[Tensor]:
    """The exact sum of a product for every fibre along a dimension, with unit vectors else."""
    others = [size for k, size in enumerate(tensor.shape) if k != d]
    places = list(torch.unravel_index(torch.arange(prod(others)), others))
    places.insert(d, torch.empty(0))
    vectors = [
        torch.nn.functional.one_hot(at.long(), size).T.to(tensor.dtype)
        for at, size in zip(places, tensor.shape, strict=True)
    ]
    vectors[d] = tensor.movedim(d, 0).flatten(1)
    return vectors


def sensitivity(vectors: list[Tensor]) -> float:
    """The expected squared change of the tensor when all entries of the vectors get independent
    noise of variance 1, to first order (Phan et al. 2020)."""
    norms = torch.stack([vector.square().sum(dim=0) for vector in vectors])
    total = 0.0
    for d, vector in enumerate(vectors):
        others = torch.cat([norms[:d], norms[d + 1 :]])
        total += len(vector) * others.prod(dim=0).sum().item()
    return total


def stabilize(tensor: Tensor, vectors: list[Tensor]) -> list[Tensor]:
    """Vectors of less sensitivity whose error is at most by `SLACK` larger.

    The vectors of one dimension after the other become those that minimise the sensitivity under
    the bound of the error: a ridge regression whose multiplier is found by bisection.
    """
    square = tensor.square().sum().item()
    gram, product = normal_equations(tensor, vectors, 0)
    error = _error(square, gram, product, vectors[0])
    bound = max(error, 0.0) * (1 + SLACK) + 1e-14 * square
    vectors = _equal_norms(vectors)
    before = sensitivity(vectors)
    for _ in range(STABLE_SWEEPS):
        for d in range(tensor.dim()):
            updated = _least_sensitive(tensor, vectors, d, bound)
            if updated is not None:
                vectors[d] = updated
        vectors = _equal_norms(vectors)
        after = sensitivity(vectors)
        if before - after < 1e-3 * before:
            break
        before = after
    return vectors


def _least_sensitive(tensor: Tensor, vectors: list[Tensor], d: int, bound: float) -> Tensor | None:
    """The vectors of one dimension with the least sensitivity whose squared error is within the
    bound; None if rounding leaves none."""
    square = tensor.square().sum().item()
    gram, product = normal_equations(tensor, vectors, d)
    norms = {k: vector.square().sum(dim=0) for k, vector in enumerate(vectors) if k != d}
    weights = sum(
        len(vectors[k]) * prod(norm for j, norm in norms.items() if j != k) for k in norms
    )
    assert isinstance(weights, Tensor)
    if not (weights > 0).all():
        return None
    scale = weights.rsqrt()
    values, basis = torch.linalg.eigh(scale[:, None] * gram * scale)
    values = values.clamp_min(0)
    turned = (product * scale) @ basis
    squares = turned.square().sum(dim=0)

    def error(multiplier: float) -> float:
        ridge = values + multiplier
        return square - (squares * (values + 2 * multiplier) / ridge.square()).sum().item()

    largest = values[-1].item()
    low, high = 1e-14 * largest, 1e3 * largest
    if not error(low) <= bound:
        return None
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if error(middle) <= bound else (low, middle)
    return (turned / (values + low)) @ basis.T * scale


def normal_equations(tensor: Tensor, vectors: list[Tensor], d: int) -> tuple[Tensor, Tensor]:
    """Of the least-squares problem for the vectors of one dimension: ``vectors @ gram = product``,
    with gram [rank, rank] and product [size, rank]."""
    others = [k for k in range(tensor.dim()) if k != d]
    gram = reduce(torch.mul, [vectors[k].T @ vectors[k] for k in others])
    longest = max(others, key=lambda k: tensor.shape[k])
    product = torch.tensordot(tensor, vectors[longest], ([longest], [0]))
    left = [k for k in range(tensor.dim()) if k != longest]
    for k in reversed(left):
        if k != d:
            axis = left.index(k)  # axes before it are all still there
            between = [1] * (product.dim() - axis - 2)
            rows = vectors[k].reshape(len(vectors[k]), *between, -1)
            product = (product * rows).sum(dim=axis)
    return gram, product


def _error(square: float, gram: Tensor, product: Tensor, vectors: Tensor) -> float:
    return square + ((vectors @ gram - 2 * product) * vectors).sum().item()


def _equal_norms(vectors: list[Tensor]) -> list[Tensor]:
    """The same products of vectors that have equal norms in all dimensions."""
    norms = torch.stack([vector.norm(dim=0) for vector in vectors])
    mean = norms.log().mean(dim=0).exp()
    scales = torch.where(norms > 0, mean / norms, 1.0)
    return [vector * scale for vector, scale in zip(vectors, scales, strict=True)]
