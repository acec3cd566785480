"""Dead code: what no result of the model depends on."""

from __future__ import annotations

from dataclasses import dataclass

from graphopt.ir import Graph
from graphopt.pipeline import Context, register_pass


@register_pass("dead-code")
@dataclass(frozen=True)
class DeadCode:
    """Removes nodes whose results nobody uses.

    Inputs stay, used or not: they are part of how the model is called. So do nodes without
    results, which somebody wants for their effect.
    """

    def run(self, graph: Graph, ctx: Context) -> bool:
        version = graph.version
        with graph.edit():
            for node in reversed(graph.nodes):
                if node.outputs and not any(v.users or v.is_output for v in node.outputs):
                    graph.erase(node)
        return graph.version != version
