"""Pruning before and after quantization and decomposition, and training after pruning."""

from __future__ import annotations

import pytest
import torch
from pruning_networks import batches, traced
from torch import Tensor, nn
from torch.nn import functional

import graphopt
from graphopt import reference
from graphopt.errors import PassError
from graphopt.ir import Graph
from graphopt.passes import EXACT, LowRank, Prune, Quantize, keep_zeros
from graphopt.pipeline import Pipeline
from graphopt.registry import PassLike

OTHERS: dict[str, PassLike] = {
    "int8": Quantize(data=batches()),
    "int8 weights": Quantize(activations=None),
    "low rank": LowRank(macs=0.7, only_faster=False, multiple=1),
}


def network() -> nn.Module:
    torch.manual_seed(4)
    convolutions = [nn.Conv2d(4, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU()]
    rest = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 4)]
    return nn.Sequential(*convolutions, *rest).eval()


def prunes() -> dict[str, Prune]:
    return {
        "single weights": Prune(0.5),
        "N:M": Prune(granularity="2:4"),
        "hessian": Prune(0.5, criterion="hessian", granularity="1x4", data=batches()),
        "channels": Prune(0.5, granularity="channel"),
    }


def sparsity(graph: Graph) -> float:
    """Fraction of zeros in the weights of layers, as they compute with them."""
    layers = [n for n in graph.nodes if n.op in ("aten.conv2d", "aten.linear")]
    weights = [graph.weight(node).tensor for node in layers]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("first", [True, False], ids=["pruned first", "pruned last"])
@pytest.mark.parametrize("kind", prunes())
def test_prunes_before_and_after_other_passes(kind: str, first: bool, other: str) -> None:
    one, x = prunes()[kind], batches()[0][0]
    order = [one, OTHERS[other]] if first else [OTHERS[other], one]
    optimized = graphopt.optimize(network(), x, passes=order, threads=1)
    graph = optimized.graph
    expected = reference.run(graph, [x])[0]
    assert expected.isfinite().all()
    step = 0.02 if other == "int8" else 1e-4  # integers at a half may be rounded either way
    assert torch.allclose(optimized(x), expected, atol=step * float(expected.abs().max()))
    if kind == "channels":
        dense = traced(network)
        Pipeline([*EXACT, OTHERS[other]]).run(dense)
        assert elements(graph) < 0.75 * elements(dense)
    elif other != "low rank" or not first:  # factors of a sparse weight are dense
        assert sparsity(graph) >= 0.45


def elements(graph: Graph) -> int:
    layers = [n for n in graph.nodes if n.op in ("aten.conv2d", "aten.linear")]
    return sum(graph.weight(node).tensor.numel() for node in layers)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_training_keeps_zeros(optimizer: str) -> None:
    graph = traced(network)
    Pipeline([Prune(0.5)]).run(graph)
    module = graph.to_torch()
    weights = {n: p for n, p in module.named_parameters() if p.dim() > 1}
    before = {name: p.detach().clone() for name, p in weights.items()}
    assert len(keep_zeros(module)) == len(weights) == 4
    if optimizer == "sgd":
        step = torch.optim.SGD(module.parameters(), 0.05, momentum=0.9, weight_decay=0.01)
    else:
        step = torch.optim.AdamW(module.parameters(), 0.01)
    for x, target in 3 * batches():
        step.zero_grad()
        functional.cross_entropy(module(x), target).backward()
        step.step()
    again = graphopt.trace(module, batches()[0][0])
    for name, old in before.items():
        new = again.value(name).constant
        assert torch.equal(new == 0, old == 0)
        assert not torch.equal(new, old)


def test_a_removed_handle_lets_weights_change() -> None:
    graph = traced(network)
    Pipeline([Prune(0.5)]).run(graph)
    module = graph.to_torch()
    for handle in keep_zeros(module):
        handle.remove()
    module(batches()[0][0]).sum().backward()
    gradient = dict(module.named_parameters())["0.weight"].grad
    assert isinstance(gradient, Tensor)
    assert gradient.ne(0).float().mean() > 0.9


def test_what_has_no_zeros_to_keep() -> None:
    fresh = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        fresh[1].weight.zero_()  # as some are at the start of training
    with pytest.raises(PassError, match="has a zero to keep"):
        keep_zeros(fresh)
