"""The edit that makes a network compute with integers: quantize and dequantize on its edges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from graphopt.ir import Graph, Node, Origin, Value
from graphopt.ir.value import substitute
from graphopt.passes.quantization.observers import Range
from graphopt.passes.quantization.scheme import Scheme, is_zero_padding
from graphopt.passes.quantization.weights import (
    ActivationFormat,
    WeightFormat,
    bias_steps,
    scales_with_room,
)

QUANTIZE = "graphopt.quantize"
DEQUANTIZE = "graphopt.dequantize"
_INT32 = torch.iinfo(torch.int32)


@dataclass(frozen=True)
class RoundedWeight:
    """A layer's weight in steps.

    Attributes:
        steps: int8, in the weight's shape.
        scale: as `WeightFormat.scales` gives it.
        bias: float32 [channels] or None.
    """

    steps: Tensor
    scale: Tensor
    bias: Tensor | None


def quantize_activations(
    graph: Graph, scheme: Scheme, ranges: Mapping[str, Range], format: ActivationFormat
) -> None:
    """Put a quantize and a dequantize on every value of a scheme, in place.

    Args:
        graph: the scheme's graph.
        scheme: which values, and which share.
        ranges: by the name of a value; values that share have the union of theirs.
        format: of the integers.
    """
    for group in scheme.groups():
        bounds = [ranges[value.name] for value in group]
        low, high = min(low for low, _ in bounds), max(high for _, high in bounds)
        name = scheme.representative(group[0]).name
        scale, zero_point = format.parameters((low, high))
        made = (
            graph.constant(scale, f"{name}.scale"),
            graph.constant(zero_point, f"{name}.zero_point"),
        )
        for value in group:
            _quantize_value(graph, scheme, value, made, format)


def _quantize_value(
    graph: Graph,
    scheme: Scheme,
    value: Value,
    parameters: tuple[Value, Value],
    format: ActivationFormat,
) -> None:
    """What computes a value with integers gives nothing else, so all its users read the
    dequantized one; of a value that is computed in floats only the integer operators do."""
    everywhere = scheme.is_integer(value)
    users = [
        user
        for user in value.users
        if user.op != "aten.sym_size.int" and (everywhere or user in scheme.readers)
    ]
    tail = (*parameters, None, format.low, format.high, format.dtype)
    origin = _origin(graph, value.producer)
    with graph.edit():
        place = _after(graph, value)
        steps = graph.add(
            QUANTIZE, value, *tail, before=place, name=f"{value.name}_q", origin=origin
        )
        back = graph.add(
            DEQUANTIZE, steps, *tail, before=place, name=f"{value.name}_dq", origin=origin
        )
        for user in users:
            for name, operand in substitute(user.operands, {value: back}).items():
                if operand != user.operands[name]:
                    graph.set_operand(user, name, operand)
        if everywhere and value.is_output:
            graph.set_outputs([back if output is value else output for output in graph.outputs])


def _origin(graph: Graph, node: Node | None) -> Origin:
    """Of the same module as a node, made by the pass that runs."""
    return replace(node.origin if node is not None else Origin(), made_by=graph.made_by)


def _after(graph: Graph, value: Value) -> Node | None:
    """The node before which something goes that follows a value directly."""
    if value.producer is None:
        return graph.nodes[0]
    return value.producer._next


def quantize_layer(
    graph: Graph, node: Node, rounded: RoundedWeight, format: WeightFormat, static: bool
) -> None:
    """Store a layer's weight in steps, and with a static input its bias too, in place."""
    weight, bias = node["weight"], node["bias"]
    scale, input_scale = rounded.scale, None
    if static:
        input_scale = static_scale(node["input"])
        assert input_scale is not None
        scale = scales_with_room(scale, rounded.bias, input_scale)
    steps = rounded.steps
    if not torch.equal(scale, rounded.scale):
        stored = steps.float() * format.expand(rounded.scale, steps)
        steps = format.nearest(stored, scale)
    with graph.edit():
        stored_weight = graph.constant(steps, f"{weight.name}_quantized")
        grouped = format.group_size is not None
        axis = 1 if grouped else (0 if format.per_channel else None)
        dequantized = graph.add(
            DEQUANTIZE,
            stored_weight,
            graph.constant(scale, f"{weight.name}_scale"),
            None,
            axis,
            -format.limit,
            format.limit,
            torch.int8,
            format.group_size,
            before=node,
            name=f"{weight.name.replace('.', '_')}_dq",
            origin=_origin(graph, node),
        )
        graph.set_operand(node, "weight", dequantized)
        if rounded.bias is None:
            return
        name = bias.name if bias is not None else f"{weight.name.removesuffix('weight')}bias"
        graph.set_operand(node, "bias", _bias(graph, node, rounded.bias, name, scale, input_scale))
        graph.drop_unused_constants()


def _bias(
    graph: Graph, node: Node, bias: Tensor, name: str, scale: Tensor, input_scale: Tensor | None
) -> Value:
    if input_scale is None:
        old = node["bias"]
        if old is not None and torch.equal(old.constant, bias):
            return old
        return graph.constant(bias, name)
    product = scale * input_scale
    return graph.add(
        DEQUANTIZE,
        graph.constant(bias_steps(bias, product), f"{name}_quantized"),
        graph.constant(product, f"{name}_scale"),
        None,
        0 if scale.dim() else None,
        _INT32.min,
        _INT32.max,
        torch.int32,
        before=node,
        name=f"{name.replace('.', '_')}_dq",
        origin=_origin(graph, node),
    )


def static_scale(value: Value) -> Tensor | None:
    """The scale of the quantized tensor that a value is, seen through padding; None if it is
    none, or has its scale only while the network runs."""
    node = value.producer
    while node is not None and is_zero_padding(node):
        node = node["self"].producer
    if node is None or node.op != DEQUANTIZE or node["axis"] is not None:
        return None
    scale: Tensor | None = node["scale"].constant
    return scale


def read_bias(node: Node) -> Tensor | None:
    """The bias that a layer computes with, [channels], whether it is quantized or not; None if it
    has none."""
    bias = node["bias"]
    if bias is None:
        return None
    if bias.is_constant:
        return bias.constant
    dequantize = bias.producer
    scale: Tensor = dequantize["scale"].constant
    steps: Tensor = dequantize["x"].constant
    return steps.float() * scale


def write_bias(graph: Graph, node: Node, bias: Tensor) -> None:
    """Give a layer another bias: in steps where its input and weight are quantized."""
    weight = node["weight"].producer
    input_scale = static_scale(node["input"])
    with graph.edit():
        if weight is None or weight.op != DEQUANTIZE or input_scale is None:
            made = graph.constant(bias, f"{node.name}_bias")
        else:
            made = _bias(
                graph, node, bias, f"{node.name}_bias", weight["scale"].constant, input_scale
            )
        old = node["bias"]
        graph.set_operand(node, "bias", made)
        if old is not None and old.producer is not None and not old.users:
            graph.erase(old.producer)
        graph.drop_unused_constants()


def quantize_dynamically(graph: Graph, value: Value, readers: list[Node]) -> None:
    """Quantize a value while the network runs, symmetrically to int8, every row (its last
    dimension) with a scale of its own, so that a result does not depend on the rest of a batch.

    No step is below -127, so that the whole range of int8 can be declared, as ONNX wants it.

    Args:
        graph: changed in place.
        value: what is quantized.
        readers: the linear layers that read it, in the order of the graph.
    """
    size = value.shape[-1]
    with graph.edit(), graph.inserting(readers[0]):
        largest = graph.add("aten.amax", graph.add("aten.abs", value), [-1], True)
        scale = graph.add("aten.clamp_min", graph.add("aten.div.Tensor", largest, 127.0), 2.0**-100)
        tail = (scale, None, value.rank - 1, -128, 127, torch.int8, size)
        steps = graph.add(QUANTIZE, value, *tail, name=f"{value.name}_q")
        back = graph.add(DEQUANTIZE, steps, *tail, name=f"{value.name}_dq")
    for node in readers:
        graph.set_operand(node, "input", back)
