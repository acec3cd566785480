"""Where tensors lie in memory."""

from __future__ import annotations

import numpy as np
import pytest
from support import GuardedBuffer

from graphopt.kernels.operand import Layout, Operand


def test_strides_follow_order_and_pitch() -> None:
    shape = (2, 3, 5, 7)
    assert Layout.plain("float32", 4).strides(shape) == (105, 35, 7, 1)
    assert Layout("float32", (0, 2, 3, 1)).strides(shape) == (105, 1, 21, 3)
    assert Layout("float32", (0, 1, 2, 3), pitch=16).strides(shape) == (240, 80, 16, 1)
    assert Layout.plain("float32", 0).strides(()) == ()


def test_bytes_span_the_memory() -> None:
    assert Operand.plain("float64", (3, 5)).bytes == 120
    assert Operand((3, 5), Layout("int8", (0, 1), pitch=64)).bytes == 133
    assert Operand.plain("float32", (3, 0)).bytes == 0
    assert Operand.plain("bool", ()).bytes == 1


def test_padded_planes() -> None:
    operand = Operand.plain("float32", (2, 3, 7, 7)).padded
    assert operand.memory == (2, 3, 64)
    assert operand.strides == (3 * 64, 64, 7, 1)
    assert operand.bytes == 2 * 3 * 64 * 4
    assert Operand.plain("float32", (2, 3, 4, 8)).padded.memory == (2, 3, 32)
    assert Operand.plain("float32", (2, 3, 16, 16)).padded.memory == (2, 3, 272)


def test_halves() -> None:
    operand = Operand.plain("float32", (1, 3, 6, 7)).halved
    assert operand.memory == (1, 2, 3, 32)
    assert operand.bytes == 2 * 3 * 32 * 4
    assert Operand.plain("float32", (1, 3, 8, 32)).halved.memory == (1, 2, 3, 144)
    with pytest.raises(ValueError, match="no fixed distance"):
        _ = operand.strides
    for shape in ((1, 3, 5, 7), (2, 3, 6, 7), (1, 3, 6)):
        with pytest.raises(ValueError, match="no halves"):
            _ = Operand.plain("float32", shape).halved


def test_elements_of_halves() -> None:
    operand = Operand.plain("float32", (1, 2, 4, 3)).halved
    buffer = GuardedBuffer(operand.bytes)
    elements = np.arange(24, dtype=np.float32).reshape(1, 2, 4, 3)
    inside = buffer.array(operand)
    inside[...] = elements.reshape(inside.shape)
    memory = buffer.bytes.view(np.float32).reshape(operand.memory)
    for half in range(2):
        for channel in range(2):
            rows = elements[0, channel, 2 * half : 2 * half + 2]
            np.testing.assert_array_equal(memory[0, half, channel, :6], rows.reshape(-1))
