"""Residual blocks: which they are, how much they change, and removing them."""

from __future__ import annotations

import math

import pytest
import torch
from agreement import largest_error
from pass_support import Net, ops, random_inputs
from torch import nn

import graphopt
from graphopt import reference
from graphopt.calibration import CalibrationData
from graphopt.errors import PassError
from graphopt.ir import Graph, Value
from graphopt.passes.pruning.residual_blocks import (
    block_influence,
    find_residual_blocks,
    remove_blocks,
)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, 3 * width, 3, padding=1)
        self.second = nn.Conv2d(3 * width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.second(torch.relu(self.first(x))))


class Network(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.blocks = nn.Sequential(*[Block(4) for _ in range(depth)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(torch.relu(self.stem(x)))


def traced() -> tuple[Network, Graph, torch.Tensor]:
    torch.manual_seed(0)
    model = Network().double().eval()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    return model, graphopt.trace(model, x), x


def test_blocks_are_found_with_their_modules_and_constants() -> None:
    _, graph, _ = traced()
    blocks = find_residual_blocks(graph)
    assert [block.name for block in blocks] == ["blocks.0", "blocks.1", "blocks.2"]
    assert [value.name for value in blocks[1].constants] == [
        *("blocks.1.first.weight", "blocks.1.first.bias"),
        *("blocks.1.second.weight", "blocks.1.second.bias"),
    ]


@pytest.mark.parametrize("gone", [[0], [1, 2], [0, 1, 2]])
def test_what_is_left_is_the_network_without_the_blocks(gone: list[int]) -> None:
    model, graph, x = traced()
    blocks = find_residual_blocks(graph)
    remove_blocks(graph, [blocks[number] for number in gone])
    graph.verify()
    for number in gone:
        model.blocks[number] = nn.ReLU()
    with torch.no_grad():
        expected = model(x)
    assert largest_error(reference.run(graph, [x]), [expected]) < 1e-12
    names = [value.name for value in graph.constants]
    assert not any(name.startswith(f"blocks.{number}") for name in names for number in gone)


def residual(n: Net, x: Value) -> Value:
    return n("aten.add.Tensor", n.linear(n("aten.relu", n.linear(x, 8)), x.shape[-1]), x)


def test_either_operand_goes_around_and_blocks_nest() -> None:
    n = Net(5, 4, dtype=torch.float64)
    inner = residual(n, n("aten.tanh", n.linear(n.x, 4)))
    outer = n("aten.add.Tensor", n.x, n.linear(inner, 4))
    graph = n.done(n.linear(outer, 3))
    blocks = find_residual_blocks(graph)
    assert [(block.around, len(block.branch)) for block in blocks] == [("other", 3), ("self", 7)]
    remove_blocks(graph, blocks)
    graph.verify()
    assert ops(graph) == ["linear"]


def test_removing_an_outer_block_first_takes_the_inner_one_along() -> None:
    n = Net(5, 4, dtype=torch.float64)
    inner = residual(n, n("aten.tanh", n.linear(n.x, 4)))
    graph = n.done(n.linear(n("aten.add.Tensor", n.x, n.linear(inner, 4)), 3))
    remove_blocks(graph, find_residual_blocks(graph)[::-1])
    assert ops(graph) == ["linear"]


def test_what_is_no_block() -> None:
    n = Net(5, 4, dtype=torch.float64)
    projected = n("aten.add.Tensor", n.linear(n.x, 6), n.linear(n("aten.relu", n.x), 6))
    seen = n.linear(projected, 6)
    watched = n("aten.add.Tensor", projected, seen)
    weighted = n("aten.add.Tensor", watched, n.linear(watched, 6), alpha=0.5)
    biased = n("aten.add.Tensor", weighted, n.random(6))
    graph = n.done(biased, seen)
    assert find_residual_blocks(graph) == []


def test_influence_is_one_minus_the_cosine() -> None:
    n = Net(5, 4, dtype=torch.float64)
    graph = n.done(n.linear(residual(n, residual(n, n.x)), 3))
    blocks = find_residual_blocks(graph)
    data = [tensors[0] for tensors in random_inputs(graph)]
    values: dict[Value, list[torch.Tensor]] = {}
    for x in data:
        values.setdefault(graph.inputs[0], []).append(x)
        reference.run(
            graph, [x], observe=lambda node, y: values.setdefault(node.output, []).append(y[0])
        )
    expected = []
    for block in blocks:
        before = torch.cat(values[block.skip]).reshape(-1, 4)
        after = torch.cat(values[block.result]).reshape(-1, 4)
        cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in zip(before, after, strict=True)]
        expected.append(1 - math.fsum(cosines) / len(cosines))
    found = block_influence(graph, blocks, CalibrationData(data))
    assert found.tolist() == pytest.approx(expected, abs=1e-12)
    assert (found > 0).all()


def test_a_block_that_adds_nothing_has_no_influence() -> None:
    n = Net(4, 6, 6, dtype=torch.float64)
    branch = n.convolution(n.x, 4, 1)
    for operand in ("weight", "bias"):
        value = branch.producer[operand]  # type: ignore[index]
        n.graph.set_constant(value, torch.zeros(value.shape, dtype=torch.float64))
    graph = n.done(n.convolution(n("aten.add.Tensor", n.x, branch), 3))
    blocks = find_residual_blocks(graph)
    data = CalibrationData([random_inputs(graph)[0][0]])
    assert block_influence(graph, blocks, data).tolist() == pytest.approx([0.0], abs=1e-12)


def test_blocks_that_are_gone_are_refused() -> None:
    _, graph, _ = traced()
    blocks = find_residual_blocks(graph)
    remove_blocks(graph, blocks[:1])
    before = graph.to_text()
    with pytest.raises(PassError, match=r"the block blocks\.0 is not part of the graph"):
        remove_blocks(graph, [blocks[1], blocks[0]])
    assert graph.to_text() == before
