"""Operators: names, schemas, binding of operands."""

from __future__ import annotations

import math
import operator

import pytest
import torch

from graphopt.errors import GraphError
from graphopt.ir.operators import REQUIRED, name_of, resolve


def test_names_there_and_back():
    for target in (
        torch.ops.aten.conv2d.default,
        torch.ops.aten.add.Tensor,
        torch.ops.aten.__and__.Tensor,
        torch.ops.graphopt.quantize.default,
        operator.mul,
        torch.sym_max,
        math.trunc,
    ):
        assert resolve(name_of(target)).target is target
    assert name_of(torch.ops.aten.conv2d.default) == "aten.conv2d"
    assert name_of(torch.ops.aten.conv2d.padding) == "aten.conv2d.padding"


@pytest.mark.parametrize(
    "name",
    ["", "relu", "aten.", "aten.conv3", "aten.conv2d.nothing", "nowhere.relu", "aten.add.Tensor.x"],
)
def test_unknown_names(name):
    with pytest.raises(GraphError, match="unknown operator"):
        resolve(name)


def test_what_is_no_operator():
    with pytest.raises(GraphError, match="not an operator"):
        name_of(torch.relu)


def test_properties():
    assert resolve("operator.add").is_size_arithmetic
    assert not resolve("aten.add.Tensor").is_size_arithmetic
    assert resolve("aten.rand_like").is_random
    assert resolve("aten.bernoulli").is_random
    assert not resolve("aten.relu").is_random
    assert not resolve("operator.add").is_random
    assert resolve("aten.relu_").is_mutable
    assert not resolve("aten.relu").is_mutable
    assert not resolve("operator.add").is_mutable


def test_parameters():
    conv = resolve("aten.conv2d")
    assert [p.name for p in conv.parameters] == (
        "input weight bias stride padding dilation groups".split()
    )
    assert conv.parameter("weight").default is REQUIRED
    assert conv.parameter("weight").is_tensor
    assert conv.parameter("bias").is_tensor
    assert not conv.parameter("groups").is_tensor
    assert resolve("aten.add.Tensor").parameter("alpha").keyword_only
    assert resolve("aten.cat").parameter("tensors").is_tensor
    with pytest.raises(GraphError, match="no operand 'kernel'; it has: input, weight"):
        conv.parameter("kernel")


def test_binding_leaves_out_defaults_of_the_same_kind():
    add = resolve("aten.add.Tensor")
    assert add.bind(("x", "y"), {"alpha": 1}) == {"self": "x", "other": "y"}
    assert add.bind(("x", "y"), {"alpha": 1.0}) == {"self": "x", "other": "y", "alpha": 1.0}
    conv = resolve("aten.conv2d")
    bound = conv.bind(("x", "w", None, [1, 1], [1, 1]), {"groups": 1})
    assert bound == {"input": "x", "weight": "w", "padding": [1, 1]}
    flatten = resolve("aten.flatten.using_ints")
    assert flatten.bind(("x", False), {}) == {"self": "x", "start_dim": False}


def test_binding_puts_operands_in_the_schemas_order():
    bound = resolve("aten.conv2d").bind((), {"groups": 2, "weight": "w", "input": "x"})
    assert list(bound) == ["input", "weight", "groups"]


@pytest.mark.parametrize(
    ("args", "kwargs", "reason"),
    [
        (("x",), {}, "'weight' is missing"),
        (("x", "w"), {"input": "y"}, "'input' is given twice"),
        (("x", "w"), {"kernel": 3}, "no operand 'kernel'"),
        (tuple("xwbspdgh"), {}, "takes 7 positional operands, got 8"),
    ],
)
def test_binding_refuses(args, kwargs, reason):
    with pytest.raises(GraphError, match=reason):
        resolve("aten.conv2d").bind(args, kwargs)


def test_arguments_are_positional_as_far_as_they_follow_on():
    conv = resolve("aten.conv2d")
    operands = conv.bind(("x", "w", "b"), {"padding": [1, 1]})
    assert conv.arguments(operands) == (["x", "w", "b"], {"padding": [1, 1]})
    add = resolve("aten.add.Tensor")
    assert add.arguments(add.bind(("x", 1), {"alpha": 2})) == (["x", 1], {"alpha": 2})


def test_calling():
    x = torch.tensor([-1.0, 2.0])
    add = resolve("aten.add.Tensor")
    assert torch.equal(add.call({"self": x, "other": x, "alpha": 3}), 4 * x)
    assert resolve("operator.floordiv").call({"a": 7, "b": 2}) == 3
    assert resolve("torch.sym_max").call({"a": 7, "b": 2}) == 7
    assert resolve("builtins.round").call({"number": 2.6}) == 3
