"""Where, and by how much, an optimized graph departs from its source."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table

from graphopt import reference
from graphopt.ir import Graph, Node, Value
from graphopt.plain_text import plain_text

RELATIVE_BOUND = 1e-3


@dataclass(frozen=True)
class Difference:
    """How far a tensor is from what it should be.

    Attributes:
        name: the value, or the output's place.
        module: the module of the source network that computes it.
        largest: largest absolute difference.
        relative: that, as a fraction of the largest expected magnitude.
        sqnr: signal to quantization-noise ratio in decibels; infinite where they are equal.
    """

    name: str
    module: str
    largest: float
    relative: float
    sqnr: float

    @staticmethod
    def between(name: str, module: str, expected: torch.Tensor, actual: torch.Tensor) -> Difference:
        if expected.numel() == 0:
            return Difference(name, module, 0.0, 0.0, math.inf)
        expected, actual = expected.to(torch.float64), actual.to(torch.float64)
        same = (expected == actual) | (expected.isnan() & actual.isnan())
        noise = torch.where(same, 0.0, (expected - actual).abs())
        finite = expected.isfinite()
        largest = noise.max().item()
        scale = expected[finite].abs().max().item() if finite.any() else 0.0
        signal, error = expected[finite].square().sum().item(), noise.square().sum().item()
        relative = largest / scale if scale else (0.0 if largest == 0 else math.inf)
        return Difference(name, module, largest, relative, decibels(signal, error))


def decibels(signal: float, noise: float) -> float:
    """The ratio of two powers in decibels, at least -3000; infinite without noise."""
    return math.inf if noise == 0 else 10 * math.log10(max(signal / noise, 1e-300))


@dataclass(frozen=True)
class Comparison:
    """What `OptimizedModel.compare` finds; prints as a table.

    Attributes:
        outputs: the engine's results against the source model's.
        layers: values that both graphs have, in order: the optimized graph against the source's.
        bound: relative difference above which two layers have parted.
    """

    outputs: tuple[Difference, ...]
    layers: tuple[Difference, ...]
    bound: float = RELATIVE_BOUND

    @property
    def first_difference(self) -> Difference | None:
        """The first layer whose relative difference is above the bound."""
        return next((d for d in self.layers if not d.relative <= self.bound), None)

    def __str__(self) -> str:
        table = Table(title="optimized against source", title_justify="left")
        for column in ("value", "module"):
            table.add_column(column)
        for column in ("largest error", "relative", "SQNR [dB]"):
            table.add_column(column, justify="right")
        first = self.first_difference
        for difference in (*self.outputs, *([first] if first else [])):
            mark = " (first to part)" if difference is first else ""
            table.add_row(
                difference.name + mark,
                difference.module,
                f"{difference.largest:.3g}",
                f"{difference.relative:.3g}",
                f"{difference.sqnr:.1f}",
            )
        return plain_text(table)


def compare(
    source: Graph,
    optimized: Graph,
    inputs: Sequence[Any],
    expected: Sequence[Any],
    actual: Sequence[Any],
) -> Comparison:
    """Compare results, and the values that both graphs compute.

    Args:
        source: the graph before the passes.
        optimized: the graph after them.
        inputs: tensors for both.
        expected: the source model's flat results.
        actual: the optimized model's flat results.
    """
    outputs = [
        Difference.between(f"output {position}", "", e, a)
        for position, (e, a) in enumerate(zip(expected, actual, strict=True))
        if isinstance(e, torch.Tensor)
    ]
    known: dict[str, torch.Tensor] = {}

    def remember(node: Node, results: list[Any]) -> None:
        for value, result in zip(node.outputs, results, strict=True):
            if isinstance(result, torch.Tensor):
                known[value.name] = result

    layers: list[Difference] = []
    originals = {node.name: node for node in source.nodes}

    def contrast(node: Node, results: list[Any]) -> None:
        for value, result in zip(node.outputs, results, strict=True):
            other = known.get(_counterpart(value, originals))
            if other is None or not isinstance(result, torch.Tensor):
                continue
            if other.shape == result.shape and other.dtype == result.dtype:
                layers.append(Difference.between(value.name, node.origin.module, other, result))

    reference.run(source, inputs, observe=remember)
    reference.run(optimized, inputs, observe=contrast)
    return Comparison(tuple(outputs), tuple(layers))


def _counterpart(value: Value, originals: Mapping[str, Node]) -> str:
    """The name in the source of what a value of the optimized graph stands for.

    That is its own name, unless its layer has other constants than in the source: then it has
    taken over what followed it, and stands for what its users read in the source.
    """
    producer = value.producer
    assert producer is not None
    twin = originals.get(producer.name)
    if twin is not None and _constants(producer) != _constants(twin):
        for user in value.users:
            original = originals.get(user.name)
            if original is None or original.op != user.op:
                continue
            if _constants(original) == _constants(user):
                for name, operand in user.operands.items():
                    read = original.operands.get(name)
                    if operand is value and isinstance(read, Value):
                        return read.name
    return value.name


def _constants(node: Node) -> list[int]:
    """Where a node's constants lie in memory."""
    values = node.input_values()
    return [value.constant.data_ptr() for value in values if value.constant is not None]
