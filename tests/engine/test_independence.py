"""Which graphs may be computed in parts of their batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from random_graphs import Case, cases
from test_lowering import new_graph
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt
from graphopt import reference
from graphopt.engine.independence import batch_of
from graphopt.ir import Graph
from graphopt.passes import EXACT
from graphopt.pipeline import Pipeline


class Called(nn.Module):
    """A function with some weights."""

    def __init__(self, function: Callable[[Called, Tensor], Tensor]) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.linear = nn.Linear(6, 5)
        self.vector = nn.Parameter(torch.randn(4, 1, 1))
        self.table = nn.Parameter(torch.randn(1, 4, 6))
        self._function = function

    def forward(self, x: Tensor) -> Tensor:
        return self._function(self, x)


def traced(function: Callable[[Called, Tensor], Tensor]) -> Graph:
    torch.manual_seed(0)
    graph = graphopt.trace(Called(function).eval(), torch.randn(3, 4, 6, 6))
    Pipeline(EXACT).run(graph)
    return graph


APART: dict[str, Callable[[Called, Tensor], Tensor]] = {
    "convolution": lambda m, x: F.hardswish(m.norm(m.convolution(x))) + x * m.vector,
    "pooling": lambda m, x: F.adaptive_avg_pool2d(F.max_pool2d(x, 2), 1).flatten(1),
    "linear": lambda m, x: m.linear(F.gelu(x)).softmax(-1),
    "sums": lambda m, x: x.mean((2, 3)) + x.amax((-2, -1)) + x.sum(1)[:, 0, :4],
    "views": lambda m, x: x.reshape(-1, 2, 2, 36).transpose(1, 2).flatten(1).unsqueeze(1),
    "channels": lambda m, x: torch.cat([x.split(2, 1)[1], F.pad(x, (0, 0, 0, 0, 1, 0))], 1),
    "permuted": lambda m, x: x.permute(0, 2, 3, 1).roll(1, 2)[:, 1:],
    "attention": lambda m, x: F.scaled_dot_product_attention(x, x, x.abs()),
    "products": lambda m, x: x @ x.transpose(-1, -2) @ m.table.reshape(4, 6, 1),
    "repeated": lambda m, x: torch.cat([m.table.expand(x.shape[0], 4, 6).unsqueeze(3), x], 3),
}
MIXED: dict[str, Callable[[Called, Tensor], Tensor]] = {
    "mean of the batch": lambda m, x: x - x.mean(0, keepdim=True),
    "softmax over the batch": lambda m, x: x.softmax(0),
    "reversed": lambda m, x: x.flip(0),
    "rolled": lambda m, x: x.roll(1, 0),
    "rolled when flat": lambda m, x: x.roll(1),
    "running sum": lambda m, x: x.cumsum(0),
    "similarities": lambda m, x: x.flatten(1) @ (x.flatten(1).T @ x.flatten(1)),
    "two entries in one": lambda m, x: torch.cat([x, x]).reshape(-1, 8, 6, 6),
    "exchanged": lambda m, x: x.transpose(0, 1).softmax(1).transpose(0, 1),
    "broadcast to a channel": lambda m, x: x[:, 0, 0, 0] + x.amax((1, 2))[:, :1],
    "one for all": lambda m, x: x.mean(),
    "fewer entries": lambda m, x: x[1:],
    "times their number": lambda m, x: x * x.shape[0],
    "share of a sum": lambda m, x: torch.add(x, x, alpha=1 / x.shape[0]),
    "normalised by the batch": lambda m, x: F.batch_norm(x, None, None, training=True),
    "attention to each other": lambda m, x: F.scaled_dot_product_attention(*[x[:, 0, 0]] * 3),
    "none but one entry": lambda m, x: m.linear(x).squeeze(0),
}


def one_by_one(graph: Graph, inputs: list[Tensor]) -> list[Tensor]:
    """Every output, computed for one entry of the batch at a time."""
    count = len(inputs[0])
    parts = [reference.run(graph, [x[k : k + 1] for x in inputs]) for k in range(count)]
    return [torch.cat(pieces) for pieces in zip(*parts, strict=True)]


@pytest.mark.parametrize("name", APART)
def test_entries_apart(name: str) -> None:
    graph = traced(APART[name])
    assert batch_of(graph) == "batch"
    x = torch.randn(5, 4, 6, 6)
    for whole, parts in zip(reference.run(graph, [x]), one_by_one(graph, [x]), strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MIXED)
def test_entries_mixed(name: str) -> None:
    assert batch_of(traced(MIXED[name])) is None


def test_fixed_sizes_and_two_free_sizes_are_no_batch() -> None:
    graph, (x,) = new_graph((3, 4))
    graph.set_outputs([graph.add("aten.relu", x)])
    assert batch_of(graph) is None
    free = graphopt.trace(nn.ReLU(), torch.randn(3, 4), {"input": {0: "batch", 1: "length"}})
    assert batch_of(free) is None


@settings(max_examples=300)
@given(cases())
def test_no_random_graph_is_wrongly_taken_for_independent(case: Case) -> None:
    if batch_of(case.graph) is None:
        return
    for tensors in case.inputs:
        whole = reference.run(case.graph, tensors)
        for one, parts in zip(whole, one_by_one(case.graph, tensors), strict=True):
            torch.testing.assert_close(one, parts, rtol=1e-4, atol=1e-4)
