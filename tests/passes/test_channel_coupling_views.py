"""Coupling of channels by operators that take apart, put together or rearrange."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from channel_support import all_groups, assert_prunes, head, net, reasons


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


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (2, 6, [(6, 1), (4, 1)]),
        (None, None, [(10, 1)]),
        (-4, 2**63 - 1, [(6, 1), (4, 1)]),
    ],
)
def test_a_part_that_is_replaced_goes_with_its_replacement(
    start: int | None, end: int | None, expected: list[tuple[int, int]]
) -> None:
    n = net(3, 6, 6)
    x, y = n.convolution(n.x, 10), n.convolution(n.x, 10 if start is None else 4)
    x = n("aten.slice_scatter", n("aten.relu", x), n("aten.tanh", y), 1, start, end)
    assert_prunes(head(n, x), expected)


def test_parts_are_replaced_beside_the_channels() -> None:
    n = net(5, 4)
    x = n.linear(n.x, 8)
    y = n("aten.tanh", n.linear(n("aten.slice.Tensor", n.x, 1, 0, 2), 8))
    x = n("aten.slice_scatter", x, y, 1, 3, 5)
    assert_prunes(n.done(n.linear(x, 3)), [(8, 1)])


@pytest.mark.parametrize("places", [(0, 8, 2), (0, 4, 1)], ids=["strided", "of zeros"])
def test_replaced_parts_that_protect(places: tuple[int, int, int]) -> None:
    n = net(3, 6, 6)
    y = n.convolution(n.x, 4)
    x = n.convolution(n.x, 8) if places[2] > 1 else n("aten.zeros", [2, 8, 4, 4])
    graph = head(n, n("aten.slice_scatter", x, n("aten.tanh", y), 1, *places))
    assert all_groups(graph) == []
    assert "(aten." in reasons(graph)["conv2d"]


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
