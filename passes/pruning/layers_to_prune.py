"""Which nodes of a graph have weights that can be pruned, and those weights in one form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.errors import GraphError
from graphopt.flops import count_flops
from graphopt.ir import Graph, Node, Value
from graphopt.ir.operators import resolve
from graphopt.ir.weights import Weight
from graphopt.passes.layers import EMBEDDING, LAYERS, LINEAR, is_transposed

PRUNABLE = LAYERS | {EMBEDDING}


@dataclass(frozen=True, eq=False)
class PrunableLayer:
    """A weight, and the nodes that compute with it.

    Attributes:
        name: path of the module, with the node's name where that is not unique.
        nodes: one, or several that share the weight, in topological order.
        weight: as the first node reads it.
    """

    name: str
    nodes: tuple[Node, ...]
    weight: Weight

    @property
    def node(self) -> Node:
        return self.nodes[0]

    @property
    def products(self) -> tuple[Node, ...]:
        """The nodes that multiply their input with the weight: all but embeddings."""
        return tuple(node for node in self.nodes if node.op != EMBEDDING)

    @property
    def is_transposed(self) -> bool:
        return is_transposed(self.node)

    @property
    def groups(self) -> int:
        return _groups(self.node)

    @property
    def kernel(self) -> tuple[int, ...]:
        """Sizes of a convolution's kernel; empty for others."""
        return tuple(self.weight.tensor.shape[2:])

    @property
    def is_depthwise(self) -> bool:
        """Whether no output channel sees more than one input channel of several."""
        return self.groups > 1 and self.taps(self.weight.tensor).shape[2] == 1

    @property
    def macs(self) -> int:
        """Multiply-adds at the example's sizes, as if there were no zeros."""
        return sum(count_flops(node) for node in self.products) // 2

    @property
    def macs_per_weight(self) -> float:
        """Multiply-adds that each element of the weight takes part in, at the example's sizes."""
        return self.macs / self.weight.tensor.numel()

    def twin(self, graph: Graph) -> PrunableLayer:
        """The layer in a clone of its graph, or with the weight that it has now in its own."""
        made = (graph.value(node.output.name).producer for node in self.nodes)
        nodes = tuple(node for node in made if node is not None)
        return PrunableLayer(self.name, nodes, graph.weight(nodes[0]))

    def taps(self, tensor: Tensor) -> Tensor:
        """A tensor of the weight's shape as [groups, output channels, input channels, taps], the
        channels counted per group. The rows of an embedding are output channels."""
        groups, first = self.groups, tensor.shape[0]
        taps = tensor.reshape(groups, first // groups, tensor.shape[1], -1)
        return taps.transpose(1, 2) if self.is_transposed else taps

    def stored(self, taps: Tensor) -> Tensor:
        """The inverse of `taps`."""
        ordered = taps.transpose(1, 2) if self.is_transposed else taps
        return ordered.reshape(self.weight.tensor.shape).contiguous()

    def write(self, tensor: Tensor) -> None:
        """Give all nodes of the layer another weight; a quantized one is quantized again with its
        scale and zero point. Other users of the same constant keep theirs."""
        weight, graph = self.weight, self.weight.graph
        if len(self.nodes) == 1:
            weight.write(tensor)
        elif weight.dequantize is None:
            graph.set_constant(weight.constant, tensor)
        elif weight.constant.only_user() is weight.dequantize:
            operands = {
                name: operand.constant if isinstance(operand, Value) else operand
                for name, operand in weight.dequantize.operands.items()
            }
            steps = resolve("graphopt.quantize").call({**operands, "x": tensor})
            graph.set_constant(weight.constant, steps)
        else:
            for node in self.nodes:
                graph.weight(node).write(tensor)


def prunable_layers(
    graph: Graph, ignored: Collection[Node] = (), *, depthwise: bool = False
) -> tuple[list[PrunableLayer], dict[str, str]]:
    """The layers whose weights can be pruned, in topological order.

    Args:
        graph: the network.
        ignored: nodes to leave alone. A weight that one of them shares is left alone too.
        depthwise: whether depthwise convolutions are among them.

    Returns:
        The layers, and why each other layer with a weight is left alone, by name.
    """
    found: dict[Value, list[Node]] = {}
    left: dict[str, str] = {}
    names = _names(graph)
    for node in graph.nodes:
        if node.op in PRUNABLE:
            found.setdefault(node["weight"], []).append(node)
    layers = []
    for value, nodes in found.items():
        name = names[nodes[0]]
        reason = _obstacle(value, nodes, ignored)
        if reason is None:
            layer = PrunableLayer(name, tuple(nodes), graph.weight(nodes[0]))
            if depthwise or not layer.is_depthwise:
                layers.append(layer)
                continue
            reason = "a depthwise convolution (depthwise=True prunes these too)"
        left[name] = reason
    return layers, left


def _names(graph: Graph) -> dict[Node, str]:
    nodes = [node for node in graph.nodes if node.op in PRUNABLE]
    count = Counter(node.origin.module for node in nodes)
    return {
        node: node.origin.module
        if node.origin.module and count[node.origin.module] == 1
        else f"{node.origin.module} (%{node.name})".strip()
        for node in nodes
    }


def _obstacle(value: Value, nodes: list[Node], ignored: Collection[Node]) -> str | None:
    """Why the weight that these nodes share cannot be pruned."""
    if any(node in ignored for node in nodes):
        return "ignored"
    try:
        weight = nodes[0].graph.weight(nodes[0])
    except GraphError:
        return f"its weight %{value.name} is computed, not a constant"
    if not value.dtype.is_floating_point or value.rank < 2 or weight.tensor.numel() == 0:
        return f"its weight is {value.type}"
    others = [user for user in value.users if user not in nodes]
    if others or value.is_output:
        user = f"%{others[0].name} ({others[0].op})" if others else "the graph's result"
        return f"its weight is also used by {user}"
    if any(list(node.input_values()).count(value) > 1 for node in nodes):
        return "its weight is more than one operand of it"
    if len({(_groups(node), is_transposed(node)) for node in nodes}) > 1:
        return "it shares its weight with a layer of another kind"
    return None


def _groups(node: Node) -> int:
    return 1 if node.op in (LINEAR, EMBEDDING) else int(node["groups"])


def masked(tensor: Tensor, mask: Tensor) -> Tensor:
    """A tensor with zeros, positive ones, where the mask is False."""
    return torch.where(mask, tensor, torch.zeros((), dtype=tensor.dtype))
