"""What quantize and dequantize nodes say, as far as integer kernels understand it.

Kernels know unsigned bytes. Steps in int8 that nobody but dequantize nodes reads are kept as such:
128 more each, as are their zero point and limits, which are the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from graphopt.engine.view_rules import PADS
from graphopt.engine.work import ConstantWork, Derived, Scope
from graphopt.ir import Graph, Node, TensorType, Type, Value

QUANTIZE, DEQUANTIZE = "graphopt.quantize", "graphopt.dequantize"
_HALF = 128


@dataclass(frozen=True)
class Scheme:
    """The scale and zero point of a whole tensor, and the least and largest step."""

    scale: float
    zero_point: int
    low: int
    high: int

    def step(self, number: float) -> int:
        """A number in steps, as the operator quantizes it."""
        steps = torch.round(torch.tensor(number, dtype=torch.float32) / self.scale)
        return int((steps + self.zero_point).clamp(self.low, self.high))


def scheme(node: Node | None, op: str) -> Scheme | None:
    """The scheme of a quantize or dequantize node, as its integers are kept; None where it has
    none of a whole tensor."""
    found = _stated(node, op)
    if node is None or found is None:
        return None
    if not is_kept_unsigned(node.output if op == QUANTIZE else node["x"]):
        return found
    zero_point, low, high = (n + _HALF for n in (found.zero_point, found.low, found.high))
    return Scheme(found.scale, zero_point, low, high)


def is_kept_unsigned(value: Value) -> bool:
    """Whether a value is int8 steps that are kept as bytes, 128 more each: those of a whole tensor
    of floats that only dequantize nodes with the same scheme read."""
    made = value.producer
    stated = _stated(made, QUANTIZE)
    if made is None or stated is None or value.is_output or value.dtype != torch.int8:
        return False
    source: Value = made["x"]
    if source.is_constant or source.dtype != torch.float32:
        return False
    return all(_stated(user, DEQUANTIZE) == stated for user in value.users)


def kept_types(graph: Graph, types: Mapping[Value, Type]) -> dict[Value, Type]:
    """The types of values as they are kept."""
    kept = dict(types)
    for node in graph.nodes:
        if node.op == QUANTIZE and is_kept_unsigned(node.output):
            kind = types[node.output]
            assert isinstance(kind, TensorType)
            kept[node.output] = TensorType(torch.uint8, kind.shape)
    return kept


def _stated(node: Node | None, op: str) -> Scheme | None:
    """The scheme as a node states it."""
    if node is None or node.op != op or node["axis"] is not None:
        return None
    scale, zero_point = node["scale"], node["zero_point"]
    if not scale.is_constant or scale.constant.numel() != 1:
        return None
    if scale.constant.dtype != torch.float32:
        return None
    number = 0
    if zero_point is not None:
        if not zero_point.is_constant or zero_point.constant.numel() != 1:
            return None
        number = int(zero_point.constant)
    return Scheme(float(scale.constant), number, node["quant_min"], node["quant_max"])


def dequantizes_constants(node: Node) -> bool:
    """Whether a node is a dequantize of constants, whose result is one too."""
    return node.op == DEQUANTIZE and all(value.is_constant for value in node.input_values())


def folded(value: Value) -> Value | Derived:
    """A value, or the constant that it is where a dequantize node makes it of constants."""
    node = value.producer
    if node is None or not dequantizes_constants(node):
        return value
    return Derived(value.name, ConstantWork(node).evaluate())


def is_grouped(scope: Scope, value: Value) -> bool:
    """Whether a value is kept with its channels in groups: bytes of an image that only
    dequantize nodes read, all with the scheme by which it was quantized."""
    made = scheme(value.producer, QUANTIZE)
    if made is None or value.is_output or scope.tensor_type(value).dtype != torch.uint8:
        return False
    shape = scope.shape(value)
    if 0 in shape or not (len(shape) == 4 or (len(shape) == 3 and _is_signal(value))):
        return False
    return all(scheme(user, DEQUANTIZE) == made for user in value.users)


def _is_signal(value: Value) -> bool:
    """Whether a quantized value (N, C, L) has channels, not rows as those of linear layers: what a
    layer over signals reads, or computes up to additions and activations."""
    readers = [reader for user in value.users for reader in user.output.users]
    for reader in readers:
        padded = reader.output.users if reader.op in PADS else ()
        if not _SIGNAL_LAYERS.isdisjoint(node.op for node in (reader, *padded)):
            return True
    node = value.producer["x"].producer if value.producer is not None else None
    while node is not None and node.op in ACTIVATIONS:
        node = node["self"].producer
    if node is not None and node.op == "aten.add.Tensor":
        makers = [x.producer for x in (node["self"], node["other"]) if isinstance(x, Value)]
    else:
        makers = [node]
    return any(maker is not None and maker.op in _SIGNAL_LAYERS for maker in makers)


ACTIVATIONS = frozenset(
    "aten.relu aten.relu6 aten.hardtanh aten.clamp aten.clamp_min aten.clamp_max".split()
)
"""Those that clamp."""
_SIGNAL_LAYERS = frozenset(
    """
    aten.conv1d aten.conv1d.padding aten.convolution aten.max_pool1d aten.avg_pool1d
    aten.adaptive_avg_pool1d
    """.split()
)


def private(value: Value) -> Node | None:
    """The node that computes a value for one other node alone."""
    return value.producer if value.only_user() is not None else None


@dataclass(frozen=True)
class Bytes:
    """A float32 value as bytes: ``value`` is what is kept of it."""

    value: Value
    scheme: Scheme


def image_of(scope: Scope, value: Value) -> Bytes | None:
    """What a dequantized image is kept as, with grouped channels; None for other values."""
    found = scheme(value.producer, DEQUANTIZE)
    if found is None:
        return None
    assert value.producer is not None
    source = value.producer["x"]
    return Bytes(source, found) if is_grouped(scope, source) else None


def rows_of(scope: Scope, value: Value) -> Bytes | None:
    """What dequantized rows (*, K) are kept as, in plain order; None for other values.

    Rows of a flattened image of one pixel are its groups of channels.
    """
    found = scheme(value.producer, DEQUANTIZE)
    if found is not None:
        assert value.producer is not None
        source = value.producer["x"]
        plain = not source.is_constant and not is_grouped(scope, source)
        is_bytes = scope.tensor_type(source).dtype == torch.uint8
        return Bytes(source, found) if plain and is_bytes else None
    flattened = flattened_pixels(scope, value)
    return None if flattened is None else image_of(scope, flattened)


def flattened_pixels(scope: Scope, value: Value) -> Value | None:
    """The image of one pixel (N, C, 1, 1), or (N, C, 1), that a value (N, C) is another view of.

    None where bytes of that image would not lie as rows do.
    """
    node = value.producer
    if node is None or node.op not in _FLATTENINGS or len(scope.shape(value)) != 2:
        return None
    image: Value = node["self"]
    shape = scope.shape(image)
    if len(shape) < 3 or (*scope.shape(value), *(1,) * (len(shape) - 2)) != shape:
        return None
    if shape[0] > 1 and shape[1] % 4:
        return None
    return image


_FLATTENINGS = {"aten.flatten.using_ints", "aten.reshape", "aten.squeeze", "aten.squeeze.dims"}


@dataclass(frozen=True)
class DynamicRows:
    """Rows of floats that are quantized to int8, each with a scale of at least ``least_scale``."""

    value: Value
    least_scale: float


def quantized_rows(value: Value) -> DynamicRows | None:
    """The floats behind dequantized rows, each of which was quantized with the scale of its own
    largest magnitude, symmetrically; None for other values."""
    dequantize = value.producer
    if dequantize is None or dequantize.op != DEQUANTIZE:
        return None
    quantize = dequantize["x"].producer
    if quantize is None or quantize.op != QUANTIZE:
        return None
    source: Value = quantize["x"]
    rank, size = source.rank, source.shape[-1]
    wanted = (None, rank - 1, 127, torch.int8, size)
    names = ("zero_point", "axis", "quant_max", "dtype", "block_size")
    scale = quantize["scale"]
    for node in (quantize, dequantize):
        if tuple(node[name] for name in names) != wanted or node["scale"] is not scale:
            return None
        if node["quant_min"] not in (-128, -127):  # no step is below -127 with this scale
            return None
    least = _scale_of_largest(scale, source)
    return None if least is None else DynamicRows(source, least)


_DIVISIONS = ("aten.div.Tensor", "aten.div.Scalar")


def _scale_of_largest(scale: Value, source: Value) -> float | None:
    """The least scale, if a scale is that of the largest magnitude of each row of ``source``."""
    steps = []
    for ops in (("aten.clamp_min",), _DIVISIONS, ("aten.amax",), ("aten.abs",)):
        node = scale.producer
        if node is None or node.op not in ops:
            return None
        steps.append(node)
        scale = node["self"]
    least, divided, largest, _ = steps
    rank = source.rank
    if scale is not source or divided["other"] != 127 or not largest["keepdim"]:
        return None
    if [dimension % rank for dimension in largest["dim"]] != [rank - 1]:
        return None
    number = least["min"]
    return float(number) if isinstance(number, int | float) else None
