"""Coupling of channels by elementwise operators, normalisation and pooling."""

from __future__ import annotations

from typing import Any

import pytest
from channel_support import all_groups, assert_prunes, head, net, reasons


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
