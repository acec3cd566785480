"""Importance of output channels, and masks that heed it."""

from __future__ import annotations

import itertools

import pytest
import torch
from pruning_networks import pruned, sparsity_of, traced
from torch import Tensor, nn

import graphopt
from graphopt.passes import Prune, Quantize
from graphopt.passes.pruning import hessian, output_importance
from graphopt.passes.pruning.granularity import Blocks
from graphopt.passes.pruning.hessian import Problem
from graphopt.passes.pruning.layers_to_prune import prunable_layers
from graphopt.pipeline import Context, Pipeline


def importance(graph: graphopt.Graph, data: list[Tensor], **kwargs: bool) -> dict[str, Tensor]:
    layers, _ = prunable_layers(graph, **kwargs)
    found = output_importance.output_importance(graph, layers, [[x] for x in data], Context())
    return {layer.name: values for layer, values in found.items()}


def relative(squares: Tensor) -> Tensor:
    """Root of the mean squares, as the importance has it."""
    root = (squares / squares.mean() + output_importance.FLOOR).sqrt()
    return root / root.mean()


SAMPLING = 6 * (2 / 8000) ** 0.5 / 2
"""Six standard deviations of the root of a mean of 8,000 squares of normal numbers."""


@pytest.fixture
def many_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_importance, "SAMPLES", 4000)
    monkeypatch.setattr(output_importance, "CHUNK", 1000)


@pytest.mark.usefixtures("many_samples")
def test_linear_layers_have_the_norms_of_what_follows() -> None:
    """Of results v A B x, the gradient at B's output is v A, at A's v."""
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 5, bias=False)).double()
    graph = traced(model, torch.randn(2, 4, dtype=torch.float64))
    found = importance(graph, [torch.randn(4000, 4, dtype=torch.float64)])
    norms = model[1].weight.detach().square().sum(0)
    assert torch.allclose(found["0"], relative(norms), rtol=SAMPLING)
    assert torch.allclose(found["1"], torch.ones(5).double(), rtol=SAMPLING)


@pytest.mark.usefixtures("many_samples")
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, groups=2),
        nn.ConvTranspose2d(4, 6, 3, groups=2),
        nn.Conv2d(4, 6, 1),
    ],
    ids=["grouped", "transposed", "1x1"],
)
def test_channels_of_convolutions(layer: nn.Module) -> None:
    """Each channel is scaled on its own afterwards."""
    model = nn.Sequential(layer, nn.Conv2d(6, 6, 1, groups=6))
    found = importance(traced(model, torch.randn(2, 4, 5, 5)), [torch.randn(200, 4, 5, 5)])
    scales = model[1].weight.detach().double().square().flatten()
    assert torch.allclose(found["0"], relative(scales), rtol=SAMPLING)


def test_channels_that_never_act_matter_least() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        model[0].bias[2] = -100.0
    found = importance(traced(model, torch.randn(2, 4)), [torch.randn(32, 4)])["0"]
    assert int(found.argmin()) == 2
    assert 0 < found[2] < 0.1


def test_where_no_gradient_comes_through_all_channels_count_the_same() -> None:
    x = [torch.randn(8, 4)]
    graph = traced(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), x[0])
    Pipeline([Quantize(data=x)]).run(graph)
    found = importance(graph, x)
    assert torch.equal(found["0"], torch.ones(6).double())


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.first, self.last = nn.Embedding(9, 4), nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.tanh(self.first(self.embedding(tokens)))
        return self.last(x), tokens


def test_tokens_as_inputs_and_several_results() -> None:
    tokens = torch.randint(0, 9, (4, 5))
    graph = traced(Tokens(), tokens)
    pruned(graph, Prune(0.5, criterion="hessian", data=[tokens]))
    assert sparsity_of(graph, "first", "last", "embedding") == 0.5


def test_the_mask_is_near_the_best_where_rows_count_differently() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(4, 30, generator=generator, dtype=torch.float64)
    weight = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    counts = torch.tensor([[1.0], [9.0]]).double()
    given = Problem(weight, hessian.damped(x @ x.T, 0.01), weight != 0, 1, counts)
    errors = []
    for places in itertools.combinations(range(8), 4):
        mask = torch.zeros(8, dtype=torch.bool)
        mask[list(places)] = True
        kept = mask.reshape(2, 4)
        errors.append(given.error(hessian.least_squares(given, weight, kept)))
    found = hessian.prune(given, Blocks(), 0.5)
    assert given.error(found) <= sorted(errors)[2] * 1.001, "not among the best 3 of 70 masks"
    assert (found != 0)[1].sum() > (found != 0)[0].sum()
