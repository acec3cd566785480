"""graphopt makes a trained PyTorch network small and fast on ordinary CPUs."""

from importlib.metadata import version as _version

from graphopt.errors import (
    ArtefactError,
    Error,
    ExportError,
    GraphError,
    PassError,
    SelectionError,
    TraceError,
)
from graphopt.ir import Graph
from graphopt.tracing import trace

__version__ = _version("graphopt")

__all__ = [
    "ArtefactError",
    "Error",
    "ExportError",
    "Graph",
    "GraphError",
    "PassError",
    "SelectionError",
    "TraceError",
    "trace",
]
