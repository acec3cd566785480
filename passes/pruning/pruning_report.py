"""What `Prune` tells: sparsity asked and got, errors, multiply-adds, bytes and times per layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from graphopt.ir import Graph
from graphopt.pass_report import PassReport
from graphopt.passes.pruning.layer_errors import error_remark, output_errors, readable_again
from graphopt.passes.pruning.layer_times import TIME_COLUMNS, Times, remarks_on
from graphopt.passes.pruning.layers_to_prune import PrunableLayer

if TYPE_CHECKING:
    from graphopt.passes.pruning.prune import Prune


class Before:
    """A network before it is pruned.

    Args:
        graph: kept as a copy; the tensors are shared.
        layers: those that may be pruned.

    Attributes:
        graph: the copy.
        layers: those of the copy.
    """

    def __init__(self, graph: Graph, layers: Sequence[PrunableLayer]) -> None:
        self.graph = graph.clone()
        self.layers = [layer.twin(self.graph) for layer in layers]

    def and_now(self, graph: Graph) -> list[tuple[PrunableLayer, PrunableLayer]]:
        """Each layer as it was, and as it is in the pruned graph."""
        return [(layer, layer.twin(graph)) for layer in self.layers]


def pruning_report(
    before: Before,
    graph: Graph,
    options: Prune,
    sparsities: Mapping[PrunableLayer, float],
    left: Mapping[str, str],
    times: Times | None,
) -> PassReport:
    """Report on a pruned graph.

    Args:
        before: as it was.
        graph: as it is.
        options: what was asked.
        sparsities: fraction of the weights that were not zero, asked per layer.
        left: why other layers were left alone.
        times: what was measured, if anything was.
    """
    data = readable_again(options.data)
    layers = before.and_now(graph)
    errors = output_errors(before.graph, layers, data)
    asked_of = {layer.name: sparsity for layer, sparsity in sparsities.items()}
    columns = ["layer", "weights", "asked", "sparsity", "error", "MACs before", "MACs after"]
    columns += ["bytes before", "bytes after"]
    columns += TIME_COLUMNS if times is not None else []
    rows = []
    for old, new in layers:
        size = old.weight.tensor.numel()
        kept = [int(torch.count_nonzero(layer.weight.tensor)) for layer in (old, new)]
        asked = 1 - kept[0] / size * (1 - asked_of[old.name])
        row: list[str | float | None] = [old.name, size, asked, 1 - kept[1] / size]
        row += [errors[old.name], *(round(old.macs_per_weight * k) for k in kept)]
        item = old.weight.constant.dtype.itemsize
        row += [_stored_bytes(k, size, item) for k in kept]
        row += times.row(old.name) if times is not None else []
        rows.append(row)
    weights = sum(old.weight.tensor.numel() for old, _ in layers)
    kept_weights = sum(int(torch.count_nonzero(new.weight.tensor)) for _, new in layers)
    title = f"{_title(options)}: {1 - kept_weights / weights:.2%} of {weights:,} weights are zero"
    return PassReport(title, tuple(columns), tuple(rows), _remarks(left, data, times))


def _title(options: Prune) -> str:
    criterion = options.criterion
    name = criterion if isinstance(criterion, str) else getattr(criterion, "__name__", "own")
    how = options.allocation
    if options.threshold is not None:
        how = f"threshold {options.threshold:g}"
    elif options.speedup is not None:
        how = f"{options.speedup:g} times as fast"
    return f"prune: {options.granularity}, {name}, {how}"


def _remarks(
    left: Mapping[str, str], data: Iterable[Any] | None, times: Times | None
) -> tuple[str, ...]:
    return (
        error_remark(data),
        "bytes: non-zero weights and a bit for each place; without zeros, all weights",
        *remarks_on(times),
        *_left_alone(left),
    )


def _left_alone(reasons: Mapping[str, str]) -> list[str]:
    """Remarks on what was left alone, given the reasons by name."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(name)
    return [f"left alone: {', '.join(names)}: {why}" for why, names in by_reason.items()]


def _stored_bytes(nonzeros: int, size: int, item: int) -> int:
    return size * item if nonzeros == size else nonzeros * item + -(-size // 8)
