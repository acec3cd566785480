"""The text form: golden texts, reading back, and errors that name the line."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from random_graphs import Case, cases, check

from graphopt.errors import GraphError
from graphopt.ir import Graph, Origin, ScalarType, TensorType

F32 = torch.float32

GOLDEN = """\
graph(%x: f32[batch=2, 3, 8, 8], %n: int=3) where batch >= 2; batch % 2 == 0 {
  %conv.weight: f32[4, 3, 3, 3] = parameter
  %conv.bias: f32[4] = parameter [0.5, -1.0, 0.0, inf]
  %conv2d: f32[2, 4, 6, 6] = aten.conv2d(%x, %conv.weight, %conv.bias)  # conv
  %half: f32[] = constant 0.5
  %mul: f32[2, 4, 6, 6] = aten.mul.Tensor(%conv2d, %half)  # by a-pass
  %sym_size: int=2 = aten.sym_size.int(%x, 0)
  %reshape: f32[2, 144] = aten.reshape(%mul, [%sym_size, -1])  # flatten by a-pass
  %split: f32[2, 100], %split_1: f32[2, 44] = aten.split.Tensor(%reshape, 100, 1)
  %add: f32[2, 44] = aten.add.Tensor(%split_1, %n, alpha=2)
  aten._assert_tensor_metadata(%add, dtype=torch.float32)
  return %split, %add, 1, None, %half
}"""


def golden() -> Graph:
    graph = Graph({"batch": 2}, ["batch >= 2", "batch % 2 == 0"])
    x = graph.add_input("x", TensorType(F32, (2, 3, 8, 8)), {0: "batch"})
    n = graph.add_input("n", ScalarType(3))
    weight = graph.constant(torch.ones(4, 3, 3, 3), "conv.weight", trainable=True)
    bias = graph.constant(torch.tensor([0.5, -1, 0, math.inf]), "conv.bias", trainable=True)
    conv = graph.add("aten.conv2d", x, weight, bias, origin=Origin("conv", "Conv2d"))
    half = graph.constant(torch.tensor(0.5), "half")
    with graph.making("a-pass"):
        scaled = graph.add("aten.mul.Tensor", conv, half)
    size = graph.add("aten.sym_size.int", x, 0)
    origin = Origin("flatten", made_by="a-pass")
    flat = graph.add("aten.reshape", scaled, [size, -1], origin=origin)
    first, second = graph.add_node("aten.split.Tensor", flat, 100, 1).outputs
    added = graph.add("aten.add.Tensor", second, n, alpha=2)
    graph.add_node("aten._assert_tensor_metadata", added, dtype=F32)
    graph.set_outputs([first, added, 1, None, half])
    return graph


def test_golden_text():
    assert golden().to_text() == GOLDEN


def test_reading_back():
    weight = torch.ones(4, 3, 3, 3)
    graph = Graph.from_text(GOLDEN, {"conv.weight": weight})
    graph.verify()
    assert graph.to_text() == GOLDEN
    assert graph.value("conv.weight").constant.data_ptr() == weight.data_ptr()
    assert graph.value("conv.weight").trainable
    assert graph.sizes == {"batch": 2}
    assert graph.guards == ("batch >= 2", "batch % 2 == 0")
    assert graph.value("x").free == {0: "batch"}
    assert graph.value("mul").producer.origin == Origin(made_by="a-pass")
    assert graph.value("reshape").producer.origin == Origin("flatten", made_by="a-pass")


@settings(max_examples=150)
@given(cases())
def test_round_trip(case: Case):
    text = case.graph.to_text()
    constants = {value.name: value.constant for value in case.graph.constants}
    twin = Graph.from_text(text, constants)
    twin.verify()
    assert twin.to_text() == text
    check(case.graph, twin, case.inputs, signed_zeros=True)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-45, 3.4028234663852886e38]),
        torch.tensor([0.1, 1 / 3], dtype=torch.float64),
        torch.tensor([0.1, 65504.0], dtype=torch.float16),
        torch.tensor([0.1, 1e30], dtype=torch.bfloat16),
        torch.tensor([-(2**63), 2**63 - 1]),
        torch.tensor([0, 255], dtype=torch.uint8),
        torch.tensor([2**64 - 1], dtype=torch.uint64),
        torch.tensor([[True, False]]),
        torch.tensor(7, dtype=torch.int8),
        torch.empty(0, 3),
        torch.empty(2, 0, dtype=torch.int64),
    ],
)
def test_spelled_out_constants(tensor: torch.Tensor):
    graph = Graph()
    graph.set_outputs([graph.constant(tensor, "c")])
    read = Graph.from_text(graph.to_text()).value("c").constant
    assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(read.view(torch.uint8), tensor.view(torch.uint8)) or tensor.isnan().any()
    torch.testing.assert_close(read, tensor, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "operand",
    [
        *(0, -3, 2**70, 1.0, -0.0, 1e-05, 1e300, 2.5e16, math.inf, -math.inf),
        *(True, False, None, "same", 'a "quoted" \\ word', "two\nlines  # no comment", "é"),
        *(1 + 2j, complex(0, math.inf), -1j),
        *(torch.float32, torch.bool, torch.strided, torch.channels_last),
        *(torch.device("cpu"), torch.device("cuda", 1)),
        *([], [1, [2.0, None]], [True, "x"]),
    ],
)
def test_literals(operand):
    graph = Graph()
    graph.set_outputs([operand])
    (read,) = Graph.from_text(graph.to_text()).outputs
    assert read == operand
    assert type(read) is type(operand)
    assert repr(read) == repr(operand)


def test_nan_is_a_literal():
    graph = Graph()
    graph.set_outputs([math.nan, [math.nan]])
    first, (second,) = Graph.from_text(graph.to_text()).outputs
    assert math.isnan(first)
    assert math.isnan(second)


@pytest.mark.parametrize("name", ["a b", "layer:0/conv.weight", 'quo"te', "x=1, y", "ä", "50%"])
def test_names_of_any_kind(name: str):
    graph = Graph({"batch": 2})
    x = graph.add_input(name, TensorType(F32, (2, 3)), {0: "batch"})
    weight = graph.constant(torch.ones(3), f"{name}.weight")
    product = graph.add("aten.mul.Tensor", x, weight, name=f"{name}!")
    graph.set_outputs([product])
    twin = Graph.from_text(graph.to_text())
    assert twin.to_text() == graph.to_text()
    assert [value.name for value in twin.values] == [name, f"{name}.weight", f"{name}!"]


def test_names_that_are_each_others_defaults():
    text = """\
graph(%relu: f32[4, 2]) {
  %split_1: f32[2, 2], %split: f32[2, 2] = aten.split.Tensor(%relu, 2)
  %constant: f32[2, 2] = aten.relu(%split)
  %split_2: f32[2, 2], %neg: f32[2, 2] = aten.split.Tensor(%relu, 2)
  %relu_1: f32[2] = constant [1.0, 2.0]
  %add: f32[2, 2] = aten.add.Tensor(%neg, %relu_1)
  return %split_1, %constant, %split_2, %add
}"""
    assert Graph.from_text(text).to_text() == text


def test_free_sizes_as_expressions():
    text = """\
graph(%x: f32[batch=4, tokens=3], %y: f32[2*batch=8, tokens + 1=4]) {
  return %x, %y
}"""
    graph = Graph.from_text(text)
    assert graph.to_text() == text
    assert graph.sizes == {"batch": 4, "tokens": 3}
    first, second = graph.assignments[1].values()
    assert graph.value("y").types[1].shape == (2 * first, second + 1)


def test_comments_and_blank_lines_are_skipped():
    lines = GOLDEN.splitlines()
    text = "\n\n".join([lines[0], "  # a remark", *lines[1:]])
    weight = torch.ones(4, 3, 3, 3)
    assert Graph.from_text(text, {"conv.weight": weight}).to_text() == GOLDEN


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("%y: f32[2, 3] = aten.relu(%z)", "no value %z"),
        ("%y: f32[2, 4] = aten.relu(%x)", r"%y is f32\[2, 3\], the text says f32\[2, 4\]"),
        ("%y: f32[2, 3] = aten.rely(%x)", "unknown operator"),
        ("%y: f32[2, 3] = aten.relu(%x", "ends too early"),
        ("%y: f32[2, 3] = aten.relu(%x) %x", "unexpected '%x' after the operands"),
        ("%y: f32[2, 3] = aten.add.Tensor(%x %x)", "expected ','"),
        ("%y: f32[2, 3] = aten.relu(%x, x=1)", "no operand 'x'"),
        ("%y: f32[2, 3] = aten.relu(@)", "cannot read"),
        ("%y: f32[2, 3] = aten.relu(torch.relu)", "cannot read the operand 'torch.relu'"),
        ("%y: f33[2, 3] = aten.relu(%x)", "unknown dtype 'f33'"),
        ("%y: f32[2, a] = aten.relu(%x)", "invalid literal"),
        ("%y: str=a = aten.relu(%x)", "unknown scalar type 'str'"),
        ("%y: f32[2, 3], %z: f32[2, 3] = aten.relu(%x)", "1 results, the text names 2"),
        ("%x: f32[2, 3] = aten.relu(%x)", "cannot be named x: that name is taken"),
        ("%c: f32[9] = constant", "leaves out the elements of %c"),
        ("%c: f32[3] = constant [1.0, 2.0]", "cannot read the text"),
        ("%c: int=3 = constant 3", "the constant %c is a tensor"),
        ("constant 3", "a constant has one name"),
        ("%x: f32[1] = constant [1.0]", "%x is defined twice"),
        ("%given: f32[4] = parameter", r"given as f32\[2\], the text says f32\[4\]"),
        ("return %x, ,", "cannot read the operand ','"),
    ],
)
def test_errors_name_the_line(line: str, reason: str):
    text = f"graph(%x: f32[2, 3]) {{\n  {line}\n}}"
    with pytest.raises(GraphError, match=reason) as caught:
        Graph.from_text(text, {"given": torch.ones(2)})
    assert caught.value.__notes__[-1] == f"in line 2: {line}"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "must begin with 'graph"),
        ("graph(%x: f32[2]) {\n  return %x", "end with '}'"),
        ("graf(%x: f32[2]) {\n}", "expected 'graph"),
        ("graph(%x: f32[batch=2]) where batch > 2 {\n}", "violate the guard"),
        ("graph(%x: f32[batch=2]) where import os {\n}", "cannot be read"),
    ],
)
def test_texts_that_are_no_graphs(text: str, reason: str):
    with pytest.raises(GraphError, match=reason):
        Graph.from_text(text)
