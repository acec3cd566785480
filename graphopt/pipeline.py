"""Runs passes over a graph, verifying it after each."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from graphopt.errors import PassError
from graphopt.ir import Graph
from graphopt.registry import Accuracy, BoundPass, Pass, PassLike, as_pass, register_pass
from graphopt.target import Target

__all__ = ["Accuracy", "Context", "Pass", "PassLike", "Pipeline", "register_pass"]


@dataclass
class Context:
    """What a pass is given beside the graph.

    Attributes:
        target: the machine, as far as passes may ask.
        options: settings of the whole pipeline, by name.
        logger: for what a pass has to say.
        progress: whether `track` shows a progress bar.
        generator: the source of all randomness in passes.
    """

    target: Target = field(default_factory=Target)
    options: Mapping[str, Any] = field(default_factory=dict)
    logger: logging.Logger = field(default_factory=lambda: logging.getLogger("graphopt"))
    progress: bool = False
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))


class Pipeline:
    """Passes in the order in which they run.

    Args:
        passes: registered names, instances or functions.

    Raises:
        PassError: a name is unknown, or an object is no pass.
    """

    def __init__(self, passes: Iterable[PassLike]) -> None:
        self.passes: tuple[BoundPass, ...] = tuple(map(as_pass, passes))

    def run(self, graph: Graph, ctx: Context | None = None) -> bool:
        """Run all passes over the graph, in place; returns whether any changed it."""
        ctx = ctx or Context()
        changed = False
        for one in self.passes:
            with graph.making(one.name):
                reported = one.function(graph, ctx)
            if not isinstance(reported, bool):
                raise PassError(f"the pass '{one.name}' returned {reported!r}, not True or False")
            graph.verify()
            changed |= reported
        return changed
