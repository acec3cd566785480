"""Runs passes over a graph, verifying it after each."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.progress import Progress
from rich.table import Table

from graphopt.errors import Error, PassError
from graphopt.ir import Graph
from graphopt.numerics import Yardstick
from graphopt.pass_report import PassReport
from graphopt.plain_text import plain_text
from graphopt.registry import Accuracy, BoundPass, Pass, PassLike, as_pass, register_pass
from graphopt.reproducer import save_reproducer
from graphopt.target import Target

__all__ = ["Accuracy", "Context", "Pass", "PassLike", "Pipeline", "PipelineRun", "register_pass"]

_EXCERPT_LINES = 16

Item = TypeVar("Item")


@dataclass
class Context:
    """What a pass is given beside the graph.

    Attributes:
        target: the machine, as far as passes may ask.
        options: settings of the whole pipeline, by name.
        logger: for what a pass has to say.
        progress: whether `track` shows a progress bar.
        generator: the source of all randomness in passes.
        reports: what the passes told so far, see `report`.
    """

    target: Target = field(default_factory=Target)
    options: Mapping[str, Any] = field(default_factory=dict)
    logger: logging.Logger = field(default_factory=lambda: logging.getLogger("graphopt"))
    progress: bool = False
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    reports: list[PassReport] = field(default_factory=list)
    _bar: Progress | None = field(default=None, init=False, repr=False)

    def report(self, report: PassReport) -> None:
        """Keep what a pass has to tell; it becomes part of the optimized model's report."""
        self.reports.append(report)

    def track(
        self, items: Iterable[Item], description: str, total: int | None = None
    ) -> Iterator[Item]:
        """The items one by one, with a progress bar where that is switched on. Bars nest.

        Args:
            items: what to go through.
            description: what the bar is called.
            total: how many there are, where the items do not tell.
        """
        if not self.progress:
            yield from items
            return
        outermost = self._bar is None
        bar = self._bar = self._bar or Progress(transient=True)
        if outermost:
            bar.start()
        if total is None and isinstance(items, Sized):
            total = len(items)
        task = bar.add_task(description, total=total)
        try:
            for item in items:
                yield item
                bar.advance(task)
        finally:
            bar.remove_task(task)
            if outermost:
                bar.stop()
                self._bar = None


@dataclass(frozen=True)
class PassRun:
    """What one pass did.

    Attributes:
        name: of the pass.
        changed: whether it changed the graph.
        seconds: how long it took, verification excluded.
        nodes: how many nodes the graph has after it.
        error: largest relative error it brought, where numbers were checked.
    """

    name: str
    changed: bool
    seconds: float
    nodes: int
    error: float | None = None


@dataclass(frozen=True)
class PipelineRun:
    """What a pipeline did, pass by pass; true if it changed the graph; prints as a table."""

    passes: tuple[PassRun, ...]

    @property
    def changed(self) -> bool:
        return any(run.changed for run in self.passes)

    def __bool__(self) -> bool:
        return self.changed

    def __str__(self) -> str:
        table = Table(title="passes", title_justify="left")
        table.add_column("pass")
        table.add_column("changed")
        for column in ("nodes", "time (ms)", "relative error"):
            table.add_column(column, justify="right")
        for run in self.passes:
            error = "" if run.error is None else f"{run.error:.3g}"
            changed = "yes" if run.changed else ""
            table.add_row(run.name, changed, str(run.nodes), f"{run.seconds * 1e3:.1f}", error)
        return plain_text(table)


class Pipeline:
    """Passes in the order in which they run.

    Args:
        passes: registered names, instances, classes or functions.

    Raises:
        PassError: a name is unknown, or an object is no pass.
    """

    def __init__(self, passes: Iterable[PassLike]) -> None:
        self.passes: tuple[BoundPass, ...] = tuple(map(as_pass, passes))

    def run(
        self,
        graph: Graph,
        ctx: Context | None = None,
        *,
        check: Sequence[Any] | None = None,
        print_after: Callable[[str], Any] | None = None,
        stop_after: int | None = None,
        reproducer: str | Path | None = None,
    ) -> PipelineRun:
        """Run the passes over a graph, in place. The graph is verified after every pass.

        Args:
            graph: on failure it is again what it was before the pass that failed; values and
                nodes are then others, of the same names.
            ctx: what the passes are given.
            check: inputs for which the numbers are compared after every pass with those before
                it: within float rounding, or the tolerance that the pass declares.
            print_after: called with the graph's text after every pass that changed it.
            stop_after: run only the first so many passes.
            reproducer: the folder for graph, constants and pipeline if a pass fails; by default
                a new temporary one.

        Raises:
            PassError: a pass failed, broke the graph, changed the numbers by more than it
                declares, or does not tell rightly whether it changed the graph. The notes tell
                where the reproducer is.
        """
        ctx = ctx or Context()
        graph.verify()
        runs: list[PassRun] = []
        passes = self.passes[:stop_after]
        before = graph.clone()
        for position, one in enumerate(ctx.track(passes, "passes")):
            if before.version != graph.version:
                before = graph.clone()
            with _failing(graph, before, one, passes[position:], reproducer):
                yardstick = None if check is None else Yardstick(graph, check)
                started = time.perf_counter()
                with graph.making(one.name):
                    reported = one.function(graph, ctx)
                seconds = time.perf_counter() - started
                _check_report(reported, graph, before)
                graph.verify()
                error = None if yardstick is None else _check_numbers(one, graph, yardstick)
            runs.append(PassRun(one.name, reported, seconds, len(graph), error))
            if print_after is not None and reported:
                print_after(f"after {one.name}:\n{graph}")
        return PipelineRun(tuple(runs))


def _check_report(reported: Any, graph: Graph, before: Graph) -> None:
    if not isinstance(reported, bool):
        raise PassError(f"it returned {reported!r}; a pass returns whether it changed the graph")
    if graph.version == before.version:
        if reported:
            raise PassError("it says that it changed the graph, and did not")
    elif not reported and not _same(graph, before):
        raise PassError("it says that it did not change the graph, and did")


def _same(graph: Graph, before: Graph) -> bool:
    tensors = {value.name: value.constant for value in before.constants}
    return graph.to_text() == before.to_text() and all(
        value.constant is tensors[value.name] for value in graph.constants
    )


def _check_numbers(one: BoundPass, graph: Graph, yardstick: Yardstick) -> float:
    error = yardstick.error(graph)
    if one.accuracy == "exact":
        departure = yardstick.departs(graph)
        if departure is not None:
            raise PassError(f"it is declared exact, but {departure}")
    elif isinstance(one.accuracy, float) and not error <= one.accuracy:
        raise PassError(
            f"it declares a tolerance of {one.accuracy:g}, and has a relative error of {error:.3g}"
        )
    return error


@contextmanager
def _failing(
    graph: Graph,
    before: Graph,
    one: BoundPass,
    passes: Sequence[BoundPass],
    reproducer: str | Path | None,
) -> Iterator[None]:
    """On an error, restore the graph, save a reproducer and name the pass."""
    try:
        yield
    except Exception as error:
        what = str(error) if isinstance(error, Error) else f"{type(error).__name__}: {error}"
        failure = PassError(f"the pass '{one.name}' failed: {what}")
        notes = getattr(error, "__notes__", [])
        for note in notes or [_head(graph.to_text())]:
            failure.add_note(note)
        folder = Path(reproducer or tempfile.mkdtemp(prefix="graphopt-reproducer-"))
        save_reproducer(folder, before, passes, str(failure))
        failure.add_note(
            f"to reproduce: Pipeline(passes).run(graph) with graph, passes = "
            f"graphopt.reproducer.load_reproducer({str(folder)!r})"
        )
        graph.restore(before)
        raise failure from error
    except BaseException:
        graph.restore(before)
        raise


def _head(text: str) -> str:
    lines = text.splitlines()
    more = len(lines) - _EXCERPT_LINES
    return "\n".join([*lines[:_EXCERPT_LINES], *([f"  ... {more} more lines"] if more > 0 else [])])
