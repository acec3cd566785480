"""Padding of its own becomes the padding of the convolution or pooling after it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from graphopt.ir import Graph, Node, Value
from graphopt.ir.rewriting import Decline, Match, op, rewrite, rule
from graphopt.passes.intervals import bounds
from graphopt.passes.layers import CONVOLUTIONS, per_dimension
from graphopt.pipeline import Context, register_pass

PADS = ("aten.pad", "aten.constant_pad_nd")
MAX_POOLS = tuple(f"aten.max_pool{d}d" for d in (1, 2, 3))
AVERAGE_POOLS = tuple(f"aten.avg_pool{d}d" for d in (1, 2, 3))


@dataclass(frozen=True)
class Padding:
    """Constant padding of the trailing dimensions.

    Attributes:
        source: what is padded.
        value: with which number.
        sides: elements (before, after) per dimension, from the first to the last of the trailing
            dimensions that a convolution or pooling slides over; all others are not padded.
    """

    source: Value
    value: float
    sides: list[tuple[int, int]]

    @property
    def before(self) -> list[int]:
        return [before for before, _ in self.sides]


def padding_of(node: Node, slid_over: int) -> Padding | Decline:
    """The padding that a node applies to as many trailing dimensions, or why it does not."""
    if node.op == "aten.pad" and node["mode"] != "constant":
        return Decline(f"%{node.name} pads with what lies inside, mode {node['mode']}")
    amounts, value = node["pad"], node["value"] or 0
    if not all(type(amount) is int and amount >= 0 for amount in amounts):
        return Decline(f"%{node.name} pads by sizes that are not fixed, or crops")
    if not isinstance(value, (int, float)):
        return Decline(f"%{node.name} pads with a value that is computed")
    if any(0 in kind.shape for kind in node["self"].types):
        return Decline(f"%{node.name} pads what is empty, and no layer takes that")
    pairs = list(zip(amounts[::2], amounts[1::2], strict=True))[::-1]
    outer, inner = pairs[: -slid_over or None], pairs[-slid_over:]
    if len(pairs) > slid_over and any(map(any, outer)):
        return Decline(f"%{node.name} pads channels or batch")
    inner = [(0, 0)] * (slid_over - len(inner)) + inner
    return Padding(node["self"], float(value), inner)


@rule(
    "conv(pad(x, p), w, b, padding=q) => conv(x, w, b, padding=p + q)",
    op(tuple(sorted(CONVOLUTIONS)), op(PADS, ...), ...),
)
def _into_convolution(graph: Graph, match: Match) -> Any:
    node, weight = match.root, match.root["weight"]
    pad = node["input"].producer
    kernel = weight.shape[2:]
    found = padding_of(pad, len(kernel))
    if isinstance(found, Decline):
        return found
    if found.value != 0:
        return Decline(f"%{pad.name} pads with {found.value}, a convolution with zeros")
    own = _own_padding(node, kernel)
    if isinstance(own, Decline):
        return own
    stride, dilation = (per_dimension(node[n], len(kernel)) for n in ("stride", "dilation"))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    obstacle = _asymmetry(found, own, reach, stride)
    if obstacle is not None:
        return obstacle
    padding = [before + o for before, o in zip(found.before, own, strict=True)]
    return graph.add(
        node.op.removesuffix(".padding"),
        found.source,
        weight,
        node["bias"],
        stride,
        padding,
        dilation,
        node["groups"],
    )


def _own_padding(node: Node, kernel: tuple[int, ...]) -> list[int] | Decline:
    """A convolution's padding as numbers, the same before and after."""
    padding = node["padding"]
    if padding == "valid":
        return [0] * len(kernel)
    if padding == "same":
        dilation = per_dimension(node["dilation"], len(kernel))
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        if any(t % 2 for t in total):
            return Decline(f"%{node.name} pads one more after than before")
        return [t // 2 for t in total]
    if not all(type(p) is int for p in padding):
        return Decline(f"the padding of %{node.name} is not fixed")
    return per_dimension(padding, len(kernel))


@rule("max_pool(pad(x, p, -inf)) => max_pool(x, padding=p)", op(MAX_POOLS, op(PADS, ...), ...))
def _into_max_pool(graph: Graph, match: Match) -> Any:
    found = _before_pool(match.root)
    if isinstance(found, Decline):
        return found
    padding, amounts = found
    if padding.value != -math.inf:
        if padding.value > bounds(padding.source)[0]:
            return Decline(f"a maximum can be the padding's {padding.value}")
        if any(d != 1 for d in per_dimension(match.root["dilation"], len(amounts))):
            return Decline(f"a window of %{match.root.name} may hold nothing but padding")
    operands = {**match.root.operands, "self": padding.source, "padding": amounts}
    return graph.add(match.root.op, **operands)


@rule("avg_pool(pad(x, p)) => avg_pool(x, padding=p)", op(AVERAGE_POOLS, op(PADS, ...), ...))
def _into_average_pool(graph: Graph, match: Match) -> Any:
    found = _before_pool(match.root)
    if isinstance(found, Decline):
        return found
    padding, amounts = found
    if padding.value != 0:
        return Decline(f"the padding is {padding.value}, an average's own padding is 0")
    own = per_dimension(match.root["padding"], len(amounts))
    if any(own) and not match.root["count_include_pad"]:
        return Decline(f"%{match.root.name} does not count its own padding, but does count this")
    changed = {"self": padding.source, "padding": amounts, "count_include_pad": True}
    return graph.add(match.root.op, **{**match.root.operands, **changed})


def _before_pool(node: Node) -> tuple[Padding, list[int]] | Decline:
    """The padding before a pooling, and the amounts that it and the pooling's own add up to."""
    dimensions = int(node.op[-2])
    pad = node["self"].producer
    found = padding_of(pad, dimensions)
    if isinstance(found, Decline):
        return found
    if node["ceil_mode"]:
        return Decline(f"%{node.name} rounds its size up, which depends on whose the padding is")
    kernel = per_dimension(node["kernel_size"], dimensions)
    stride = per_dimension(node["stride"] or kernel, dimensions)
    dilation = [1] * dimensions
    if node.op in MAX_POOLS:
        dilation = per_dimension(node["dilation"], dimensions)
    own = per_dimension(node["padding"], dimensions)
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    obstacle = _asymmetry(found, own, reach, stride)
    if obstacle is not None:
        return obstacle
    amounts = [before + o for before, o in zip(found.before, own, strict=True)]
    if any(amount > k // 2 for amount, k in zip(amounts, kernel, strict=True)):
        return Decline(f"%{node.name} cannot pad by more than half of its kernel")
    return found, amounts


def _asymmetry(
    padding: Padding, own: list[int], reach: list[int], stride: list[int]
) -> Decline | None:
    """Why padding cannot be the same before and after: some window sees the difference.

    With ``before`` on both sides every window lies where it was. Their number stays the same if
    the padding after is as long, or if what it has more or less is never reached by a window.
    """
    first = padding.source.rank - len(padding.sides)
    for d, (before, after) in enumerate(padding.sides):
        if before == after:
            continue
        size = padding.source.fixed_size(first + d)
        if size is None:
            return Decline(f"it pads {before} before and {after} after, along a free dimension")
        actual, symmetric = (
            (size + before + behind + 2 * own[d] - reach[d]) // stride[d]
            for behind in (after, before)
        )
        if actual != symmetric:
            return Decline(f"it pads {before} before and {after} after")
    return None


@register_pass("fold-padding")
@dataclass(frozen=True)
class FoldPadding:
    """Folds constant padding into the convolution or pooling after it."""

    def run(self, graph: Graph, ctx: Context) -> bool:
        return rewrite(graph, [_into_convolution, _into_max_pool, _into_average_pool])
