"""Coupling of channels by convolutions, linear layers and other products with weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from channel_support import all_groups, assert_prunes, head, net, random_removals, reasons
from pass_support import Net, random_inputs

from graphopt import reference
from graphopt.ir import Value
from graphopt.passes.pruning.channel_removal import mask_units


def test_a_chain_of_convolutions() -> None:
    n = net(3, 6, 6)
    y = n("aten.relu", n.batch_norm(n.convolution(n.x, 8)))
    pruned = assert_prunes(head(n, n.convolution(y, 6)), [(8, 1), (6, 1)])
    assert [node["weight"].shape[:2] for node in pruned.nodes if node.op == "aten.conv2d"] == [
        (6, 3),
        (4, 6),
    ]


def test_linear_layers_and_dropout() -> None:
    n = net(5, 4)
    y = n("aten.dropout", n("aten.gelu", n.linear(n.x, 8)), 0.1, False)
    assert_prunes(n.done(n.linear(y, 3)), [(8, 1)])


def test_products_with_constants() -> None:
    n = net(5, 4)
    y = n("aten.matmul", n.x, n.random(4, 8))
    y = n("aten.relu", n("aten.add.Tensor", y, n.random(8)))
    assert_prunes(n.done(n("aten.matmul", y, n.random(8, 3))), [(8, 1)])


def test_addmm() -> None:
    n = net(4)
    y = n("aten.relu", n("aten.addmm", n.random(8), n.x, n.random(4, 8)))
    assert_prunes(n.done(n("aten.addmm", n.random(3), y, n.random(8, 3))), [(8, 1)])


def test_one_dimensional_and_unbatched_convolutions() -> None:
    n = net(4, 9)
    y = n.convolution(n("aten.relu", n.convolution(n.x, 8)), 3)
    assert_prunes(n.done(y), [(8, 1)])


@pytest.mark.parametrize(
    ("groups", "expected"),
    [(2, [(4, 2), (3, 2)]), (4, [(4, 2)]), (8, [(8, 1)])],
    ids=["places within groups", "whole groups", "depthwise"],
)
def test_grouped_convolution(groups: int, expected: list[tuple[int, int]]) -> None:
    n = net(3, 6, 6)
    y = n("aten.relu", n.convolution(n.x, 8))
    out = {2: 6, 4: 12, 8: 16}[groups]
    y = n("aten.relu", n.convolution(y, out, groups=groups))
    pruned = assert_prunes(head(n, y), expected)
    (grouped,) = (node for node in pruned.nodes if node.op == "aten.conv2d" and node["groups"] > 1)
    assert grouped["groups"] == {2: 2, 4: 3, 8: 6}[groups]


def test_a_grouped_convolution_of_the_input_keeps_its_groups() -> None:
    n = net(4, 6, 6)
    y = n("aten.relu", n.convolution(n.x, 12, groups=2))
    assert_prunes(head(n, y), [(6, 2)])


@pytest.mark.parametrize(
    ("groups", "expected"), [(1, [(8, 1), (6, 1)]), (2, [(4, 2), (3, 2)]), (8, [(8, 1)])]
)
def test_transposed_convolution(groups: int, expected: list[tuple[int, int]]) -> None:
    n = net(3, 6, 6)
    y = n("aten.relu", n.convolution(n.x, 8))
    y = n("aten.relu", n.transposed(y, {1: 6, 2: 6, 8: 8}[groups], groups=groups, stride=[2, 2]))
    assert_prunes(head(n, y), expected)


def test_the_general_convolution() -> None:
    n = net(3, 6, 6)
    y = n("aten.relu", n.convolution(n.x, 8))
    for transposed in (False, True):
        weight = n.random(*((8, 8, 3, 3) if transposed else (8, 4, 3, 3)), name="weight")
        settings: list[Any] = [[1, 1], [1, 1], [1, 1], transposed, [0, 0], 1 if transposed else 2]
        y = n("aten.relu", n("aten.convolution", y, weight, n.random(8), *settings))
    assert_prunes(head(n, y), [(4, 2), (4, 2), (8, 1)])


def test_embedding() -> None:
    n = Net(5, dtype=torch.int64)
    table = n.graph.constant(torch.randn(10, 8, dtype=torch.float64), "table.weight")
    y = n("aten.embedding", table, n.x)
    weight = n.graph.constant(torch.randn(3, 8, dtype=torch.float64), "head.weight")
    assert_prunes(n.done(n("aten.linear", n("aten.tanh", y), weight)), [(8, 1)])


def test_shared_weights_lose_the_same_channels_everywhere() -> None:
    n = net(8, 6, 6)
    first = n.convolution(n.x, 8)
    weight, bias = first.producer["weight"], first.producer["bias"]  # type: ignore[index, union-attr]
    twice = n("aten.conv2d", n("aten.relu", first), weight, bias)
    graph = head(n, twice)
    assert all_groups(graph) == []
    assert "%x is an input" in reasons(graph)["conv2d"]


def test_a_weight_shared_by_two_branches() -> None:
    n = net(3, 6, 6)
    first = n.convolution(n.x, 8)
    weight = first.producer["weight"]  # type: ignore[index, union-attr]
    other = n("aten.conv2d", n("aten.tanh", n.x), weight)
    left = n.convolution(n("aten.relu", first), 3)
    right = n.convolution(n("aten.relu", other), 3)
    assert_prunes(n.done(left, right), [(8, 1)])


# -- Einstein sums -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("btc,co->bto", "btc,co->bto"),
        ("...c,co->...o", "... c, c o"),
        ("btc,co", "bot,oc"),
        ("btc,co->tbo", "tbo,oc->btc"),
    ],
)
def test_einstein_sums_with_weights(first: str, second: str) -> None:
    n = net(5, 4)
    x = n("aten.einsum", first, [n.x, n.random(4, 8)])
    x = n("aten.einsum", second, [n("aten.relu", x), n.random(8, 3)])
    assert_prunes(n.done(x), [(8, 1)])


def test_an_einstein_sum_with_several_labels() -> None:
    """Channels are a grid [heads, width]; a weight that reads both lets either go."""
    n = net(5, 4)
    x = n("aten.einsum", "btc,chw->bthw", [n.x, n.random(4, 3, 5)])
    x = n("aten.mul.Tensor", n("aten.tanh", x), n.random(3, 5))
    x = n("aten.einsum", "hwo,bthw->bto", [n.random(3, 5, 2), x])
    assert_prunes(n.done(x), [(3, 1), (5, 1)])


def test_einstein_sums_of_three_and_of_one() -> None:
    n = net(5, 4)
    x = n("aten.einsum", "btc,cr,ro->bto", [n.x, n.random(4, 6), n.random(6, 8)])
    x = n("aten.einsum", "bto->bot", [n("aten.relu", x)])
    x = n("aten.einsum", "bot,ot->bt", [x, n.random(8, 5)])
    assert_prunes(n.done(x), [(8, 1)])


def test_a_label_that_is_repeated_takes_a_diagonal() -> None:
    n = net(5, 4)
    x = n("aten.einsum", "btc,cc->btc", [n.linear(n.x, 8), n.random(8, 8)])
    assert_prunes(n.done(n.linear(n("aten.relu", x), 3)), [(8, 1)])


def test_a_size_of_one_is_broadcast_in_an_einstein_sum() -> None:
    n = net(5, 4)
    x = n("aten.relu", n.linear(n.x, 8))
    x = n("aten.einsum", "btc,bt->bc", [x, n.random(1, 5)])
    assert_prunes(n.done(n.linear(x, 3)), [(8, 1)])


def test_heads_in_einstein_sums() -> None:
    n = net(5, 6)
    q, k, v = (n("aten.einsum", "btc,chw->bthw", [n.x, n.random(6, 4, 3)]) for _ in range(3))
    scores = n("aten.softmax.int", n("aten.einsum", "bqhw,bkhw->bhqk", [q, k]), -1)
    x = n("aten.einsum", "bhqk,bkhw->bqhw", [scores, v])
    graph = n.done(n("aten.einsum", "bqhw,hwc->bqc", [x, n.random(4, 3, 6)]))
    assert_prunes(graph, [(3, 1), (4, 1)])
    assert [group.is_heads for group in all_groups(graph)] == [False, True]
    assert "no operand of it is a weight" in str(reasons(graph).values())


# -- weights with a norm of their own ----------------------------------------------------------


def weight_norm(n: Net, *shape: int) -> Value:
    return n("aten._weight_norm", n.random(*shape), n.random(shape[0], *[1] * (len(shape) - 1)))


def test_weight_norm_makes_channels_that_can_go() -> None:
    n = net(3, 6, 6)
    x = n("aten.conv2d", n.x, weight_norm(n, 8, 3, 3, 3), n.random(8))
    x = n("aten.conv2d", n("aten.relu", x), n.random(8, 1, 3, 3), n.random(8), groups=8)
    graph = head(n, n("aten.relu", x))
    assert_prunes(graph, [(8, 1)])
    masked = mask_units(graph, random_removals(all_groups(graph)))
    assert all(reference.run(masked, x)[0].isfinite().all() for x in random_inputs(graph))


def test_weight_norm_keeps_what_it_reads() -> None:
    """Without some inputs, the norm of the others would be raised to the same value."""
    n = net(4)
    x = n("aten.relu", n.linear(n.x, 8))
    graph = n.done(n("aten.linear", x, weight_norm(n, 3, 8)))
    assert all_groups(graph) == []
    assert reasons(graph)["linear"] == "%_weight_norm (aten._weight_norm) normalises over it"
