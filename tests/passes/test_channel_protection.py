"""Which channels cannot go, and the reasons given."""

from __future__ import annotations

from channel_support import all_groups, net, reasons, sizes


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
