"""The pass as a whole: geometries against torch, gate and budgets with a known clock, errors."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import pytest
import torch
from low_rank_support import X, applied, macs_of, methods_for, network, relative
from torch import nn

import graphopt
from graphopt import reference
from graphopt.errors import PassError
from graphopt.ir import Graph
from graphopt.kernels.simd import LANES
from graphopt.passes import LowRank
from graphopt.passes.low_rank.merging import merge_neighbours
from graphopt.passes.low_rank.methods import METHODS
from graphopt.pipeline import Context, Pipeline
from graphopt.target import Target

# -- geometries ----------------------------------------------------------------------------------

torch.manual_seed(0)
GEOMETRIES = {
    "plain": (nn.Conv2d(6, 8, 3), (9, 8)),
    "stride": (nn.Conv2d(6, 8, 3, stride=2, padding=1), (9, 8)),
    "unequal": (nn.Conv2d(6, 8, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1)), (9, 8)),
    "dilation": (nn.Conv2d(6, 8, 3, dilation=2, padding=2), (9, 8)),
    "same": (nn.Conv2d(6, 8, (3, 2), padding="same", dilation=(1, 2)), (9, 8)),
    "valid": (nn.Conv2d(6, 8, 3, padding="valid", stride=2), (9, 8)),
    "row": (nn.Conv2d(6, 8, (1, 3), padding=(1, 1), stride=(2, 1)), (9, 8)),
    "column": (nn.Conv2d(6, 8, (5, 1), padding=(2, 0), stride=(1, 2)), (9, 8)),
    "pointwise": (nn.Conv2d(6, 8, 1, stride=2, padding=1), (9, 8)),
    "groups": (nn.Conv2d(6, 8, 3, groups=2, padding=1, stride=(2, 1)), (9, 8)),
    "no bias": (nn.Conv2d(6, 8, 3, bias=False), (9, 8)),
    "one dimension": (nn.Conv1d(6, 8, 3, stride=2, padding=2), (11,)),
    "one dimension, same": (nn.Conv1d(6, 8, 4, padding="same", groups=2), (11,)),
    "one dimension, dilation": (nn.Conv1d(6, 8, 3, dilation=3, padding=1), (11,)),
    "three dimensions": (nn.Conv3d(4, 4, (2, 3, 2), (1, 2, 1), padding=(1, 0, 1)), (4, 5, 4)),
}  # fmt: skip


APPLYING = [
    (method, name)
    for name, (layer, _) in GEOMETRIES.items()
    for method in methods_for(layer.weight.shape)
]
OTHERS = [pair for pair in itertools.product(METHODS, GEOMETRIES) if pair not in APPLYING]


def at_full_rank(method: str, geometry: str) -> tuple[nn.Module, torch.Tensor, Graph, Any]:
    layer, sizes = GEOMETRIES[geometry]
    x = torch.randn(2, layer.in_channels, *sizes)
    model = nn.Sequential(layer, nn.ReLU()).eval()
    one = LowRank(method, rank=1.0, groups=3 - layer.groups, only_faster=False)
    return model, x, *applied(model, x, one)


@pytest.mark.parametrize(("method", "geometry"), APPLYING)
def test_full_rank_computes_the_layer(method, geometry):
    model, x, graph, report = at_full_rank(method, geometry)
    with torch.no_grad():
        assert relative(reference.run(graph, [x])[0], model(x)) < 1e-6
    assert report.rows[0][6] == macs_of(graph)
    assert report.rows[0][4] == sum(
        math.prod(value.shape) for value in graph.constants if value.name.endswith("weight")
    )


@pytest.mark.parametrize(("method", "geometry"), OTHERS)
def test_layers_to_which_a_method_does_not_apply_stay(method, geometry):
    model, x, graph, report = at_full_rank(method, geometry)
    assert graph.to_text() == graphopt.trace(model, x).to_text()
    assert report.rows == ()
    assert re.search("stays: .*(more than one tap|rows and columns)", str(report))


@pytest.mark.parametrize("layer", [nn.Linear(7, 9), nn.Linear(9, 7, bias=False)])
def test_linear_layers(layer):
    x = torch.randn(2, 5, layer.in_features)
    graph, report = applied(nn.Sequential(layer), x, LowRank("svd", rank=1.0, only_faster=False))
    with torch.no_grad():
        assert relative(reference.run(graph, [x])[0], layer(x)) < 1e-5
    assert [node.op for node in graph.nodes] == ["aten.linear", "aten.linear"]
    assert report.rows[0][6] == macs_of(graph)


def test_embeddings():
    model = nn.Sequential(nn.Embedding(20, 8, padding_idx=3), nn.Linear(8, 4))
    x = torch.randint(0, 20, (2, 5))
    one = LowRank("svd", rank={"0": 1.0}, only_faster=False)
    graph, report = applied(model, x, one)
    with torch.no_grad():
        assert relative(reference.run(graph, [x])[0], model(x)) < 1e-5
    assert [node.op for node in graph.nodes][:2] == ["aten.embedding", "aten.linear"]
    assert graph.nodes[0]["padding_idx"] == 3
    assert report.rows[0][5:7] == [0, 10 * 8 * 8]


def test_the_error_of_a_layer_is_the_tail_of_its_singular_values():
    layer = nn.Conv2d(6, 8, 3, padding=1)
    x = torch.randn(1, 6, 9, 9)
    graph, report = applied(nn.Sequential(layer), x, LowRank("svd", rank=3, only_faster=False))
    values = torch.linalg.svdvals(layer.weight.detach().double().flatten(1))
    tail = (values[3:].square().sum() / values.square().sum()).sqrt().item()
    assert report.rows[0][7] == pytest.approx(tail, abs=1e-12)
    first, second = (graph.value(f"0.{place}.weight").constant for place in (0, 1))
    product = torch.einsum("or,rihw->oihw", second.flatten(1), first)
    assert relative(product, layer.weight.detach()) == pytest.approx(tail, abs=1e-6)


def test_an_image_without_batch():
    layer = nn.Conv2d(4, 6, 3, padding=1)
    x = torch.randn(4, 7, 8)
    graph = graphopt.trace(layer, x, dynamic={})
    Pipeline([LowRank("tucker2", rank=1.0, only_faster=False)]).run(graph, Context())
    with torch.no_grad():
        assert relative(reference.run(graph, [x])[0], layer(x)) < 1e-5


# -- names, composition --------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        nn.init.ones_(self.bn1.bias)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.conv3 = nn.Conv2d(16, 16, 3, padding=1)
        self.conv3.weight = self.conv2.weight
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
        self.fc = nn.Linear(16, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.depthwise(self.conv3(self.conv2(x))))
        return self.fc(x.mean(dim=(2, 3)))


def test_modules_carry_the_names_of_a_sequence_and_can_be_trained():
    x = torch.randn(2, 3, 8, 8)
    model = Block().eval()
    opt = graphopt.optimize(model, x, passes=[LowRank("tucker2", rank=0.5, only_faster=False)])
    module = opt.graph.to_torch()
    names = [name for name, _ in module.named_parameters()]
    assert [name for name in names if name.startswith("conv1")] == [
        "conv1.0.weight", "conv1.1.weight", "conv1.2.weight", "conv1.2.bias",
    ]  # fmt: skip
    assert opt.graph.value("conv1.0.weight").users
    report = str(opt.report())
    assert "conv2 stays: it shares its weight with another layer" in report
    assert "depthwise stays: it is depthwise" in report
    assert "fc stays: tucker2 is for convolutions" in report
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module.train()(x).square().mean().backward()
    optimizer.step()
    assert all(not torch.equal(before[n], p) for n, p in module.named_parameters() if "conv1" in n)


@pytest.mark.parametrize("method", ["cp", "spatial"])
def test_a_network_through_optimize_and_onnx(method, tmp_path):
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, stride=2, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    ).eval()
    x = torch.randn(2, 3, 17, 16)
    one = LowRank(method, rank=0.5, only_faster=False)
    opt = graphopt.optimize(model, x, passes=[one])
    exact = opt.graph.to_torch()(x)
    torch.testing.assert_close(opt(x), exact, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(opt(x[:1]), exact[:1], rtol=1e-4, atol=1e-5)
    assert len([n for n in opt.graph.nodes if n.op.startswith("aten.conv2d")]) > 2
    opt.export_onnx(tmp_path / "model.onnx")  # compares with the graph in onnxruntime


def test_a_quantized_weight_stays():
    graph = graphopt.trace(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4))
    (node,) = graph.nodes
    weight = graph.constant(torch.randint(-9, 9, (4, 4), dtype=torch.int8), "steps")
    settings = (weight, graph.constant(torch.tensor(0.5)), None, None, -128, 127)
    weight = graph.add("graphopt.dequantize", *settings, torch.float32, None, before=node)
    graph.set_operand(node, "weight", weight)
    ctx = Context()
    assert not Pipeline([LowRank(only_faster=False)]).run(graph, ctx)
    assert "decompose before quantizing" in str(ctx.reports[-1])


def test_a_layer_of_zeros():
    layer = nn.Conv2d(4, 6, 3)
    nn.init.zeros_(layer.weight)
    x = torch.randn(1, 4, 5, 5)
    for method in METHODS:
        graph, _ = applied(nn.Sequential(layer), x, LowRank(method, rank=2, only_faster=False))
        with torch.no_grad():
            torch.testing.assert_close(reference.run(graph, [x])[0], layer(x))


# -- neighbours ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("layers", "method", "count"),
    [
        ((nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 8, 1)), "channel", 2),
        ((nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3)), "tucker2", 3),
        ((nn.Conv2d(16, 16, 3, stride=2), nn.Conv2d(16, 12, 1)), "spatial", 2),
        ((nn.Linear(16, 16), nn.Linear(16, 16)), "svd", 3),
    ],
)  # fmt: skip
def test_a_neighbour_is_merged_where_that_is_cheaper(layers, method, count, bias):
    if not bias:
        for layer in layers:
            nn.init.zeros_(layer.bias)
    x = torch.randn(2, 16, 9, 9) if isinstance(layers[0], nn.Conv2d) else torch.randn(2, 16)
    model = nn.Sequential(*layers).eval()
    one = LowRank(method, rank=4, only_faster=False)
    graph, report = applied(model, x, one)
    assert len(graph.nodes) == count
    assert "merged with a neighbour" in str(report)
    unmerged = graphopt.trace(model, x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("graphopt.passes.low_rank.low_rank.merge_neighbours", lambda graph: 0)
        Pipeline([one]).run(unmerged, Context())
    assert macs_of(graph) < macs_of(unmerged)
    exact = reference.run(unmerged, [x])[0]
    torch.testing.assert_close(reference.run(graph, [x])[0], exact, rtol=1e-4, atol=1e-5)


def test_what_lies_between_is_no_neighbour():
    """A bias is no constant where zeros are padded after it; an activation is none at all."""
    padded = nn.Sequential(nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3, padding=1)).eval()
    x = torch.randn(1, 16, 6, 6)
    one = LowRank("tucker2", rank=4, only_faster=False)
    graph, _ = applied(padded, x, one)
    assert len(graph.nodes) == 3  # the 1x1 of the chain takes the one before, no taps between
    separated = nn.Sequential(nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 3)).eval()
    graph, _ = applied(separated, x, one)
    assert len(graph.nodes) == 5
    assert merge_neighbours(graph) == 0


# -- ranks, options ------------------------------------------------------------------------------


def ranks_of(report: Any) -> dict[str, str]:
    return {row[0]: row[2] for row in report.rows}


def test_ranks_are_rounded_up_to_what_the_kernels_like():
    target = Target(vector_bytes=64)
    model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Conv2d(64, 6, 1))
    x = torch.randn(1, 64, 6, 6)

    def ranks(**options):
        one = LowRank("svd", only_faster=False, **options)
        return ranks_of(applied(model, x, one, target=target)[1])

    assert ranks(rank=0.3) == {"0": "24", "1": "2"}
    assert ranks(rank=0.3, multiple=1) == {"0": "19", "1": "2"}
    assert ranks(rank=0.3, multiple=16) == {"0": "32", "1": "2"}
    assert ranks(rank=5) == {"0": "5", "1": "5"}
    assert ranks(rank={"0": 0.5}) == {"0": "32"}
    assert ranks(rank={nn.Conv2d: 0.5, "1": 3}) == {"0": "32", "1": "3"}


def test_planted_ranks_are_found_without_any_option():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(60, 80), nn.ReLU(), nn.Linear(80, 50))
    with torch.no_grad():
        for layer, rank in ((model[0], 7), (model[2], 3)):
            out, into = layer.weight.shape
            planted = torch.randn(out, rank) @ torch.randn(rank, into)
            layer.weight.copy_(planted + 0.2 * torch.randn(out, into))
    x = torch.randn(3, 60)
    _, report = applied(model, x, LowRank(only_faster=False, multiple=1))
    assert ranks_of(report) == {"0": "7", "2": "3"}
    _, report = applied(model, x, LowRank("svd", rank="evbmf", only_faster=False))
    half = LANES // 2  # what ranks are rounded up to: half of a vector register
    rounded = {name: str(math.ceil(rank / half) * half) for name, rank in (("0", 7), ("2", 3))}
    assert ranks_of(report) == rounded


def test_energy_bounds_every_layers_error():
    _, report = applied(network(), X, LowRank("tucker2", energy=0.8, only_faster=False))
    assert len(report.rows) == 3
    assert all(row[7] ** 2 <= 0.2 + 1e-9 for row in report.rows)


def test_ignored_layers_stay():
    one = LowRank("svd", rank=0.25, ignore=("0", re.compile("^6$")), only_faster=False)
    _, report = applied(network(), X, one)
    assert ranks_of(report).keys() == {"2", "4"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "qr"}, "method has 'qr'; there are 'auto', svd"),
        ({"method": ()}, "method is empty"),
        ({"rank": 0.5, "energy": 0.5, "method": "svd"}, "rank and energy cannot be given together"),
        ({"macs": 0.5, "energy": 0.5}, "energy and macs cannot be given together"),
        ({"macs": 0}, "macs is 0; it is a share"),
        ({"energy": 1.5}, "energy is 1.5; it is a share"),
        ({"speedup": 0.5}, "speedup is 0.5; it is a factor of at least 1"),
        ({"speedup": 2.0, "only_faster": False}, "needs only_faster=True"),
        ({"asymmetric": True}, "asymmetric needs data"),
        ({"method": "svd", "rank": 0}, "rank has 0; it takes"),
        ({"method": "svd", "rank": 1.5}, "rank has 1.5; it takes"),
        ({"method": "svd", "rank": True}, "rank has True; it takes"),
        ({"method": "svd", "rank": "vbmf"}, "rank has 'vbmf'; it takes"),
        ({"method": "svd", "rank": {"a": -1}}, "rank has -1; it takes"),
        ({"rank": 8}, "say which method"),
        ({"groups": 0}, "groups is 0; it is a whole number"),
        ({"multiple": 1.5}, "multiple is 1.5; it is a whole number"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(PassError, match=re.escape(message)):
        LowRank(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "svd", "rank": {"nowhere": 3}}, "rank has 'nowhere', which means no layer"),
        ({"method": "svd", "rank": 40}, r"rank is 40; with svd this layer has ranks from 1 to 32"),
        ({"method": "tucker2", "rank": (2, 3, 4)}, "rank has 3 numbers, tucker2 has 2 ranks"),
        ({"method": "svd", "rank": 2, "ignore": "nowhere"}, "ignore has 'nowhere'"),
        ({"method": "svd", "rank": 2, "data": []}, "the calibration data has no batches"),
        ({"method": "svd", "rank": 2, "data": [torch.ones(1, 2)]}, "batch 0 of the calibration"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_the_network(options, message):
    graph = graphopt.trace(network(), X)
    text = graph.to_text()
    with pytest.raises(PassError, match=message):
        Pipeline([LowRank(only_faster=False, **options)]).run(graph, Context())
    assert graph.to_text() == text
