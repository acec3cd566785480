"""What a pass has to tell about what it did, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.table import Table

from graphopt.plain_text import plain_text

WIDTH = 140


@dataclass(frozen=True)
class PassReport:
    """A table with remarks, kept by `Context.report` and shown by the optimized model's report.

    Attributes:
        title: the pass, and in short what it did.
        columns: names of the columns; the first one names the layer.
        rows: one per layer: texts, numbers, or None for an empty cell.
        remarks: whole sentences below the table, such as why layers were left alone.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[Sequence[str | float | None], ...]
    remarks: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The same as plain lists and dicts."""
        return asdict(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(title=escape(self.title), title_justify="left")
        for place, column in enumerate(self.columns):
            numeric = any(isinstance(row[place], (int, float)) for row in self.rows)
            table.add_column(column, justify="right" if numeric else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*map(_cell, row))
        yield table
        yield from map(escape, self.remarks)

    def __str__(self) -> str:
        return plain_text(self, WIDTH)


def _cell(content: str | float | None) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return escape(content)
    return f"{content:.4g}" if isinstance(content, float) else f"{content:,}"
