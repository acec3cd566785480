"""Depth pruning: whole residual blocks, of which only the path around them stays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from graphopt.calibration import CalibrationData, observe
from graphopt.errors import PassError
from graphopt.ir import Graph, Node, Value
from graphopt.pipeline import Context

_ADD = "aten.add.Tensor"


@dataclass(frozen=True, eq=False)
class ResidualBlock:
    """``result = skip + branch(skip)``, where nothing else uses what is inside of the branch.

    Attributes:
        name: the innermost module that all layers of the branch belong to; with the result where
            that has several blocks.
        addition: the node that adds.
        around: the name of its operand that goes around the block.
        branch: the nodes of the block, in order, the addition excepted.
    """

    name: str
    addition: Node
    around: str
    branch: tuple[Node, ...]

    @property
    def skip(self) -> Value:
        """What goes around the block."""
        value: Value = self.addition[self.around]
        return value

    @property
    def result(self) -> Value:
        return self.addition.output

    @property
    def constants(self) -> tuple[Value, ...]:
        """Constants that only the block uses."""
        inside = {*self.branch, self.addition}
        used = dict.fromkeys(v for node in self.branch for v in node.input_values())
        return tuple(v for v in used if v.is_constant and v.users.keys() <= inside)


def find_residual_blocks(graph: Graph) -> list[ResidualBlock]:
    """The residual blocks of a network, in order; a block may lie inside of another.

    An addition of a shortcut that has a layer of its own, such as the projection at the start of
    a ResNet's stage, is none: without the branch the result would be another representation.
    """
    blocks = []
    for node in graph.nodes:
        if node.op != _ADD or not node.output.dtype.is_floating_point or node["alpha"] != 1:
            continue
        for around, other in (("self", "other"), ("other", "self")):
            branch = _branch(node, node[around], node[other])
            if branch:
                blocks.append(ResidualBlock(_module(branch), node, around, branch))
                break
    count = Counter(block.name for block in blocks)
    return [
        replace(block, name=f"{block.name} (%{block.result.name})")
        if count[block.name] > 1
        else block
        for block in blocks
    ]


def block_influence(
    graph: Graph,
    blocks: Sequence[ResidualBlock],
    data: CalibrationData,
    ctx: Context | None = None,
) -> Tensor:
    """How much each block changes its input: 1 minus the cosine of the angle between input and
    result, averaged over all places (Men et al., "ShortGPT", 2024). The block with the least is
    the first to go.

    Args:
        graph: the network.
        blocks: from `find_residual_blocks`.
        data: what flows through it.
        ctx: shows the progress.

    Returns:
        [blocks], float64, between 0 and 2.
    """
    totals = torch.zeros(len(blocks), dtype=torch.float64)
    places = torch.zeros(len(blocks), dtype=torch.float64)
    seen: dict[Value, Tensor] = {}
    skips = {block.skip for block in blocks}
    ends = {block.result: number for number, block in enumerate(blocks)}

    def note(value: Value, tensor: Tensor) -> None:
        if value in ends:
            number = ends[value]
            cosines = _cosines(seen[blocks[number].skip], tensor)
            totals[number] += (1 - cosines).sum()
            places[number] += cosines.numel()
        if value in skips:
            seen[value] = tensor.clone()

    observers = {value: partial(note, value) for value in (*skips, *ends)}
    observe(graph, data, observers.items(), ctx, "influence of blocks")
    return totals / places


def remove_blocks(graph: Graph, blocks: Sequence[ResidualBlock]) -> None:
    """Remove residual blocks, all in one edit: who read the result of one reads what went around
    it.

    Raises:
        PassError: a block is no longer part of the graph.
    """
    for block in blocks:
        if block.addition not in graph:
            raise PassError(f"the block {block.name} is not part of the graph; find blocks anew")
    with graph.edit():
        for block in blocks:
            if block.addition not in graph:
                continue  # it lay inside of another block
            graph.replace(block.result, block.skip)
            for node in (block.addition, *reversed(block.branch)):
                if node in graph and not any(v.users or v.is_output for v in node.outputs):
                    graph.erase(node)


def _branch(addition: Node, skip: object, end: object) -> tuple[Node, ...]:
    """The nodes between a value and an addition's other operand; none if that does not come from
    the value, or something else sees into the branch."""
    if not isinstance(skip, Value) or not isinstance(end, Value) or skip is end:
        return ()
    if skip.types != addition.output.types or skip.is_constant:
        return ()
    inside = _between(skip, end)
    for node in inside:
        for value in node.outputs:
            if value.is_output or not value.users.keys() <= {*inside, addition}:
                return ()
    return inside


def _between(start: Value, end: Value) -> tuple[Node, ...]:
    """The nodes that depend on one value and that another depends on, in order."""
    before = _ancestors(end)
    depends: dict[Node, None] = {}
    for node in start.graph.nodes:
        if node in before and any(v is start or v.producer in depends for v in node.input_values()):
            depends[node] = None
    return tuple(depends) if end.producer in depends else ()


def _ancestors(value: Value) -> set[Node]:
    found: set[Node] = set()
    waiting = [value]
    while waiting:
        node = waiting.pop().producer
        if node is not None and node not in found:
            found.add(node)
            waiting.extend(node.input_values())
    return found


def _module(branch: Sequence[Node]) -> str:
    """The innermost module of all nodes that come from one."""
    paths = [node.origin.module.split(".") for node in branch if node.origin.module]
    shared: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared) or branch[0].name


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosines over channels: the last dimension, or dimension 1 of images."""
    dimension = 1 if a.dim() == 4 else -1
    result: Tensor = torch.cosine_similarity(a.double(), b.double(), dim=dimension)
    return result
