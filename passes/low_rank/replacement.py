"""A chain of layers in the place of one layer."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from graphopt.ir import Graph, Origin, Value
from graphopt.ir.types import TensorType
from graphopt.passes.layers import EMBEDDING, LINEAR
from graphopt.passes.low_rank.factors import Chain, Factor
from graphopt.passes.low_rank.subjects import Subject


def replace_layer(graph: Graph, subject: Subject, chain: Chain, offsets: Tensor) -> None:
    """Put a chain in the place of a layer.

    Its weights are named like modules in a sequence: those of ``conv`` become ``conv.0.weight``,
    ``conv.1.weight`` and so on, the last one has the bias.

    Args:
        graph: the layer's graph.
        subject: the layer.
        chain: as `factors.side_by_side` gives it.
        offsets: the bias [output channels]; all zeros mean none where there was none.
    """
    node = subject.node
    owner = subject.weight.name.removesuffix("weight").removesuffix(".")
    origin = dataclasses.replace(node.origin, made_by=graph.made_by)
    with graph.edit(), graph.inserting(node):
        result = _emit(graph, subject, subject.input, chain, offsets, owner, origin)
        name = node.output.name
        graph.replace(node.output, result)
        graph.erase(node)
        graph.rename(result, name)


def fragment(subject: Subject, chain: Chain | None = None) -> Graph:
    """A layer alone as a graph, or a chain in its place, at the example's sizes."""
    graph = Graph()
    kind = subject.input.type
    assert isinstance(kind, TensorType)
    x = graph.add_input("x", kind)
    if chain is not None:
        graph.set_outputs([_emit(graph, subject, x, chain, subject.offsets(), "", Origin())])
        return graph
    node, operands = subject.node, dict(subject.node.operands)
    operands["indices" if subject.is_embedding else "input"] = x
    for name in ("weight", "bias"):
        value = operands.get(name)
        if isinstance(value, Value):
            assert value.constant is not None
            operands[name] = graph.constant(value.constant, name)
    graph.set_outputs([graph.add(node.op, **operands)])
    return graph


def _emit(
    graph: Graph,
    subject: Subject,
    x: Value,
    chain: Chain,
    offsets: Tensor,
    owner: str,
    origin: Origin,
) -> Value:
    """Add the layers of a chain; returns the last result."""
    has_bias = subject.bias is not None or bool(offsets.any())
    dtype, name = subject.weight.dtype, subject.node.output.name
    for place, factor in enumerate(chain):
        prefix = f"{owner}.{place}" if owner else str(place)

        def constant(tensor: Tensor, leaf: str, prefix: str = prefix) -> Value:
            stored = tensor.to(dtype).contiguous()
            return graph.constant(stored, f"{prefix}.{leaf}", trainable=subject.weight.trainable)

        settings: dict[str, Any] = {"name": f"{name}_{place}", "origin": origin}
        if subject.is_embedding and place == 0:
            table = constant(factor.weight.T, "weight")
            padding = subject.node["padding_idx"]
            x = graph.add(EMBEDDING, table, x, padding_idx=padding, **settings)
            continue
        weight = constant(factor.weight, "weight")
        is_last = place == len(chain) - 1
        bias = constant(offsets, "bias") if is_last and has_bias else None
        if subject.spatial == 0:
            x = graph.add(LINEAR, x, weight, bias, **settings)
        else:
            x = _convolve(graph, subject, factor, (x, weight, bias), settings)
    return x


def _convolve(
    graph: Graph,
    subject: Subject,
    factor: Factor,
    operands: tuple[Value, Value, Value | None],
    settings: dict[str, Any],
) -> Value:
    def own(values: tuple[int, ...], otherwise: int) -> list[int]:
        return [v if d in factor.dimensions else otherwise for d, v in enumerate(values)]

    op = f"aten.conv{subject.spatial}d"
    padding: str | list[int]
    if isinstance(subject.padding, str):
        # In the other dimensions the factor has a single tap, for which nothing is padded.
        op, padding = f"{op}.padding", subject.padding
    else:
        padding = own(subject.padding, 0)
    stride, dilation = own(subject.stride, 1), own(subject.dilation, 1)
    return graph.add(op, *operands, stride, padding, dilation, factor.groups, **settings)
