"""Sizes that operators have as literals, when some channels are gone: shapes of reshapes, sizes of
splits, places of slices, numbers of groups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.ir import Graph, Node, Operand, Value
from graphopt.passes.layers import ALL_CONVOLUTIONS, is_transposed
from graphopt.passes.pruning.axes import Axis, Sizes, kept_ranges
from graphopt.passes.pruning.coupling_rules_views import slice_bounds


@dataclass(frozen=True, eq=False)
class Remaining:
    """What remains of a graph's channels. Values are known by name, so that it holds for clones.

    Attributes:
        axes: of every tensor, before.
        gone: of every channel, whether it is removed.
    """

    axes: dict[str, tuple[Axis, ...]]
    gone: np.ndarray

    def kept(self, axis: Axis) -> np.ndarray:
        """Which of an axis' channels remain, bool."""
        return np.asarray((axis.channels < 0) | ~self.gone[axis.channels])

    def indices(self, value: Value, dimension: int) -> np.ndarray:
        """Which indices of a dimension of fixed size remain, bool."""
        axis = self.axes[value.name][dimension]
        return np.asarray(np.tile(np.repeat(self.kept(axis), axis.inner[0]), axis.outer[0]))

    def sizes(self, value: Value, dimension: int) -> Sizes:
        """The size of a dimension under each assignment of the free sizes."""
        axis = self.axes[value.name][dimension]
        return axis.sizes_with(int(self.kept(axis).sum()))

    def changes(self, value: Value, dimension: int) -> bool:
        return bool(not self.kept(self.axes[value.name][dimension]).all())

    def changes_any(self, node: Node) -> bool:
        """Whether an operand or a result of a node becomes smaller."""
        tensors = [v for v in (*node.input_values(), *node.outputs) if v.is_tensor]
        return any(self.changes(v, d) for v in tensors for d in range(len(self.axes[v.name])))


def rewrite_sizes(graph: Graph, node: Node, left: Remaining) -> None:
    """Adapt what a node has as literals to what remains. Types are settled by the caller, at the
    end of the edit."""
    rule = _RULES.get(node.op)
    if rule is not None and left.changes_any(node):
        rule(graph, node, left)


def _shape(operand: str) -> Callable[[Graph, Node, Remaining], None]:
    def rule(graph: Graph, node: Node, left: Remaining) -> None:
        graph.set_operand(node, operand, _new_shape(graph, node, node[operand], 0, left))

    return rule


def _unflatten(graph: Graph, node: Node, left: Remaining) -> None:
    first = node["dim"] % len(left.axes[node["self"].name])
    graph.set_operand(node, "sizes", _new_shape(graph, node, node["sizes"], first, left))


def _new_shape(
    graph: Graph, node: Node, shape: list[Operand], first: int, left: Remaining
) -> list[Operand]:
    """A shape that begins at a dimension of the result. A size that is computed from free ones
    becomes -1, or where the shape has that already, it is scaled."""
    new = list(shape)
    for place, item in enumerate(shape):
        dimension = first + place
        if not left.changes(node.output, dimension):
            continue
        if not isinstance(item, Value):
            new[place] = item if item == -1 else left.sizes(node.output, dimension)[0]
        elif -1 not in [one for one in new if not isinstance(one, Value)]:
            new[place] = -1
        else:
            axis = left.axes[node.output.name][dimension]
            with graph.inserting(before=node):
                scaled = graph.add("operator.mul", item, int(left.kept(axis).sum()))
                new[place] = graph.add("operator.floordiv", scaled, len(axis.channels))
    return new


def _split(graph: Graph, node: Node, left: Remaining) -> None:
    """Equal parts may become unequal ones."""
    dimension = node["dim"] % len(left.axes[node["self"].name])
    if not left.changes(node["self"], dimension):
        return
    before = [left.axes[part.name][dimension].sizes[0] for part in node.outputs]
    sizes = list(kept_ranges(left.indices(node["self"], dimension), before))
    if node.op in _EQUAL_SPLITS:
        node = _as_split_with_sizes(graph, node, before, dimension)
    graph.set_operand(node, "split_sizes", sizes)


def _as_split_with_sizes(graph: Graph, node: Node, sizes: list[int], dimension: int) -> Node:
    made = graph.add_node(
        "aten.split_with_sizes", node["self"], sizes, dimension, before=node, origin=node.origin
    )
    names = [part.name for part in node.outputs]
    for old, new in zip(node.outputs, made.outputs, strict=True):
        graph.replace(old, new)
    graph.erase(node)
    for part, name in zip(made.outputs, names, strict=True):
        graph.rename(part, name)
    return made


def _slice(graph: Graph, node: Node, left: Remaining) -> None:
    dimension = node["dim"] % len(left.axes[node["self"].name])
    bounds = slice_bounds(node)
    if bounds is None or not left.changes(node["self"], dimension):
        return
    kept = left.indices(node["self"], dimension)
    start, length = int(kept[: bounds[0]].sum()), int(kept[slice(*bounds)].sum())
    graph.set_operand(node, "start", start)
    if node.op == "aten.narrow":
        graph.set_operand(node, "length", length)
    else:
        graph.set_operand(node, "end", start + length)


def _select(graph: Graph, node: Node, left: Remaining) -> None:
    dimension = node["dim"] % len(left.axes[node["self"].name])
    if left.changes(node["self"], dimension):
        kept = left.indices(node["self"], dimension)
        graph.set_operand(node, "index", int(kept[: node["index"] % len(kept)].sum()))


def _convolution(graph: Graph, node: Node, left: Remaining) -> None:
    if node["groups"] == 1:
        return
    side = node.output if is_transposed(node) else node["input"]
    place = len(left.axes[side.name]) - (len(left.axes[node["weight"].name]) - 1)
    groups = left.sizes(side, place)[0] // left.sizes(node["weight"], 1)[0]
    graph.set_operand(node, "groups", groups)


def _group_norm(graph: Graph, node: Node, left: Remaining) -> None:
    axis = left.axes[node["input"].name][1]
    groups = node["num_groups"] * left.sizes(node["input"], 1)[0] // axis.sizes[0]
    graph.set_operand(node, "num_groups", groups)


def _squeeze(graph: Graph, node: Node, left: Remaining) -> None:
    """A dimension of which one channel is left is not one of those that were of size 1."""
    axes = left.axes[node["self"].name]
    ones = [d for d, axis in enumerate(axes) if all(size == 1 for size in axis.sizes)]
    explicit = graph.add("aten.squeeze.dims", node["self"], ones, before=node, origin=node.origin)
    name = node.output.name
    graph.replace(node.output, explicit)
    graph.erase(node)
    graph.rename(explicit, name)


_EQUAL_SPLITS = ("aten.split.Tensor", "aten.chunk")
_RULES: dict[str, Callable[[Graph, Node, Remaining], Any]] = {
    "aten.reshape": _shape("shape"),
    "aten.view": _shape("size"),
    "aten._unsafe_view": _shape("size"),
    "aten.expand": _shape("size"),
    "aten.broadcast_to": _shape("size"),
    "aten.unflatten.int": _unflatten,
    **dict.fromkeys((*_EQUAL_SPLITS, "aten.split_with_sizes", "aten.split.sizes"), _split),
    "aten.squeeze": _squeeze,
    "aten.slice.Tensor": _slice,
    "aten.narrow": _slice,
    "aten.slice_scatter": _slice,
    "aten.select.int": _select,
    **dict.fromkeys(ALL_CONVOLUTIONS, _convolution),
    "aten.group_norm": _group_norm,
}
