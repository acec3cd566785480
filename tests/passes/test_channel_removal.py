"""Removing and masking units: errors, clones, quantized weights, networks after exact passes."""

from __future__ import annotations

import pytest
import torch
from agreement import largest_error
from channel_support import all_groups, assert_prunes, assert_removal_is_masking, random_removals
from hypothesis import given, settings
from pass_support import Net
from random_graphs import Case, cases
from torch import nn

import graphopt
from graphopt import Pipeline, reference
from graphopt.errors import PassError
from graphopt.flops import count_flops
from graphopt.ir import Graph, Value
from graphopt.passes import EXACT
from graphopt.passes.pruning.channel_groups import find_groups
from graphopt.passes.pruning.channel_removal import mask_units, remaining_macs, remove_units


def chain() -> Graph:
    """Two convolutions with eight channels between them."""
    n = Net(3, 6, 6, dtype=torch.float64)
    y = n("aten.relu", n.batch_norm(n.convolution(n.x, 8)))
    return n.done(n.convolution(y, 5))


def test_tensors_are_sliced_as_by_hand() -> None:
    graph = chain()
    (group,) = find_groups(graph)[0]
    kept = [0, 2, 3, 7]
    before = {value.name: value.constant for value in graph.constants}
    remove_units(graph, {group: [1, 4, 5, 6]})
    for value in graph.constants:
        old = before[value.name]
        assert old is not None
        assert value.constant is not None
        if value.name == "conv.weight_1":
            assert torch.equal(value.constant, old[:, kept])
        elif value.name == "conv.bias_1":
            assert torch.equal(value.constant, old)
        else:
            assert torch.equal(value.constant, old[kept])
        assert value.trainable == ("weight" in value.name)


def test_a_module_made_smaller_by_hand_gives_the_same() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5)
    ).double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    graph = graphopt.trace(model, x)
    (group,) = find_groups(graph)[0]
    remove_units(graph, {group: [0, 5]})
    kept = [1, 2, 3, 4, 6, 7]
    small = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5)
    ).double()
    with torch.no_grad():
        small[0].weight.copy_(model[0].weight[kept])  # type: ignore[operator]
        small[0].bias.copy_(model[0].bias[kept])  # type: ignore[operator]
        columns = model[4].weight.reshape(5, 8, 4)[:, kept]  # type: ignore[operator]
        small[4].weight.copy_(columns.reshape(5, 24))  # type: ignore[operator]
        small[4].bias.copy_(model[4].bias)  # type: ignore[operator, arg-type]
        expected = small(x)
    assert largest_error(reference.run(graph, [x]), [expected]) < 1e-12


def test_masked_are_the_slices_of_members_alone() -> None:
    graph = chain()
    (group,) = find_groups(graph)[0]
    masked = mask_units(graph, {group: [2]})
    for value in graph.constants:
        old, new = value.constant, masked.value(value.name).constant
        assert old is not None
        assert new is not None
        changed = (old != new).nonzero()
        reads = value.name == "conv.weight_1"
        if "running" in value.name or value.name == "conv.bias_1":  # a variance divides
            assert not len(changed)
        else:
            assert set(changed[:, int(reads)].tolist()) == {2}
            assert not new.select(int(reads), 2).any()


def test_scores_are_summed_over_all_that_belongs_to_a_unit() -> None:
    graph = chain()
    (group,) = find_groups(graph)[0]
    assert group.name == "conv2d"
    assert sorted(m.constant.name for m in group.members if m.makes_channels) == ["conv.weight"]
    found = group.scores(lambda member: member.constant.constant.abs())
    expected = torch.zeros(8, dtype=torch.float64)
    for member in group.members:
        tensor = member.constant.constant.abs()
        expected += (
            tensor.transpose(0, member.dimension).flatten(1).sum(1) if tensor.dim() > 1 else tensor
        )
    assert torch.allclose(found, expected)


def test_all_but_one_unit_may_go_and_not_the_last() -> None:
    graph = chain()
    (group,) = find_groups(graph)[0]
    before = graph.to_text()
    for odd, message in (
        (range(8), "the group conv2d would lose all of its 8 units; leave it one"),
        ([3, 8], "the group conv2d has 8 units, and none is 8"),
        ([-1], "none is -1"),
    ):
        for function in (remove_units, mask_units, remaining_macs):
            with pytest.raises(PassError, match=message):
                function(graph, {group: list(odd)})
    assert graph.to_text() == before
    remove_units(graph, {group: list(range(7))})
    graph.verify()


def test_groups_of_a_graph_that_has_changed_are_refused() -> None:
    graph = chain()
    (group,) = find_groups(graph)[0]
    remove_units(graph, {group: [0]})
    with pytest.raises(PassError, match="find them anew"):
        remove_units(graph, {group: [0]})
    (again,) = find_groups(graph)[0]
    assert again.units == 7


def test_groups_hold_for_clones_and_for_other_numbers() -> None:
    graph = chain()
    (group,) = find_groups(graph)[0]
    clone = graph.clone()
    weight = clone.value("conv.weight")
    clone.set_constant(weight, torch.ones(weight.shape, dtype=torch.float64))
    remove_units(clone, {group: [0, 1]})
    assert clone.value("conv.weight").shape[0] == 6
    assert graph.value("conv.weight").shape[0] == 8


def test_nothing_to_remove_changes_nothing() -> None:
    graph = chain()
    (group,) = find_groups(graph)[0]
    version = graph.version
    remove_units(graph, {group: []})
    remove_units(graph, {})
    assert graph.version == version


def test_multiply_adds_are_foretold() -> None:
    n = Net(3, 6, 6, dtype=torch.float64)
    x = n("aten.relu", n.convolution(n.x, 8))
    x = n("aten.relu", n.convolution(x, 12, groups=4))
    x = n("aten.reshape", n.transposed(x, 6, 3, groups=2), [-1, 6, 16])
    x = n("aten.transpose.int", x, 1, 2)
    q, k, v = (
        n("aten.transpose.int", n("aten.reshape", n.linear(x, 12), [-1, 16, 4, 3]), 1, 2)
        for _ in range(3)
    )
    x = n("aten.matmul", n("aten.softmax.int", n("aten.matmul", q, n("aten.mT", k)), -1), v)
    x = n("aten.reshape", n("aten.transpose.int", x, 1, 2), [-1, 16, 12])
    graph = n.done(n.linear(x, 4))
    removals = random_removals(all_groups(graph))
    assert len(removals) >= 3
    pruned = assert_removal_is_masking(graph, removals)
    assert remaining_macs(graph, removals) == sum(count_flops(node) for node in pruned.nodes) // 2
    assert remaining_macs(graph, {}) == sum(count_flops(node) for node in graph.nodes) // 2


@pytest.mark.parametrize(
    "kind", ["quantized", "constant product", "Einstein sum", "tokens", "attention"]
)
def test_multiply_adds_are_foretold_of_other_layers(kind: str) -> None:
    n = Net(5, 6, dtype=torch.float64)
    x = n("aten.relu", n.linear(n.x, 8))
    if kind == "quantized":
        x = n("aten.linear", x, quantized(n, n.random(8, 8), 0))
    elif kind == "constant product":
        x = n("aten.matmul", x, n.random(8, 12))
    elif kind == "Einstein sum":
        x = n("aten.einsum", "btc,cho->btho", [x, n.random(8, 3, 4)])
        x = n("aten.einsum", "btho,oph->btp", [n("aten.tanh", x), n.random(4, 6, 3)])
    elif kind == "tokens":  # a layer over tokens, of which each channel has its own
        x = n("aten.mT", n.linear(n("aten.mT", x), 7))
    else:
        q, k, v = (
            n("aten.transpose.int", n("aten.reshape", n.linear(x, 12), [-1, 5, 4, 3]), 1, 2)
            for _ in range(3)
        )
        x = n("aten.scaled_dot_product_attention", q, k, v)
        x = n("aten.reshape", n("aten.transpose.int", x, 1, 2), [-1, 5, 12])
    graph = n.done(n.linear(x, 3))
    removals = random_removals(all_groups(graph))
    pruned = assert_removal_is_masking(graph, removals)
    assert remaining_macs(graph, removals) == sum(count_flops(node) for node in pruned.nodes) // 2


# -- quantized weights -------------------------------------------------------------------------


def quantized(n: Net, weight: Value, axis: int | None, block: int | None = None) -> Value:
    """A weight as a dequantize of int8 with zero points that are not zero."""
    tensor = weight.constant
    assert tensor is not None
    if block is not None:
        shape = list(tensor.shape)
        shape[axis or 0] //= block
    else:
        shape = [tensor.shape[axis]] if axis is not None else []
    scale = torch.rand(shape, dtype=torch.float64) * 0.05 + 0.01
    zero = torch.randint(-20, 20, shape, dtype=torch.int8)
    settings = (axis, -128, 127, torch.int8, block)
    stored = torch.ops.graphopt.quantize(tensor, scale, zero, *settings)
    parts = [n.graph.constant(t, "q") for t in (stored, scale, zero)]
    return n.graph.add("graphopt.dequantize", *parts, *settings)


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_quantized_weights_are_sliced_with_their_scales(axis: int | None) -> None:
    n = Net(4, dtype=torch.float64)
    first = n("aten.linear", n.x, quantized(n, n.random(8, 4), axis), n.random(8))
    second = n("aten.linear", n("aten.sigmoid", first), quantized(n, n.random(5, 8), axis))
    pruned = assert_prunes(n.done(second), [(8, 1)])
    layers = [node for node in pruned.nodes if node.op == "aten.linear"]
    assert [pruned.weight(node).tensor.shape for node in layers] == [(6, 4), (5, 6)]


def test_scales_per_block_protect_what_they_are_shared_by() -> None:
    n = Net(8, dtype=torch.float64)
    first = n("aten.linear", n.x, quantized(n, n.random(8, 8), 1, 4))
    second = n("aten.linear", n("aten.relu", first), quantized(n, n.random(5, 8), 1, 4))
    graph = n.done(second)
    assert all_groups(graph) == []
    n = Net(8, dtype=torch.float64)
    first = n("aten.linear", n.x, quantized(n, n.random(8, 8), 1, 4))
    assert_prunes(n.done(n.linear(n("aten.relu", first), 5)), [(8, 1)])


def test_quantized_activations() -> None:
    n = Net(3, 6, 6, dtype=torch.float64)
    x = n("aten.relu", n.convolution(n.x, 8))
    scale = n.graph.constant(torch.rand(8, dtype=torch.float64) * 0.02 + 0.01, "scale")
    zero = n.graph.constant(torch.randint(0, 40, (8,), dtype=torch.uint8), "zero")
    settings = (1, 0, 255, torch.uint8)
    x = n("graphopt.quantize", x, scale, zero, *settings)
    x = n("graphopt.dequantize", x, scale, zero, *settings)
    assert_prunes(n.done(n.convolution(x, 5)), [(8, 1)])


# -- whole networks ----------------------------------------------------------------------------


class Transformer(nn.Module):
    """Torch's own encoder layer, whose attention merges heads with the batch when written out."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, norm_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def small_networks() -> list[nn.Module]:
    torch.manual_seed(1)
    bottleneck = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        nn.Conv2d(8, 8, 3, groups=8, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.Hardswish(),
        nn.Conv2d(8, 6, 1),
        nn.Flatten(),
        nn.Linear(6 * 16, 5),
    )
    for module in bottleneck.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return [bottleneck, Transformer()]


@pytest.mark.parametrize("exact", [False, True], ids=["traced", "after exact passes"])
@pytest.mark.parametrize("number", [0, 1], ids=["bottleneck", "transformer"])
def test_traced_networks(number: int, exact: bool) -> None:
    model = small_networks()[number].eval().double()
    x = torch.randn(2, *([(3, 6, 6), (5, 16)][number]), dtype=torch.float64)
    graph = graphopt.trace(model, x)
    if exact:
        Pipeline(EXACT).run(graph)
    assert_prunes(graph, [[(8, 1), (6, 1)], [(24, 1), (4, 12)]][number])


@settings(max_examples=40)
@given(cases())
def test_random_graphs(case: Case) -> None:
    """Whatever is found in a random graph can be removed as if it were masked."""
    graph = case.in_double().graph
    groups = all_groups(graph)
    removals = random_removals(groups, 0.4)
    masked, pruned = mask_units(graph, removals), graph.clone()
    remove_units(pruned, removals)
    pruned.verify()
    if any(node.operator.is_random for node in graph.nodes):
        return
    for tensors in case.in_double().inputs:
        wanted = reference.run(masked, tensors)
        assert largest_error(reference.run(pruned, tensors), wanted) < 1e-9
