"""Concatenations, and splits that undo them or are undone by them."""

from __future__ import annotations

from typing import Any

from graphopt.ir import Graph, Node, Operand, Value
from graphopt.ir.rewriting import Decline, Match, literal, op, operand, rule, value
from graphopt.passes.view_rules import SLICES, window

SPLITS = (
    "aten.split.Tensor",
    "aten.split.sizes",
    "aten.split_with_sizes",
    "aten.chunk",
    "aten.tensor_split.sections",
    "aten.tensor_split.indices",
)
_SPLITS_OF_STACKS = {"aten.stack": ("aten.unbind.int",)}


def _parts(node: Node) -> tuple[list[Value], int]:
    """What is concatenated or stacked, and along which dimension of the result."""
    return list(node["tensors"]), node["dim"] % node.output.rank


@rule("cat([x]) => x", op("aten.cat", [value("x")], ...))
def concatenation_of_one(graph: Graph, match: Match) -> Value:
    x: Value = match["x"]
    return x


@rule("stack([x]) => unsqueeze(x)", op("aten.stack", [value("x")], literal("dim")))
def stack_of_one(graph: Graph, match: Match) -> Value:
    return graph.add("aten.unsqueeze", match["x"], match["dim"])


@rule("cat(split(x)) => x", op(("aten.cat", "aten.stack"), operand("parts"), literal("dim")))
def concatenation_of_split(graph: Graph, match: Match) -> Value | Decline:
    parts, dimension = _parts(match.root)
    splits = {part.producer for part in parts}
    split = splits.pop()
    if splits or split is None:
        return Decline("its operands do not come from one node")
    if split.op not in _SPLITS_OF_STACKS.get(match.root.op, SPLITS):
        return Decline(f"%{split.name} is {split.op}")
    x: Value = split["self"]
    if split["dim"] % x.rank != dimension:
        return Decline(f"%{split.name} splits dimension {split['dim']}, not {dimension}")
    if parts != split.outputs:
        return Decline(f"its operands are not all results of %{split.name}, in order")
    return x


@rule(
    "split(cat(parts), sizes of parts) => parts",
    op(
        (*SPLITS, "aten.unbind.int"),
        op(("aten.cat", "aten.stack"), ..., name="cat", single_use=False),
        ...,
    ),
)
def split_of_concatenation(graph: Graph, match: Match) -> list[Value] | Decline:
    parts, dimension = _parts(match["cat"])
    split = match.root
    if (split.op == "aten.unbind.int") != (match["cat"].op == "aten.stack"):
        return Decline(f"{split.op} does not undo {match['cat'].op}")
    if split["dim"] % match["cat"].output.rank != dimension:
        return Decline(f"it splits dimension {split['dim']}, not {dimension}")
    if [part.types for part in parts] != [result.types for result in split.outputs]:
        return Decline("the results are not as large as what was concatenated")
    if split.op in SPLITS and any(part.fixed_size(dimension) is None for part in parts):
        return Decline("a size along the dimension is free")
    return parts


@rule(
    "slice(cat(parts)) => slice(part)",
    op(SLICES, op("aten.cat", ..., name="cat", single_use=False), ...),
)
def slice_of_concatenation(graph: Graph, match: Match) -> Value | Decline:
    parts, dimension = _parts(match["cat"])
    wanted = window(match.root)
    if wanted is None or wanted[0] != dimension:
        return Decline("it cuts another dimension, or bounds depend on free sizes")
    _, start, step, count = wanted
    end = start + (count - 1) * step + 1
    offset = 0
    for part in parts:
        size = part.fixed_size(dimension) if part.rank == match["cat"].output.rank else None
        if size is None:
            return Decline(f"the size of %{part.name} along dimension {dimension} is not fixed")
        if count and offset <= start and end <= offset + size:
            if part.dtype != match.root.output.dtype:
                return Decline(f"%{part.name} is {part.dtype} before it is concatenated")
            whole = count == size and step == 1
            bounds = (dimension, start - offset, end - offset, step)
            return part if whole else graph.add("aten.slice.Tensor", part, *bounds)
        offset += size
    return Decline("it takes from several parts, or nothing")


@rule(
    "select(stack(parts), i) => parts[i]",
    op("aten.select.int", op("aten.stack", ..., name="stack", single_use=False), ...),
)
def select_of_stack(graph: Graph, match: Match) -> Value | Decline:
    parts, dimension = _parts(match["stack"])
    index: Operand = match.root["index"]
    if match.root["dim"] % match["stack"].output.rank != dimension or not isinstance(index, int):
        return Decline("it selects along another dimension, or an index that is computed")
    part: Any = parts[index]
    if part.dtype != match.root.output.dtype:
        return Decline(f"%{part.name} is {part.dtype} before it is stacked")
    result: Value = part
    return result


RULES = (
    concatenation_of_one,
    stack_of_one,
    concatenation_of_split,
    split_of_concatenation,
    slice_of_concatenation,
    select_of_stack,
)
