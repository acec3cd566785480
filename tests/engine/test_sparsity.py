"""Zeros in constants: noticed without a flag, computed by sparse kernels, packed once."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.engine import compile_graph
from graphopt.passes import EXACT


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 64, 3, padding=1)
        self.block = nn.Sequential(
            nn.Conv2d(64, 64, 1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1)
        )
        self.tokens = nn.Linear(28, 128)
        self.head = nn.Linear(128, 50)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = torch.relu(self.block(x) + x)
        x = torch.nn.functional.gelu(self.tokens(x.mean(3)))
        return self.head(x.mean(1))


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    monkeypatch.setenv("GRAPHOPT_SELECTION", "estimate")
    torch.manual_seed(0)
    return Network().eval()


def prune(network: Network, sparsity: float) -> None:
    for layer in (network.block[0], network.block[3], network.tokens, network.head):
        with torch.no_grad():
            layer.weight *= torch.rand_like(layer.weight) >= sparsity


def test_zeros_choose_the_kernels(network: Network) -> None:
    x = torch.randn(1, 3, 28, 14)
    dense = graphopt.optimize(network, x)
    assert not any("sparse" in str(layer.kernel) for layer in dense.report().layers)
    prune(network, 0.9)
    optimized = graphopt.optimize(network, x)
    kernels = {layer.layer: str(layer.kernel) for layer in optimized.report().layers}
    assert "sparse" not in kernels["first"]
    for name, kind in {
        "block.0": "sparse convolution",
        "block.3": "sparse convolution",
        "tokens": "sparse matmul",
        "head": "sparse vector",
    }.items():
        assert kernels[name].startswith(kind)
    exact = copy.deepcopy(network).double()
    with torch.no_grad():
        for batch in (1, 3):
            x = torch.randn(batch, 3, 28, 14)
            expected, own = exact(x.double()), network(x)
            error = (optimized(x).double() - expected).abs().max()
            assert error <= 4 * (own.double() - expected).abs().max() + 1e-7


def test_streams_are_packed_once_for_all_batches(network: Network) -> None:
    prune(network, 0.9)
    graph = graphopt.trace(network, torch.randn(2, 3, 28, 14))
    graphopt.Pipeline(EXACT).run(graph)
    first = compile_graph(graph, threads=2)
    other = compile_graph(graph, {"batch": 5}, threads=2, like=first)
    streams = [key for key in first.packed if "sparse" in key[1] and "vector" not in key[1]]
    assert len(streams) == 3
    for key in streams:
        assert other.packed[key] is first.packed[key]


def test_results_depend_neither_on_the_threads_nor_on_the_call(network: Network) -> None:
    prune(network, 0.8)
    x = torch.randn(2, 3, 28, 14)
    expected = graphopt.optimize(network, x, threads=1)(x)
    for threads in (1, 2, 3):
        optimized = graphopt.optimize(network, x, threads=threads)
        assert all(torch.equal(optimized(x), expected) for _ in range(100))
