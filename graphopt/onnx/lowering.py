"""Operators that torch's exporter lacks, gets wrong or spells at length, in terms of others.

Each rule gives ATen operators with the same numbers, so it can be tested without ONNX.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from graphopt.errors import ExportError
from graphopt.ir import Graph, Node, Value
from graphopt.ir.value import Operand
from graphopt.onnx.naming import describe

# A rule returns a replacement per output of the node, or None where the node may stay.
Rule = Callable[["Builder", Node], list[Value] | None]

_rules: dict[str, Rule] = {}


class Builder:
    """Adds nodes in the place of another, with its origin."""

    def __init__(self, graph: Graph, node: Node) -> None:
        self.graph = graph
        self.node = node

    def add(self, op: str, /, *args: Operand, **kwargs: Operand) -> Value:
        return self.graph.add(op, *args, before=self.node, origin=self.node.origin, **kwargs)

    def constant(self, tensor: torch.Tensor, name: str) -> Value:
        return self.graph.constant(tensor, name)


def lower(graph: Graph) -> None:
    """Apply every rule, in place."""
    for node in graph.nodes:
        rule = _rules.get(node.op)
        if rule is None:
            continue
        with graph.edit():
            try:
                replacements = rule(Builder(graph, node), node)
            except ExportError as error:
                raise ExportError(f"{describe(node)} cannot be exported: {error}") from error
            if replacements is not None:
                for old, new in zip(node.outputs, replacements, strict=True):
                    graph.replace(old, new)
                graph.erase(node)


def rule(*ops: str) -> Callable[[Rule], Rule]:
    """Register the rule of some operators."""

    def register(function: Rule) -> Rule:
        for op in ops:
            _rules[op] = function
        return function

    return register


@rule("aten.squeeze.dim", "aten.squeeze.dims")
def _squeeze(builder: Builder, node: Node) -> list[Value] | None:
    """ONNX Squeeze refuses a dimension that is not 1, which torch leaves as it is."""
    x = node["self"]
    given = node["dim"]
    dimensions = [d % x.rank for d in (given if isinstance(given, list) else [given])]
    squeezed = [d for d in dimensions if x.fixed_size(d) == 1]
    if len(squeezed) == len(dimensions):
        return None
    return [builder.add("aten.squeeze.dims", x, squeezed) if squeezed else x]


@rule("aten.copy")
def _copy(builder: Builder, node: Node) -> list[Value]:
    source = builder.add("aten.to.dtype", node["src"], node["self"].dtype)
    return [builder.add("aten.expand_as", source, node["self"])]


@rule("aten.unbind.int")
def _unbind(builder: Builder, node: Node) -> list[Value]:
    dimension = node["dim"]
    return [
        builder.add("aten.select.int", node["self"], dimension, index)
        for index in range(len(node.outputs))
    ]


@rule("aten.avg_pool2d")
def _avg_pool2d(builder: Builder, node: Node) -> list[Value] | None:
    """The exporter drops ``divisor_override``."""
    divisor = node["divisor_override"]
    if divisor is None:
        return None
    if node["ceil_mode"]:
        raise ExportError("avg_pool2d with both ceil_mode and divisor_override has no ONNX form")
    operands = {**node.operands, "count_include_pad": True}
    del operands["divisor_override"]
    kernel = node["kernel_size"]
    area = math.prod(kernel) if len(kernel) == 2 else kernel[0] ** 2
    mean = builder.add("aten.avg_pool2d", **operands)
    return [builder.add("aten.mul.Tensor", mean, area / divisor)]


@rule("aten.adaptive_avg_pool2d", "aten._adaptive_avg_pool2d")
def _adaptive_avg_pool2d(builder: Builder, node: Node) -> list[Value] | None:
    """The mean of all; windows of one size; else a product with a constant from each side."""
    x = node["self"]
    targets = node["output_size"]
    if targets == [1, 1]:
        return [builder.add("aten.mean.dim", x, [-2, -1], True)]
    height, width = x.fixed_size(-2), x.fixed_size(-1)
    if height is None or width is None or not all(isinstance(n, int) for n in targets):
        return None
    if height % targets[0] == 0 and width % targets[1] == 0:
        window = [height // targets[0], width // targets[1]]
        return [builder.add("aten.avg_pool2d", x, window, window)]
    rows = builder.constant(_averages(height, targets[0], x.dtype), "row_averages")
    columns = builder.constant(_averages(width, targets[1], x.dtype).T, "column_averages")
    narrow = builder.add("aten.matmul", x, columns)
    return [builder.add("aten.matmul", rows, narrow)]


def _averages(size: int, target: int, dtype: torch.dtype) -> torch.Tensor:
    """A (target, size) matrix whose rows average the windows of adaptive pooling."""
    matrix = torch.zeros(target, size, dtype=torch.float64)
    for row in range(target):
        start, end = row * size // target, -(-(row + 1) * size // target)
        matrix[row, start:end] = 1 / (end - start)
    return matrix.to(dtype)


@rule("aten.group_norm")
def _group_norm(builder: Builder, node: Node) -> list[Value] | None:
    """With a group per channel it is instance normalisation, which ONNX has as one operator."""
    x = node["input"]
    if x.rank < 3 or x.fixed_size(1) != node["num_groups"]:
        return None
    statistics = (None, None, True, 0.0, node["eps"], False)
    return [builder.add("aten.instance_norm", x, node["weight"], node["bias"], *statistics)]


@rule("aten.permute", "aten.transpose.int", "aten.swapaxes")
def _permute(builder: Builder, node: Node) -> list[Value] | None:
    """A permutation that moves only dimensions of size 1 is a view."""
    x = node["self"]
    if node.op == "aten.permute":
        order = [d % x.rank for d in node["dims"]]
    else:
        order = list(range(x.rank))
        first, second = (node[p.name] for p in node.operator.parameters[1:])
        order[first], order[second] = order[second], order[first]
    sizes = [x.fixed_size(d) for d in order]
    moved = [d for d, size in zip(order, sizes, strict=True) if size != 1]
    if moved != sorted(moved) or sizes.count(None) > 1:
        return None
    return [builder.add("aten.reshape", x, [-1 if size is None else size for size in sizes])]


@rule("aten.im2col")
def _im2col(builder: Builder, node: Node) -> list[Value] | None:
    """Where the image's size is fixed, a selection of its pixels by constant positions."""
    x = node["self"]
    height, width = x.fixed_size(-2), x.fixed_size(-1)
    if x.rank != 4 or height is None or width is None:
        return None
    margins = [margin for padding in reversed(node["padding"]) for margin in (padding, padding)]
    padded = builder.add("aten.constant_pad_nd", x, margins) if any(margins) else x
    positions = torch.arange(padded.shape[-2] * padded.shape[-1], dtype=torch.float64)
    windows = torch.ops.aten.im2col.default(
        positions.reshape(1, 1, *padded.shape[-2:]),
        node["kernel_size"],
        node["dilation"],
        [0, 0],
        node["stride"],
    )
    selection = builder.constant(windows.to(torch.int64).flatten(), "window_positions")
    pixels = builder.add("aten.flatten.using_ints", padded, 2, 3)
    selected = builder.add("aten.index_select", pixels, 2, selection)
    by_window = builder.add("aten.unflatten.int", selected, 2, [-1, windows.shape[-1]])
    return [builder.add("aten.flatten.using_ints", by_window, 1, 2)]


@rule("aten.scaled_dot_product_attention")
def _attention(builder: Builder, node: Node) -> list[Value] | None:
    """softmax(q kᵀ scale + mask) v, with zeros where a mask leaves nothing to attend to."""
    query, key, value = node["query"], node["key"], node["value"]
    width = query.fixed_size(-1)
    if width is None or node["dropout_p"]:
        return None
    scale = node["scale"]
    if scale is None:
        scale = 1 / math.sqrt(width)
    if node["enable_gqa"] and query.shape[-3] != key.shape[-3]:
        key = _repeat_heads(builder, key, query)
        value = _repeat_heads(builder, value, query)
    if scale != 1:
        query = builder.add("aten.mul.Tensor", query, scale)
    scores = builder.add("aten.matmul", query, builder.add("aten.transpose.int", key, -2, -1))
    mask = node["attn_mask"]
    if node["is_causal"]:
        mask = _causal_mask(builder, scores)
    if mask is not None and mask.dtype == torch.bool:
        hidden = builder.constant(torch.tensor(-math.inf, dtype=scores.dtype), "hidden")
        scores = builder.add("aten.where.self", mask, scores, hidden)
    elif mask is not None:
        scores = builder.add("aten.add.Tensor", scores, mask)
    weights = builder.add("aten.softmax.int", scores, -1)
    if _may_hide_all(node["attn_mask"]):
        nothing = builder.constant(torch.tensor(0.0, dtype=weights.dtype), "nothing")
        absent = builder.add("aten.isnan", weights)
        weights = builder.add("aten.where.self", absent, nothing, weights)
    return [builder.add("aten.matmul", weights, value)]


def _may_hide_all(mask: Value | None) -> bool:
    """Whether a mask may leave nothing to attend to; softmax is NaN there."""
    if mask is None or mask.constant is None:
        return mask is not None
    tensor = mask.constant
    visible = tensor if tensor.dtype == torch.bool else tensor > -math.inf
    return not bool(visible.any(-1).all())


def _causal_mask(builder: Builder, scores: Value) -> Value:
    """A boolean mask (queries, keys), a constant where both are fixed."""
    fixed = [scores.fixed_size(-2), scores.fixed_size(-1)]
    if all(size is not None for size in fixed):
        ones = torch.ones([size or 0 for size in fixed], dtype=torch.bool)
        return builder.constant(ones.tril(), "causal_mask")
    positions = []
    for dimension in (-2, -1):
        size = builder.add("aten.sym_size.int", scores, dimension % scores.rank)
        positions.append(builder.add("aten.arange", size))
    queries = builder.add("aten.unsqueeze", positions[0], 1)
    return builder.add("aten.ge.Tensor", queries, positions[1])


def _repeat_heads(builder: Builder, x: Value, query: Value) -> Value:
    """Each head of keys or values as often as the query has heads for it."""
    times = query.shape[-3] // x.shape[-3]
    return builder.add("aten.repeat_interleave.self_int", x, times, x.rank - 3)


@rule("graphopt.fake_quantize")
def _fake_quantize(builder: Builder, node: Node) -> list[Value]:
    parameters = {name: operand for name, operand in node.operands.items() if name != "x"}
    steps = _quantized(builder, node)
    return [builder.add("graphopt.dequantize", steps, **parameters)]


@rule("graphopt.quantize")
def _quantize(builder: Builder, node: Node) -> list[Value]:
    return [_quantized(builder, node)]


@rule("graphopt.dequantize")
def _dequantize(builder: Builder, node: Node) -> list[Value] | None:
    """ONNX has no zero point for int32, which holds biases."""
    zero_point = node["zero_point"]
    if node["dtype"] != torch.int32 or zero_point is None:
        return None
    if not zero_point.is_constant or zero_point.constant.any():
        raise ExportError("ONNX dequantizes int32 with a zero point of zero only")
    return [builder.add("graphopt.dequantize", **{**node.operands, "zero_point": None})]


def _quantized(builder: Builder, node: Node) -> Value:
    """The steps of a quantization: a constant for a constant, else a quantize operator that
    saturates at the limits of its type only, as ONNX does."""
    operands = dict(node.operands)
    x, dtype = operands["x"], operands["dtype"]
    if all(v.is_constant for v in node.input_values()):
        tensors = {n: v.constant if isinstance(v, Value) else v for n, v in operands.items()}
        steps = torch.ops.graphopt.quantize.default(**tensors)
        return builder.constant(steps, f"{x.name}_quantized")
    limits = torch.iinfo(dtype)
    if (operands["quant_min"], operands["quant_max"]) != (limits.min, limits.max):
        # Clipping before it leaves the pair with DequantizeLinear recognisable.
        operands["x"] = _clip(builder, node)
        operands["quant_min"], operands["quant_max"] = limits.min, limits.max
    return builder.add("graphopt.quantize", **operands)


def _clip(builder: Builder, node: Node) -> Value:
    """x within what the lowest and the highest step stand for."""
    x, scale, zero_point, axis = node["x"], node["scale"], node["zero_point"], node["axis"]
    if node["block_size"] is not None:
        raise ExportError("quantizing by blocks to less than the range of a type has no ONNX form")
    if not scale.is_constant or not (zero_point is None or zero_point.is_constant):
        raise ExportError("a range narrower than its type needs a constant scale and zero point")
    shift = 0 if zero_point is None else zero_point.constant.to(scale.dtype)
    low, high = (scale.constant * (node[bound] - shift) for bound in ("quant_min", "quant_max"))
    if axis is None:
        return builder.add("aten.clamp", x, low.item(), high.item())
    shape = [1] * x.rank
    shape[axis] = -1
    bounds = [
        builder.constant(bound.reshape(shape), name)
        for bound, name in ((low, "lowest"), (high, "highest"))
    ]
    return builder.add("aten.clamp.Tensor", x, *bounds)
