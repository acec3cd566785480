"""Finds the pass, and the application of a rule in it, that brings an error."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from graphopt.errors import PassError
from graphopt.ir import Graph
from graphopt.ir.rewriting import limit_applications
from graphopt.numerics import Yardstick
from graphopt.pipeline import Context, Pipeline
from graphopt.registry import BoundPass, PassLike


@dataclass(frozen=True)
class Culprit:
    """What first brings an error above the tolerance.

    Attributes:
        position: of the pass in the pipeline, from 0.
        name: of the pass.
        application: the rule and the node, where the pass rewrites by rules.
        error: relative error of the outputs after it, against the graph before all passes.
        before: the graph before that pass, or before that application in it.
        after: the graph after it.
    """

    position: int
    name: str
    application: str | None
    error: float
    before: Graph
    after: Graph

    def __str__(self) -> str:
        where = f", applying {self.application}," if self.application else ""
        return f"pass {self.position} ('{self.name}'){where} brings the error to {self.error:.3g}"


def bisect(
    passes: Iterable[PassLike],
    graph: Graph,
    inputs: Sequence[Any],
    tolerance: float,
    ctx: Context | None = None,
) -> Culprit | None:
    """Find the first pass after which the outputs err by more than a tolerance, and within it,
    if it rewrites by rules, the first application that brings this about.

    Args:
        passes: as `Pipeline` takes them.
        graph: not changed.
        inputs: one tensor per graph input.
        tolerance: largest relative error of an output that is acceptable.
        ctx: what the passes are given.

    Returns:
        None if no pass exceeds the tolerance.

    Raises:
        PassError: a pass fails.
    """
    if not tolerance >= 0:
        raise PassError(f"a tolerance must not be negative, got {tolerance}")
    yardstick = Yardstick(graph, inputs)
    current = graph.clone()
    for position, one in enumerate(Pipeline(passes).passes):
        before = current.clone()
        with limit_applications(None) as applied:
            Pipeline([one]).run(current, ctx)
        error = yardstick.error(current)
        if error <= tolerance:
            continue
        if not applied:
            return Culprit(position, one.name, None, error, before, current)
        return _first_application(position, one, before, yardstick, tolerance, len(applied), ctx)
    return None


def _first_application(
    position: int,
    one: BoundPass,
    graph: Graph,
    yardstick: Yardstick,
    tolerance: float,
    count: int,
    ctx: Context | None,
) -> Culprit:
    """Binary search for neighbouring numbers of applications, the larger of which is too much."""

    def after(limit: int) -> tuple[Graph, float, list[str]]:
        trial = graph.clone()
        with limit_applications(limit) as applied:
            Pipeline([one]).run(trial, ctx)
        return trial, yardstick.error(trial), applied

    good, bad = 0, count
    while bad - good > 1:
        middle = (good + bad) // 2
        if after(middle)[1] <= tolerance:
            good = middle
        else:
            bad = middle
    after_graph, error, applied = after(bad)
    # A pass may do more than its rules; what is left when none is applied is not a rule's fault.
    innocent = after(0)[1] > tolerance
    application = None if innocent or not applied else applied[-1]
    before = graph if innocent else after(good)[0]
    return Culprit(position, one.name, application, error, before, after_graph)
