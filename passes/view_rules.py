"""Views: those that change nothing, and chains of them that one can replace."""

from __future__ import annotations

import sys
from typing import Any

from graphopt.ir import Graph, Node, Value
from graphopt.ir.rewriting import Decline, Match, literal, op, operand, rule, value
from graphopt.passes.identity_rules import same_type

# Operators that keep the elements in their order and give them another shape.
RESHAPES = (
    "aten.reshape",
    "aten.view",
    "aten._unsafe_view",
    "aten.reshape_as",
    "aten.view_as",
    "aten.flatten.using_ints",
    "aten.unflatten.int",
    "aten.unsqueeze",
    "aten.squeeze",
    "aten.squeeze.dim",
    "aten.squeeze.dims",
)
SQUEEZES = ("aten.squeeze", "aten.squeeze.dim", "aten.squeeze.dims")
# Operators that repeat elements, or not, depending on the sizes.
EXPANSIONS = ("aten.expand", "aten.expand_as", "aten.broadcast_to", "aten.repeat", "aten.tile")
PERMUTATIONS = (
    "aten.permute",
    "aten.transpose.int",
    "aten.t",
    "aten.swapaxes",
    "aten.swapdims",
    "aten.movedim.int",
    "aten.movedim.intlist",
    "aten.numpy_T",
    "aten.mT",
)
SLICES = ("aten.slice.Tensor", "aten.narrow")


def permutation(node: Node) -> list[int]:
    """The source dimension of every dimension of the result of one of `PERMUTATIONS`."""
    rank = node["self"].rank
    order = list(range(rank))
    if node.op == "aten.permute":
        return [dimension % rank for dimension in node["dims"]]
    if node.op in ("aten.t", "aten.numpy_T"):
        return order[::-1]
    if node.op.startswith("aten.movedim"):
        sources, destinations = _as_list(node["source"]), _as_list(node["destination"])
        moved = {d % rank: s % rank for s, d in zip(sources, destinations, strict=True)}
        rest = iter([d for d in order if d not in moved.values()])
        return [moved[d] if d in moved else next(rest) for d in order]
    names = {"aten.transpose.int": ("dim0", "dim1"), "aten.swapdims": ("dim0", "dim1")}
    if node.op == "aten.mT":
        a, b = -2, -1
    else:
        first, second = names.get(node.op, ("axis0", "axis1"))
        a, b = node[first], node[second]
    if rank:
        order[a], order[b] = order[b], order[a]
    return order


def _as_list(dimensions: int | list[int]) -> list[int]:
    return [dimensions] if isinstance(dimensions, int) else list(dimensions)


def _squeezes_free_dimension(node: Node) -> bool:
    x: Value = node["self"]
    if node.op not in SQUEEZES:
        return False
    named = range(x.rank) if node.op == "aten.squeeze" else _as_list(node["dim"])
    return x.rank > 0 and any(x.fixed_size(dimension) is None for dimension in named)


def window(node: Node) -> tuple[int, int, int, int] | None:
    """Dimension, start, step and count of one of `SLICES`; None if they depend on free sizes."""
    x: Value = node["self"]
    dimension = node["dim"] % x.rank
    size, count = x.fixed_size(dimension), node.output.fixed_size(dimension)
    step = node["step"] if node.op == "aten.slice.Tensor" else 1
    start = 0 if node["start"] is None else node["start"]
    if size is None or count is None or not isinstance(start, int) or not isinstance(step, int):
        return None
    start = max(0, start + size) if start < 0 else min(start, size)
    return dimension, start, step, count


@rule("reshape(x, shape of x) => x", op(RESHAPES, value("x"), ...))
def reshape_to_own_shape(graph: Graph, match: Match) -> Value | Decline:
    if _squeezes_free_dimension(match.root):
        return Decline("whether it removes a free dimension depends on its size")
    return same_type(match["x"], match)


@rule("expand(x, shape of x) => x", op(EXPANSIONS, value("x"), ...))
def expand_to_own_shape(graph: Graph, match: Match) -> Value | Decline:
    return same_type(match["x"], match)


@rule("reshape(... reshape(x)) => x", op(RESHAPES, op(RESHAPES, ..., single_use=False), ...))
def reshape_there_and_back(graph: Graph, match: Match) -> Value | Decline:
    result = match.root.output
    node: Node | None = match.root
    while node is not None and node.op in RESHAPES and not _squeezes_free_dimension(node):
        x: Value = node["self"]
        if x.types == result.types:
            return x
        node = x.producer
    return Decline(f"no operand of the chain is {result.type}")


@rule(
    "reshape(reshape(x), shape) => reshape(x, shape)",
    op(
        ("aten.reshape", "aten.view", "aten._unsafe_view"),
        op(RESHAPES, value("x"), ..., single_use=False),
        operand("shape"),
    ),
)
def reshape_chain(graph: Graph, match: Match) -> Value:
    return graph.add("aten.reshape", match["x"], match["shape"])


@rule("permute(x, own order) => x", op(PERMUTATIONS, value("x"), ...))
def permute_to_own_order(graph: Graph, match: Match) -> Value | Decline:
    order = permutation(match.root)
    x: Value = match["x"]
    return x if order == sorted(order) else Decline(f"it permutes to {order}")


@rule(
    "permute(permute(x)) => permute(x)",
    op(PERMUTATIONS, op(PERMUTATIONS, value("x"), ..., name="inner", single_use=False), ...),
)
def permute_chain(graph: Graph, match: Match) -> Value:
    x: Value = match["x"]
    inner = permutation(match["inner"])
    order = [inner[dimension] for dimension in permutation(match.root)]
    moved = [dimension for dimension, source in enumerate(order) if dimension != source]
    if not moved:
        return x
    if len(moved) == 2:
        return graph.add("aten.transpose.int", x, *moved)
    return graph.add("aten.permute", x, order)


@rule("slice(x, everything) => x", op(SLICES, value("x"), ...))
def slice_of_everything(graph: Graph, match: Match) -> Value | Decline:
    x, root = match["x"], match.root
    if root.op == "aten.slice.Tensor" and x.fixed_size(root["dim"]) is None:
        # A literal bound beyond the two sizes that are known is none for larger ones.
        start, end = root["start"], root["end"]
        if isinstance(start, int) and start != 0:
            return Decline(f"the dimension is free and the slice starts at {start}")
        if isinstance(end, int) and end < sys.maxsize:
            return Decline(f"the dimension is free and the slice ends at {end}")
    return same_type(x, match)


@rule(
    "slice(slice(x)) => slice(x)",
    op(SLICES, op(SLICES, value("x"), ..., name="inner", single_use=False), ..., name="outer"),
)
def slice_chain(graph: Graph, match: Match) -> Value | Decline:
    inner, outer = window(match["inner"]), window(match["outer"])
    if inner is None or outer is None:
        return Decline("its bounds depend on free sizes")
    dimension, first, inner_step, _ = inner
    if outer[0] != dimension:
        return Decline(f"it slices dimension {outer[0]}, the one before it {dimension}")
    _, second, outer_step, count = outer
    start, step = first + second * inner_step, inner_step * outer_step
    end = start + (count - 1) * step + 1 if count else start
    return graph.add("aten.slice.Tensor", match["x"], dimension, start, end, step)


def _is_zero(pads: Any) -> bool:
    return all(isinstance(pad, int) and pad == 0 for pad in pads)


@rule(
    "pad(x, 0) => x",
    op(("aten.constant_pad_nd", "aten.pad"), value("x"), literal(where=_is_zero), ...),
)
def empty_padding(graph: Graph, match: Match) -> Value | Decline:
    return same_type(match["x"], match)


RULES = (
    reshape_to_own_shape,
    reshape_there_and_back,
    reshape_chain,
    expand_to_own_shape,
    permute_to_own_order,
    permute_chain,
    slice_of_everything,
    slice_chain,
    empty_padding,
)
