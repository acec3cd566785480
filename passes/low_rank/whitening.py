"""Decompositions that keep what a layer computes on data, rather than its weights.

With the covariance C of the layer's input (for a convolution: of the neighbourhood that it sees),
the mean squared error of the output is ``trace((W - V) C (W - V).T)`` for an approximation V of the
kernel W; the means of input and output are met exactly, by the bias. A covariance that few images
tell is shrunk towards that of inputs of which nothing is known, for which the plain decomposition
is the best one: of a layer that sees a single vector per image, fewer images than inputs tell
nothing of most directions, and all that is in these would be given up at no error. Where a kernel
is split into a matrix product, the best V is known: W projected on the principal components of the
output (Zhang, Zou, He and Sun, "Accelerating very deep convolutional networks", 2015). In general
the factors are improved in turn, each a least-squares problem in itself.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from graphopt.passes.low_rank.factors import Chain, compose
from graphopt.passes.low_rank.methods import Family, Ranks
from graphopt.passes.low_rank.moments import Moments
from graphopt.passes.low_rank.search import smallest
from graphopt.passes.low_rank.splitting import Splitting

SWEEPS = 4
STEPS = 8
"""Conjugate-gradient steps per factor and sweep."""
CONVERGED = 1e-4
"""Improvement ends when a sweep lowers the error by less than this part."""
RIDGE = 1e-6
"""How much of every direction the data is supposed to hold at least, relative to the mean."""


class PrincipalOutputs:
    """`Splitting` into a single matrix product that is the best for data.

    On the data itself it loses no more than the plain one, however far the covariance is shrunk:
    it minimises a weighted sum of the error there and of the error that the plain one minimises.

    Args:
        plain: the same for the weights.
        kernel: float64, [output channels, input channels, *taps].
        outputs: moments of the layer's outputs without bias [output channels], as x; if its
            inputs carry the error of earlier layers, with the outputs that it should have as y.
    """

    def __init__(self, plain: Splitting, kernel: Tensor, outputs: Moments) -> None:
        self._plain, self._kernel, self._outputs = plain, kernel, outputs
        self._square = kernel.flatten(1) @ kernel.flatten(1).T
        self.full = self.at_hand = plain.full

    @cached_property
    def _covariances(self) -> tuple[Tensor, Tensor]:
        """Of the outputs as they are, and of those that they should be with them."""
        return shrunk(self._outputs, self._square, self._square)

    @cached_property
    def _regression(self) -> Tensor | None:
        """What turns the outputs as they are into those that they should be."""
        if not self._outputs.has_pairs:
            return None
        covariance, cross = self._covariances
        return regression_of(cross, covariance)

    @cached_property
    def _components(self) -> tuple[Tensor, Tensor]:
        """Variances, descending, and principal components of the output."""
        covariance = self._covariances[0]
        if self._regression is not None:
            covariance = self._regression @ covariance @ self._regression.T
        ridge = RIDGE * covariance.trace() / self._square.trace().clamp_min(1e-300)
        variances, components = torch.linalg.eigh(covariance + ridge * self._square)
        return variances.flip(0).clamp_min(0), components.flip(1)

    def error(self, ranks: Ranks) -> float:
        variances = self._components[0]
        total = variances.sum().item()
        return variances[ranks[0] :].sum().item() / total if total else 0.0

    def draft(self, ranks: Ranks) -> Chain:
        basis = self._components[1][:, : ranks[0]]
        return self._plain.factors([(basis, self._into(basis) @ self._kernel.flatten(1))])

    chain = draft

    def shift(self, ranks: Ranks, chain: Chain) -> Tensor:
        basis = self._components[1][:, : ranks[0]]
        mean = self._outputs.x_mean
        wanted = self._outputs.y_mean if self._outputs.has_pairs else mean
        return wanted - basis @ (self._into(basis) @ mean)

    def ranks_for(self, energy: float) -> Ranks:
        return (smallest(lambda rank: self.error((rank,)) <= 1 - energy, self.full[0]),)

    def evbmf(self) -> Ranks:
        return self._plain.evbmf()

    def _into(self, basis: Tensor) -> Tensor:
        return basis.T if self._regression is None else basis.T @ self._regression


class Refined:
    """A family whose chains are improved on data.

    Args:
        plain: the decompositions to start from.
        kernel: float64, [output channels, input channels, *taps].
        inputs: moments of what the layer sees [n] (n = input channels x taps), as x; if that
            carries the error of earlier layers, with the outputs that it should have as y.
    """

    def __init__(self, plain: Family, kernel: Tensor, inputs: Moments) -> None:
        self._plain, self._moments = plain, inputs
        identity = torch.eye(kernel[0].numel(), dtype=kernel.dtype)
        covariance, cross = shrunk(inputs, identity, kernel.flatten(1))
        if inputs.has_pairs:
            self._wanted = inputs.y_mean
            kernel = refitted(kernel, cross, covariance)
        else:
            self._wanted = kernel.flatten(1) @ inputs.x_mean
        self._kernel = kernel
        self._problem = OutputError(kernel, covariance)
        self.full = plain.full
        self.at_hand = plain.at_hand
        self._drafts: dict[Ranks, Chain] = {}

    def error(self, ranks: Ranks) -> float:
        return self._problem.error(self.draft(ranks))

    def draft(self, ranks: Ranks) -> Chain:
        if ranks not in self._drafts:
            self._drafts[ranks] = self._problem.fit_last(self._plain.draft(ranks))
        return self._drafts[ranks]

    def chain(self, ranks: Ranks) -> Chain:
        """On the calibration data itself it is at least as good as the plain one, too."""
        plain = self._plain.chain(ranks)
        start = min((plain, self.draft(ranks)), key=self._problem.error)
        on_data = OutputError(self._kernel, self._moments.covariance)
        return min((self._problem.improve(start), plain), key=on_data.error)

    def shift(self, ranks: Ranks, chain: Chain) -> Tensor:
        return self._wanted - compose(chain).flatten(1) @ self._moments.x_mean

    def ranks_for(self, energy: float) -> Ranks:
        """Ranks grow in step until the share of the output's variance is kept."""
        largest = max(self.full)

        def ranks(step: int) -> Ranks:
            return tuple(max(1, -(-full * step // largest)) for full in self.full)

        return ranks(smallest(lambda step: self.error(ranks(step)) <= 1 - energy, largest))

    def evbmf(self) -> Ranks:
        return self._plain.evbmf()


class OutputError:
    """The mean squared error of a layer's output, as a function of the factors of its kernel.

    Args:
        kernel: float64, [output channels, input channels, *taps].
        inputs: covariance of what it sees [n, n], n = input channels x taps.
    """

    def __init__(self, kernel: Tensor, inputs: Tensor) -> None:
        self._kernel = kernel
        ridge = RIDGE * inputs.diagonal().mean()
        self._inputs = inputs + ridge * torch.eye(len(inputs), dtype=inputs.dtype)
        flat = kernel.flatten(1)
        self._square = ((flat @ self._inputs) * flat).sum().item()

    def error(self, chain: Chain) -> float:
        """Relative to the variance of the output."""
        difference = (self._kernel - compose(chain)).flatten(1)
        error = ((difference @ self._inputs) * difference).sum().item()
        return error / self._square if self._square else 0.0

    def improve(self, chain: Chain) -> Chain:
        """Alternating least squares over the factors; the error never grows."""
        error = self.error(chain)
        for _ in range(SWEEPS):
            for place in range(len(chain) - 1):
                chain = self._descend(chain, place)
            chain = self.fit_last(chain)
            before, error = error, self.error(chain)
            if before - error <= CONVERGED * before:
                break
        return chain

    def fit_last(self, chain: Chain) -> Chain:
        """The best last factor, which has no groups, for those before it."""
        *first, last = chain
        rank, *taps = last.weight.shape[1:]
        count = rank * last.weight[0, 0].numel()
        units = torch.eye(count, dtype=last.weight.dtype).reshape(count, rank, *taps)
        basis = compose((*first, replace(last, weight=units))).flatten(1)
        residual = (self._kernel - compose(chain)).flatten(1)
        weighted = self._inputs @ basis.T
        inverse = torch.linalg.pinv(basis @ weighted, hermitian=True, rtol=1e-12)
        change = residual @ weighted @ inverse
        fitted = (*first, replace(last, weight=last.weight + change.reshape(last.weight.shape)))
        return min((fitted, chain), key=self.error)

    def _descend(self, chain: Chain, place: int) -> Chain:
        """Conjugate gradients on one factor, in which the kernel is linear."""

        def with_weight(weight: Tensor) -> Chain:
            return (*chain[:place], replace(chain[place], weight=weight), *chain[place + 1 :])

        def gradient(kernel: Tensor) -> Tensor:
            """Of half the output's square, when it is the kernel's, by the factor's weight."""
            weight = chain[place].weight.detach().requires_grad_()
            with torch.enable_grad():
                composed = compose(with_weight(weight)).flatten(1)
                return torch.autograd.grad(composed, weight, kernel @ self._inputs)[0]

        weight = chain[place].weight
        residual = gradient((self._kernel - compose(chain)).flatten(1))
        direction, square = residual, residual.square().sum()
        for _ in range(STEPS):
            if square == 0:
                break
            along = gradient(compose(with_weight(direction)).flatten(1))
            curvature = (direction * along).sum()
            if not curvature > 0:
                break
            step = square / curvature
            weight = weight + step * direction
            residual = residual - step * along
            before, square = square, residual.square().sum()
            direction = residual + (square / before) * direction
        return min((with_weight(weight), chain), key=self.error)


def shrunk(moments: Moments, target: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """The covariance of x, and that of y and x, as far as the data tells them.

    Args:
        moments: of the data.
        target: the covariance of x where nothing is known, but for a factor: [x_size, x_size].
        pairs: that of y and x there: [y_size, x_size].
    """
    share, multiple = moments.shrinkage(target)
    covariance = (1 - share) * moments.covariance + share * multiple * target
    if not moments.has_pairs:
        return covariance, moments.cross_covariance
    return covariance, (1 - share) * moments.cross_covariance + share * multiple * pairs


def regression_of(cross: Tensor, covariance: Tensor) -> Tensor:
    """The matrix B for which ``B x`` is nearest to y.

    Directions in which x hardly varies are left as they are: B is the identity there.

    Args:
        cross: covariance of y and x [n, n].
        covariance: of x [n, n].
    """
    ridge = RIDGE * covariance.diagonal().mean().clamp_min(1e-300)
    identity = torch.eye(len(covariance), dtype=covariance.dtype)
    difference = torch.linalg.solve(covariance + ridge * identity, (cross - covariance).T).T
    return identity + difference


def refitted(kernel: Tensor, cross: Tensor, inputs: Tensor) -> Tensor:
    """The kernel that comes nearest to the outputs that a layer should have, from its inputs as
    they are.

    Args:
        kernel: what it is, [output channels, input channels, *taps].
        cross: covariance of the outputs it should have and of what it sees [output channels, n].
        inputs: covariance of what it sees [n, n].
    """
    flat = kernel.flatten(1)
    ridge = RIDGE * inputs.diagonal().mean().clamp_min(1e-300)
    identity = torch.eye(len(inputs), dtype=inputs.dtype)
    change = torch.linalg.solve(inputs + ridge * identity, (cross - flat @ inputs).T).T
    return (flat + change).reshape(kernel.shape)
