"""The one exception family of graphopt."""

from __future__ import annotations


class Error(Exception):
    """Base of every error that graphopt raises on purpose.

    The message names the module or operator, says what is wrong and what to do about it; longer
    material, such as an excerpt of the graph, is attached with ``add_note``.
    """


class TraceError(Error):
    """A model cannot be traced, or is called in a way its trace was not made for."""


class GraphError(Error):
    """A change would break the graph, or the graph is already broken."""


class PassError(Error):
    """A pass is unknown, wrongly registered, or failed on a graph."""


class SelectionError(Error):
    """The engine cannot choose or build a kernel."""


class ExportError(Error):
    """A graph cannot be exported, or its export does not compute the same numbers."""


class ArtefactError(Error):
    """A file written by graphopt cannot be read or written."""
