"""What the tests of low-rank decompositions share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import graphopt
from graphopt.flops import count_flops
from graphopt.ir import Graph
from graphopt.passes import LowRank
from graphopt.passes.low_rank.methods import METHODS
from graphopt.pipeline import Context, Pipeline


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def methods_for(shape: Sequence[int]) -> tuple[str, ...]:
    """The methods that apply to a kernel [output channels, input channels, *taps], if its groups
    of channels come out even."""
    taps = shape[2:]
    if all(extent == 1 for extent in taps):
        return ("svd",)
    has_rows_and_columns = len(taps) == 2 and 1 not in taps
    return tuple(method for method in METHODS if method != "spatial" or has_rows_and_columns)


def applied(model: nn.Module, x: torch.Tensor, one: LowRank, **context: Any) -> tuple[Graph, Any]:
    graph = graphopt.trace(model, x)
    ctx = Context(**context)
    Pipeline([one]).run(graph, ctx)
    return graph, ctx.reports[-1]


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()


def macs_of(graph: Graph) -> int:
    return sum(count_flops(node) for node in graph.nodes) // 2


def parameters_of(graph: Graph) -> int:
    return sum(math.prod(value.shape) for value in graph.constants if value.trainable)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 1),
        nn.ReLU(),
        nn.Conv2d(64, 48, 3, padding=1),
    ).eval()


X = torch.randn(1, 8, 12, 12)


def by_macs(fragment: Graph) -> float:
    """A machine that takes a nanosecond for a multiply-add, and 100 for every layer."""
    return 1e-9 * macs_of(fragment) + 1e-7 * len(fragment.nodes)


def flat(fragment: Graph) -> float:
    """A machine on which every layer takes a millisecond, whatever it does."""
    return 1e-3 * len(fragment.nodes)
