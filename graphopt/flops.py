"""Floating-point operations of a node, counted by torch on fake tensors."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from graphopt.ir import Node, ScalarType, TensorType, Value
from graphopt.ir.inference import map_operand
from graphopt.ir.operators import resolve

aten = torch.ops.aten


def count_flops(node: Node) -> int:
    """Floating-point operations of a node at the example's sizes.

    Only products of matrices, vectors and convolutions count, two per multiply-add; a division
    by two gives the MACs that papers report. The count is that of dense operands.
    """
    operands = tuple((name, _hashable(operand)) for name, operand in node.operands.items())
    return _count(node.op, operands)


def _hashable(operand: Any) -> Any:
    if isinstance(operand, (list, tuple)):
        return tuple(map(_hashable, operand))
    return operand.type if isinstance(operand, Value) else operand


@functools.lru_cache(maxsize=10_000, typed=True)
def _count(op: str, operands: tuple[tuple[str, Any], ...]) -> int:
    def to_fake(leaf: Any) -> Any:
        if isinstance(leaf, TensorType):
            return torch.empty(leaf.shape, dtype=leaf.dtype, device="cpu")
        return leaf.value if isinstance(leaf, ScalarType) else leaf

    counter = FlopCounterMode(display=False, custom_mapping=_ADDITIONAL)
    with torch.no_grad(), FakeTensorMode(), counter:
        resolve(op).call({name: map_operand(operand, to_fake) for name, operand in operands})
    return int(counter.get_total_flops())


def _attention(
    query: list[int], key: list[int], value: list[int], *args: Any, **kwargs: Any
) -> int:
    """Scores and their product with the values."""
    *heads, length, width = query
    return 2 * math.prod(heads) * length * key[-2] * (width + value[-1])


def _matrix_vector(matrix: list[int], *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(matrix)


def _add_matrix_vector(bias: list[int], matrix: list[int], *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(matrix)


# What the counter of torch passes over.
_ADDITIONAL: dict[Any, Any] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten.mv: _matrix_vector,
    aten.addmv: _add_matrix_vector,
    aten.dot: _matrix_vector,
}
