"""Measured time of layers, each alone, and of the whole network."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.ir import Graph, Node, TensorType, Value
from graphopt.ir.inference import map_operand
from graphopt.passes.pruning.layers_to_prune import PrunableLayer
from graphopt.pipeline import Context

TIME_COLUMNS = ["ms before", "ms after"]
ALLOWED = 60.0
"""Seconds after which no further layer is timed for a report."""


@dataclass(frozen=True)
class Times:
    """Seconds before pruning and after it.

    Attributes:
        layers: of layers, each alone, by name; those that were not timed are missing.
        network: of the whole network.
    """

    layers: Mapping[str, tuple[float, float]]
    network: tuple[float, float]

    @property
    def speedup(self) -> float:
        return self.network[0] / self.network[1]

    def row(self, name: str) -> list[float | None]:
        """`TIME_COLUMNS` of a layer in a report; None where it was not timed."""
        found = self.layers.get(name)
        return [None, None] if found is None else [1e3 * seconds for seconds in found]

    def __str__(self) -> str:
        before, after = (1e3 * seconds for seconds in self.network)
        return (
            f"the whole network: {before:.4g} ms before, {after:.4g} ms after, "
            f"{self.speedup:.2f} times as fast"
        )


def remarks_on(times: Times | None) -> list[str]:
    """What to say of times below a report's table."""
    if times is None:
        return ["times: Prune(measure=True) measures them"]
    return ["ms: of the layer alone, without what the network fuses with it", str(times)]


def measure(
    before: Graph,
    after: Graph,
    layers: Sequence[tuple[PrunableLayer, PrunableLayer]],
    ctx: Context,
    allowed: float = ALLOWED,
) -> Times:
    """Time a network and its layers before and after pruning.

    Args:
        before: the network as it was.
        after: as it is.
        layers: each before and after. Those with most multiply-adds are timed first, the others
            as long as there is time.
        ctx: has the timer, and shows the progress.
        allowed: seconds for the layers.

    Raises:
        PassError: the target has no timer.
    """
    network = ctx.target.time(before), ctx.target.time(after)
    known: dict[str, float] = {}

    def seconds(layer: PrunableLayer) -> float:
        key = problem(layer)
        if key not in known:
            known[key] = _seconds(layer, layer.weight.tensor, ctx)
        return known[key]

    largest_first = sorted(layers, key=lambda pair: pair[0].macs, reverse=True)
    end = time.monotonic() + allowed
    measured: dict[str, tuple[float, float]] = {}
    for old, new in ctx.track(largest_first, "timing layers"):
        if time.monotonic() > end:
            break
        measured[old.name] = seconds(old), seconds(new)
    return Times(measured, network)


def time_layers(
    layers: Sequence[PrunableLayer],
    levels: Sequence[float],
    pruned: Callable[[PrunableLayer, float], Tensor],
    ctx: Context,
) -> dict[PrunableLayer, list[float]]:
    """Seconds of every layer alone at every sparsity; layers that are the same problem, of the
    same shapes and settings, are timed once.

    Args:
        layers: which.
        levels: sparsities.
        pruned: a layer's weight at a sparsity.
        ctx: has the timer, and shows the progress.
    """
    known: dict[str, list[float]] = {}
    for layer in ctx.track(layers, "timing layers"):
        key = problem(layer)
        if key not in known:
            known[key] = [_seconds(layer, pruned(layer, level), ctx) for level in levels]
    return {layer: known[problem(layer)] for layer in layers}


def _seconds(layer: PrunableLayer, weight: Tensor, ctx: Context) -> float:
    """Of a layer alone with some weight, all its uses together."""
    return sum(ctx.target.time(fragment(node, weight)) for node in layer.nodes)


def fragment(node: Node, weight: Tensor) -> Graph:
    """A graph of one layer alone, with another weight. All its sizes are fixed.

    A quantized layer is taken as if it were not; the time of the whole network puts that right.
    """
    graph = Graph()
    made: dict[Value, Value] = {}

    def twin(leaf: object) -> object:
        if not isinstance(leaf, Value):
            return leaf
        if leaf is node["weight"]:
            made.setdefault(leaf, graph.constant(weight, "weight"))
        elif leaf.constant is not None:
            made.setdefault(leaf, graph.constant(leaf.constant, leaf.name))
        elif isinstance(leaf.type, TensorType):
            made.setdefault(leaf, graph.add_input(leaf.name, leaf.type))
        return made[leaf]

    operands = {name: map_operand(operand, twin) for name, operand in node.operands.items()}
    graph.set_outputs(graph.add_node(node.op, **operands).outputs)
    return graph


def problem(layer: PrunableLayer) -> str:
    """The same for layers that take the same time: of the same shapes, settings and number of
    zeros."""
    parts = []
    for node in layer.nodes:
        operands = {
            name: map_operand(o, lambda leaf: leaf.type if isinstance(leaf, Value) else leaf)
            for name, o in node.operands.items()
        }
        parts.append(f"{node.op} {operands}")
    return f"{parts} {int(torch.count_nonzero(layer.weight.tensor))}"
