"""Small networks and data for the tests of pruning."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

import graphopt
from graphopt.pass_report import PassReport
from graphopt.passes import Prune
from graphopt.pipeline import Context, Pipeline


def network() -> nn.Module:
    """Convolutions with batch norm (plain, grouped, depthwise, transposed), and a classifier."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1, stride=2, groups=2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 8, 3, stride=2, padding=1, output_padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Linear(8, 4),
        nn.BatchNorm1d(4),
    )
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.2, 0.2)
    return model.eval()


def tiny() -> nn.Module:
    """A convolution and a linear layer, with batch norm after each."""
    torch.manual_seed(3)
    layers = [nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 4), nn.BatchNorm1d(4)).eval()


def batches(count: int = 2, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    """Images for the network, with labels."""
    generator = torch.Generator().manual_seed(5)
    return [
        (
            torch.randn(size, 4, 8, 8, generator=generator),
            torch.randint(0, 4, (size,), generator=generator),
        )
        for _ in range(count)
    ]


@functools.cache
def _traced(make: Callable[[], nn.Module]) -> graphopt.Graph:
    return graphopt.trace(make(), batches()[0][0])


def traced(
    model: nn.Module | Callable[[], nn.Module] = network, x: Tensor | None = None
) -> graphopt.Graph:
    """The graph of a model, or of what a function makes; the latter is traced once."""
    if not isinstance(model, nn.Module):
        return _traced(model).clone()
    return graphopt.trace(model, batches()[0][0] if x is None else x)


def pruned(graph: graphopt.Graph, one: Prune, ctx: Context | None = None) -> PassReport:
    """Prune in place; the report, the first where there are several."""
    ctx = ctx or Context()
    told = len(ctx.reports)
    Pipeline([one]).run(graph, ctx)
    return ctx.reports[told]


def sparsity_of(graph: graphopt.Graph, *modules: str) -> float:
    """Fraction of zeros in the weights of modules, or of all layers in the report."""
    weights = [graph.value(f"{module}.weight").constant for module in modules]
    zeros = sum(int((w == 0).sum()) for w in weights if w is not None)
    return zeros / sum(w.numel() for w in weights if w is not None)
