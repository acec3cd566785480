"""One network of the zoo with a third of its channels gone, through torch, the engine and
onnxruntime, each against the masked network in float64.

What `tests/passes/test_channel_pruning_zoo.py` tests and `benchmarks/channel_pruning.py --zoo`
tabulates.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import torch
from agreement import bound, largest_error, tensors
from zoo import Network

import graphopt
from graphopt import Graph, Pipeline, reference
from graphopt.engine import Selection, compile_graph
from graphopt.onnx import export_onnx
from graphopt.passes import EXACT
from graphopt.passes.pruning.channel_groups import find_groups
from graphopt.passes.pruning.channel_removal import mask_units, remove_units

BATCHES = (2, 3)


class Pruned:
    """A network that has lost a random third of the units of every group at once.

    Attributes:
        groups: how many groups of channels and of attention heads it has.
        kept: the part of its constants' elements that is left.
        masked, pruned: the graphs that must agree.
    """

    def __init__(self, network: Network, size: int, *, exact: bool = True) -> None:
        model = network.build(size)
        dense = graphopt.trace(model, network.inputs(BATCHES[0], size).example())
        if exact:
            Pipeline(EXACT).run(dense)
        groups = [*find_groups(dense)[0], *find_groups(dense, heads=True)[0]]
        generator = torch.Generator().manual_seed(0)
        removals = {
            group: torch.randperm(group.units, generator=generator)[
                : max(1, group.units // 3)
            ].tolist()
            for group in groups
        }
        self.groups = len(groups)
        self.masked = mask_units(dense, removals)
        self.pruned = dense.clone()
        remove_units(self.pruned, removals)
        self.pruned.verify()
        self.kept = _elements(self.pruned) / _elements(dense)
        self._inputs = {b: _flat(network.inputs(b, size, seed=b)) for b in BATCHES}
        self._wanted = {
            b: reference.run(self.masked, x, dtype=torch.float64) for b, x in self._inputs.items()
        }
        #: the masked network in float32: torch's own rounding, beside 1e-5
        self.allowed = max(
            1e-5,
            *(bound(reference.run(self.masked, x), self._wanted[b]) for b, x in self._items()),
        )

    def _items(self) -> Any:
        return self._inputs.items()

    def torch_error(self) -> float:
        """In float64, so that nothing but the removal counts."""
        return max(
            largest_error(reference.run(self.pruned, x, dtype=torch.float64), self._wanted[b])
            for b, x in self._items()
        )

    def engine_error(self) -> float:
        errors = []
        for batch, inputs in self._items():
            sizes = dict.fromkeys(self.pruned.sizes, batch)
            plan = compile_graph(self.pruned, sizes, threads=2, selection=Selection(measure=False))
            wanted = [
                y for y, here in zip(self._wanted[batch], plan.is_computed, strict=True) if here
            ]
            errors.append(largest_error(plan.run(*inputs), wanted))
        return max(errors)

    def onnx_error(self, path: Path) -> float:
        export_onnx(self.pruned, path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_inputs()]
        errors = []
        for batch, inputs in self._items():
            feed = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
            outputs = [torch.from_numpy(y) for y in session.run(None, feed)]
            errors.append(largest_error(outputs, tensors(self._wanted[batch])))
        return max(errors)


def _flat(inputs: Any) -> list[torch.Tensor]:
    return tensors((inputs.args, inputs.kwargs))


def _elements(graph: Graph) -> int:
    return sum(value.constant.numel() for value in graph.constants if value.constant is not None)
