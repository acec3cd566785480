"""Whether a graph treats the entries of a batch each on its own.

Then a batch may be computed in parts: where its activations would not stay in the caches, entry by
entry they do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from graphopt.engine.layer_rules import CONVOLUTIONS
from graphopt.engine.quantization import DEQUANTIZE, QUANTIZE
from graphopt.engine.view_rules import PADS
from graphopt.ir import Graph, Node, TensorType, Value


def batch_of(graph: Graph) -> str | None:
    """The free size that is dimension 0 of every input and of every output, if no entry of any
    output depends on another entry of an input than its own; None otherwise.

    Operators are judged by rules; one that has none here counts as mixing entries.
    """
    names = {value.free.get(0) for value in graph.inputs}
    name = names.pop() if len(names) == 1 else None
    if name is None or name not in graph.sizes or len(graph.sizes) > 1:
        return None
    judge = _Judge(graph, name)
    if not all(map(judge.is_batched, graph.inputs)):
        return None
    if not all(isinstance(output, Value) and judge.is_batched(output) for output in graph.outputs):
        return None
    apart = all(
        judge.keeps_apart(node)
        for node in graph.nodes
        if any(isinstance(value.types[0], TensorType) for value in node.outputs)
    )
    return name if apart else None


_POINTWISE = ("aten.hardswish",)
"""Elementwise operators that torch does not mark as such."""


class _Judge:
    def __init__(self, graph: Graph, name: str) -> None:
        self._sizes = [assignment[name] for assignment in graph.assignments]

    def is_batched(self, value: Value) -> bool:
        """Whether dimension 0, and no other, is the batch."""
        shapes = [t.shape for t in value.types if isinstance(t, TensorType)]
        if len(shapes) != len(value.types) or not shapes[0]:
            return False
        same = all(shape[1:] == shapes[0][1:] for shape in shapes)
        return same and [shape[0] for shape in shapes] == self._sizes

    def keeps_apart(self, node: Node) -> bool:
        """Whether no entry of a node's results depends on another, or on how many there are."""
        operands = list(node.input_values())
        batched = [value for value in operands if self.is_batched(value)]
        if not all(map(self.is_batched, node.outputs)):
            return not batched and not any(map(_varies, (*operands, *node.outputs)))
        rule = _RULES.get(node.op)
        if rule is not _keeps_order and any(_varies(v) for v in operands if v not in batched):
            return False  # another size, or the number of entries itself
        pointwise = torch.Tag.pointwise in getattr(node.operator.target, "tags", ())
        if pointwise or node.op in _POINTWISE:
            alone = not node.operator.is_random
            return alone and all(value.rank == node.output.rank for value in batched)
        return rule is not None and rule(node, batched)


def _varies(value: Value) -> bool:
    """Whether a shape, or a number, depends on the free sizes."""
    return len(set(value.types)) > 1


_Rule = Callable[[Node, list[Value]], bool]


def _only(*names: str) -> _Rule:
    """Nothing but these operands is batched, and each entry of theirs is treated on its own."""

    def rule(node: Node, batched: list[Value]) -> bool:
        return all(any(value is node[name] for name in names) for value in batched)

    return rule


def _along(name: str) -> _Rule:
    """The operator works along dimensions, none of which may be the batch."""

    def rule(node: Node, batched: list[Value]) -> bool:
        given: Any = node[name]
        rank = batched[0].rank
        dimensions = [given] if isinstance(given, int) else given
        return bool(dimensions) and all(isinstance(d, int) and d % rank for d in dimensions)

    return rule


def _trailing(name: str) -> _Rule:
    """The operator works along as many trailing dimensions as a list has entries."""

    def rule(node: Node, batched: list[Value]) -> bool:
        return len(batched) == 1 and len(node[name]) < batched[0].rank

    return rule


def _pads(node: Node, batched: list[Value]) -> bool:
    return len(batched) == 1 and len(node["pad"]) // 2 < batched[0].rank


def _permutes(node: Node, batched: list[Value]) -> bool:
    return bool(node["dims"][0] % batched[0].rank == 0)


def _concatenates(node: Node, batched: list[Value]) -> bool:
    rank = batched[0].rank
    return node["dim"] % rank != 0 and all(value in batched for value in node["tensors"])


def _multiplies(node: Node, batched: list[Value]) -> bool:
    """Matrices of batched stacks with one another, or with the same matrices for all entries."""
    left, right = node.input_values()
    rank = node.output.rank
    if right in batched:
        return rank >= 3 and right.rank == rank and (left.rank < rank or left in batched)
    return left.rank == rank and (rank == 2 or right.rank < rank)


def _attends(node: Node, batched: list[Value]) -> bool:
    stacks = [node[name] for name in ("query", "key", "value")]
    mask = node["attn_mask"]
    # In matrices without a stack, dimension 0 is what attends.
    whole = all(value in batched and value.rank > 2 for value in stacks) and not node["dropout_p"]
    return whole and (mask not in batched or mask.rank == node["query"].rank)


def _normalizes(node: Node, batched: list[Value]) -> bool:
    """By statistics that are given, not by those of the batch."""
    return not node["training"] and _only("input")(node, batched)


def _keeps_order(node: Node, batched: list[Value]) -> bool:
    """Elements keep their order, or are repeated for every entry: as dimension 0 is the batch
    before and after, so do the entries. Sizes are operands."""
    return True


_RULES: dict[str, _Rule] = {
    **dict.fromkeys((*CONVOLUTIONS, "aten.linear"), _only("input")),
    "aten.batch_norm": _normalizes,
    "aten.group_norm": _only("input"),
    **dict.fromkeys(
        (
            *("aten.max_pool2d", "aten.avg_pool2d", "aten.adaptive_avg_pool2d"),
            *("aten.pixel_shuffle", "aten.upsample_nearest2d.vec"),
            *("aten.upsample_bilinear2d.vec", "aten.upsample_bicubic2d.vec"),
        ),
        lambda node, batched: batched[0].rank == 4,
    ),
    **dict.fromkeys((QUANTIZE, DEQUANTIZE), _only("x")),
    "aten.embedding": _only("indices"),
    "aten.layer_norm": _trailing("normalized_shape"),
    **dict.fromkeys(PADS, _pads),
    **dict.fromkeys(
        (
            *("aten.softmax.int", "aten._softmax", "aten.log_softmax.int", "aten.glu"),
            *("aten.mean.dim", "aten.sum.dim_IntList", "aten.amax", "aten.amin", "aten.select.int"),
            *("aten.slice.Tensor", "aten.split.Tensor", "aten.split_with_sizes", "aten.chunk"),
            # A part of one entry would lose the dimension that a larger batch keeps.
            *("aten.narrow", "aten.squeeze.dim", "aten.squeeze.dims"),
        ),
        _along("dim"),
    ),
    "aten.roll": _along("dims"),
    "aten.transpose.int": lambda node, batched: (
        0 not in (node["dim0"] % batched[0].rank, node["dim1"] % batched[0].rank)
    ),
    "aten.permute": _permutes,
    "aten.cat": _concatenates,
    **dict.fromkeys(("aten.matmul", "aten.bmm"), _multiplies),
    "aten.scaled_dot_product_attention": _attends,
    **dict.fromkeys(
        (
            *("aten.view", "aten.reshape", "aten.flatten.using_ints", "aten.unflatten.int"),
            *("aten.unsqueeze", "aten.expand", "aten.contiguous", "aten.clone"),
        ),
        _keeps_order,
    ),
}
