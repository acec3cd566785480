"""Coupling rules of operators that only rearrange, take apart or put together."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import torch

from graphopt.ir import Node, TensorType, Value
from graphopt.passes.pruning.axes import Axis, Piece, pieces
from graphopt.passes.pruning.coupling import Axes, Coupling, Rule, describe

PERMUTATIONS = frozenset(
    "aten.permute aten.transpose.int aten.swapaxes aten.t aten.movedim.int aten.numpy_T aten.mT"
    .split()
)  # fmt: skip
RESHAPES = frozenset(
    """
    aten.reshape aten.view aten._unsafe_view aten.flatten.using_ints aten.unflatten.int
    aten.squeeze aten.squeeze.dim aten.squeeze.dims aten.unsqueeze aten.reshape_as aten.view_as
    """.split()
)


def _permutation(c: Coupling, node: Node) -> list[Axes]:
    axes = c.axes[node["self"]]
    return [tuple(axes[dimension] for dimension in permutation_order(node))]


def permutation_order(node: Node) -> list[int]:
    """Which dimension of the operand each dimension of the result is."""
    marked = torch.empty(tuple(range(2, node.output.rank + 2)), device="meta")
    operands = {**node.operands, "self": marked}
    return [size - 2 for size in node.operator.call(operands).shape]


def _reshape(c: Coupling, node: Node) -> list[Axes]:
    axes, out = c.axes[node["self"]], node.output
    shapes = [t.shape for t in out.types if isinstance(t, TensorType)]
    found: list[Axis | None] = [None] * out.rank
    for dimension, axis in enumerate(axes):
        if axis.is_fixed:
            continue
        later = _products(axes[dimension + 1 :], c.assignments)
        placed = pieces(axis, later, shapes)
        if placed is None:
            c.pin(axis, f"{describe(node)} mixes its channels with a size that is free")
            continue
        piece, carried = _carried(c, node, dimension, axis, placed)
        if found[piece.dimension] is not None:
            c.pin_channels(carried, f"{describe(node)} mixes it with other channels")
        else:
            found[piece.dimension] = Axis(piece.outer, carried, piece.inner)
    return [
        tuple(
            axis if axis is not None else _unlabelled(c, node, axes, dimension, shapes)
            for dimension, axis in enumerate(found)
        )
    ]


def _products(axes: Sequence[Axis], assignments: int) -> tuple[int, ...]:
    return tuple(prod(axis.sizes[k] for axis in axes) for k in range(assignments))


def _carried(
    c: Coupling, node: Node, dimension: int, axis: Axis, placed: Sequence[Piece]
) -> tuple[Piece, np.ndarray]:
    """Channels that are spread over several dimensions can only be removed along one of them.
    Which that is, is decided for all at once (see `coupling_rules.couple`); what is tried first
    is the outermost, such as the heads of attention."""
    if len(placed) == 1:
        return placed[0], axis.channels
    key = f"{node.name}: {dimension}"
    order = list(reversed(placed)) if _is_shuffle(node) else list(placed)
    piece = order[c.choose(key, len(order))]
    carried = c.tie_all(axis.channels, piece.coordinates(len(axis.channels)))
    c.decided(key, len(order), carried)
    return piece, carried


def _is_shuffle(node: Node) -> bool:
    """Whether the result is only transposed and given its old shape: ShuffleNet's channel
    shuffle, which distributes the channels of each group over all."""
    value: Value = node.output
    for names in (PERMUTATIONS, RESHAPES):
        user = value.only_user()
        while user is not None and user.op in ("aten.contiguous", "aten.clone"):
            user = user.output.only_user()
        if user is None or user.op not in names:
            return False
        value = user.output
    return value.types == node["self"].types


def _unlabelled(
    c: Coupling, node: Node, axes: Axes, dimension: int, shapes: Sequence[Sequence[int]]
) -> Axis:
    """The axis of a dimension without removable channels, for the reason of what it holds."""
    sizes = tuple(shape[dimension] for shape in shapes)
    after = prod(shapes[0][dimension + 1 :])
    for place, axis in enumerate(axes):
        later = _products(axes[place + 1 :], c.assignments)[0]
        overlaps = min(later * axis.sizes[0], after * sizes[0]) > max(later, after)
        if overlaps and axis.is_fixed:
            return Axis(sizes, axis.channels[:1], (1,) * c.assignments)
    return c.fixed(sizes, f"{describe(node)} takes channels apart")


def _expand(c: Coupling, node: Node) -> list[Axes]:
    axes, out = c.axes[node["self"]], node.output
    new = out.rank - len(axes)
    result = []
    for dimension in range(out.rank):
        sizes = c.sizes(out, dimension)
        kept = dimension >= new and axes[dimension - new].sizes == sizes
        result.append(
            axes[dimension - new] if kept else c.fixed(sizes, f"{describe(node)} repeats it")
        )
    return [tuple(result)]


def _repeat(c: Coupling, node: Node) -> list[Axes]:
    axes, out = c.axes[node["self"]], node.output
    new = out.rank - len(axes)
    result = []
    for dimension in range(out.rank):
        sizes = c.sizes(out, dimension)
        axis = axes[dimension - new] if dimension >= new else None
        flat = axis.flat() if axis is not None else None
        if axis is not None and axis.sizes == sizes:
            result.append(axis)
        elif axis is not None and flat is not None and len(set(sizes)) == 1 and len(flat) > 1:
            result.append(c.row(np.tile(flat, sizes[0] // len(flat))))
        else:
            if axis is not None:
                c.pin(axis, f"{describe(node)} repeats it")
            result.append(c.fixed(sizes, f"{describe(node)} repeats it"))
    return [tuple(result)]


def _cat(c: Coupling, node: Node) -> list[Axes]:
    # torch lets empty vectors pass whatever the rank of the others
    parts = [c.axes[value] for value in node["tensors"] if value.rank == node.output.rank]
    dimension = node["dim"] % node.output.rank
    result = list(parts[0])
    for axes in parts[1:]:
        for place, axis in enumerate(axes):
            if place != dimension:
                result[place] = c.tie(result[place], axis, node)
    rows = [axes[dimension].flat() for axes in parts]
    known = [channels for channels in rows if channels is not None]
    if len(known) == len(rows):
        result[dimension] = c.row(np.concatenate(known))
    else:
        reason = f"{describe(node)} appends to a size that is free"
        for axes in parts:
            c.pin(axes[dimension], reason)
        result[dimension] = c.fixed(c.sizes(node.output, dimension), reason)
    return [tuple(result)]


def _stack(c: Coupling, node: Node) -> list[Axes]:
    parts = [c.axes[value] for value in node["tensors"]]
    result = list(parts[0])
    for axes in parts[1:]:
        result = [c.tie(a, b, node) for a, b in zip(result, axes, strict=True)]
    dimension = node["dim"] % node.output.rank
    result.insert(dimension, c.fixed((len(parts),) * c.assignments, f"{describe(node)} stacks"))
    return [tuple(result)]


def _split(c: Coupling, node: Node) -> list[Axes]:
    axes, dimension = _axes_and_dimension(c, node)
    flat = axes[dimension].flat()
    results, start = [], 0
    for part in node.outputs:
        sizes = c.sizes(part, dimension)
        if flat is None or len(set(sizes)) > 1:
            c.pin(axes[dimension], f"{describe(node)} divides a size that is free")
            axis = c.fixed(sizes, f"{describe(node)} divides a size that is free")
        else:
            axis = c.row(flat[start : start + sizes[0]])
            start += sizes[0]
        results.append((*axes[:dimension], axis, *axes[dimension + 1 :]))
    return results


def _axes_and_dimension(c: Coupling, node: Node) -> tuple[Axes, int]:
    axes = c.axes[node["self"]]
    return axes, node["dim"] % len(axes)


def _slice(c: Coupling, node: Node) -> list[Axes]:
    axes, dimension = _axes_and_dimension(c, node)
    axis, sizes = axes[dimension], c.sizes(node.output, dimension)
    if sizes == axis.sizes and node["step"] == 1:
        return [axes]
    flat = axis.flat()
    bounds = slice_bounds(node)
    if flat is None or bounds is None or len(set(sizes)) > 1:
        c.pin(axis, f"{describe(node)} takes a part whose place is free")
        part = c.fixed(sizes, f"{describe(node)} takes a part whose place is free")
    elif node.op == "aten.slice.Tensor" and node["step"] != 1:
        c.pin(axis, f"{describe(node)} takes every {node['step']}th of it")
        part = c.fixed(sizes, f"{describe(node)} takes every {node['step']}th of it")
    else:
        part = c.row(flat[slice(*bounds)])
    return [(*axes[:dimension], part, *axes[dimension + 1 :])]


def _slice_scatter(c: Coupling, node: Node) -> list[Axes]:
    """A part of one tensor is replaced by another: what is replaced goes with what replaces it."""
    axes, dimension = _axes_and_dimension(c, node)
    inserted = c.axes[node["src"]]
    result = [
        a if place == dimension else c.tie(a, b, node)
        for place, (a, b) in enumerate(zip(axes, inserted, strict=True))
    ]
    flat, new, bounds = axes[dimension].flat(), inserted[dimension].flat(), slice_bounds(node)
    if flat is None or new is None or bounds is None or node["step"] != 1:
        reason = f"{describe(node)} replaces parts of it whose places are free, or not neighbours"
        for axis in (axes[dimension], inserted[dimension]):
            c.pin(axis, reason)
        result[dimension] = c.fixed(axes[dimension].sizes, reason)
    else:
        start, end = bounds
        c.tie_channels(flat[start:end], new)
        result[dimension] = c.row(np.concatenate([flat[:start], new, flat[end:]]))
    return [tuple(result)]


def slice_bounds(node: Node) -> tuple[int, int] | None:
    """Where a slice starts and ends; None if that is computed."""
    size = node["self"].shape[node["dim"] % node["self"].rank]
    if node.op == "aten.narrow":
        start, length = node["start"], node["length"]
        if isinstance(start, Value) or isinstance(length, Value):
            return None
        return start % size, start % size + length
    start, end = node["start"], node["end"]
    if isinstance(start, Value) or isinstance(end, Value):
        return None
    low, high, _ = slice(start, end).indices(size)
    return low, max(low, high)


def _select(c: Coupling, node: Node) -> list[Axes]:
    """The one that is selected stays; others may go."""
    axes, dimension = _axes_and_dimension(c, node)
    flat, index = axes[dimension].flat(), node["index"]
    if flat is None or isinstance(index, Value):
        c.pin(axes[dimension], f"{describe(node)} takes one of it")
    else:
        c.pin_channels(flat[[index]], f"{describe(node)} takes it")
    return [(*axes[:dimension], *axes[dimension + 1 :])]


def _unbind(c: Coupling, node: Node) -> list[Axes]:
    axes, dimension = _axes_and_dimension(c, node)
    c.pin(axes[dimension], f"{describe(node)} takes it apart")
    return [(*axes[:dimension], *axes[dimension + 1 :])] * len(node.outputs)


def _index_select(c: Coupling, node: Node) -> list[Axes]:
    axes, dimension = _axes_and_dimension(c, node)
    c.pin(axes[dimension], f"{describe(node)} looks up places of it")
    indices = c.axes[node["index"]] or (c.fixed((1,) * c.assignments, "one index"),)
    return [(*axes[:dimension], *indices, *axes[dimension + 1 :])]


def _index(c: Coupling, node: Node) -> list[Axes]:
    """Some dimensions are replaced by those of index tensors: in place where the indexed ones are
    neighbours, in front where not."""
    axes, given = c.axes[node["self"]], node["indices"]
    indexed = [d for d, index in enumerate(given) if index is not None]
    reason = f"{describe(node)} looks up places of it"
    for dimension in indexed:
        c.pin(axes[dimension], reason)
    masks = any(given[d].dtype in (torch.bool, torch.uint8) for d in indexed)
    if masks or not indexed:
        for axis in axes:
            c.pin(axis, reason)
        return [c.all_fixed(node.output, reason)]
    rank = max(given[d].rank for d in indexed)
    neighbours = indexed[-1] - indexed[0] == len(indexed) - 1
    place = indexed[0] if neighbours else 0
    left = [axis for d, axis in enumerate(axes) if d not in indexed]
    looked_up = c.all_fixed(node.output, reason)[place : place + rank]
    return [(*left[:place], *looked_up, *left[place:])]


def _pixel_shuffle(c: Coupling, node: Node) -> list[Axes]:
    """[C * r * r, H, W] -> [C, H * r, W * r]"""
    axes, out = c.axes[node["self"]], node.output
    flat = axes[-3].flat()
    reason = f"{describe(node)} rearranges images"
    for axis in axes[-2:]:
        c.pin(axis, reason)
    fixed = c.all_fixed(out, reason)
    if flat is None:
        c.pin(axes[-3], reason)
        return [(*axes[:-3], *fixed[-3:])]
    area = node["upscale_factor"] ** 2
    channels = c.row(c.tie_all(flat, np.arange(len(flat)) // area))
    return [(*axes[:-3], channels, *fixed[-2:])]


def _channel_shuffle(c: Coupling, node: Node) -> list[Axes]:
    """[groups, C / groups] -> [C / groups, groups]: the same places of all groups go together."""
    axes = c.axes[node["self"]]
    flat, groups = axes[1].flat(), node["groups"]
    if flat is None:
        c.pin(axes[1], f"{describe(node)} shuffles a size that is free")
        return [c.all_fixed(node.output, f"{describe(node)} shuffles a size that is free")]
    places = c.tie_all(flat, np.arange(len(flat)) % (len(flat) // groups))
    return [(axes[0], Axis((1,) * c.assignments, places, (groups,) * c.assignments), *axes[2:])]


def _pixel_unshuffle(c: Coupling, node: Node) -> list[Axes]:
    axes, out = c.axes[node["self"]], node.output
    reason = f"{describe(node)} rearranges images"
    for axis in axes[-2:]:
        c.pin(axis, reason)
    area = node["downscale_factor"] ** 2
    spread = Axis(axes[-3].outer, axes[-3].channels, tuple(area * i for i in axes[-3].inner))
    return [(*axes[:-3], spread, *c.all_fixed(out, reason)[-2:])]


def _im2col(c: Coupling, node: Node) -> list[Axes]:
    """[*, C, H, W] -> [*, C * kernel, places]"""
    axes = c.axes[node["self"]]
    reason = f"{describe(node)} slides a window over it"
    for axis in axes[-2:]:
        c.pin(axis, reason)
    area = prod(node["kernel_size"])
    spread = Axis(axes[-3].outer, axes[-3].channels, tuple(area * i for i in axes[-3].inner))
    return [(*axes[:-3], spread, *c.all_fixed(node.output, reason)[-1:])]


def _col2im(c: Coupling, node: Node) -> list[Axes]:
    """[*, C * kernel, places] -> [*, C, H, W]"""
    axes = c.axes[node["self"]]
    reason = f"{describe(node)} sums up windows"
    c.pin(axes[-1], reason)
    flat, area = axes[-2].flat(), prod(node["kernel_size"])
    fixed = c.all_fixed(node.output, reason)
    if flat is None:
        c.pin(axes[-2], reason)
        return [(*axes[:-2], *fixed[-3:])]
    channels = c.tie_all(flat, np.arange(len(flat)) // area)
    return [(*axes[:-2], c.row(channels), *fixed[-2:])]


VIEW_RULES: dict[str, Rule] = {
    **dict.fromkeys(PERMUTATIONS, _permutation),
    **dict.fromkeys(RESHAPES, _reshape),
    **dict.fromkeys(("aten.expand", "aten.expand_as", "aten.broadcast_to"), _expand),
    "aten.repeat": _repeat,
    "aten.cat": _cat,
    "aten.stack": _stack,
    **dict.fromkeys(
        ("aten.split.Tensor", "aten.split_with_sizes", "aten.split.sizes", "aten.chunk"),
        _split,
    ),
    **dict.fromkeys(("aten.slice.Tensor", "aten.narrow"), _slice),
    "aten.slice_scatter": _slice_scatter,
    "aten.select.int": _select,
    "aten.unbind.int": _unbind,
    "aten.index_select": _index_select,
    "aten.index.Tensor": _index,
    "aten.channel_shuffle": _channel_shuffle,
    "aten.native_channel_shuffle": _channel_shuffle,
    "aten.pixel_shuffle": _pixel_shuffle,
    "aten.pixel_unshuffle": _pixel_unshuffle,
    "aten.im2col": _im2col,
    "aten.col2im": _col2im,
}
