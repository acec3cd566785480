"""Removing units of channel groups from a graph, and masking them with zeros."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from graphopt.errors import PassError
from graphopt.flops import count_flops
from graphopt.ir import Graph, Node, TensorType, Value
from graphopt.ir.operators import resolve
from graphopt.passes.arithmetic import DIVISIONS
from graphopt.passes.layers import is_transposed
from graphopt.passes.pruning.channel_groups import ChannelGroup, uses
from graphopt.passes.pruning.coupling_rules_einsum import EINSUM, einsum_labels
from graphopt.passes.pruning.coupling_rules_layers import MATRIX_PRODUCTS
from graphopt.passes.pruning.remaining_sizes import Remaining, rewrite_sizes

Removals = Mapping[ChannelGroup, Sequence[int]]
"""The units to remove, by group."""


def remove_units(graph: Graph, removals: Removals) -> None:
    """Remove units from a graph, all in one edit: tensors become smaller, and so do the literal
    sizes of operators.

    The result computes what the graph does whose units are masked (see `mask_units`).

    Args:
        graph: where the groups were found, or a clone of it. Constants may have got other numbers
            since; after a removal, groups must be found again.
        removals: the units' numbers. Each group keeps at least one.

    Raises:
        PassError: no unit of a group would be left, there is no unit of a number, or the graph
            has changed otherwise since the groups were found. The graph stays as it is.
    """
    left = _remaining(graph, removals)
    if left is None:
        return
    expected = {value.name: _expected_types(value, left) for value in graph.values}
    before = graph.clone()
    with graph.edit():
        for constant in graph.constants:
            _slice_constant(graph, constant, left)
        for node in graph.nodes:
            rewrite_sizes(graph, node, left)
    wrong = [v for v in graph.values if expected.get(v.name, v.types) != v.types]
    if wrong:
        found, value = wrong[0].types, wrong[0]
        graph.restore(before)
        raise PassError(
            f"the removal would make %{value.name} {found[0]} instead of "
            f"{expected[value.name][0]}: the coupling rules do not fit the graph"
        )


def remaining_macs(graph: Graph, removals: Removals) -> int:
    """How many multiply-adds a graph would have left at the example's sizes, without changing it.

    Args:
        graph, removals: as for `remove_units`.

    Raises:
        PassError: as `remove_units` does.
    """
    left = _remaining(graph, removals)
    total = Fraction(0)
    for node in graph.nodes:
        count = Fraction(count_flops(node), 2)
        if count and left is not None:
            for value, dimension in _factors(node):
                size = value.shape[dimension]
                count *= Fraction(left.sizes(value, dimension)[0], size)
        total += count
    return int(total)


def _factors(node: Node) -> Iterator[tuple[Value, int]]:
    """The dimensions whose sizes a node's multiply-adds are a multiple of, as far as channels can
    be removed from them."""
    whole = node.outputs[0]
    weight = node.operands.get("weight")
    if weight is not None:
        yield weight, 1
        whole = node["input"] if is_transposed(node) else whole
    elif node.op == EINSUM:
        seen = {}
        for value, labels in zip(node["tensors"], einsum_labels(node)[0], strict=True):
            seen.update({label: (value, d) for d, label in enumerate(labels) if value.shape[d] > 1})
        yield from seen.values()
        return
    elif node.op in MATRIX_PRODUCTS:
        first = node[MATRIX_PRODUCTS[node.op][0]]
        yield first, first.rank - 1
    for dimension in range(whole.rank):
        yield whole, dimension


def mask_units(graph: Graph, removals: Removals) -> Graph:
    """A clone of a graph in which all that belongs to units is zero: the weights, biases and
    scales that make them, and the weights that read them.

    Args:
        graph, removals: as for `remove_units`.

    Raises:
        PassError: as `remove_units` does.
    """
    _check(graph, removals)
    masked = graph.clone()
    with masked.edit():
        for group, units in removals.items():
            for member in group.members:
                constant = masked.value(member.constant.name)
                if any(_divides(*use) for use in uses(constant)):
                    continue
                chosen = torch.isin(member.units, torch.as_tensor(list(units)))
                shape = [1] * constant.rank
                shape[member.dimension] = -1
                zeros = _zeros_like(graph.value(constant.name))
                assert constant.constant is not None
                masked.set_constant(
                    constant, torch.where(chosen.reshape(shape), zeros, constant.constant)
                )
    return masked


def _remaining(graph: Graph, removals: Removals) -> Remaining | None:
    """What a removal leaves; None if it removes nothing."""
    wanted = {group: units for group, units in removals.items() if len(units)}
    _check(graph, wanted)
    if not wanted:
        return None
    structure = next(iter(wanted)).structure
    gone = np.zeros(len(structure.components.component), dtype=bool)
    for group, units in wanted.items():
        together = group.components[np.asarray(units, dtype=np.int64)]
        gone |= np.isin(group.structure.components.component, together)
    return Remaining(structure.axes, gone)


def _check(graph: Graph, removals: Removals) -> None:
    structures = {group.structure for group in removals}
    if not all(structure.fits(graph) for structure in structures):
        raise PassError("the graph has changed since its channel groups were found; find them anew")
    for group, units in removals.items():
        odd = [unit for unit in units if not 0 <= unit < group.units]
        if odd:
            raise PassError(f"the group {group.name} has {group.units} units, and none is {odd[0]}")
        if len(set(units)) >= group.units:
            raise PassError(
                f"the group {group.name} would lose all of its {group.units} units; leave it one"
            )


def _expected_types(value: Value, left: Remaining) -> tuple[object, ...]:
    if not value.is_tensor:
        return value.types
    sizes = [left.sizes(value, dimension) for dimension in range(value.rank)]
    return tuple(
        TensorType(value.dtype, tuple(size[k] for size in sizes)) for k in range(len(value.types))
    )


def _slice_constant(graph: Graph, constant: Value, left: Remaining) -> None:
    tensor = constant.constant
    assert tensor is not None
    for dimension in range(tensor.dim()):
        if left.changes(constant, dimension):
            kept = torch.from_numpy(np.flatnonzero(left.indices(constant, dimension)))
            tensor = tensor.index_select(dimension, kept)
    if tensor is not constant.constant:
        graph.set_constant(constant, tensor)


def _zeros_like(constant: Value) -> Tensor:
    """Elements that stand for zero, also where the constant is quantized."""
    assert constant.constant is not None
    for user in constant.users:
        if user.op == "graphopt.dequantize" and user["x"] is constant:
            operands = {
                name: operand.constant if isinstance(operand, Value) else operand
                for name, operand in user.operands.items()
            }
            zeros = torch.zeros(constant.shape, dtype=user.output.dtype)
            return resolve("graphopt.quantize").call({**operands, "x": zeros})
    return torch.zeros_like(constant.constant)


def _divides(node: Node, operand: str) -> bool:
    """Whether a zero of an operand would give infinities."""
    if node.op in DIVISIONS:
        return operand == "other"
    if node.op == "aten._weight_norm":
        return operand == "v"
    return operand in ("running_mean", "running_var") or (
        node.op == "graphopt.quantize" and operand == "scale"
    )
