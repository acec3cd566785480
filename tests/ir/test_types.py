"""Types: tensors, scalars, and what makes two of them equal."""

from __future__ import annotations

import pytest
import torch

from graphopt.ir import ScalarType, TensorType
from graphopt.ir.types import DTYPE_NAMES, DTYPES_BY_NAME


def test_tensor_type_of_a_tensor():
    kind = TensorType.of(torch.empty(2, 0, 5, dtype=torch.float16))
    assert kind == TensorType(torch.float16, (2, 0, 5))
    assert (kind.rank, kind.numel, kind.nbytes) == (3, 0, 0)
    assert TensorType(torch.int64, (2, 3)).nbytes == 48
    assert TensorType(torch.bool, ()).numel == 1


def test_texts():
    assert str(TensorType(torch.float32, (2, 3))) == "f32[2, 3]"
    assert str(TensorType(torch.int8, ())) == "i8[]"
    assert str(ScalarType(3)) == "int=3"
    assert str(ScalarType(True)) == "bool=True"
    assert str(ScalarType(0.5)) == "float=0.5"


def test_every_dtype_has_a_name_of_its_own():
    assert len(DTYPES_BY_NAME) == len(DTYPE_NAMES)
    assert all(DTYPES_BY_NAME[name] == dtype for dtype, name in DTYPE_NAMES.items())


@pytest.mark.parametrize(("one", "other"), [(1, True), (1, 1.0), (0, False), (0.0, -0.0)])
def test_scalars_that_python_calls_equal_differ(one, other):
    assert ScalarType(one) != ScalarType(other)
    assert len({ScalarType(one), ScalarType(other)}) == 2


def test_equal_scalars_are_equal():
    assert ScalarType(2) == ScalarType(2)
    assert hash(ScalarType(2)) == hash(ScalarType(2))
    assert ScalarType(float("nan")) == ScalarType(float("nan"))
    assert ScalarType(2) != TensorType(torch.int64, ())
    assert ScalarType(2).kind is int
    assert ScalarType(True).kind is bool
