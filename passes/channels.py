"""Scaling and shifting per channel, and moving it into the layers before or after.

A view between the two is no obstacle where it keeps the channels together: the dimension that
holds them is followed through reshapes and permutations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from graphopt.ir import Graph, Node, Operand, TensorType, Value
from graphopt.ir.patterns import Decline
from graphopt.passes.layers import Layer, is_storable, layer_of, rewrite_layer


@dataclass(frozen=True)
class ChannelAffine:
    """``result = source * scale + shift``, source and result of one type.

    Attributes:
        scale, shift: in float64; [channels], or [] where there is no dimension.
        dimension: which one holds the channels; None if all elements are treated alike.
    """

    source: Value
    result: Value
    scale: Tensor
    shift: Tensor
    dimension: int | None


def per_channel(operand: Operand, result: Value) -> tuple[Tensor, int | None] | Decline:
    """A constant operand of an elementwise operator, in float64: with the dimension of the result
    along which it varies, or as one number [] and None."""
    if isinstance(operand, (int, float)) and not isinstance(operand, bool):
        return torch.tensor(operand, dtype=torch.float64), None
    if not isinstance(operand, Value) or operand.constant is None or operand.dtype.is_complex:
        return Decline(f"{operand!r} is not a constant of real numbers")
    tensor = operand.constant.double()
    if tensor.numel() == 1:
        return tensor.reshape(()), None
    varying = [d for d, size in enumerate(tensor.shape) if size != 1]
    if len(varying) > 1 or tensor.numel() == 0:
        return Decline(f"%{operand.name} varies along more than one dimension")
    return tensor.reshape(-1), result.rank - tensor.dim() + varying[0]


def fold_into_producer(graph: Graph, affine: ChannelAffine) -> Value | Decline:
    """Fold into the layer that computes the source; returns the value that takes the result's
    place. Always exact."""
    value, dimension, reader = affine.source, affine.dimension, affine.result.producer
    while True:
        if value.is_output or [user for user in value.users if _reads(user, value)] != [reader]:
            return Decline(f"%{value.name} has other users, or is an output of the graph")
        reader = value.producer
        if reader is None:
            return Decline(f"%{value.name} is not the result of a layer")
        if not is_view(reader):
            break
        seen = _dimension_before(reader, dimension)
        if isinstance(seen, Decline):
            return seen
        value, dimension = reader["self"], seen
    layer = layer_of(reader)
    if isinstance(layer, Decline):
        return layer
    if dimension not in (None, layer.output_dimension):
        return Decline(f"dimension {dimension} of %{value.name} does not hold its channels")
    taps, offsets = layer.taps(), layer.offsets()
    shape = (*taps.shape[:2], 1, 1)
    scale = affine.scale.expand_as(offsets)
    folded = taps * scale.reshape(shape), offsets * scale + affine.shift
    if not is_storable(layer, *folded):
        return Decline(f"the weight of %{layer.node.name} would leave the range of its dtype")
    rewrite_layer(graph, layer, *folded)
    return affine.source


def fold_into_consumers(graph: Graph, affine: ChannelAffine) -> Value | Decline:
    """Fold into the layers that read the result, which must be all that reads it; returns the
    value that takes the result's place. With a shift this is exact only without zero padding."""
    folded = []
    for consumer in _consumers(affine.result, affine.dimension):
        if isinstance(consumer, Decline):
            return consumer
        layer, dimension = consumer
        if dimension not in (None, layer.input_dimension):
            return Decline(f"dimension {dimension} of %{layer.input.name} is not the channels'")
        if affine.shift.any() and layer.has_padding:
            return Decline(f"%{layer.node.name} pads with zeros, which the shift does not reach")
        taps = layer.taps()
        groups, _, channels, _ = taps.shape
        scale = affine.scale.expand(groups * channels).reshape(groups, 1, channels, 1)
        offsets = layer.offsets() + layer.response(affine.shift.expand(groups * channels))
        folded.append((layer, taps * scale, offsets))
        if not is_storable(*folded[-1]):
            return Decline(f"the weight of %{layer.node.name} would leave the range of its dtype")
    for layer, taps, offsets in folded:
        rewrite_layer(graph, layer, taps, offsets)
    return affine.source


def _consumers(value: Value, dimension: int | None) -> Iterator[tuple[Layer, int | None] | Decline]:
    """The layers that read a value, through views, each with the dimension followed up to it."""
    if value.is_output or not value.users:
        yield Decline(f"%{value.name} is an output of the graph, or has no users")
        return
    for user in value.users:
        if not _reads(user, value):
            continue
        if is_view(user) and list(user.input_values()).count(value) == 1 and user["self"] is value:
            seen = _dimension_after(user, dimension)
            yield from [seen] if isinstance(seen, Decline) else _consumers(user.output, seen)
            continue
        layer = layer_of(user)  # its weight and bias are constants, so the value is its input
        yield layer if isinstance(layer, Decline) else (layer, dimension)


_RESHAPES = frozenset(
    """
    aten.reshape aten.view aten._unsafe_view aten.flatten.using_ints aten.unflatten.int
    aten.squeeze aten.squeeze.dim aten.squeeze.dims aten.unsqueeze aten.reshape_as aten.view_as
    aten.contiguous aten.clone aten.alias
    """.split()
)
_PERMUTATIONS = frozenset(
    "aten.permute aten.transpose.int aten.swapaxes aten.t aten.movedim.int".split()
)


def is_view(node: Node) -> bool:
    """Whether a node only arranges the elements of its operand ``self`` in another shape."""
    return node.op in _RESHAPES or node.op in _PERMUTATIONS


def _reads(user: Node, value: Value) -> bool:
    """Whether a node looks at more than a value's shape."""
    if user.op in ("aten.reshape_as", "aten.view_as", "aten.expand_as"):
        return user["self"] is value
    return user.op != "aten.sym_size.int"


def _dimension_before(view: Node, dimension: int | None) -> int | Decline | None:
    return _follow(view, view.output, view["self"], dimension)


def _dimension_after(view: Node, dimension: int | None) -> int | Decline | None:
    return _follow(view, view["self"], view.output, dimension)


def _follow(view: Node, start: Value, end: Value, dimension: int | None) -> int | Decline | None:
    """Which dimension of one end of a view holds what a dimension of its other end holds."""
    if dimension is None:
        return None
    if view.op in _PERMUTATIONS:
        order = _order(view)
        return order[dimension] if start is view.output else order.index(dimension)
    for candidate in range(end.rank):
        if _same_place(start, dimension, end, candidate):
            return candidate
    return Decline(f"%{view.name} does not keep the channels together")


def _order(permutation: Node) -> list[int]:
    """Which dimension of the operand each dimension of the result is."""
    rank = permutation.output.rank
    marked = torch.empty(tuple(range(2, rank + 2)), device="meta")
    operands = {**permutation.operands, "self": marked}
    return [size - 2 for size in permutation.operator.call(operands).shape]


def _same_place(a: Value, dimension: int, b: Value, candidate: int) -> bool:
    """Whether two row-major arrays of the same elements have equal indices in two dimensions."""
    for first, second in zip(a.types, b.types, strict=True):
        assert isinstance(first, TensorType)
        assert isinstance(second, TensorType)
        same_size = first.shape[dimension] == second.shape[candidate]
        same_stride = prod(first.shape[dimension + 1 :]) == prod(second.shape[candidate + 1 :])
        if not same_size or not same_stride or first.numel == 0:
            return False
    return True
