"""What a layer's weights are multiplied with: mean and covariance, in constant memory."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from graphopt.ir import Node
from graphopt.passes.layers import LINEAR, per_dimension
from graphopt.passes.neighbourhoods import neighbourhoods, zeros_around

ROWS_PER_BATCH = 4096
"""How many positions of a batch are looked at, drawn at random."""

INDEPENDENT_PER_ITEM = 16
"""As how many independent samples the positions of one image count."""


class InputStatistics:
    """Mean and second moments of the patches that a convolution or linear layer sees.

    Args:
        node: the layer; its weight is [groups * output channels, inputs per group, ...].
        generator: chooses the positions.
    """

    def __init__(self, node: Node, generator: torch.Generator) -> None:
        self._node = node
        self._generator = generator
        self.groups = 1 if node.op == LINEAR else int(node["groups"])
        weight = node["weight"]
        inputs = prod(weight.shape[1:])
        self.samples = 0
        self.independent = 0
        self._sum = torch.zeros(self.groups, inputs, dtype=torch.float64)
        self._products = torch.zeros(self.groups, inputs, inputs, dtype=torch.float64)

    @property
    def bytes(self) -> int:
        return self._products.nbytes

    def __call__(self, x: Tensor) -> None:
        rows = patches(self._node, x, self._generator)
        if not rows.shape[1]:
            return
        positions = rows.shape[1]
        items = x.shape[0] if x.dim() > 1 else 1
        self.samples += positions
        self.independent += min(positions, items * INDEPENDENT_PER_ITEM)
        self._sum += rows.double().sum(1)
        self._products += (rows.transpose(1, 2) @ rows).double()

    @property
    def mean(self) -> Tensor:
        """[groups, inputs], float64."""
        return self._sum / max(self.samples, 1)

    def covariance(self, centred: bool) -> Tensor:
        """[groups, inputs, inputs], float64, shrunk towards a multiple of the identity as far as
        the number of samples asks for (oracle approximating shrinkage: Chen, Wiesel, Eldar and
        Hero, 2010).

        Args:
            centred: around the mean, where a bias corrects that; else around zero.
        """
        moments = self._products / max(self.samples, 1)
        if centred:
            mean = self.mean
            moments = moments - mean[:, :, None] * mean[:, None, :]
        return shrunk(moments, self.independent)


def shrunk(covariance: Tensor, samples: int) -> Tensor:
    """Covariances [..., n, n] of so many samples, shrunk by oracle approximating shrinkage."""
    size = covariance.shape[-1]
    diagonal = covariance.diagonal(dim1=-2, dim2=-1)
    trace = diagonal.sum(-1)
    square = covariance.square().sum((-2, -1))
    above = (1 - 2 / size) * square + trace.square()
    below = (samples + 1 - 2 / size) * (square - trace.square() / size)
    share = torch.where(below > 0, above / below, 1.0).clamp(0, 1)[..., None, None]
    identity = torch.eye(size, dtype=covariance.dtype)
    return (1 - share) * covariance + share * (trace / size)[..., None, None] * identity


def patches(node: Node, x: Tensor, generator: torch.Generator) -> Tensor:
    """What the weights of a layer meet at some positions of x: [groups, positions, inputs]."""
    if node.op == LINEAR:
        rows = x.reshape(-1, x.shape[-1])
        return rows[_chosen(len(rows), generator)][None]
    kernel = node["weight"].shape[2:]
    spatial = len(kernel)
    stride, dilation = (per_dimension(node[name], spatial) for name in ("stride", "dilation"))
    padding = zeros_around(node["padding"], kernel, dilation)
    windows = neighbourhoods(x, kernel, stride, padding, dilation)
    positions = windows.shape[: 1 + spatial]
    chosen = _chosen(prod(positions), generator)
    found = windows[torch.unravel_index(chosen, positions)]
    groups = int(node["groups"])
    return found.reshape(len(chosen), groups, -1).transpose(0, 1)


def _chosen(count: int, generator: torch.Generator) -> Tensor:
    if count <= ROWS_PER_BATCH:
        return torch.arange(count)
    return torch.randint(0, count, (ROWS_PER_BATCH,), generator=generator)
