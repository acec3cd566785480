"""`graphopt.optimize`: the public face over tracing, passes and engine."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import nn

from graphopt.engine import time_graph
from graphopt.errors import Error
from graphopt.ir import Graph
from graphopt.model import OptimizedModel
from graphopt.pass_report import PassReport
from graphopt.passes import EXACT
from graphopt.pipeline import Context, Pipeline
from graphopt.precision import cpu_source
from graphopt.registry import PassLike
from graphopt.target import Target
from graphopt.tracing import Dynamic


def optimize(
    model: nn.Module,
    example_inputs: Any = None,
    passes: Iterable[PassLike] = (),
    *,
    dynamic: Dynamic | None = None,
    threads: int | None = None,
    progress: bool | None = None,
) -> OptimizedModel:
    """Make a trained model small and fast on this CPU.

    Args:
        model: never changed. float16 and bfloat16 models compute in float32 and return their
            own dtype; a model on another device is copied to the CPU, with a warning.
        example_inputs: a tensor, a tuple of positional arguments, a dict of keyword arguments, or
            a (tuple, dict) of both. Without them the model is traced at its first call.
        passes: instances, registered names or functions, run between two rounds of the exact
            passes. Without lossy passes the result is the model's own, within float rounding.
        dynamic: which sizes are free; see `graphopt.trace`. Dimension 0 is by default.
        threads: how many threads a call may use; by default the cores this process may use.
        progress: whether to show progress bars; by default where passes are given and the
            standard error is a terminal.

    Returns:
        A module for inference with the model's arguments and results.

    Raises:
        TraceError: the model cannot be traced.
        PassError: a pass is unknown or failed.
    """
    if not isinstance(model, nn.Module):
        raise Error(f"optimize takes an nn.Module, got a {type(model).__name__}")
    if isinstance(model, OptimizedModel):
        raise Error("the model is optimized already; optimize its source with all passes at once")
    given = list(passes)
    show = bool(given) and sys.stderr.isatty() if progress is None else progress
    pipeline = Pipeline([*EXACT, *given, *(EXACT if given else ())])

    def prepare(graph: Graph) -> tuple[PassReport, ...]:
        count = optimized.threads
        target = Target(lambda fragment: time_graph(fragment, threads=count), threads=count)
        ctx = Context(target=target, progress=show)
        pipeline.run(graph, ctx)
        return tuple(ctx.reports)

    optimized = OptimizedModel(
        cpu_source(model),
        prepare,
        dynamic=dynamic,
        threads=threads,
        pipeline=[one.name for one in pipeline.passes],
    )
    if example_inputs is not None:
        optimized.trace(example_inputs)
    return optimized
