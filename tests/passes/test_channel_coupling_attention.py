"""Coupling of channels by attention: heads."""

from __future__ import annotations

import pytest
from channel_support import all_groups, assert_prunes, net, reasons, sizes
from pass_support import Net

from graphopt.ir import Value


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
