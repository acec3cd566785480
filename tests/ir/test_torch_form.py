"""Graphs as torch modules: structure of calls, names of parameters, training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import graphopt
from graphopt.ir import Graph, TensorType

F32 = torch.float32


@dataclass
class Result:
    hidden: Tensor
    logits: Tensor | None = None
    count: int = 0


pytree.register_dataclass(Result)


class Structured(nn.Module):
    """Every kind of argument and result that a model may have."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("offset", torch.arange(4.0))

    def forward(
        self, x: Tensor, pair: tuple[Tensor, dict[str, Tensor]], mask: Any = None, *, scale: float
    ) -> Any:
        left, rest = pair
        hidden = self.second(self.first(x) + left) * scale + rest["right"] + self.offset
        if mask is not None:
            hidden = hidden * mask
        return {"result": Result(hidden, None, 3), "list": [x, (hidden.sum(), None, "name")]}


def arguments(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    pair = (torch.randn(batch, 4), {"right": torch.randn(batch, 4)})
    return (torch.randn(batch, 4), pair), {"scale": 0.5}


@pytest.mark.parametrize("with_mask", [False, True])
def test_it_is_called_like_its_source(with_mask: bool):
    model = Structured().eval()
    args, kwargs = arguments(2)
    if with_mask:
        kwargs["mask"] = torch.ones(4)
    dynamic = {"mask": {}} if with_mask else None
    module = graphopt.trace(model, (args, kwargs), dynamic).to_torch()
    for batch in (2, 5):
        args, kwargs = arguments(batch)
        if with_mask:
            kwargs["mask"] = torch.rand(4)
            args, kwargs = (*args, kwargs["mask"]), {"scale": 0.5}
        with torch.no_grad():
            wanted, result = model(*args, **kwargs), module(*args, **kwargs)
        assert pytree.tree_structure(result) == pytree.tree_structure(wanted)
        assert isinstance(result["result"], Result)
        for ours, theirs in zip(
            pytree.tree_leaves(result), pytree.tree_leaves(wanted), strict=True
        ):
            if isinstance(theirs, Tensor):
                torch.testing.assert_close(ours, theirs)
            else:
                assert ours == theirs


def test_names_of_parameters_and_buffers():
    model = Structured().eval()
    args, kwargs = arguments(2)
    module = graphopt.trace(model, (args, kwargs)).to_torch()
    parameters = dict(module.named_parameters())
    assert parameters.keys() == {"first.weight", "first.bias"}  # the tied weight is one
    assert dict(module.named_buffers()).keys() == {"offset"}
    assert torch.equal(parameters["first.weight"], model.first.weight)
    assert parameters["first.weight"].data_ptr() != model.first.weight.data_ptr()
    assert not module.training


def test_training_it_changes_neither_graph_nor_source():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    graph = graphopt.trace(model, torch.randn(2, 4))
    module = graph.to_torch()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        module(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for value in graph.constants:
        assert value.constant is not None
        assert torch.equal(value.constant, before[value.name])
    assert not torch.equal(dict(module.named_parameters())["0.weight"], before["0.weight"])


def test_a_graph_without_an_interface_takes_and_returns_tuples():
    graph = Graph()
    x = graph.add_input("x", TensorType(F32, (4, 3)))
    y = graph.add_input("self", TensorType(F32, (3,)))
    values, indices = graph.add_node("aten.max.dim", graph.add("aten.add.Tensor", x, y), 0).outputs
    parts = graph.add_node("aten.split.Tensor", values, 2).outputs
    graph.set_outputs([indices, parts[1], x, 7, None])
    a, b = torch.randn(4, 3), torch.randn(3)
    first, second, third, number, nothing = graph.to_torch()(a, b)
    expected = (a + b).max(0)
    assert torch.equal(first, expected.indices)
    assert torch.equal(second, expected.values[2:])
    assert third is a
    assert (number, nothing) == (7, None)


def test_an_operator_that_returns_a_list_of_one():
    graph = Graph()
    x = graph.add_input("x", TensorType(F32, (2, 3)))
    (part,) = graph.add_node("aten.split.Tensor", x, 2).outputs
    graph.set_outputs([graph.add("aten.neg", part)])
    tensor = torch.randn(2, 3)
    assert torch.equal(graph.to_torch()(tensor)[0], -tensor)


def test_free_sizes_stay_free():
    graph = Graph({"batch": 2})
    x = graph.add_input("x", TensorType(F32, (2, 3)), {0: "batch"})
    size = graph.add("aten.sym_size.int", x, 0)
    total = graph.add("operator.mul", size, 3)
    graph.set_outputs([graph.add("aten.reshape", x, [total]), total])
    flat, count = graph.to_torch()(torch.ones(7, 3))
    assert flat.shape == (21,)
    assert count == 21


@pytest.mark.parametrize(
    "names",
    [
        ("weight", "weight.weight"),
        ("a.b", "a"),
        ("training", "forward"),
        ("layer-1.weight", "layer_1.weight"),
        ("blocks.0.weight", "blocks.0"),
        ("a b.c:d", "lambda"),
        ("", "x..y"),
    ],
)
def test_any_names_of_constants(names: tuple[str, str]):
    graph = Graph()
    x = graph.add_input("x", TensorType(F32, (2,)))
    tensors = [torch.randn(2), torch.randn(2)]
    for name, tensor in zip(names, tensors, strict=True):
        x = graph.add("aten.add.Tensor", x, graph.constant(tensor, name, trainable=True))
    graph.set_outputs([x])
    module = graph.to_torch()
    torch.testing.assert_close(module(torch.zeros(2))[0], tensors[0] + tensors[1])
    assert len(list(module.parameters())) == 2


def test_integer_parameters_are_buffers():
    graph = Graph()
    table = graph.constant(torch.arange(3), "table", trainable=True)
    graph.set_outputs([table])
    assert list(dict(graph.to_torch().named_buffers())) == ["table"]


def test_origins_travel_along():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    module = graphopt.trace(model, torch.randn(2, 4)).to_torch()
    origins = [node.meta["origin"].module for node in module.graph.nodes if "origin" in node.meta]
    assert origins == ["0", "1"]
