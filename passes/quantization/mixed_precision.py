"""Which layers must stay in floats: who hurts most, until a target is met."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import islice

from torch import Tensor

from graphopt import reference
from graphopt.calibration import CalibrationData
from graphopt.comparison import decibels
from graphopt.ir import Graph
from graphopt.pipeline import Context

Build = Callable[[Sequence[str]], Graph]
"""The network with these layers quantized, and no others."""

BATCHES = 4
"""How many batches of the calibration data sensitivities are measured with."""


class SignalToNoise:
    """Power of outputs over that of their errors, in decibels, over many batches."""

    def __init__(self) -> None:
        self._signal = 0.0
        self._noise = 0.0

    def add(self, expected: Sequence[object], actual: Sequence[object]) -> None:
        for wanted, given in zip(expected, actual, strict=True):
            if isinstance(wanted, Tensor) and wanted.is_floating_point():
                assert isinstance(given, Tensor)
                self._signal += wanted.double().square().sum().item()
                self._noise += (wanted.double() - given.double()).square().sum().item()

    @property
    def decibels(self) -> float:
        return decibels(self._signal, self._noise)


def signal_to_noise(
    source: Graph, graphs: Sequence[Graph], data: CalibrationData, ctx: Context, what: str
) -> list[float]:
    """SQNR (dB) of each graph's outputs against those of the source, over the first batches."""
    seen = [SignalToNoise() for _ in graphs]
    for batch in islice(data.batches(source, None), BATCHES):
        expected = reference.run(source, batch.inputs)
        for ratio, graph in zip(seen, ctx.track(graphs, what), strict=True):
            ratio.add(expected, reference.run(graph, batch.inputs))
    return [ratio.decibels for ratio in seen]


def sensitivities(
    source: Graph, build: Build, layers: Sequence[str], data: CalibrationData, ctx: Context
) -> dict[str, float]:
    """SQNR (dB) of the outputs when only this layer is quantized, for every layer."""
    graphs = [build([name]) for name in layers]
    found = signal_to_noise(source, graphs, data, ctx, "sensitivity of layers")
    return dict(zip(layers, found, strict=True))


def fewest_in_floats(order: Sequence[str], is_good: Callable[[Sequence[str]], bool]) -> list[str]:
    """The shortest beginning of an order whose layers, left in floats, meet a target.

    Args:
        order: layers, those that hurt most first.
        is_good: whether the target is met when these layers are left in floats. More layers in
            floats are taken to be no worse, so that bisection finds the shortest.
    """
    count = bisect_left(range(len(order)), True, key=lambda n: is_good(order[:n]))
    return list(order[:count])
