"""Linear layers that read the same tensor become one, whose result is split."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch

from graphopt.ir import Graph, Node, Value
from graphopt.ir.rewriting import Decline, Match, op, rewrite, rule
from graphopt.passes.layers import LINEAR, Layer, layer_of
from graphopt.pipeline import Context, register_pass


@rule(
    "linear(x, w1, b1), linear(x, w2, b2) => split(linear(x, cat(w1, w2), cat(b1, b2)))",
    op(LINEAR, ...),
)
def _merge(graph: Graph, match: Match) -> Any:
    first = _mergeable(match.root)
    if isinstance(first, Decline):
        return first
    layers = [first]
    for user in first.input.users:
        layer = _mergeable(user)
        if isinstance(layer, Layer) and layer.input is first.input and user is not match.root:
            layers.append(layer)
    if any(layer.node.before(match.root) for layer in layers):
        return Decline(f"%{match.root.name} is not the first that reads %{first.input.name}")
    if len(layers) == 1:
        return Decline(f"no other linear layer reads %{first.input.name}")
    weights, biases = _joined(layers)
    names = [layer.weight.name for layer in layers]
    trainable = all(layer.weight.trainable for layer in layers)
    weight = graph.constant(weights, _joint_name(names, "weight"), trainable=trainable)
    bias = None
    if biases is not None:
        bias = graph.constant(biases, _joint_name(names, "bias"), trainable=trainable)
    merged = graph.add(LINEAR, first.input, weight, bias)
    sizes = [layer.weight.shape[0] for layer in layers]
    parts = graph.add_node("aten.split_with_sizes", merged, sizes, merged.rank - 1)
    for layer, part in zip(layers[1:], parts.outputs[1:], strict=True):
        graph.replace(layer.node.output, part)
        graph.erase(layer.node)
        graph.rename(part, layer.node.output.name)
    return parts.outputs[0]


def _mergeable(node: Node) -> Layer | Decline:
    layer = layer_of(node)
    if isinstance(layer, Decline):
        return layer
    if node.op != LINEAR:
        return Decline(f"%{node.name} is {node.op}, not a linear layer")
    for value in (layer.weight, layer.bias):
        if value is not None and value.only_user() is not node:
            return Decline(f"%{value.name} has other users than %{node.name}")
    return layer


def _joined(layers: list[Layer]) -> tuple[torch.Tensor, torch.Tensor | None]:
    weights = torch.cat([_tensor(layer.weight) for layer in layers])
    if all(layer.bias is None for layer in layers):
        return weights, None
    biases = [
        weights.new_zeros(layer.weight.shape[0]) if layer.bias is None else _tensor(layer.bias)
        for layer in layers
    ]
    return weights, torch.cat(biases)


def _tensor(value: Value) -> torch.Tensor:
    assert value.constant is not None
    return value.constant


def _joint_name(names: list[str], kind: str) -> str:
    """``attention.query_key_value.weight`` for the weights of query, key and value."""
    paths = [name.removesuffix(".weight").split(".") for name in names]
    levels = zip(*paths, strict=False)
    shared = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, levels))
    parts = ["_".join(path[shared:]) for path in paths]
    return ".".join([*paths[0][:shared], "_".join(filter(None, parts)) or "merged", kind])


@register_pass("merge-linears")
@dataclass(frozen=True)
class MergeLinears:
    """Merges linear layers that share their input, such as query, key and value."""

    def run(self, graph: Graph, ctx: Context) -> bool:
        return rewrite(graph, [_merge])
