"""Whether a changed graph still computes the numbers that it should."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphopt import reference
from graphopt.ir import Graph

# A float32 result may err this many times as much as the one it replaces, since another order of
# operations rounds differently; and by a few roundings where that happens to be exact.
FACTOR = 4.0
ROUNDINGS = 32


def relative_error(expected: Sequence[Any], actual: Sequence[Any]) -> float:
    """The largest difference of two lists of outputs, relative to the largest expected magnitude
    of the output; infinite where shapes, integers, NaNs or infinities differ."""
    errors = [_error(e, a) for e, a in zip(expected, actual, strict=True)]
    return max(errors, default=0.0)


def _error(expected: Any, actual: Any) -> float:
    if not isinstance(expected, torch.Tensor):
        return 0.0 if type(expected) is type(actual) and expected == actual else float("inf")
    if not isinstance(actual, torch.Tensor) or expected.shape != actual.shape:
        return float("inf")
    if not (expected.is_floating_point() or expected.is_complex()):
        return 0.0 if torch.equal(expected, actual) else float("inf")
    kind = torch.complex128 if expected.is_complex() else torch.float64
    expected, actual = expected.to(kind), actual.to(kind)
    same = (expected == actual) | (expected.isnan() & actual.isnan())
    finite = expected.isfinite()
    if not bool((same | (finite & actual.isfinite())).all()):
        return float("inf")
    difference = (expected - actual)[~same].abs()
    if difference.numel() == 0:
        return 0.0
    scale = expected[finite].abs().max().item()
    return difference.max().item() / scale if scale else float("inf")


class Yardstick:
    """What a graph gives for some inputs, to compare with what it gives after a change.

    Args:
        graph: as it is now; it may be changed afterwards.
        inputs: one tensor per graph input.
    """

    def __init__(self, graph: Graph, inputs: Sequence[Any]) -> None:
        self.inputs = list(inputs)
        self.outputs = _run(graph, inputs, None)
        exact = _run(graph, inputs, torch.float64)
        # Outputs that are no floating numbers, such as an index of a maximum, have no rounding.
        self._exact = [
            e if isinstance(o, torch.Tensor) and o.is_floating_point() else o
            for e, o in zip(exact, self.outputs, strict=True)
        ]
        self._own = [_error(e, o) for e, o in zip(self._exact, self.outputs, strict=True)]

    def error(self, graph: Graph) -> float:
        """`relative_error` of a graph's outputs against those of the graph as it was."""
        return relative_error(self.outputs, _run(graph, self.inputs, None))

    def departs(self, graph: Graph) -> str | None:
        """How a graph differs by more than float rounding; None if it does not."""
        actual = _run(graph, self.inputs, None)
        for position, (exact, got, own) in enumerate(
            zip(self._exact, actual, self._own, strict=True)
        ):
            error, bound = _error(exact, got), FACTOR * own + ROUNDINGS * _epsilon(got)
            if not error <= bound:
                return (
                    f"output {position} has a relative error of {error:.3g}, where float rounding "
                    f"explains {bound:.3g}"
                )
        return None


def _run(graph: Graph, inputs: Sequence[Any], dtype: torch.dtype | None) -> list[Any]:
    """The same random numbers each time, so that random operators do not count as a change."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return reference.run(graph, inputs, dtype=dtype)


def _epsilon(output: Any) -> float:
    if isinstance(output, torch.Tensor) and (output.is_floating_point() or output.is_complex()):
        return torch.finfo(output.dtype).eps
    return 0.0
