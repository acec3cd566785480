"""Scores of criteria, against their definitions computed otherwise."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pruning_networks import batches, network, pruned, traced
from torch import Tensor, nn
from torch.nn import functional

from graphopt.calibration import CalibrationData
from graphopt.errors import PassError
from graphopt.passes import FoldBatchNorm, Prune
from graphopt.passes.pruning.criteria import (
    CRITERIA,
    CriterionContext,
    find_criterion,
    lamp_normalization,
)
from graphopt.passes.pruning.layers_to_prune import prunable_layers
from graphopt.passes.pruning.statistics import Statistics
from graphopt.pipeline import Context, Pipeline


def scores(graph: Any, name: str, data: Any = None, loss: Any = None) -> dict[str, Tensor]:
    """A criterion's scores of every layer, by module."""
    layers, _ = prunable_layers(graph, depthwise=True)
    given = None if data is None else CalibrationData(data)
    statistics = Statistics(graph, layers, given, loss, Context())
    generator = torch.Generator().manual_seed(0)
    criterion = CRITERIA[name]
    return {
        layer.name: criterion.scores(CriterionContext(layer, statistics, generator))
        for layer in layers
    }


def test_taylor_is_the_finite_difference_of_the_loss() -> None:
    """For a loss that is linear in each weight, exactly what removing the weight changes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 2)).double()
    x, target = torch.randn(4, 2, 4, 4).double(), torch.randn(4, 2).double()

    def loss(output: Tensor, wanted: Tensor) -> Tensor:
        return (output * wanted).sum()

    found = scores(traced(model, x), "taylor", [(x, target)], loss)
    for name, layer in (("0", model[0]), ("2", model[2])):
        weight = layer.weight
        with torch.no_grad():
            base = loss(model(x), target)
            for place in range(0, weight.numel(), 5):
                kept = weight.flatten()[place].item()
                weight.view(-1)[place] = 0.0
                change = (loss(model(x), target) - base).abs()
                weight.view(-1)[place] = kept
                assert torch.isclose(found[name].flatten()[place], change, rtol=1e-9)


def test_gradients_are_those_of_torch_and_averaged_over_batches() -> None:
    model, data = network(), batches(3)
    taylor = scores(traced(model), "taylor", data, functional.cross_entropy)
    fisher = scores(traced(model), "fisher", data, functional.cross_entropy)
    gradients = []
    for x, target in data:
        model.zero_grad()
        functional.cross_entropy(model(x), target).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for name in taylor:
        weight = model.get_parameter(f"{name}.weight").detach()
        own = torch.stack([g[f"{name}.weight"] for g in gradients])
        assert torch.allclose(taylor[name], (own * weight).abs().mean(0), atol=1e-6, rtol=1e-4)
        expected = weight.square() * own.square().mean(0) / 2
        assert torch.allclose(fisher[name], expected, atol=1e-7, rtol=1e-4)


def test_wanda_is_magnitude_times_the_norm_of_the_input() -> None:
    data = batches(2)
    graph = traced()
    found = scores(graph, "wanda", data)
    x = torch.cat([b[0] for b in data])
    weight = graph.value("0.weight").constant
    unfolded = functional.unfold(x, 3, padding=1).transpose(0, 1).flatten(1)
    expected = weight.abs().flatten(1) * unfolded.norm(dim=1)
    assert torch.allclose(found["0"].flatten(1).float(), expected, rtol=1e-4)


def test_lamp() -> None:
    """u_k / sum of u_j over the weights not smaller."""
    found = lamp_normalization(torch.tensor([[4.0, 1.0], [2.0, 3.0]]))
    expected = [[4 / 4, 1 / 10], [2 / 9, 3 / 7]]
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64))


def test_batch_norm_and_geometric_median_score_channels() -> None:
    model = network()
    gamma = scores(traced(model), "batch-norm")
    for name, norm in (("0", 1), ("6", 7), ("9", 10), ("14", 15)):
        dimension = 1 if name == "9" else 0
        axes = [d for d in range(gamma[name].dim()) if d != dimension]
        sums = gamma[name].sum(axes).float()
        assert torch.allclose(sums, model[norm].weight.abs())
    rows = model[0].weight.detach().flatten(1)
    expected = [sum(math.dist(a, b) for b in rows.tolist()) for a in rows.tolist()]
    median = scores(traced(model), "geometric-median")["0"].sum((1, 2, 3))
    assert torch.allclose(median.float(), torch.tensor(expected), rtol=1e-4)


def test_folded_batch_norm_is_explained() -> None:
    graph = traced()
    Pipeline([FoldBatchNorm()]).run(graph)
    with pytest.raises(PassError, match=r"no batch norm with a scale after 0; .*folded already"):
        scores(graph, "batch-norm")


def test_a_criterion_of_ones_own() -> None:
    def last(weight: Tensor, context: CriterionContext) -> Tensor:
        return torch.arange(weight.numel(), dtype=torch.float32).reshape(weight.shape)

    graph = traced(nn.Linear(4, 2), torch.randn(2, 4))
    report = pruned(graph, Prune(0.5, criterion=last))
    weight = graph.value("weight").constant
    assert not weight[0].any()
    assert weight[1].all()
    assert "last" in report.title


@pytest.mark.parametrize(
    ("wrong", "message"),
    [(lambda w, c: w[0], r"gave \[4\] for the weight of .*, which is \[2, 4\]"),
     (lambda w, c: 3, "gave 3"), (lambda w, c: w * torch.nan, "not numbers")],
)  # fmt: skip
def test_scores_that_are_none(wrong: Any, message: str) -> None:
    graph = traced(nn.Linear(4, 2), torch.randn(2, 4))
    with pytest.raises(PassError, match=message):
        pruned(graph, Prune(0.5, criterion=wrong))


def test_unknown_criterion() -> None:
    with pytest.raises(PassError, match="'magnitud' is unknown; there are magnitude"):
        find_criterion("magnitud")


def test_a_loss_without_gradient() -> None:
    one = Prune(0.5, criterion="taylor", data=batches(), loss=lambda y, t: y.argmax().float())
    with pytest.raises(PassError, match="one number that depends on the output"):
        pruned(traced(), one)
