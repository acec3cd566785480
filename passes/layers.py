"""Convolutions, transposed convolutions and linear layers as affine maps over channels.

What the passes that fold something into a layer share: its weight as one array
[groups, output channels, input channels, taps] whatever the operator, and new weights and biases
that are computed in float64 and stored in the layer's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from graphopt.ir import Graph, Node, Value
from graphopt.ir.patterns import Decline

LINEAR = "aten.linear"
EMBEDDING = "aten.embedding"
CONVOLUTIONS = frozenset(
    f"aten.conv{d}d{overload}" for d in (1, 2, 3) for overload in ("", ".padding")
)
TRANSPOSED_CONVOLUTIONS = frozenset(
    ("aten.conv_transpose1d", "aten.conv_transpose2d.input", "aten.conv_transpose3d.input")
)
ALL_CONVOLUTIONS = CONVOLUTIONS | TRANSPOSED_CONVOLUTIONS | {"aten.convolution"}
LAYERS = ALL_CONVOLUTIONS | {LINEAR}


@dataclass(frozen=True)
class Layer:
    """A layer with a constant weight and a constant bias or none; see `layer_of`."""

    node: Node
    input: Value
    weight: Value
    bias: Value | None

    @property
    def is_transposed(self) -> bool:
        return is_transposed(self.node)

    @property
    def groups(self) -> int:
        return 1 if self.node.op == LINEAR else self.node["groups"]

    @property
    def input_dimension(self) -> int:
        """The dimension of the input that holds the channels."""
        return self.input.rank - self._trailing

    @property
    def output_dimension(self) -> int:
        """The dimension of the result that holds the channels."""
        return self.node.output.rank - self._trailing

    @property
    def _trailing(self) -> int:
        return self.weight.rank - 1

    @property
    def has_padding(self) -> bool:
        """Whether some results do not see an element of the input at every tap of the kernel, so
        that a shift of the input is no shift of the result."""
        if self.node.op == LINEAR:
            return False
        kernel = self.weight.shape[2:]
        if self.is_transposed:
            zeros = _always(self.node["padding"], 0) and _always(self.node["output_padding"], 0)
            return not (zeros and _always(self.node["stride"], 1) and set(kernel) == {1})
        padding = self.node["padding"]
        if isinstance(padding, str):
            return padding != "valid" and set(kernel) != {1}
        return not _always(padding, 0)

    def taps(self) -> Tensor:
        """The weight in float64: [groups, output channels, input channels, taps], the channels
        counted per group."""
        weight, groups = self.weight.constant, self.groups
        assert weight is not None
        shape = (groups, weight.shape[0] // groups, weight.shape[1], -1)
        taps = weight.double().reshape(shape)
        return taps.transpose(1, 2) if self.is_transposed else taps

    def offsets(self) -> Tensor:
        """The bias in float64 [output channels]; zeros where there is none."""
        if self.bias is not None and self.bias.constant is not None:
            return self.bias.constant.double()
        groups, channels = self.taps().shape[:2]
        return torch.zeros(groups * channels, dtype=torch.float64)

    def response(self, shift: Tensor) -> Tensor:
        """What a shift of the input's channels [input channels], without padding, becomes in the
        result, [output channels]; both in float64."""
        taps = self.taps()
        groups, _, channels, _ = taps.shape
        return (taps * shift.reshape(groups, 1, channels, 1)).sum(dim=(2, 3)).reshape(-1)


def is_transposed(node: Node) -> bool:
    """Whether a node is a transposed convolution."""
    if node.op == "aten.convolution":
        return bool(node["transposed"])
    return node.op in TRANSPOSED_CONVOLUTIONS


def layer_of(node: Node) -> Layer | Decline:
    """The layer that a node is, or why it is none that can be changed."""
    if node.op not in LAYERS:
        return Decline(f"%{node.name} is {node.op}, neither a convolution nor a linear layer")
    data, weight, bias = node["input"], node["weight"], node["bias"]
    if weight.constant is None:
        return Decline(f"the weight %{weight.name} of %{node.name} is not a constant")
    if bias is not None and (bias.constant is None or bias.rank != 1):
        return Decline(f"the bias %{bias.name} of %{node.name} is not a constant vector")
    dtypes = {v.dtype for v in (data, weight, bias, node.output) if v is not None}
    if len(dtypes) > 1 or not weight.dtype.is_floating_point:
        return Decline(f"%{node.name} does not compute in one floating-point dtype")
    if weight.rank < 2 or weight.constant.numel() == 0:
        return Decline(f"the weight %{weight.name} of %{node.name} has no channels")
    if list(node.input_values()).count(data) > 1:
        return Decline(f"%{data.name} is more than one operand of %{node.name}")
    return Layer(node, data, weight, bias)


def rewrite_layer(graph: Graph, layer: Layer, taps: Tensor, offsets: Tensor) -> None:
    """Give a layer another weight and bias. A constant that others use too stays as it is, the
    layer gets one of its own. A bias that is all zeros is not added where there was none.

    Args:
        graph: the layer's graph.
        layer: what is changed.
        taps: as from `Layer.taps`, storable (see `is_storable`).
        offsets: as from `Layer.offsets`, storable.
    """
    old = layer.weight
    weight = (taps.transpose(1, 2) if layer.is_transposed else taps).reshape(old.shape)
    name = old.name.removesuffix("weight") + "bias" if old.name.endswith("weight") else "bias"
    trainable = old.trainable  # read now: the constant is gone once nobody uses it
    _put(graph, layer.node, "weight", weight.to(old.dtype))
    if layer.bias is not None:
        _put(graph, layer.node, "bias", offsets.to(layer.bias.dtype))
    elif offsets.any():
        bias = graph.constant(offsets.to(old.dtype), name, trainable=trainable)
        graph.set_operand(layer.node, "bias", bias)


def is_storable(layer: Layer, taps: Tensor, offsets: Tensor) -> bool:
    """Whether the layer's dtype holds a weight and bias with its usual precision: nothing
    overflows, and per output channel nothing underflows that float32 could tell from zero."""
    bounds, least = torch.finfo(layer.weight.dtype), torch.finfo(torch.float32).tiny
    for tensor in (taps, offsets):
        if tensor.numel():
            low, high = torch.aminmax(tensor)
            if not (low >= bounds.min and high <= bounds.max):
                return False
    if bounds.tiny <= least:
        return True  # rounding is relative down to what float32 cannot tell from zero
    weights = taps.flatten(2)
    error = (weights.to(layer.weight.dtype).double() - weights).abs()
    allowed = bounds.eps * weights.abs().amax(dim=2, keepdim=True)
    return bool((error <= allowed + least).all())


def _put(graph: Graph, node: Node, name: str, tensor: Tensor) -> None:
    value = node[name]
    if value.only_user() is node and list(node.input_values()).count(value) == 1:
        graph.set_constant(value, tensor)
    else:
        own = graph.constant(tensor, value.name, trainable=value.trainable)
        graph.set_operand(node, name, own)


def per_dimension(setting: object, dimensions: int) -> list[int]:
    """A setting with one number per dimension, or one for all, as a number per dimension."""
    items = cast("Sequence[int]", setting if isinstance(setting, (list, tuple)) else [setting])
    return list(items) * dimensions if len(items) == 1 else list(items)


def _always(setting: object, number: int) -> bool:
    """Whether a setting per dimension, or one for all, is everywhere some number."""
    items = setting if isinstance(setting, (list, tuple)) else [setting]
    return all(isinstance(item, int) and item == number for item in items)
