"""A new layer and a 1x1 convolution (or linear layer) beside it as one, where that is cheaper."""

from __future__ import annotations

from math import prod

from torch import Tensor

from graphopt.ir import Graph, Node
from graphopt.ir.patterns import Decline
from graphopt.passes.layers import CONVOLUTIONS, LINEAR, Layer, layer_of
from graphopt.passes.low_rank.factors import Factor, compose


def merge_neighbours(graph: Graph) -> int:
    """Merge layers that the running pass made with the layer directly before or after them, if
    the one layer has fewer multiply-adds than the two. Returns how many were merged."""
    merged = 0
    for node in graph.nodes:
        while node in graph and _merge_with_next(graph, node):
            merged += 1
    return merged


def _merge_with_next(graph: Graph, first: Node) -> bool:
    """Merge a layer into its only user, whose place the one layer takes."""
    if first.op != LINEAR and first.op not in CONVOLUTIONS:
        return False
    second = first.output.only_user()
    if second is None or second.op.removesuffix(".padding") != first.op.removesuffix(".padding"):
        return False
    made = [node.origin.made_by == graph.made_by for node in (first, second)]
    if not any(made) or (all(made) and first.origin == second.origin):
        return False
    before, after = layer_of(first), layer_of(second)
    if isinstance(before, Decline) or isinstance(after, Decline) or after.input != first.output:
        return False
    if before.groups != 1 or after.groups != 1 or not _can_merge(before, after):
        return False
    weight = compose((Factor(_kernel(before)), Factor(_kernel(after))))
    pixels = [
        prod(layer.node.output.shape[layer.output_dimension + 1 :]) for layer in (before, after)
    ]
    costs = [
        count * prod(layer.weight.shape)
        for count, layer in zip(pixels, (before, after), strict=True)
    ]
    if pixels[1] * weight.numel() >= sum(costs):
        return False
    _write(graph, before, after, weight)
    return True


def _can_merge(before: Layer, after: Layer) -> bool:
    """Whether the two are one layer: one of them works on every position by itself, and no
    padding comes between the two."""
    if before.node.op == LINEAR or _is_pointwise(after):
        return True
    has_bias = before.bias is not None
    return _is_pointwise(before) and not (has_bias and after.has_padding)


def _is_pointwise(layer: Layer) -> bool:
    node = layer.node
    taps = prod(layer.weight.shape[2:])
    return taps == 1 and set(node["stride"]) == {1} and not layer.has_padding


def _kernel(layer: Layer) -> Tensor:
    """The weight in float64, [output, input channels, *taps]."""
    assert layer.weight.constant is not None
    return layer.weight.constant.double()


def _write(graph: Graph, before: Layer, after: Layer, weight: Tensor) -> None:
    first, second = before.node, after.node
    offsets = after.offsets() + after.response(before.offsets())
    geometry = first if first.op == LINEAR or _is_pointwise(after) else second
    with graph.edit(), graph.inserting(second):
        stored, trainable = weight.to(after.weight.dtype), after.weight.trainable
        made = graph.constant(stored, after.weight.name, trainable=trainable)
        bias = after.bias
        if bias is not None or before.bias is not None:
            name = after.weight.name.removesuffix("weight") + "bias"
            bias = graph.constant(offsets.to(stored.dtype), name, trainable=trainable)
        operands = {**geometry.operands, "input": first["input"], "weight": made, "bias": bias}
        result = graph.add(geometry.op, origin=second.origin, **operands)
        name = second.output.name
        graph.replace(second.output, result)
        graph.erase(second)
        graph.erase(first)
        graph.rename(result, name)
