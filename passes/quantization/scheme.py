"""Which values of a network are quantized, and which of them share scale and zero point.

Starting from the inputs of the layers that are to compute with integers, the need for quantized
values is followed backwards: through pooling, views and concatenation, which share scale and zero
point with their operands, and through residual additions. What a layer fuses, a residual addition
and an activation after it, is quantized once, at its end.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from graphopt.ir import Graph, Node, Value
from graphopt.passes.channels import is_view
from graphopt.passes.layers import LINEAR, Layer, layer_of
from graphopt.passes.padding_folding import PADS

CONVOLUTIONS = ("aten.conv1d", "aten.conv2d")
"""Those that integer kernels compute."""

ACTIVATIONS = frozenset("aten.relu aten.hardtanh aten.relu6 aten.clamp aten.clamp_min".split())
"""Clamps: after a layer they are part of it, elsewhere they keep scale and zero point."""

_ADD = "aten.add.Tensor"
_KEEPING = frozenset(
    """
    aten.max_pool1d aten.avg_pool1d aten.adaptive_avg_pool1d aten.mean.dim
    aten.max_pool2d aten.avg_pool2d aten.adaptive_avg_pool2d aten.adaptive_max_pool2d
    aten.cat aten.slice.Tensor aten.select.int aten.split_with_sizes aten.split.Tensor
    aten.chunk aten.channel_shuffle aten.pixel_shuffle aten.upsample_nearest2d
    aten.upsample_nearest2d.vec aten.expand aten.flip
    """.split()
)


@dataclass
class Scheme:
    """What is quantized.

    Attributes:
        layers: the convolutions and linear layers that compute with integers.
        fuses_additions: whether a residual addition is part of the layer before it; else the
            layer's result is quantized by itself.
        readers: all nodes that read dequantized values, the layers among them.
        root: per quantized value, which value's scale and zero point it has.
    """

    graph: Graph
    layers: frozenset[Node]
    fuses_additions: bool = True
    readers: dict[Node, None] = field(default_factory=dict)
    root: dict[Value, Value] = field(default_factory=dict)
    _integer: dict[Value, bool] = field(default_factory=dict)

    def groups(self) -> list[list[Value]]:
        """The quantized values, those with the same scale and zero point together."""
        found: dict[Value, list[Value]] = {}
        for value in self.root:
            found.setdefault(self.representative(value), []).append(value)
        return list(found.values())

    def representative(self, value: Value) -> Value:
        while self.root[value] is not value:
            value = self.root[value]
        return value

    def share(self, first: Value, second: Value) -> None:
        self.root[self.representative(second)] = self.representative(first)

    def is_integer(self, value: Value) -> bool:
        """Whether a value can be computed with integers all the way from layers."""
        if value not in self._integer:
            self._integer[value] = False
            self._integer[value] = self._computes_with_integers(value)
        return self._integer[value]

    def _computes_with_integers(self, value: Value) -> bool:
        node = value.producer
        if node is None:
            return False
        if node in self.layers:
            return True
        if is_residual_add(node):
            return any(self.is_integer(x) for x in (node["self"], node["other"]))
        if node.op in ACTIVATIONS or keeps_scale(node) or is_zero_padding(node):
            return any(self.is_integer(source) for source in _sources(node))
        return False


def find_scheme(graph: Graph, layers: frozenset[Node], *, fuses_additions: bool = True) -> Scheme:
    """The scheme for layers that compute with integers; see the module."""
    scheme = Scheme(graph, layers, fuses_additions)
    for node in graph.nodes:
        if node in layers:
            scheme.readers[node] = None
            _want(scheme, node["input"])
    for node in reversed(graph.nodes):
        # An integer convolution must end in quantized values; a linear layer may give floats.
        if node in layers and node.op in CONVOLUTIONS:
            end = _end(scheme, node)
            if end is not None and _is_read(end):
                _want(scheme, end)
    return scheme


def is_candidate(node: Node) -> str | None:
    """Why a convolution or linear layer cannot compute with integers; None if it can."""
    if node.op not in (*CONVOLUTIONS, LINEAR):
        return f"{node.op} has no integer form"
    layer = layer_of(node)
    if not isinstance(layer, Layer):
        return layer.reason
    if layer.weight.dtype != torch.float32:
        return f"it computes in {layer.weight.dtype}"
    unbatched = node.op in CONVOLUTIONS and layer.input.rank != layer.weight.rank
    if layer.input.is_constant or unbatched:
        return "its input is a constant, or has no batch"
    return None


def is_zero_padding(node: Node) -> bool:
    return (
        node.op in PADS
        and not node["value"]
        and node.operands.get("mode", "constant") == "constant"
    )


def is_residual_add(node: Node) -> bool:
    """Whether a node adds two computed tensors of one shape."""
    if node.op != _ADD or node["alpha"] != 1:
        return False
    operands = (node["self"], node["other"])
    return all(
        isinstance(x, Value) and not x.is_constant and x.is_tensor and x.types == node.output.types
        for x in operands
    )


def keeps_scale(node: Node) -> bool:
    """Whether the numbers a node returns lie within the range of those it reads."""
    return node.op in _KEEPING or is_view(node)


def fused_layer(scheme: Scheme, add: Node) -> Node | None:
    """The layer that a residual addition becomes a part of: the later of those that it reads."""
    candidates = [
        x.producer
        for x in (add["self"], add["other"])
        if x.producer in scheme.layers and x.only_user() is add
    ]
    if not scheme.fuses_additions or not candidates or add["self"] is add["other"]:
        return None
    first, last = candidates[0], candidates[-1]
    return first if last.before(first) else last


def _sources(node: Node) -> list[Value]:
    return [
        value
        for value in node.input_values()
        if value.is_tensor and not value.is_constant and value.dtype.is_floating_point
    ]


def _want(scheme: Scheme, value: Value) -> None:
    """Have a value quantized, and what it is computed from by integers too."""
    stack = [value]
    while stack:
        value = stack.pop()
        node = value.producer
        if node is not None and is_zero_padding(node):
            scheme.readers[node] = None
            stack.append(node["self"])
            continue
        if value in scheme.root or value.is_constant:
            continue
        scheme.root[value] = value
        if node is None or not scheme.is_integer(value) or node in scheme.layers:
            continue
        if node.op in ACTIVATIONS and _is_fused(scheme, node["self"], node):
            node = node["self"].producer
            assert node is not None
            if node in scheme.layers:
                continue
        scheme.readers[node] = None
        if is_residual_add(node):
            fused = fused_layer(scheme, node)
            stack += [x for x in (node["self"], node["other"]) if x.producer is not fused]
            continue
        for source in _sources(node):
            _want(scheme, source)
            if source in scheme.root:
                scheme.share(source, value)


def _is_fused(scheme: Scheme, inner: Value, activation: Node) -> bool:
    """Whether an activation is part of the layer, or of the addition, that it follows."""
    node = inner.producer
    if node is None or inner.only_user() is not activation or inner in scheme.root:
        return False
    return node in scheme.layers or (is_residual_add(node) and scheme.is_integer(inner))


def _is_read(value: Value) -> bool:
    return any(user.op != "aten.sym_size.int" for user in value.users)


def _end(scheme: Scheme, layer: Node) -> Value | None:
    """What a layer returns after the addition and the activation that are part of it; None if
    some of that is quantized already."""
    value = layer.output
    while value not in scheme.root:
        user = value.only_user()
        if user is None:
            return value
        is_sum = is_residual_add(user) and fused_layer(scheme, user) is layer
        if not is_sum and user.op not in ACTIVATIONS:
            return value
        value = user.output
        if not is_sum:
            return None if value in scheme.root else value
    return None
