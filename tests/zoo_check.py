"""One network of the zoo through every stage, each against torch in float64.

The stages are the columns of the benchmark's table and the tests of `tests/test_zoo.py`.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from agreement import assert_same_form, bound, largest_error, tensors
from torch import nn
from zoo import Inputs, Network

import graphopt

BATCHES = (2, 3)


@dataclass(frozen=True)
class Truth:
    """What torch gives for one batch: in float32, and in float64 from the same weights."""

    inputs: Inputs
    single: Any
    double: Any

    @classmethod
    def of(cls, network: Network, model: nn.Module, batch: int, size: int) -> Truth:
        inputs = network.inputs(batch, size, seed=batch)
        with torch.no_grad():
            double = inputs.to(torch.float64).call(copy.deepcopy(model).double())
            return cls(inputs, inputs.call(model), double)

    @property
    def allowed(self) -> float:
        return bound(self.single, self.double)

    def error(self, outputs: Any) -> float:
        """Largest relative error of a result, whose form must be the model's own."""
        assert_same_form(outputs, self.single)
        return largest_error(outputs, self.double)


class Subject:
    """A built network with its stages, each computed when first asked for."""

    def __init__(self, network: Network, size: int) -> None:
        self.network = network
        self.size = size
        self.model = network.build(size)
        self.truths = [Truth.of(network, self.model, batch, size) for batch in BATCHES]

    @property
    def example(self) -> Any:
        return self.truths[0].inputs.example()

    @functools.cached_property
    def optimized(self) -> graphopt.OptimizedModel:
        return graphopt.optimize(self.model, self.example)

    def graph_errors(self, graph: graphopt.Graph) -> list[float]:
        """Errors of torch running a graph, at each batch."""
        module = graph.to_torch()
        with torch.no_grad():
            return [truth.error(truth.inputs.call(module)) for truth in self.truths]

    def engine_errors(self) -> list[float]:
        return [truth.error(truth.inputs.call(self.optimized)) for truth in self.truths]

    def onnx_errors(self, path: Path) -> list[float]:
        """Errors of onnxruntime running the export; its outputs are a flat list."""
        self.optimized.export_onnx(path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_inputs()]
        errors = []
        for truth in self.truths:
            given = tensors((truth.inputs.args, truth.inputs.kwargs))
            feed = {name: x.numpy() for name, x in zip(names, given, strict=True)}
            outputs = [torch.from_numpy(y) for y in session.run(None, feed)]
            errors.append(largest_error(outputs, tensors(truth.double)))
        return errors
