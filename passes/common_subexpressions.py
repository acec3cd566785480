"""Common subexpressions: what is computed, or kept, more than once."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch

from graphopt.ir import Graph, Node, Operand, Value
from graphopt.pipeline import Context, register_pass

_PREFIX = 64  # elements that decide which constants are worth comparing in full


@register_pass("common-subexpressions")
@dataclass(frozen=True)
class CommonSubexpressions:
    """Computes once what several nodes compute from the same operands, and merges equal constants.

    Random operators are left alone. Constants are equal if dtype, shape and every bit are (0.0 is
    not -0.0). Two parameters that merely have equal elements are not merged: training the result
    would tie them.
    """

    def run(self, graph: Graph, ctx: Context) -> bool:
        version = graph.version
        with graph.edit():
            _merge_constants(graph)
            _merge_nodes(graph)
        return graph.version != version


def _merge_nodes(graph: Graph) -> None:
    first: dict[Hashable, Node] = {}
    for node in graph.nodes:
        if node.operator.is_random or not node.outputs:
            continue
        operands = tuple((name, _key(operand)) for name, operand in node.operands.items())
        original = first.setdefault((node.op, operands), node)
        if original is not node:
            for old, new in zip(node.outputs, original.outputs, strict=True):
                graph.replace(old, new)
            graph.erase(node)


def _key(operand: Operand) -> Hashable:
    if isinstance(operand, (list, tuple)):
        return tuple(map(_key, operand))
    # repr tells 1 from 1.0 and True, and 0.0 from -0.0, which are equal to Python.
    return operand if isinstance(operand, Value) else (type(operand), repr(operand))


def _merge_constants(graph: Graph) -> None:
    originals: dict[Any, list[Value]] = {}
    for value in graph.constants:
        tensor = value.constant
        assert tensor is not None
        if tensor.layout != torch.strided:
            continue
        prefix = bytes(_bits(tensor.reshape(-1)[:_PREFIX]).tolist())
        alike = originals.setdefault((value.type, prefix), [])
        for original in alike:
            if _mergeable(original, value):
                graph.replace(value, original)
                break
        else:
            alike.append(value)


def _mergeable(a: Value, b: Value) -> bool:
    assert a.constant is not None
    assert b.constant is not None
    if _same_memory(a.constant, b.constant):
        return True
    if a.trainable or b.trainable:
        return False
    return torch.equal(_bits(a.constant), _bits(b.constant))


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    same_place = a.data_ptr() == b.data_ptr() and a.stride() == b.stride()
    return a.numel() > 0 and same_place and a.is_conj() == b.is_conj() and a.is_neg() == b.is_neg()


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    plain = tensor.resolve_conj().resolve_neg().reshape(-1).contiguous()
    if plain.numel() <= 1:  # contiguous to torch whatever its stride, but not to be seen as bytes
        plain = plain.clone(memory_format=torch.contiguous_format)
    return plain.view(torch.uint8)
