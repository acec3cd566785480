"""How much the output of each layer has changed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from graphopt import reference
from graphopt.calibration import CalibrationData, Observer, observe
from graphopt.ir import Graph, Node, Value
from graphopt.passes.layers import EMBEDDING
from graphopt.passes.pruning.layers_to_prune import PrunableLayer
from graphopt.passes.pruning.sensitivity import relative_error


def output_errors(
    graph: Graph,
    layers: Sequence[tuple[PrunableLayer, PrunableLayer]],
    data: Iterable[Any] | None,
) -> dict[str, float]:
    """Root of the relative squared error of each layer's output, by the layer's name.

    Args:
        graph: the network as it was.
        layers: of that network, each with what it has become, of the same shape.
        data: the inputs of its first batch go through the network as it was, so that each layer's
            error is its own. None for white inputs: the error of the weight.
    """
    if data is None:
        return {
            old.name: relative_error([new.weight.tensor], [old.weight.tensor]) ** 0.5
            for old, new in layers
        }
    errors: dict[str, float] = {}

    def comparison(old: PrunableLayer, new: PrunableLayer) -> Observer:
        def compare(x: Tensor) -> None:
            errors[old.name] = relative_error([_output(new, x)], [_output(old, x)]) ** 0.5

        return compare

    observers = [(_input(old.node), comparison(old, new)) for old, new in layers]
    observe(graph, CalibrationData(data, limit=1), observers)
    return errors


def error_remark(data: Iterable[Any] | None) -> str:
    """What to say of these errors below a report's table."""
    inputs = "inputs of the first batch" if data is not None else "white inputs"
    return f"error: of the layer's output, relative, for {inputs} of the network as it was"


def readable_again(data: Iterable[Any] | None) -> Iterable[Any] | None:
    """The data, or None where it is a generator, which has been read already."""
    return None if data is not None and iter(data) is data else data


def _input(node: Node) -> Value:
    value: Value = node["indices"] if node.op == EMBEDDING else node["input"]
    return value


def _output(layer: PrunableLayer, x: Tensor) -> Any:
    node = layer.node
    given = {value: value.constant for value in node.input_values()}
    return reference.evaluate(node, {**given, _input(node): x, node["weight"]: layer.weight.tensor})
