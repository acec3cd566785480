"""The engine: lowering, selection, memory plan and execution of a graph."""

from graphopt.engine.planning import Plan, PlanStep, compile_graph, random_inputs, time_graph
from graphopt.engine.selection import Selection
from graphopt.engine.threads import default_threads

__all__ = [
    "Plan",
    "PlanStep",
    "Selection",
    "compile_graph",
    "default_threads",
    "random_inputs",
    "time_graph",
]
