"""The pass as a whole: options, composition, interplay with other passes, errors."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from pruning_networks import batches, network, pruned, sparsity_of, tiny, traced
from torch import Tensor, nn
from torch.nn import functional

import graphopt
from graphopt import reference
from graphopt.errors import PassError
from graphopt.passes import FoldBatchNorm, Prune
from graphopt.passes.pruning.criteria import CRITERIA
from graphopt.pipeline import Context, Pipeline

PRUNED = ("0", "6", "9", "14", "17")  # all but the depthwise convolution


@pytest.mark.parametrize("allocation", ["uniform", "global", "erk", "sensitivity"])
@pytest.mark.parametrize("granularity", ["unstructured", "2:4", "1x4", "2x2"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_granularity_and_allocation(
    criterion: str, granularity: str, allocation: str
) -> None:
    graph, data, ctx = traced(tiny), batches(), Context()
    one = Prune(0.5, granularity=granularity, criterion=criterion, allocation=allocation, data=data,
                loss=functional.cross_entropy)  # fmt: skip
    assert one.run(graph, ctx)
    (report,) = ctx.reports
    weights = [row[1] for row in report.rows]
    zeros = sum(row[3] * row[1] for row in report.rows)
    assert zeros / sum(weights) == pytest.approx(0.5, abs=0.03)
    result = reference.run(graph, [data[0][0]])[0]
    assert result.isfinite().all()
    name, _, size = granularity.partition(":")
    if size:
        taps = graph.value("0.weight").constant.reshape(8, 4, 9)
        assert ((taps != 0).sum(1) <= int(name)).all()


def test_uniform_sparsity_is_exact_per_layer() -> None:
    graph = traced()
    report = pruned(graph, Prune(0.25))
    assert [row[0] for row in report.rows] == list(PRUNED)
    for module in PRUNED:
        assert sparsity_of(graph, module) == pytest.approx(0.25, abs=0.005)
    assert sparsity_of(graph, "3") == 0
    assert any("3: a depthwise convolution" in remark for remark in report.remarks)
    pruned(graph, Prune(0.25, depthwise=True, ignore=[nn.Linear, nn.ConvTranspose2d, "0"]))
    assert sparsity_of(graph, "3") == 0.25


def test_twice_is_relative_to_the_remaining_weights() -> None:
    graph, at_once = traced(), traced()
    pruned(graph, Prune(0.5))
    report = pruned(graph, Prune(0.5))
    pruned(at_once, Prune(0.75))
    for module, row in zip(PRUNED, report.rows, strict=True):
        assert sparsity_of(graph, module) == 0.75
        assert row[2] == pytest.approx(0.75)
        weights = [g.value(f"{module}.weight").constant for g in (graph, at_once)]
        assert torch.equal(*weights)


@pytest.mark.parametrize("granularity", ["2:4", "1x4"])
def test_patterns_twice(granularity: str) -> None:
    graph = traced()
    sparsity = None if ":" in granularity else 0.5
    pruned(graph, Prune(sparsity, granularity=granularity))
    once = {m: sparsity_of(graph, m) for m in PRUNED}
    ctx = Context()
    changed = bool(Pipeline([Prune(sparsity, granularity=granularity)]).run(graph, ctx))
    twice = {m: sparsity_of(graph, m) for m in PRUNED}
    if granularity == "2:4":
        assert not changed
        assert twice == once
    else:
        assert twice == {m: 1 - (1 - s) / 2 for m, s in once.items()}


@pytest.mark.parametrize("criterion", ["magnitude", "hessian"])
def test_blocks_after_single_weights_count_whole_blocks(criterion: str) -> None:
    """Half of the weights are zero, but no block is: half of the blocks go."""
    model = nn.Linear(16, 8)
    with torch.no_grad():
        model.weight[:, ::2] = 0
    data = [torch.randn(32, 16)]
    graph = traced(model, data[0])
    pruned(graph, Prune(0.5, granularity="2x4", criterion=criterion, data=data))
    weight = graph.value("weight").constant
    assert weight is not None
    blocks = weight.reshape(4, 2, 4, 4).abs().sum((1, 3))
    assert int((blocks == 0).sum()) == 8
    assert not weight[:, ::2].any()


def test_threshold_trims_by_absolute_value() -> None:
    graph = traced()
    before = {m: graph.value(f"{m}.weight").constant for m in PRUNED}
    pruned(graph, Prune(threshold=0.1))
    for module, old in before.items():
        new = graph.value(f"{module}.weight").constant
        assert torch.equal(new, torch.where(old.abs() < 0.1, 0.0, old))


def test_constants_of_the_source_are_not_written() -> None:
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimized = graphopt.optimize(
        model, batches()[0][0], passes=[Prune(0.5, criterion="hessian", data=batches())]
    )
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    report = str(optimized.report())
    assert "prune: unstructured, hessian, uniform: 50.0" in report
    assert "left alone: 3: a depthwise convolution" in report


def test_before_and_after_folding_batch_norm() -> None:
    x = batches()[0][0]
    first, second = traced(), traced()
    Pipeline([Prune(0.5, criterion="batch-norm"), FoldBatchNorm()]).run(first)
    Pipeline([FoldBatchNorm(), Prune(0.5)]).run(second)
    for graph in (first, second):
        assert sparsity_of(graph, *PRUNED) == pytest.approx(0.5, abs=0.01)
        assert reference.run(graph, [x])[0].isfinite().all()
    only = traced()
    Pipeline([Prune(0.5, criterion="batch-norm")]).run(only)
    exact = reference.run(only, [x])[0]
    assert torch.allclose(reference.run(first, [x])[0], exact, atol=1e-4)


def quantized(per_channel: bool, shared: bool) -> graphopt.Graph:
    """Linear layers with quantized weights, one weight read twice where it is shared."""
    graph = graphopt.Graph({"batch": 2})
    kind = graphopt.ir.TensorType(torch.float32, (2, 8))
    x = graph.add_input("x", kind, {0: "batch"})
    generator = torch.Generator().manual_seed(0)
    for place in range(1 if shared else 2):
        raw = torch.randint(-7, 8, (8, 8), generator=generator).to(torch.int8)
        q = graph.constant(raw, f"w{place}", trainable=True)
        scale = graph.constant(torch.rand(8) + 0.1 if per_channel else torch.tensor(0.3), "scale")
        zero = graph.constant(torch.ones(8 if per_channel else 1, dtype=torch.int64).squeeze(), "z")
        w = graph.add("graphopt.dequantize", q, scale, zero, 0 if per_channel else None,
                      -8, 7, torch.int8)  # fmt: skip
        for _ in range(2 if shared else 1):
            x = graph.add("aten.relu", graph.add("aten.linear", x, w))
    graph.set_outputs([x])
    return graph


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("criterion", ["magnitude", "hessian"])
def test_quantized_weights(per_channel: bool, shared: bool, criterion: str) -> None:
    graph = quantized(per_channel, shared)
    data = [torch.randn(16, 8) for _ in range(2)]
    one = Prune(0.5, criterion=criterion, data=data)
    report = pruned(graph, one)
    for node in graph.nodes:
        if node.op == "aten.linear":
            weight = graph.weight(node)
            assert weight.dequantize is not None
            assert weight.constant.constant.dtype == torch.int8
            assert float((weight.tensor == 0).float().mean()) >= 0.5
    assert len(report.rows) == (1 if shared else 2)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embedding.weight
        self.alone = nn.Embedding(12, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.head(self.embedding(tokens) + self.alone(tokens))
        return result


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "hessian", "taylor"])
def test_shared_weights_are_pruned_once(criterion: str) -> None:
    tokens = torch.randint(0, 12, (2, 5))
    graph = traced(Tied(), tokens)
    data = [(torch.randint(0, 12, (8, 5)), torch.zeros(8, dtype=torch.int64)) for _ in range(2)]
    one = Prune(0.5, criterion=criterion, data=data, loss=lambda y, t: y[:, 0].logsumexp(1).sum())
    report = pruned(graph, one)
    assert len(report.rows) == 2
    assert [row[3] for row in report.rows] == [0.5, 0.5]
    weights = {graph.weight(node).constant for node in graph.nodes if node.op != "aten.add.Tensor"}
    assert len(weights) == 2


def test_a_shared_weight_is_ignored_with_any_of_its_layers() -> None:
    graph = traced(Tied(), torch.randint(0, 12, (2, 5)))
    report = pruned(graph, Prune(0.5, ignore="head"))
    assert [row[0] for row in report.rows] == ["alone"]


def test_masks_survive_the_torch_form_and_its_training() -> None:
    graph = traced()
    pruned(graph, Prune(0.5))
    module = graph.to_torch()
    zeros = {name: p == 0 for name, p in module.named_parameters() if name.endswith("weight")}
    layers = {f"{m}.weight" for m in PRUNED}
    assert all(zeros[name].float().mean() == pytest.approx(0.5, abs=0.01) for name in layers)
    again = graphopt.trace(module, batches()[0][0])
    for name in layers:
        assert torch.equal(again.value(name).constant == 0, zeros[name])


def test_the_engine_and_the_reference_agree() -> None:
    x = batches()[0][0]
    optimized = graphopt.optimize(network(), x, passes=[Prune(0.8, granularity="2x2")])
    expected = reference.run(optimized.graph, [x])[0]
    assert torch.allclose(optimized(x), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Prune takes one of sparsity, .*none of them"),
        ({"sparsity": 0.5, "macs": 0.5}, "given: sparsity and macs"),
        ({"sparsity": 1.0}, r"sparsity 1.0 is out of range; it must be in \[0, 1\)"),
        ({"sparsity": -0.1}, "out of range"),
        ({"sparsity": float("nan")}, "out of range"),
        ({"sparsity": "half"}, "out of range"),
        ({"macs": 0}, r"must be in \(0, 1\]"),
        ({"parameters": 1.5}, "out of range"),
        ({"speedup": 1.0}, "above 1"),
        ({"threshold": 0.0}, "positive"),
        ({"threshold": 1.0, "granularity": "2:4"}, "which fixes how many"),
        ({"threshold": 1.0, "criterion": "l2"}, "compares magnitudes"),
        ({"sparsity": 0.8, "granularity": "2:4"}, "2:4 has the sparsity 0.5, not 0.8"),
        ({"sparsity": 0.5, "granularity": "4:4"}, "N:M wants"),
        ({"sparsity": 0.5, "granularity": 4}, "is no text"),
        ({"sparsity": 0.5, "granularity": "rows"}, "'rows' is unknown"),
        ({"sparsity": 0.5, "criterion": "wanda"}, "'wanda' needs data"),
        ({"sparsity": 0.5, "criterion": "taylor", "data": [1]}, "needs a loss"),
        ({"sparsity": 0.5, "allocation": "sensitivity"}, "'sensitivity' needs data"),
        ({"sparsity": 0.5, "allocation": "best"}, "'best' is unknown"),
        ({"sparsity": 0.5, "data": torch.zeros(3)}, "iterable of batches"),
        ({"sparsity": 0.5, "ignore": [3]}, "ignore has 3"),
        ({"sparsity": 0.5, "damping": 0.0}, "no positive number"),
    ],
)
def test_options_that_are_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PassError, match=message):
        Prune(**options)


def test_patterns_that_mean_no_layer() -> None:
    with pytest.raises(PassError, match="ignore has 'stem', which means no layer"):
        pruned(traced(), Prune(0.5, ignore="stem"))


def test_nothing_to_prune() -> None:
    with pytest.raises(PassError, match=r"nothing to prune: .*0: ignored"):
        pruned(traced(), Prune(0.5, ignore=re.compile("")))
    with pytest.raises(PassError, match="nothing to prune: no layer has a weight"):
        pruned(traced(nn.ReLU(), torch.randn(2, 3)), Prune(0.5))
    with pytest.raises(PassError, match="narrower than a 64x64 block"):
        pruned(traced(), Prune(0.5, granularity="64x64"))


def test_data_that_does_not_fit_leaves_the_graph_as_it_was() -> None:
    graph = traced()
    text, weight = graph.to_text(), graph.value("0.weight").constant
    good, bad = batches()[0], torch.randn(2, 5, 8, 8)
    with pytest.raises(PassError, match="batch 1 of the calibration data"):
        pruned(graph, Prune(0.5, criterion="hessian", data=[good, bad]))
    assert graph.to_text() == text
    assert graph.value("0.weight").constant is weight


def test_an_interruption_leaves_the_graph_as_it_was() -> None:
    graph = traced()
    text, seen = graph.to_text(), []

    def stop(output: Tensor, target: Tensor) -> Tensor:
        seen.append(target)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return functional.cross_entropy(output, target)

    with pytest.raises(KeyboardInterrupt):
        pruned(graph, Prune(0.5, criterion="taylor", data=batches(), loss=stop))
    assert graph.to_text() == text


@pytest.mark.parametrize("criterion", ["wanda", "hessian"])
def test_a_generator_serves_for_one_sweep_of_inputs(criterion: str) -> None:
    graph = traced()
    report = pruned(graph, Prune(0.5, criterion=criterion, data=iter(batches())))
    assert "white inputs" in " ".join(report.remarks)


def test_a_generator_serves_for_one_sweep() -> None:
    graph = traced()
    pruned(graph, Prune(0.5, criterion="taylor", data=iter(batches()),
                        loss=functional.cross_entropy))  # fmt: skip
    assert sparsity_of(graph, *PRUNED) == pytest.approx(0.5, abs=0.01)
