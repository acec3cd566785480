"""What an exported model does not need: foldable nodes, identities, duplicates, chains."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir
import onnxscript.optimizer
from onnx_ir.passes import common

_KEPT = ("QuantizeLinear", "DequantizeLinear")
_LARGEST_FOLDED = 2**26


def clean(model: onnx_ir.Model) -> None:
    """Fold and simplify, in place. The dequantize of a constant stays, to keep the weight small."""
    onnxscript.optimizer.optimize_ir(
        model,
        num_iterations=4,
        input_size_limit=_LARGEST_FOLDED,
        output_size_limit=_LARGEST_FOLDED,
        should_fold=lambda node: node.op_type not in _KEPT,
    )
    for node in model.graph:
        if node.op_type == "Slice":
            _merge_slices(node)
        elif node.op_type == "Unsqueeze":
            _merge_unsqueezes(node)
        elif node.op_type == "Concat":
            _merge_concatenations(node)
    common.RemoveUnusedNodesPass()(model)


def _merge_slices(node: onnx_ir.Node) -> None:
    """Slices of different axes are one slice."""
    before = _producer(node)
    if before is None:
        return
    inner, outer = _slice_operands(before), _slice_operands(node)
    if inner is None or outer is None or set(inner[2]) & set(outer[2]):
        return
    merged = [[*first, *second] for first, second in zip(inner, outer, strict=True)]
    _set_operands(node, before.inputs[0], merged)


def _slice_operands(node: onnx_ir.Node) -> list[list[int]] | None:
    """Starts, ends, axes (not negative) and steps, if they are known."""
    starts, ends = _constant(node, 1), _constant(node, 2)
    if starts is None or ends is None:
        return None
    axes = _constant(node, 3) if len(node.inputs) > 3 else list(range(len(starts)))
    steps = _constant(node, 4) if len(node.inputs) > 4 else [1] * len(starts)
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    if axes is None or steps is None or shape is None:
        return None
    return [starts, ends, [axis % len(shape) for axis in axes], steps]


def _merge_unsqueezes(node: onnx_ir.Node) -> None:
    before = _producer(node)
    if before is None or before.inputs[0] is None or before.inputs[0].shape is None:
        return
    inner, outer = _constant(before, 1), _constant(node, 1)
    if inner is None or outer is None:
        return
    middle = len(before.inputs[0].shape) + len(inner)
    rank = middle + len(outer)
    outer = [axis % rank for axis in outer]
    kept = [axis for axis in range(rank) if axis not in outer]
    merged = sorted([*outer, *(kept[axis % middle] for axis in inner)])
    _set_operands(node, before.inputs[0], [merged])


def _merge_concatenations(node: onnx_ir.Node) -> None:
    """A concatenation takes in those along the same axis that only it uses."""
    axis = _axis(node)
    if axis is None:
        return
    operands: list[onnx_ir.Value | None] = []
    for value in node.inputs:
        before = value.producer() if value is not None else None
        is_same = before is not None and before.op_type == "Concat" and _axis(before) == axis
        alone = value is not None and len(value.uses()) == 1 and not value.is_graph_output()
        if before is not None and is_same and alone:
            operands += before.inputs
        else:
            operands.append(value)
    node.resize_inputs(len(operands))
    for index, value in enumerate(operands):
        node.replace_input_with(index, value)


def _axis(concatenation: onnx_ir.Node) -> int | None:
    """Its axis, not negative; None where the rank is unknown."""
    shape = concatenation.outputs[0].shape
    return concatenation.attributes["axis"].as_int() % len(shape) if shape is not None else None


def _producer(node: onnx_ir.Node) -> onnx_ir.Node | None:
    """What makes a node's first operand, if it is of the same kind."""
    value = node.inputs[0]
    before = value.producer() if value is not None else None
    return before if before is not None and before.op_type == node.op_type else None


def _constant(node: onnx_ir.Node, index: int) -> list[int] | None:
    value = node.inputs[index]
    if value is None or value.const_value is None:
        return None
    return [int(n) for n in value.const_value.numpy().reshape(-1)]


def _set_operands(
    node: onnx_ir.Node, source: onnx_ir.Value | None, numbers: Sequence[Sequence[int]]
) -> None:
    """Let a node read a value and lists of integers, as new constants."""
    node.resize_inputs(1 + len(numbers))
    node.replace_input_with(0, source)
    graph = node.graph
    assert isinstance(graph, onnx_ir.Graph)
    for index, items in enumerate(numbers, 1):
        name = f"{node.outputs[0].name}_operand_{index}"
        tensor = onnx_ir.tensor(np.array(items, dtype=np.int64), name=name)
        value = onnx_ir.Value(
            name=name,
            type=onnx_ir.TensorType(onnx_ir.DataType.INT64),
            shape=onnx_ir.Shape([len(items)]),
            const_value=tensor,
        )
        graph.register_initializer(value)
        node.replace_input_with(index, value)
