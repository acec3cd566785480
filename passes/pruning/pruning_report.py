"""What `Prune` tells: sparsity asked and got, errors, multiply-adds, bytes and times per layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graphopt import reference
from graphopt.calibration import CalibrationData, Observer, observe
from graphopt.ir import Graph, Node, Value
from graphopt.pass_report import PassReport
from graphopt.passes.pruning.layers_to_prune import EMBEDDING, PrunableLayer
from graphopt.passes.pruning.sensitivity import relative_error

if TYPE_CHECKING:
    from graphopt.passes.pruning.prune import Prune
    from graphopt.passes.pruning.time_budget import TimedChoice


class Before:
    """A network before it is pruned.

    Args:
        graph: kept as a copy; the tensors are shared.
        layers: those that may be pruned.
    """

    def __init__(self, graph: Graph, layers: Sequence[PrunableLayer]) -> None:
        self.graph = graph.clone()
        self.layers = list(layers)
        self.weights = {layer: layer.weight.tensor for layer in layers}


def now_of(layer: PrunableLayer) -> Tensor:
    """The weight that a layer has now."""
    return layer.node.graph.weight(layer.node).tensor


def pruning_report(
    before: Before,
    options: Prune,
    sparsities: Mapping[PrunableLayer, float],
    left: Mapping[str, str],
    timed: TimedChoice | None,
) -> PassReport:
    """Report on a pruned graph.

    Args:
        before: as it was.
        options: what was asked.
        sparsities: fraction of the weights that were not zero, asked per layer.
        left: why other layers were left alone.
        timed: what was measured, if anything was.
    """
    data = options.data
    if data is not None and iter(data) is data:  # a generator, and read already
        data = None
    errors = _errors(before, data)
    columns = ["layer", "weights", "asked", "sparsity", "error", "MACs before", "MACs after"]
    columns += ["bytes before", "bytes after"]
    if timed is not None:
        columns += ["ms before", "ms after"]
    rows = []
    for layer in before.layers:
        old, new = before.weights[layer], now_of(layer)
        zeros, size = int((old == 0).sum()), old.numel()
        asked = 1 - (1 - zeros / size) * (1 - sparsities[layer])
        kept = [size - zeros, int(torch.count_nonzero(new))]
        item = layer.weight.constant.dtype.itemsize
        row: list[str | float | None] = [layer.name, size, asked, 1 - kept[1] / size]
        row += [errors[layer], *(round(layer.macs_per_weight * k) for k in kept)]
        row += [_stored_bytes(k, size, item) for k in kept]
        if timed is not None:
            row += [1e3 * seconds for seconds in timed.layer_seconds[layer]]
        rows.append(row)
    remarks = _remarks(left, data, timed)
    return PassReport(_title(before, options), tuple(columns), tuple(rows), remarks)


def _title(before: Before, options: Prune) -> str:
    weights = sum(old.numel() for old in before.weights.values())
    kept = sum(int(torch.count_nonzero(now_of(layer))) for layer in before.layers)
    criterion = options.criterion
    name = criterion if isinstance(criterion, str) else getattr(criterion, "__name__", "own")
    how = options.allocation
    if options.threshold is not None:
        how = f"threshold {options.threshold:g}"
    elif options.speedup is not None:
        how = f"{options.speedup:g} times as fast"
    return (
        f"prune: {options.granularity}, {name}, {how}: "
        f"{1 - kept / weights:.2%} of {weights:,} weights are zero"
    )


def _remarks(
    left: Mapping[str, str], data: Iterable[Any] | None, timed: TimedChoice | None
) -> tuple[str, ...]:
    inputs = "inputs of the first batch" if data is not None else "white inputs"
    remarks = [
        f"error: of the layer's output, relative, for {inputs} of the network as it was",
        "bytes: non-zero weights and a bit for each place; without zeros, all weights",
    ]
    if timed is not None:
        before, after = (1e3 * seconds for seconds in timed.seconds)
        remarks.append(
            f"the whole network: {before:.4g} ms before, {after:.4g} ms after, "
            f"{timed.speedup:.2f} times as fast"
        )
    by_reason: dict[str, list[str]] = {}
    for name, reason in left.items():
        by_reason.setdefault(reason, []).append(name)
    remarks += [f"left alone: {', '.join(names)}: {why}" for why, names in by_reason.items()]
    return tuple(remarks)


def _stored_bytes(nonzeros: int, size: int, item: int) -> int:
    return size * item if nonzeros == size else nonzeros * item + -(-size // 8)


def _errors(before: Before, data: Iterable[Any] | None) -> dict[PrunableLayer, float]:
    """Per layer, the root of the relative squared error of its output."""
    if data is None:
        return {
            layer: relative_error([now_of(layer)], [old]) ** 0.5
            for layer, old in before.weights.items()
        }
    squares: dict[PrunableLayer, float] = {}

    def comparison(layer: PrunableLayer, old: Node) -> Observer:
        def compare(x: Tensor) -> None:
            exact = _output(old, x, before.weights[layer])
            squares[layer] = relative_error([_output(layer.node, x, now_of(layer))], [exact])

        return compare

    observers: list[tuple[Value, Observer]] = []
    for layer in before.layers:
        old = before.graph.value(layer.node.output.name).producer
        assert old is not None
        observers.append((_input(old), comparison(layer, old)))
    observe(before.graph, CalibrationData(data, limit=1), observers)
    return {layer: square**0.5 for layer, square in squares.items()}


def _input(node: Node) -> Value:
    value: Value = node["indices"] if node.op == EMBEDDING else node["input"]
    return value


def _output(node: Node, x: Tensor, weight: Tensor) -> Any:
    given = {value: value.constant for value in node.input_values()}
    return reference.evaluate(node, {**given, _input(node): x, node["weight"]: weight})
