"""Keys and loop nests."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.kernels.expression import Builder
from graphopt.kernels.loops import broadcast_strides, collapse
from graphopt.kernels.operand import ConstantOperand, Layout, Operand
from graphopt.kernels.problem import PointwiseProblem
from graphopt.kernels.registry import aligned_empty
from graphopt.kernels.zeros import ZeroPattern


def problem(literal: object, shape: tuple[int, ...] = (3,)) -> PointwiseProblem:
    builder = Builder()
    expression = builder.finish(builder.apply("mul", builder.input(), literal))
    operand = Operand.plain("float32", shape)
    return PointwiseProblem(expression, (operand,), (operand,))


def test_keys_tell_apart_what_equality_does_not() -> None:
    keys = [problem(literal).key() for literal in (0.0, -0.0, 0, False)]
    assert len(set(keys)) == 4
    assert problem(0.0).key() == problem(0.0).key()
    assert problem(0.0).key() != problem(0.0, (4,)).key()
    plain = problem(1)
    constant = ConstantOperand((3,), Layout.plain("float32", 1), ZeroPattern("a", (0.5, 1.0, 1.0)))
    assert replace(plain, inputs=(constant,)).key() != plain.key()


@given(st.data())
def test_collapsed_nests_visit_the_same_addresses(data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, 4))
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=rank, max_size=rank)))
    order = data.draw(st.permutations(range(rank)))
    layouts = [Layout.plain("float32", rank), Layout("float32", tuple(order))]
    masked = tuple(data.draw(st.sampled_from((1, size))) for size in shape)
    strides = [layout.strides(shape) for layout in layouts]
    strides.append(broadcast_strides(masked, layouts[0].strides(masked), shape))
    nest = collapse(shape, strides, order)

    def visits(sizes: tuple[int, ...], steps: list) -> set[tuple[int, ...]]:
        found = []
        for index in itertools.product(*map(range, sizes)):
            addresses = [sum(i * s for i, s in zip(index, step, strict=True)) for step in steps]
            found.append(tuple(addresses))
        assert len(found) == int(np.prod(sizes))
        return set(found)

    assert visits(shape, strides) == visits(nest.sizes, list(nest.strides))
    assert nest.rows * nest.inner == int(np.prod(shape))


def test_collapse_is_as_small_as_can_be() -> None:
    plain = Layout.plain("float32", 4)
    shape = (2, 3, 5, 7)
    assert collapse(shape, [plain.strides(shape)] * 2).sizes == (210,)
    channel = broadcast_strides((3, 1, 1), (1, 1, 1), shape)
    assert collapse(shape, [plain.strides(shape), channel]).sizes == (2, 3, 35)


def test_broadcasting_is_checked() -> None:
    assert broadcast_strides((3, 1), (1, 1), (2, 3, 4)) == (0, 1, 0)
    for shape in ((2,), (4, 3, 1)):
        with pytest.raises(ValueError, match="does not broadcast"):
            broadcast_strides(shape, (1,) * len(shape), (3,))


@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (17,)])
def test_aligned_arrays(shape: tuple[int, ...]) -> None:
    for dtype in ("float32", "int8", "float64"):
        array = aligned_empty(shape, dtype)
        assert array.shape == shape
        assert array.dtype == dtype
        assert array.flags.c_contiguous
        assert array.size == 0 or array.ctypes.data % 64 == 0
