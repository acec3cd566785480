"""Coupling rules: for each, a small network whose pruned graph equals the masked one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from channel_support import all_groups, assert_prunes, reasons, sizes
from pass_support import Net

from graphopt.ir import Graph, Value


def net(*shape: int) -> Net:
    return Net(*shape, dtype=torch.float64)


def head(n: Net, x: Value) -> Graph:
    """Global pooling and a linear layer, so that channels can go."""
    pooled = n("aten.mean.dim", x, [-1, -2]) if x.rank == 4 else x
    return n.done(n.linear(pooled, 3, name="head"))


# -- convolutions and linear layers ----------------------------------------------------------


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


# -- elementwise operators, normalisation ------------------------------------------------------


def test_a_residual_addition() -> None:
    n = net(3, 6, 6)
    x = n("aten.relu", n.convolution(n.x, 8))
    y = n("aten.relu", n.convolution(x, 5, padding=[1, 1]))
    y = n("aten.add.Tensor", x, n.convolution(y, 8, padding=[1, 1]))
    assert_prunes(head(n, n("aten.relu", y)), [(8, 1), (5, 1)])


def test_squeeze_and_excitation() -> None:
    n = net(3, 6, 6)
    x = n("aten.relu", n.convolution(n.x, 8))
    y = n("aten.relu", n.convolution(n("aten.adaptive_avg_pool2d", x, [1, 1]), 4, 1))
    y = n("aten.mul.Tensor", n("aten.sigmoid", n.convolution(y, 8, 1)), x)
    assert_prunes(head(n, y), [(8, 1), (4, 1)])


def test_broadcasting() -> None:
    n = net(3, 6, 6)
    x = n.convolution(n.x, 8)
    x = n("aten.mul.Tensor", x, n.random(8, 1, 1))
    x = n("aten.add.Tensor", x, n.random(1, 1, 1))
    x = n("aten.where.self", n("aten.gt.Scalar", x, 0.0), x, n.random(1, 8, 1, 1))
    x = n("aten.div.Tensor", x, n.random(8, 1, 1, positive=True))
    assert_prunes(head(n, n("aten.clamp", x, -1.0, 2.0)), [(8, 1)])


def test_one_channel_that_meets_many_is_repeated() -> None:
    n = net(3, 6, 6)
    gate = n("aten.sigmoid", n.convolution(n.x, 1))
    x = n("aten.mul.Tensor", n.convolution(n.x, 8), gate)
    assert_prunes(head(n, x), [(8, 1)])


def test_prelu() -> None:
    n = net(3, 6, 6)
    x = n("aten.prelu", n.convolution(n.x, 8), n.random(8))
    assert_prunes(head(n, n("aten.prelu", x, n.random(1))), [(8, 1)])


def test_batch_norm_without_affine_and_instance_norm() -> None:
    n = net(3, 6, 6)
    x = n.batch_norm(n.convolution(n.x, 8), affine=False)
    x = n.convolution(n("aten.relu", x), 6)
    x = n("aten.instance_norm", x, n.random(6), n.random(6), None, None, True, 0.1, 1e-3, False)
    assert_prunes(head(n, n("aten.relu", x)), [(8, 1), (6, 1)])


def test_group_norm_loses_whole_groups() -> None:
    n = net(3, 6, 6)
    x = n("aten.group_norm", n.convolution(n.x, 12), 4, n.random(12), n.random(12))
    pruned = assert_prunes(head(n, n("aten.relu", x)), [(4, 3)])
    (norm,) = (node for node in pruned.nodes if node.op == "aten.group_norm")
    assert norm["num_groups"] == 3


def test_a_group_norm_of_one_group_protects() -> None:
    n = net(3, 6, 6)
    x = n("aten.group_norm", n.convolution(n.x, 12), 1)
    graph = head(n, n("aten.relu", x))
    assert all_groups(graph) == []
    assert reasons(graph)["conv2d"] == "%group_norm (aten.group_norm) normalises over it"


@pytest.mark.parametrize(
    "normalise",
    [
        lambda n, x: n("aten.layer_norm", x, [8], n.random(8), n.random(8)),
        lambda n, x: n("aten.rms_norm", x, [8], n.random(8)),
        lambda n, x: n("aten.softmax.int", x, -1),
        lambda n, x: n("aten.sub.Tensor", x, n("aten.mean.dim", x, [-1], True)),
        lambda n, x: n("aten.cumsum", x, 2),
        lambda n, x: n("aten.flip", x, [-1]),
        lambda n, x: n("aten.div.Tensor", x, n("aten.linalg_vector_norm", x, 2, [-1], True)),
    ],
    ids=["layer norm", "RMS norm", "softmax", "mean", "cumsum", "flip", "norm"],
)
def test_what_computes_over_channels_protects_them(normalise: Any) -> None:
    n = net(5, 4)
    graph = n.done(n("aten.matmul", normalise(n, n.linear(n.x, 8)), n.random(8, 3)))
    assert all_groups(graph) == []
    assert "(aten." in reasons(graph)["linear"]


def test_normalisation_over_other_dimensions_does_not() -> None:
    n = net(5, 4)
    x = n("aten.softmax.int", n.linear(n.x, 8), 1)
    x = n("aten.transpose.int", n("aten.layer_norm", n("aten.mT", x), [5]), 1, 2)
    assert_prunes(n.done(n.linear(x, 3)), [(8, 1)])


def test_pooling_interpolation_and_padding() -> None:
    n = net(3, 8, 8)
    x = n("aten.max_pool2d", n.convolution(n.x, 8), [2, 2])
    x = n("aten.upsample_nearest2d.vec", x, [12, 12], None)
    x = n("aten.avg_pool2d", n("aten.constant_pad_nd", x, [1, 1, 1, 1]), [3, 3])
    assert_prunes(head(n, x), [(8, 1)])


def test_padding_of_channels_protects() -> None:
    n = net(3, 6, 6)
    graph = head(n, n("aten.constant_pad_nd", n.convolution(n.x, 8), [0, 0, 0, 0, 0, 4]))
    assert "pads it" in reasons(graph)["conv2d"]


def test_a_gated_linear_unit_ties_its_halves() -> None:
    n = net(5, 4)
    x = n("aten.glu", n.linear(n.x, 16), -1)
    assert_prunes(n.done(n.linear(x, 3)), [(8, 2)])


# -- taking apart, putting together ------------------------------------------------------------


def test_concatenation() -> None:
    n = net(3, 6, 6)
    a, b = n.convolution(n.x, 4), n.convolution(n.x, 6)
    x = n("aten.cat", [a, b, n("aten.relu", a)], 1)
    assert_prunes(head(n, x), [(4, 1), (6, 1)])


@pytest.mark.parametrize(
    ("op", "setting", "expected"),
    [
        ("aten.chunk", 2, [(5, 1), (5, 1)]),
        ("aten.split.Tensor", 4, [(4, 1), (4, 1), (2, 1)]),
        ("aten.split_with_sizes", [3, 7], [(3, 1), (7, 1)]),
    ],
)
def test_split(op: str, setting: Any, expected: list[tuple[int, int]]) -> None:
    n = net(3, 6, 6)
    parts = n.graph.add_node(op, n.convolution(n.x, 10), setting, 1).outputs
    outputs = [n.convolution(n("aten.relu", part), 3) for part in parts]
    pruned = assert_prunes(n.done(*outputs), expected)
    (split,) = (node for node in pruned.nodes if "split" in node.op)
    assert split["split_sizes"] == [units - max(1, units // 3) for units, _ in expected]


def test_halves_that_are_added_lose_the_same_channels() -> None:
    n = net(3, 6, 6)
    a, b = n.graph.add_node("aten.chunk", n.convolution(n.x, 10), 2, 1).outputs
    assert_prunes(head(n, n("aten.mul.Tensor", a, n("aten.sigmoid", b))), [(5, 2)])


def test_slices() -> None:
    n = net(3, 6, 6)
    x = n.convolution(n.x, 10)
    first = n("aten.slice.Tensor", x, 1, 0, 4)
    middle = n("aten.narrow", x, 1, 2, 5)
    last = n("aten.slice.Tensor", x, 1, -3, 2**63 - 1)
    graph = n.done(*(n.convolution(n("aten.relu", y), 3) for y in (first, middle, last)))
    assert_prunes(graph, [(2, 1), (2, 1), (3, 1), (3, 1)])


def test_strided_slices_protect() -> None:
    n = net(3, 6, 6)
    graph = head(n, n("aten.slice.Tensor", n.convolution(n.x, 10), 1, 0, 10, 2))
    assert "takes every 2th of it" in reasons(graph)["conv2d"]


def test_a_selected_channel_stays() -> None:
    n = net(3, 6, 6)
    x = n.convolution(n.x, 10)
    one = n("aten.select.int", x, 1, -2)
    graph = n.done(one, n("aten.select.int", x, 1, 4), n.convolution(n("aten.relu", x), 3))
    pruned = assert_prunes(graph, [(8, 1)])
    places = [node["index"] for node in pruned.nodes if node.op == "aten.select.int"]
    bias, kept = x.producer["bias"].constant, pruned.value("conv.bias").constant
    assert kept.numel() == 8
    assert torch.equal(kept[places], bias[[8, 4]])


def test_tokens_are_selected_and_stacked() -> None:
    n = net(5, 4)
    x = n.linear(n.x, 8)
    first, last = (n("aten.select.int", x, 1, place) for place in (0, -1))
    x = n("aten.stack", [first, n("aten.tanh", last)], 1)
    assert_prunes(n.done(n.linear(x, 3)), [(8, 1)])


def test_index_and_gather() -> None:
    n = net(5, 4)
    x = n.linear(n.x, 8)
    places = n.known([[0, 2], [1, 4]], dtype=torch.int64)
    x = n("aten.index.Tensor", x, [None, places])
    x = n("aten.index_select", x, 1, n.known([1, 0], dtype=torch.int64))
    assert_prunes(n.done(n.linear(x, 3)), [(8, 1)])


# -- views -----------------------------------------------------------------------------------


def test_flattened_images() -> None:
    n = net(3, 6, 6)
    x = n("aten.flatten.using_ints", n("aten.relu", n.convolution(n.x, 8)), 1)
    x = n.linear(n("aten.relu", n.linear(x, 6)), 3)
    pruned = assert_prunes(n.done(x), [(8, 1), (6, 1)])
    linear = next(node for node in pruned.nodes if node.op == "aten.linear")
    assert linear["weight"].shape == (4, 6 * 16)


@pytest.mark.parametrize("shape", [[-1, 8 * 16], ["batch", 8 * 16], ["batch", -1]])
def test_reshapes_that_flatten(shape: list[Any]) -> None:
    """With -1 for the batch, channels that are gone would otherwise end up in it."""
    n = net(3, 6, 6)
    batch = n("aten.sym_size.int", n.x, 0)
    x = n("aten.reshape", n.convolution(n.x, 8), [batch if s == "batch" else s for s in shape])
    assert_prunes(n.done(n.linear(x, 3)), [(8, 1)])


def test_tokens_from_images_and_back() -> None:
    n = net(3, 6, 6)
    x = n("aten.view", n.convolution(n.x, 8), [-1, 8, 16])
    x = n("aten.permute", x, [0, 2, 1])
    x = n("aten.gelu", n.linear(x, 6))
    x = n("aten.reshape", n("aten.transpose.int", x, 1, 2), [-1, 6, 4, 4])
    assert_prunes(n.done(n.convolution(x, 3)), [(8, 1), (6, 1)])


def test_windows_leave_channels_alone() -> None:
    n = net(3, 4, 4)
    x = n("aten.permute", n.convolution(n.x, 8, 1), [0, 2, 3, 1])
    x = n("aten.reshape", x, [-1, 2, 2, 2, 2, 8])
    x = n("aten.reshape", n("aten.permute", x, [0, 1, 3, 2, 4, 5]), [-1, 4, 8])
    assert_prunes(n.done(n.linear(x, 3)), [(8, 1)])


def test_unflatten_squeeze_expand_repeat() -> None:
    n = net(5, 4)
    x = n("aten.unflatten.int", n.linear(n.x, 8), -1, [1, 8])
    x = n("aten.expand", x, [-1, 5, 3, 8])
    x = n("aten.repeat", x, [1, 1, 2, 2])
    x = n("aten.squeeze.dim", n("aten.unsqueeze", x, 1), 1)
    assert_prunes(n.done(n.linear(x, 3)), [(8, 1)])


def test_a_last_channel_is_not_squeezed() -> None:
    n = net(3, 6, 6)
    x = n("aten.adaptive_avg_pool2d", n.convolution(n.x, 8), [1, 1])
    assert_prunes(n.done(n.linear(n("aten.squeeze", x), 3)), [(8, 1)])


@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("written_out", [True, False])
def test_channel_shuffle(groups: int, written_out: bool) -> None:
    n = net(3, 6, 6)
    x = n("aten.relu", n.convolution(n.x, 12))
    if written_out:
        x = n("aten.view", x, [-1, groups, 12 // groups, 4, 4])
        x = n("aten.contiguous", n("aten.transpose.int", x, 1, 2))
        x = n("aten.view", x, [-1, 12, 4, 4])
    else:
        x = n("aten.channel_shuffle", x, groups)
    assert_prunes(head(n, n.convolution(x, 6)), [(12 // groups, groups), (6, 1)])


def test_pixel_shuffle_and_unshuffle() -> None:
    n = net(3, 6, 6)
    x = n("aten.pixel_shuffle", n.convolution(n.x, 12), 2)
    x = n("aten.pixel_unshuffle", n("aten.relu", n.convolution(x, 4, 1)), 2)
    assert_prunes(head(n, x), [(3, 4), (4, 1)])


def test_unfolding_and_folding() -> None:
    n = net(3, 4, 4)
    x = n("aten.im2col", n.convolution(n.x, 6, 1), [2, 2], [1, 1], [0, 0], [2, 2])
    x = n("aten.col2im", n("aten.tanh", x), [4, 4], [2, 2], [1, 1], [0, 0], [2, 2])
    assert_prunes(head(n, x), [(6, 1)])


def test_a_grid_loses_rows_where_columns_are_needed_whole() -> None:
    n = net(4)
    x = n("aten.reshape", n.linear(n.x, 12), [-1, 3, 4])
    x = n("aten.softmax.int", x, 2)
    assert_prunes(n.done(n.linear(n("aten.reshape", x, [-1, 12]), 2)), [(3, 4)])


def test_a_grid_loses_columns_where_rows_are_needed_whole() -> None:
    n = net(4)
    x = n("aten.reshape", n.linear(n.x, 12), [-1, 3, 4])
    x = n("aten.softmax.int", x, 1)
    assert_prunes(n.done(n.linear(n("aten.reshape", x, [-1, 12]), 2)), [(4, 3)])


# -- attention --------------------------------------------------------------------------------


def heads_of(n: Net, x: Value, heads: int) -> Value:
    """[batch, tokens, channels] -> [batch, heads, tokens, width]"""
    x = n("aten.view", x, [-1, x.shape[1], heads, x.shape[2] // heads])
    return n("aten.transpose.int", x, 1, 2)


def joined(n: Net, x: Value) -> Value:
    x = n("aten.transpose.int", x, 1, 2)
    return n("aten.reshape", x, [-1, x.shape[1], x.shape[2] * x.shape[3]])


@pytest.mark.parametrize("masked", [False, True])
def test_attention_loses_heads(masked: bool) -> None:
    n = net(5, 6)
    q, k, v = (heads_of(n, n.linear(n.x, 12), 4) for _ in range(3))
    mask = n.random(4, 5, 5) if masked else None
    y = n("aten.scaled_dot_product_attention", q, k, v, mask)
    graph = n.done(n.linear(joined(n, y), 6))
    assert_prunes(graph, [(4, 3)])
    assert reasons(graph)["linear"] == "they are attention heads"


def test_attention_that_is_written_out() -> None:
    n = net(5, 6)
    q, k, v = (heads_of(n, n.linear(n.x, 12), 4) for _ in range(3))
    scores = n("aten.matmul", q, n("aten.transpose.int", k, -1, -2))
    scores = n("aten.softmax.int", n("aten.mul.Scalar", scores, 3**-0.5), -1)
    assert_prunes(n.done(n.linear(joined(n, n("aten.matmul", scores, v)), 6)), [(4, 3)])


@pytest.mark.parametrize("separate", ["unbind", "split", "chunk before"])
def test_attention_with_one_layer_for_query_key_and_value(separate: str) -> None:
    n = net(5, 6)
    x = n.linear(n.x, 36)
    if separate == "chunk before":
        parts = n.graph.add_node("aten.chunk", x, 3, -1).outputs
        q, k, v = (heads_of(n, part, 4) for part in parts)
    elif separate == "unbind":
        x = n("aten.permute", n("aten.reshape", x, [-1, 5, 3, 4, 3]), [2, 0, 3, 1, 4])
        q, k, v = n.graph.add_node("aten.unbind.int", x).outputs
    else:
        q, k, v = n.graph.add_node("aten.split.Tensor", heads_of(n, x, 4), 3, -1).outputs
    y = n("aten.scaled_dot_product_attention", q, k, v)
    assert_prunes(n.done(n.linear(joined(n, y), 6)), [(4, 9)])


@pytest.mark.parametrize("repeated", [True, False])
def test_grouped_query_attention_loses_a_key_with_its_queries(repeated: bool) -> None:
    n = net(5, 6)
    q = heads_of(n, n.linear(n.x, 24), 8)
    k, v = (heads_of(n, n.linear(n.x, 12), 4) for _ in range(2))
    if repeated:
        spread = []
        for x in (k, v):
            x = n("aten.expand", n("aten.unsqueeze", x, 2), [-1, 4, 2, 5, 3])
            spread.append(n("aten.reshape", x, [-1, 8, 5, 3]))
        y = n("aten.scaled_dot_product_attention", q, *spread)
    else:
        y = n("aten.scaled_dot_product_attention", q, k, v, enable_gqa=True)
    assert_prunes(n.done(n.linear(joined(n, y), 6)), [(4, 6)])


def test_heads_that_share_a_dimension_with_the_batch() -> None:
    """torch.nn.MultiheadAttention computes on [batch * heads, tokens, width]."""
    n = net(5, 6)
    batch = n("aten.sym_size.int", n.x, 0)
    together = n("operator.mul", batch, 4)
    parts = []
    for _ in range(3):
        x = n("aten.transpose.int", n.linear(n.x, 12), 0, 1)
        x = n("aten.transpose.int", n("aten.reshape", x, [5, together, 3]), 0, 1)
        parts.append(x)
    q, k, v = parts
    scores = n("aten.softmax.int", n("aten.bmm", q, n("aten.transpose.int", k, 1, 2)), -1)
    y = n("aten.transpose.int", n("aten.bmm", scores, v), 0, 1)
    y = n("aten.reshape", y, [5, batch, 12])
    assert_prunes(n.done(n.linear(n("aten.transpose.int", y, 0, 1), 6)), [(4, 3)])


def test_a_computed_size_beside_a_free_place_is_scaled() -> None:
    n = net(5, 6)
    together = n("operator.mul", n("aten.sym_size.int", n.x, 0), 4)
    x = n("aten.transpose.int", n.linear(n.x, 12), 0, 1)
    x = n("aten.tanh", n("aten.reshape", x, [-1, together, 3]))
    x = n("aten.reshape", x, [5, n("aten.sym_size.int", n.x, 0), 12])
    pruned = assert_prunes(n.done(n.linear(x, 2)), [(4, 3)])
    assert "operator.floordiv" in [node.op for node in pruned.nodes]


def test_the_width_of_values_is_no_unit_of_attention() -> None:
    n = net(5, 6)
    q, k = (heads_of(n, n.linear(n.x, 12), 4) for _ in range(2))
    y = n("aten.scaled_dot_product_attention", q, k, heads_of(n, n.linear(n.x, 20), 4))
    groups = all_groups(n.done(n.linear(joined(n, y), 6)))
    assert sizes(groups) == [(4, 3)]
    assert sorted(member.constant.shape[0] for member in groups[0].members) == [
        *(6, 12, 12, 12, 12, 20, 20)
    ]


# -- what is protected -------------------------------------------------------------------------


def test_outputs_and_inputs_are_protected() -> None:
    n = net(3, 6, 6)
    x = n.convolution(n.x, 8)
    y = n.convolution(n("aten.relu", x), 5)
    z = n("aten.add.Tensor", n.x, n.convolution(n.x, 3, padding=[1, 1]))
    graph = n.done(n.convolution(y, 4, 1), x, n.convolution(z, 2))
    assert sizes(all_groups(graph)) == [(5, 1)]
    found = reasons(graph)
    assert found["conv2d"] == "output 1 of the network, %conv2d, has it"
    assert found["conv2d_2"] == "%x is an input"
    assert found["conv2d_3"] == "output 0 of the network, %conv2d_3, has it"


def test_an_operator_without_a_rule_protects_what_it_reads_and_gives() -> None:
    n = net(5, 4)
    x = n("aten.renorm", n.linear(n.x, 8), 2.0, 0, 1.0)
    graph = n.done(n.linear(n("aten.relu", n.linear(x, 6)), 3))
    assert sizes(all_groups(graph)) == [(6, 1)]
    assert reasons(graph)["linear"] == "%renorm (aten.renorm) has no coupling rule"


def test_sums_over_channels_of_two_activations_protect() -> None:
    n = net(5, 4)
    x = n.linear(n.x, 8)
    y = n("aten.matmul", n("aten.sigmoid", x), n("aten.mT", x))
    assert "neither operand is a weight" in reasons(n.done(y))["linear"]


def test_a_layer_of_one_channel_keeps_it() -> None:
    n = net(4)
    graph = n.done(n.linear(n("aten.relu", n.linear(n.x, 1)), 3))
    assert all_groups(graph) == []
    assert reasons(graph) == {"linear_1": "output 0 of the network, %linear_1, has it"}
