"""graphopt makes a trained PyTorch network small and fast on ordinary CPUs."""

from importlib.metadata import version as _version

from graphopt.api import optimize
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
from graphopt.model import OptimizedModel
from graphopt.pass_report import PassReport
from graphopt.pipeline import Context, Pipeline
from graphopt.registry import register_pass
from graphopt.target import Target
from graphopt.tracing import trace

__version__ = _version("graphopt")

__all__ = [
    "ArtefactError",
    "Context",
    "Error",
    "ExportError",
    "Graph",
    "GraphError",
    "OptimizedModel",
    "PassError",
    "PassReport",
    "Pipeline",
    "SelectionError",
    "Target",
    "TraceError",
    "optimize",
    "register_pass",
    "trace",
]
