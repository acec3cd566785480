"""Cross-layer equalisation: the channels of a tensor scaled to use its range alike.

A factor per channel moves from the layers that write a tensor to those that read it, which leaves
the network's function as it is: through residual additions, pooling, padding, and activations
that scaling passes through (Nagel et al., "Data-free quantization through weight equalization and
bias correction", 2019). From normalisation into the linear layers behind it is SmoothQuant (Xiao
et al., 2023).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from graphopt.calibration import CalibrationData, observe
from graphopt.errors import PassError
from graphopt.ir import Graph, Node, Value
from graphopt.passes.layers import Layer, is_storable, layer_of, rewrite_layer
from graphopt.passes.quantization.channel_statistics import ChannelRange
from graphopt.passes.quantization.scheme import is_residual_add, is_zero_padding
from graphopt.pipeline import Context
from graphopt.registry import register_pass

_POOLING = frozenset(("aten.max_pool2d", "aten.avg_pool2d", "aten.adaptive_avg_pool2d"))
_ELEMENTWISE = frozenset(("aten.relu", "aten.leaky_relu"))
LAYER_NORM = "aten.layer_norm"
LEAST_FACTOR = 1 / 256
"""Channels that hardly move are not blown up beyond this."""


@dataclass
class ChannelGroup:
    """Tensors whose channels are scaled together.

    Attributes:
        values: the tensors, with the dimension of their channels.
        writers: layers, or layer normalisations, whose results they are.
        readers: layers that read them.
        open: whether something reads or writes them that a factor does not pass through.
    """

    values: dict[Value, int] = field(default_factory=dict)
    writers: list[Node] = field(default_factory=list)
    readers: list[Node] = field(default_factory=list)
    open: bool = False


def channel_groups(graph: Graph) -> list[ChannelGroup]:
    """The groups of a graph whose channels can be scaled."""
    found: list[ChannelGroup] = []
    seen: set[Value] = set()
    for node in graph.nodes:
        start = _written(node)
        if start is None or node.output in seen:
            continue
        group = ChannelGroup()
        _collect(group, node.output, start)
        seen.update(group.values)
        if not group.open and group.readers:
            found.append(group)
    return found


def _written(node: Node) -> int | None:
    """The dimension of the channels that a node writes with factors of its own."""
    if node.op == LAYER_NORM:
        affine = node["weight"], node["bias"]
        constant = all(x is None or (isinstance(x, Value) and x.is_constant) for x in affine)
        if len(node["normalized_shape"]) == 1 and affine[0] is not None and constant:
            return node.output.rank - 1
        return None
    layer = layer_of(node)
    return layer.output_dimension if isinstance(layer, Layer) else None


def _collect(group: ChannelGroup, value: Value, dimension: int) -> None:
    stack = [(value, dimension)]
    while stack:
        value, dimension = stack.pop()
        if value in group.values:
            group.open |= group.values[value] != dimension
            continue
        group.values[value] = dimension
        group.open |= value.is_output or value.is_input or value.is_constant
        if value.producer is not None:
            stack += _before(group, value.producer, dimension)
        for user in value.users:
            stack += _behind(group, user, value, dimension)


def _before(group: ChannelGroup, node: Node, dimension: int) -> list[tuple[Value, int]]:
    if _written(node) == dimension:
        group.writers.append(node)
        return []
    if is_residual_add(node):
        return [(node["self"], dimension), (node["other"], dimension)]
    if _passes(node, dimension):
        return [(node["self"], dimension)]
    group.open = True
    return []


def _behind(
    group: ChannelGroup, node: Node, value: Value, dimension: int
) -> list[tuple[Value, int]]:
    layer = layer_of(node)
    if node.op == "aten.sym_size.int":
        return []
    if isinstance(layer, Layer) and layer.input is value and layer.input_dimension == dimension:
        if node not in group.readers:
            group.readers.append(node)
        return []
    if is_residual_add(node) or (_passes(node, dimension) and node["self"] is value):
        return [(node.output, dimension)]
    group.open = True
    return []


def _passes(node: Node, dimension: int) -> bool:
    if is_zero_padding(node):
        padded = range(node["self"].rank - len(node["pad"]) // 2, node["self"].rank)
        return dimension not in padded
    if node.op == "aten.mean.dim":
        dims = [d % node["self"].rank for d in node["dim"] or []]
        return bool(dims) and node["keepdim"] and dimension not in dims
    if node.op in _POOLING:
        return dimension == node.output.rank - 3
    return node.op in _ELEMENTWISE


def scale_group(graph: Graph, group: ChannelGroup, factor: Tensor) -> bool:
    """Divide the channels of a group by factors [channels], in place; False if a weight would
    leave the range of its dtype, and then nothing is changed."""
    factor = factor.double()
    changes: list[tuple[Layer, Tensor, Tensor]] = []
    for node in dict.fromkeys((*group.writers, *group.readers)):
        layer = layer_of(node)
        if not isinstance(layer, Layer):
            continue
        taps, offsets = layer.taps(), layer.offsets()
        groups, outputs, inputs, _ = taps.shape
        if node in group.writers:
            taps, offsets = taps / factor.reshape(groups, outputs, 1, 1), offsets / factor
        if node in group.readers:
            taps = taps * factor.reshape(groups, 1, inputs, 1)
        changes.append((layer, taps, offsets))
    if not all(is_storable(*change) for change in changes):
        return False
    with graph.edit():
        for change in changes:
            rewrite_layer(graph, *change)
        for node in group.writers:
            if node.op == LAYER_NORM:
                _scale_normalisation(graph, node, factor)
    return True


def _scale_normalisation(graph: Graph, node: Node, factor: Tensor) -> None:
    for name in ("weight", "bias"):
        old = node[name]
        if old is not None:
            scaled = (old.constant.double() / factor).to(old.dtype)
            made = graph.constant(scaled, old.name, trainable=old.trainable)
            graph.set_operand(node, name, made)


def activation_ranges(
    graph: Graph, groups: list[ChannelGroup], data: CalibrationData, ctx: Context
) -> list[Tensor]:
    """The largest magnitudes that calibration data gives the channels of every group, [channels]
    in float64."""
    ranges = {v: ChannelRange(dim) for group in groups for v, dim in group.values.items()}
    observe(graph, data, ranges.items(), ctx, "ranges of channels")
    found = []
    for group in groups:
        seen = [r for v in group.values if (r := ranges[v].largest) is not None]
        found.append(torch.stack(seen).amax(0).double())
    return found


def written_range(group: ChannelGroup) -> Tensor | None:
    """The largest magnitudes of the weights of layers that write the channels of a group,
    [channels] in float64; None if no layer does."""
    return _weight_range(group.writers, (2, 3))


def read_range(group: ChannelGroup) -> Tensor | None:
    """The same of the layers that read them."""
    return _weight_range(group.readers, (1, 3))


def _weight_range(nodes: list[Node], others: tuple[int, int]) -> Tensor | None:
    layers = [layer for node in nodes if isinstance(layer := layer_of(node), Layer)]
    largest = [layer.taps().abs().amax(others).reshape(-1) for layer in layers]
    return torch.stack(largest).amax(0) if largest else None


def balancing(written: Tensor, read: Tensor, strength: float) -> Tensor:
    """Factors ``written**strength / read**(1 - strength)`` [channels] from largest magnitudes; 1
    for channels without any."""
    usable = (written > 0) & (read > 0)
    factor = written**strength / read.clamp_min(1e-30) ** (1 - strength)
    return torch.where(usable, factor, 1.0).clamp(1e-4, 1e4)


def equalise_activations(
    graph: Graph, groups: list[ChannelGroup], data: CalibrationData, strength: float, ctx: Context
) -> int:
    """Scale the channels of groups by the largest magnitudes that calibration data gives them.

    Args:
        graph: changed in place; its function stays.
        groups: of the graph's tensors.
        data: calibration data.
        strength: 1 lets every channel reach the same magnitude, 0 changes nothing.
        ctx: shows the progress.

    Returns:
        How many groups were scaled.
    """
    count = 0
    ranges = activation_ranges(graph, groups, data, ctx)
    for group, largest in zip(groups, ranges, strict=True):
        if largest.any():
            factor = (largest / largest.max()).clamp_min(LEAST_FACTOR) ** strength
            count += scale_group(graph, group, factor)
    return count


def equalise_weights(graph: Graph, groups: list[ChannelGroup]) -> int:
    """Scale the channels of groups so that the weights that write a channel have the same range
    as those that read it; without data. Returns how many groups were scaled."""
    count = 0
    for group in groups:
        written, read = written_range(group), read_range(group)
        if written is not None and read is not None:
            count += scale_group(graph, group, balancing(written, read, 0.5))
    return count


@register_pass("cross-layer-equalisation", accuracy=1e-3)
@dataclass(frozen=True)
class CrossLayerEqualisation:
    """Scales channels between layers so that they use a quantized tensor's range alike.

    Attributes:
        data: calibration data; channels are then scaled by the ranges of activations. Without it,
            by those of weights.
        strength: with data, from 0 (nothing) to 1 (all channels reach the same magnitude).
    """

    data: Any = None
    strength: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise PassError(f"the strength of equalisation is from 0 to 1, not {self.strength}")

    def run(self, graph: Graph, ctx: Context) -> bool:
        groups = channel_groups(graph)
        if not groups:
            return False
        if self.data is None:
            return equalise_weights(graph, groups) > 0
        data = CalibrationData(self.data)
        return equalise_activations(graph, groups, data, self.strength, ctx) > 0
