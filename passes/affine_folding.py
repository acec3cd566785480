"""A scale or shift per channel becomes part of a neighbouring convolution or linear layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphopt.ir import Graph, Node, Operand, Value
from graphopt.ir.rewriting import Decline, Match, op, rewrite, rule
from graphopt.passes.channels import (
    ChannelAffine,
    fold_into_consumers,
    fold_into_producer,
    per_channel,
)
from graphopt.pipeline import Context, register_pass

_NAMES = "add sub rsub mul div".split()
ARITHMETIC = (
    "aten.neg",
    "aten.addcmul",
    *(f"aten.{name}.{kind}" for name in _NAMES for kind in ("Tensor", "Scalar")),
)

_ZERO = torch.zeros((), dtype=torch.float64)
_Effect = tuple[Tensor, Tensor, int | None]  # scale, shift, dimension


def channel_affine(node: Node) -> ChannelAffine | Decline:
    """The scale and shift that an arithmetic node with constant operands applies, or why it
    applies none. The constants may vary along one dimension."""
    names = ("tensor1", "tensor2") if node.op == "aten.addcmul" else ("self", "other")
    data, other = node[names[0]], None if node.op == "aten.neg" else node[names[1]]
    swapped = not isinstance(data, Value) or data.is_constant
    if swapped:
        data, other = other, data
    if not isinstance(data, Value) or data.is_constant or data.types != node.output.types:
        return Decline(f"%{node.name} is not an operand of the same type changed by a constant")
    if not data.dtype.is_floating_point:
        return Decline(f"%{node.name} computes in {data.dtype}")
    if node.op == "aten.neg":
        effect: _Effect | Decline = (-torch.ones((), dtype=torch.float64), _ZERO, None)
    elif node.op == "aten.addcmul":
        effect = _scaled_and_shifted(node, other)
    else:
        effect = _arithmetic(node, other, swapped)
    if isinstance(effect, Decline):
        return effect
    scale, shift, dimension = effect
    if not (scale.isfinite().all() and shift.isfinite().all()):
        return Decline(f"the constant of %{node.name} gives no finite scale and shift")
    return ChannelAffine(data, node.output, scale, shift, dimension)


def _scaled_and_shifted(node: Node, factor: Operand) -> _Effect | Decline:
    """``self + value * tensor1 * tensor2``, all constant but the data."""
    scale, shift = per_channel(factor, node.output), per_channel(node["self"], node.output)
    if isinstance(scale, Decline):
        return scale
    if isinstance(shift, Decline):
        return shift
    dimensions = {d for d in (scale[1], shift[1]) if d is not None}
    if len(dimensions) > 1 or not isinstance(node["value"], (int, float)):
        return Decline(f"%{node.name} scales one dimension and shifts another")
    scaled, shifted = torch.broadcast_tensors(scale[0] * node["value"], shift[0])
    return scaled, shifted, next(iter(dimensions), None)


def _arithmetic(node: Node, other: Operand, swapped: bool) -> _Effect | Decline:
    """Two operands, of which the first is the constant where they are swapped."""
    constant = per_channel(other, node.output)
    if isinstance(constant, Decline):
        return constant
    effect = _effect(node, constant[0], swapped)
    return effect if isinstance(effect, Decline) else (*effect, constant[1])


def _effect(node: Node, constant: Tensor, swapped: bool) -> tuple[Tensor, Tensor] | Decline:
    """Scale and shift, of the constant's shape; swapped if the constant is the first operand."""
    name = node.op.split(".")[1]
    one = torch.ones_like(constant)
    if name == "mul":
        return constant, _ZERO
    if name == "div":
        if swapped:
            return Decline(f"%{node.name} divides by what is not constant")
        return one / constant, _ZERO
    # add: self + alpha * other; sub: self - alpha * other; rsub: other - alpha * self
    alpha = node["alpha"]
    if not isinstance(alpha, (int, float)):
        return Decline(f"alpha of %{node.name} is not a literal")
    of_self, of_other = {"add": (1, alpha), "sub": (1, -alpha), "rsub": (-alpha, 1)}[name]
    of_data, of_constant = (of_other, of_self) if swapped else (of_self, of_other)
    return one * of_data, constant * of_constant


@rule(
    "layer(x, w, b) * scale + shift => layer(x, w * scale, b * scale + shift)", op(ARITHMETIC, ...)
)
def _into_producer(graph: Graph, match: Match) -> Any:
    affine = channel_affine(match.root)
    return affine if isinstance(affine, Decline) else fold_into_producer(graph, affine)


@rule("layer(x * scale + shift, w, b) => layer(x, w * scale, b + w * shift)", op(ARITHMETIC, ...))
def _into_consumers(graph: Graph, match: Match) -> Any:
    affine = channel_affine(match.root)
    return affine if isinstance(affine, Decline) else fold_into_consumers(graph, affine)


@register_pass("fold-channel-affine")
@dataclass(frozen=True)
class FoldChannelAffine:
    """Folds arithmetic with a constant per channel into the layer before or after it."""

    def run(self, graph: Graph, ctx: Context) -> bool:
        return rewrite(graph, [_into_producer, _into_consumers])
