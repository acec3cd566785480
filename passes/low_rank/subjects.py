"""Layers that can be decomposed: convolutions, linear layers and embeddings as kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from graphopt.errors import GraphError
from graphopt.ir import Graph, Node, Value
from graphopt.ir.patterns import Decline
from graphopt.passes.layers import CONVOLUTIONS, EMBEDDING, LINEAR, per_dimension
from graphopt.passes.low_rank.factors import Chain, multiply_adds, parameters
from graphopt.passes.neighbourhoods import zeros_around


@dataclass(frozen=True, eq=False)
class Subject:
    """A layer, as what decompositions need to know of it.

    Attributes:
        node: the layer.
        weight: its constant.
        bias: its constant, or None.
        groups: of its channels.
        stride, dilation: per spatial dimension; empty for a layer without.
        padding: likewise, or ``"same"`` or ``"valid"``.
        inputs, outputs: spatial sizes before and after.
        rows: how often it is applied at the example's sizes: the batch, or the tokens.
    """

    node: Node
    weight: Value
    bias: Value | None
    groups: int = 1
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    rows: int = 1

    @property
    def name(self) -> str:
        return self.node.origin.module or self.node.name

    @property
    def is_embedding(self) -> bool:
        return self.node.op == EMBEDDING

    @property
    def input(self) -> Value:
        value: Value = self.node["indices" if self.is_embedding else "input"]
        return value

    @property
    def spatial(self) -> int:
        return len(self.stride)

    def twin(self, graph: Graph) -> Subject:
        """The layer in a clone of its graph."""
        node = graph.value(self.node.output.name).producer
        assert node is not None
        bias = None if self.bias is None else graph.value(self.bias.name)
        return replace(self, node=node, weight=graph.value(self.weight.name), bias=bias)

    def kernels(self) -> list[Tensor]:
        """Of every group, in float64: [output channels, input channels, *taps]. The entries of
        an embedding's table are its input channels."""
        stored = self.weight.constant
        assert stored is not None
        weight = stored.double()
        return list((weight.T if self.is_embedding else weight).chunk(self.groups))

    def offsets(self) -> Tensor:
        """The bias in float64, [output channels]."""
        if self.bias is not None and self.bias.constant is not None:
            return self.bias.constant.double()
        stored = self.weight.constant
        assert stored is not None
        return torch.zeros(stored.shape[1 if self.is_embedding else 0], dtype=torch.float64)

    def macs(self, chain: Chain | None = None) -> int:
        """Multiply-adds at the example's sizes, of a chain in its place or of itself."""
        if self.is_embedding:
            return self.rows * parameters(chain[1:]) if chain else 0
        if chain is None:
            return self.rows * prod(self.outputs) * self.parameters()
        return multiply_adds(chain, self.inputs, self.outputs, self.rows)

    def parameters(self, chain: Chain | None = None) -> int:
        """Weights of a chain in its place, or of itself; the bias, which stays, left out."""
        return prod(self.weight.shape) if chain is None else parameters(chain)

    def paddings(self) -> tuple[tuple[int, int], ...]:
        """Zeros before and after, per spatial dimension."""
        return zeros_around(self.padding, self.weight.shape[2:], self.dilation)


def subject_of(graph: Graph, node: Node) -> Subject | Decline | None:
    """The layer that a node is, why it cannot be decomposed, or None if it is no such layer."""
    if node.op not in (LINEAR, EMBEDDING) and node.op not in CONVOLUTIONS:
        return None
    try:
        stored = graph.weight(node)
    except GraphError:
        return Decline("its weight is not a constant")
    if stored.dequantize is not None:
        return Decline("its weight is quantized; decompose before quantizing")
    weight, bias = stored.constant, None if node.op == EMBEDDING else node["bias"]
    if bias is not None and not bias.is_constant:
        return Decline("its bias is not a constant")
    if not weight.dtype.is_floating_point or weight.rank < 2 or 0 in weight.shape:
        return Decline(f"its weight is {weight.type}")
    if weight.only_user() is not node:
        return Decline("it shares its weight with another layer")
    tensor = weight.constant
    assert tensor is not None
    if not tensor.isfinite().all():
        return Decline("its weight is not finite")
    if node.op == EMBEDDING:
        if node["sparse"] or node["scale_grad_by_freq"]:
            return Decline("its gradient is sparse or scaled by frequency")
        return Subject(node, weight, None, rows=prod(node["indices"].shape))
    if node.op == LINEAR:
        return Subject(node, weight, bias, rows=prod(node["input"].shape[:-1]))
    return _convolution(node, weight, bias)


def _convolution(node: Node, weight: Value, bias: Value | None) -> Subject | Decline:
    spatial, groups, out = weight.rank - 2, node["groups"], weight.shape[0]
    if weight.shape[1] == 1 and groups == out:
        return Decline("it is depthwise, its channels have no rank in common")
    shape, result = node["input"].shape, node.output.shape
    padding = node["padding"]
    return Subject(
        node,
        weight,
        bias,
        groups,
        tuple(per_dimension(node["stride"], spatial)),
        padding if isinstance(padding, str) else tuple(per_dimension(padding, spatial)),
        tuple(per_dimension(node["dilation"], spatial)),
        tuple(shape[-spatial:]),
        tuple(result[-spatial:]),
        prod(shape[: -spatial - 1]),
    )
