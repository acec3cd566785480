"""Coupling rules of operators with weights, of products, normalisation and attention."""

from __future__ import annotations

import numpy as np

from graphopt.ir import Node, Value
from graphopt.passes.layers import ALL_CONVOLUTIONS, is_transposed
from graphopt.passes.pruning.axes import Axis
from graphopt.passes.pruning.coupling import Axes, Coupling, Rule, describe
from graphopt.passes.pruning.coupling_rules_elementwise import broadcast

# With these, removed slices of constants are zero slices of the result where they are masked.
_KEEPS_ZEROS = frozenset(
    """
    aten.reshape aten.view aten._unsafe_view aten.flatten.using_ints aten.unflatten.int
    aten.squeeze aten.squeeze.dim aten.squeeze.dims aten.unsqueeze aten.reshape_as aten.view_as
    aten.contiguous aten.clone aten.alias aten.permute aten.transpose.int aten.swapaxes aten.t
    aten.movedim.int aten.expand aten.slice.Tensor aten.select.int aten.cat aten.to.dtype
    aten.type_as aten.mul.Scalar graphopt.dequantize aten._weight_norm
    """.split()
)


def _linear(c: Coupling, node: Node) -> list[Axes]:
    """[*, in] x [out, in] -> [*, out]"""
    x, weight = c.axes[node["input"]], c.axes[node["weight"]]
    _contract(c, node, (node["input"], x[-1]), (node["weight"], weight[-1]))
    return [(*x[:-1], *_with_bias(c, node, weight[:-1]))]


def _with_bias(c: Coupling, node: Node, out: Axes) -> Axes:
    if node["bias"] is None or not out:
        return out
    return (c.tie(out[0], c.axes[node["bias"]][0], node),)


def _contract(c: Coupling, node: Node, a: tuple[Value, Axis], b: tuple[Value, Axis]) -> None:
    """A sum over two axes. What is removed must contribute nothing before, too: one of the two is
    a constant, whose slices are zero where they are masked."""
    c.tie(a[1], b[1], node)
    if not (is_weight(a[0]) or is_weight(b[0])):
        c.pin(a[1], f"{describe(node)} sums over it, and neither operand is a weight")


def is_weight(value: Value) -> bool:
    if value.is_constant:
        return True
    producer = value.producer
    if producer is None or producer.op not in _KEEPS_ZEROS:
        return False
    return all(is_weight(operand) for operand in producer.input_values() if operand.is_tensor)


def _convolution(c: Coupling, node: Node) -> list[Axes]:
    x, weight = c.axes[node["input"]], c.axes[node["weight"]]
    place = len(x) - (len(weight) - 1)  # of the channels
    transposed = is_transposed(node)
    for axis in (*x[place + 1 :], *weight[2:]):
        c.pin(axis, f"{describe(node)} slides its kernel over it")
    groups = node["groups"]
    incoming, outgoing = (weight[0], weight[1]) if transposed else (weight[1], weight[0])
    if groups == 1:
        _contract(c, node, (node["input"], x[place]), (node["weight"], incoming))
    elif not is_weight(node["weight"]) or x[place].flat() is None:
        for axis in (x[place], weight[0], weight[1]):
            c.pin(axis, f"{describe(node)} has groups and a weight that is computed")
        outgoing = c.fixed(c.sizes(node.output, place), f"{describe(node)} has groups")
    else:
        outgoing = _grouped(c, node, x[place], weight[0], weight[1], groups, transposed)
    (outgoing,) = _with_bias(c, node, (outgoing,))
    reason = f"{describe(node)} slides its kernel over it"
    spatial = c.all_fixed(node.output, reason)[place + 1 :]
    return [(*x[:place], outgoing, *spatial)]


def _grouped(
    c: Coupling, node: Node, x: Axis, first: Axis, second: Axis, groups: int, transposed: bool
) -> Axis:
    """Channels are [groups, channels of a group]: either whole groups go, or the same places of
    every group."""
    given, rows, columns = x.flat(), first.flat(), second.flat()
    assert given is not None
    assert rows is not None
    assert columns is not None
    wide = len(given) // groups
    group_of_input = np.arange(len(given)) // wide
    place_of_input = np.arange(len(given)) % wide
    high = len(rows) // groups
    key = f"{node.name}: groups"
    ways = 1 if wide == high == 1 else 2
    whole = c.choose(key, ways) == int(wide > groups)
    if whole:
        c.pin(second, f"{describe(node)} loses whole groups")
        one = c.tie_all(given, group_of_input)
        c.tie_channels(c.tie_all(rows, np.arange(len(rows)) // high), one)
        c.decided(key, ways, one)
        out = len(columns) if transposed else high
        return Axis((1,) * c.assignments, one, (out,) * c.assignments)
    inputs = c.tie_all(given, place_of_input)
    across = c.tie_all(rows, np.arange(len(rows)) % high)
    if transposed:
        c.tie_channels(given, rows)
        outputs = np.tile(columns, groups)
        c.decided(key, ways, np.concatenate([inputs, columns]))
    else:
        c.tie_channels(inputs, columns)
        outputs = np.tile(across, groups)
        c.decided(key, ways, np.concatenate([inputs, across]))
    return c.row(outputs)


def _matmul(c: Coupling, node: Node) -> list[Axes]:
    first, second = MATRIX_PRODUCTS[node.op]
    a, b = node[first], node[second]
    if min(a.rank, b.rank) < 2:
        reason = f"{describe(node)} multiplies a vector"
        for axis in (*c.axes[a], *c.axes[b]):
            c.pin(axis, reason)
        return [c.all_fixed(node.output, reason)]
    left, right = c.axes[a], c.axes[b]
    _contract(c, node, (a, left[-1]), (b, right[-2]))
    batch = broadcast(c, node, node.output.rank - 2, [left[:-2], right[:-2]])
    if not (is_weight(a) or is_weight(b)):
        for axis in batch:
            c.mark_heads(axis)
    result = (*batch, left[-2], right[-1])
    if first != "self":
        result = broadcast(c, node, len(result), [result, c.axes[node["self"]]])
    return [result]


MATRIX_PRODUCTS = {
    "aten.matmul": ("self", "other"),
    "aten.mm": ("self", "mat2"),
    "aten.bmm": ("self", "mat2"),
    "aten.addmm": ("mat1", "mat2"),
    "aten.baddbmm": ("batch1", "batch2"),
}
"""The operands that are multiplied."""


def _embedding(c: Coupling, node: Node) -> list[Axes]:
    weight = c.axes[node["weight"]]
    c.pin(weight[0], f"{describe(node)} looks up its rows")
    return [(*c.axes[node["indices"]], weight[1])]


def _batch_norm(c: Coupling, node: Node) -> list[Axes]:
    x = c.axes[node["input"]]
    channels = x[1]
    for name in ("weight", "bias", "running_mean", "running_var"):
        if node[name] is not None:
            channels = c.tie(channels, c.axes[node[name]][0], node)
    whole = any(node.operands.get(name) for name in ("training", "use_input_stats"))
    if whole:  # statistics of the input itself
        for axis in (x[0], *x[2:]):
            c.pin(axis, f"{describe(node)} normalises over it")
    out = (x[0], channels, *x[2:])
    return [
        out,
        *[c.all_fixed(extra, f"{describe(node)} returns it") for extra in node.outputs[1:]],
    ]


def _weight_norm(c: Coupling, node: Node) -> list[Axes]:
    """A weight of which each slice along a dimension is given a norm: slices can go. Without a
    part of a slice the rest of it would be scaled up."""
    v, g, dimension = c.axes[node["v"]], c.axes[node["g"]], node["dim"]
    reason = f"{describe(node)} normalises over it"
    for place, axis in enumerate(v):
        if place != dimension:
            c.pin(axis, reason)
    axes = list(c.all_fixed(node.output, reason))
    if dimension >= 0:
        axes[dimension] = c.tie(v[dimension], g[dimension], node)
    return [tuple(axes)]


def _layer_norm(c: Coupling, node: Node) -> list[Axes]:
    """Without some of the channels, mean and variance would be others."""
    x = c.axes[node["input"]]
    count = len(node["normalized_shape"])
    reason = f"{describe(node)} normalises over it"
    for axis in x[len(x) - count :]:
        c.pin(axis, reason)
    for name in ("weight", "bias"):
        if node.operands.get(name) is not None:
            for axis in c.axes[node[name]]:
                c.pin(axis, reason)
    normalised = c.all_fixed(node.outputs[0], reason)[len(x) - count :]
    out = (*x[: len(x) - count], *normalised)
    return [
        out,
        *[c.all_fixed(extra, f"{describe(node)} returns it") for extra in node.outputs[1:]],
    ]


def _group_norm(c: Coupling, node: Node) -> list[Axes]:
    """Whole groups can go: the statistics of the others stay."""
    x = c.axes[node["input"]]
    reason = f"{describe(node)} normalises over it"
    for axis in x[2:]:
        c.pin(axis, reason)
    flat, groups = x[1].flat(), node["num_groups"]
    if groups == 1 or flat is None:
        c.pin(x[1], reason)
        return [(x[0], c.fixed(x[1].sizes, reason), *x[2:])]
    one = c.tie_all(flat, np.arange(len(flat)) // (len(flat) // groups))
    channels = Axis((1,) * c.assignments, one, (len(flat) // groups,) * c.assignments)
    for name in ("weight", "bias"):
        if node[name] is not None:
            channels = c.tie(channels, c.axes[node[name]][0], node)
    return [(x[0], channels, *x[2:])]


def _attention(c: Coupling, node: Node) -> list[Axes]:
    """Whole heads can go; the query heads that share a key and a value go together."""
    query, key, value = (c.axes[node[name]] for name in ("query", "key", "value"))
    reason = f"{describe(node)} sums over it"
    for axis in (query[-1], key[-1], key[-2], value[-2]):
        c.pin(axis, reason)
    mask = c.axes[node["attn_mask"]] if node["attn_mask"] is not None else ()
    if mask:
        c.pin(mask[-1], reason)
    if node["enable_gqa"]:
        shared = query[-3].flat(), key[-3].flat()
        assert shared[0] is not None
        assert shared[1] is not None
        one = c.tie_all(shared[0], np.arange(len(shared[0])) // (len(shared[0]) // len(shared[1])))
        c.tie_channels(one, shared[1])
        c.tie(key[-3], value[-3], node)
        batch = broadcast(c, node, len(query) - 2, [query[:-2], mask[:-2]])
    else:
        leading = [operand[:-2] for operand in (query, key, value, mask)]
        batch = broadcast(c, node, len(query) - 2, leading)
    for axis in batch:
        c.mark_heads(axis)
    tokens = broadcast(c, node, 1, [(query[-2],), mask[-2:-1]])
    return [(*batch, *tokens, value[-1])]


def _prelu(c: Coupling, node: Node) -> list[Axes]:
    x, weight = c.axes[node["self"]], c.axes[node["weight"]]
    if node["weight"].shape[0] == 1 or len(x) < 2:
        return [x]
    return [(x[0], c.tie(x[1], weight[0], node), *x[2:])]


def _quantize(c: Coupling, node: Node) -> list[Axes]:
    """A scale or zero point per channel goes with its channel; blocks are not divided."""
    x = list(c.axes[node["x"]])
    axis = node["axis"]
    if axis is not None:
        for name in ("scale", "zero_point"):
            if node[name] is None:
                continue
            if node["block_size"] is None:
                x[axis] = c.tie(x[axis], c.axes[node[name]][0], node)
                continue
            c.pin(x[axis], f"{describe(node)} has a scale per block of it")
            for dimension, along in enumerate(c.axes[node[name]]):
                if dimension == axis % len(x):
                    c.pin(along, f"{describe(node)} has a scale per block of it")
                else:
                    x[dimension] = c.tie(x[dimension], along, node)
    return [tuple(x)]


LAYER_RULES: dict[str, Rule] = {
    "aten.linear": _linear,
    **dict.fromkeys(ALL_CONVOLUTIONS, _convolution),
    **dict.fromkeys(MATRIX_PRODUCTS, _matmul),
    "aten.embedding": _embedding,
    "aten._weight_norm": _weight_norm,
    "aten.batch_norm": _batch_norm,
    "aten._native_batch_norm_legit_no_training": _batch_norm,
    "aten.instance_norm": _batch_norm,
    "aten.layer_norm": _layer_norm,
    "aten.native_layer_norm": _layer_norm,
    "aten.rms_norm": _layer_norm,
    "aten.group_norm": _group_norm,
    "aten.scaled_dot_product_attention": _attention,
    "aten.prelu": _prelu,
    **dict.fromkeys(
        ("graphopt.quantize", "graphopt.dequantize", "graphopt.fake_quantize"), _quantize
    ),
}
