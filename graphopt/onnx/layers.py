"""Compares an exported quantized network with its graph layer by layer, on equal inputs."""

from __future__ import annotations

import os
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx.utils import Extractor
from rich.table import Table

from graphopt import reference
from graphopt.errors import ExportError
from graphopt.ir import Graph, Node, Value
from graphopt.onnx.verification import cpu_session
from graphopt.plain_text import plain_text

_QUANTIZE = "graphopt.quantize"


@dataclass(frozen=True)
class LayerSteps:
    """How far onnxruntime's result of one layer is from the graph's.

    Attributes:
        name: the quantized value.
        module: the module of the source network that computes it.
        steps: largest difference, in steps of the quantized value.
        different: the share of elements that differ.
    """

    name: str
    module: str
    steps: int
    different: float


@dataclass(frozen=True)
class LayerComparison:
    """What `compare_layers` finds, in the graph's order; prints as a table."""

    layers: tuple[LayerSteps, ...]

    @property
    def largest(self) -> int:
        """The largest difference of all layers, in steps."""
        return max((layer.steps for layer in self.layers), default=0)

    @property
    def first_difference(self) -> LayerSteps | None:
        """The first layer that differs by more than the one step that rounding explains."""
        return next((layer for layer in self.layers if layer.steps > 1), None)

    def __str__(self) -> str:
        table = Table(title="onnxruntime against the graph, layer by layer", title_justify="left")
        for column in ("value", "module"):
            table.add_column(column)
        for column in ("steps", "elements that differ"):
            table.add_column(column, justify="right")
        first = self.first_difference
        for layer in self.layers:
            mark = " (first to part)" if layer is first else ""
            share = f"{layer.different:.2%}"
            table.add_row(layer.name + mark, layer.module, str(layer.steps), share)
        return plain_text(table)


def compare_layers(
    graph: Graph, path: str | os.PathLike[str], inputs: Sequence[torch.Tensor]
) -> LayerComparison:
    """Run every quantized layer of a file in onnxruntime, with its integer kernels, on what the
    graph gives the layer.

    Args:
        graph: what the file was exported from.
        path: the file.
        inputs: one tensor per graph input.

    Raises:
        ExportError: the file does not quantize what the graph does.
    """
    values = [node.output for node in graph.nodes if _is_quantized(node)]
    seen: dict[Value, torch.Tensor] = dict(zip(graph.inputs, inputs, strict=True))

    def remember(node: Node, results: list[Any]) -> None:
        if _is_quantized(node):
            seen[node.output] = results[0]

    reference.run(graph, inputs, observe=remember)
    model = onnx.load(os.fspath(path))
    names = [node.output[0] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    if len(names) != len(values):
        raise ExportError(
            f"{path} has {len(names)} quantized values, and the graph {len(values)}; it was "
            "exported from another one"
        )
    known = {x.name: seen[v] for x, v in zip(model.graph.input, graph.inputs, strict=True)}
    known |= {name: seen[value] for name, value in zip(names, values, strict=True)}
    producers = {output: node for node in model.graph.node for output in node.output}
    extractor = Extractor(model)
    layers = []
    for name, value in zip(names, values, strict=True):
        sources = _sources(producers, name, known)
        part = cpu_session(extractor.extract_model(sources, [name]).SerializeToString())
        (result,) = part.run(None, {source: known[source].numpy() for source in sources})
        difference = np.abs(result.astype(np.int64) - known[name].numpy().astype(np.int64))
        producer = value.producer
        assert producer is not None
        layers.append(
            LayerSteps(
                value.name,
                producer.origin.module,
                int(difference.max(initial=0)),
                float((difference > 0).mean()) if difference.size else 0.0,
            )
        )
    return LayerComparison(tuple(layers))


def _is_quantized(node: Node) -> bool:
    return node.op == _QUANTIZE and not all(value.is_constant for value in node.input_values())


def _sources(
    producers: Mapping[str, onnx.NodeProto], name: str, known: Container[str]
) -> list[str]:
    """The quantized values and inputs that a quantized value is computed from."""
    found: dict[str, None] = {}
    stack = list(producers[name].input)
    while stack:
        given = stack.pop()
        if given in known:
            found[given] = None
        elif given in producers:
            stack += producers[given].input
    return list(found)
