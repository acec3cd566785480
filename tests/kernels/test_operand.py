"""Where tensors lie in memory."""

from __future__ import annotations

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
