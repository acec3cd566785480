"""networkx views of a graph, for questions about its structure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import networkx

from graphopt.ir.value import values_in

if TYPE_CHECKING:
    from graphopt.ir.graph import Graph


def to_networkx(graph: Graph) -> networkx.MultiDiGraph:
    """Nodes of the view are the graph's `Node`s and, as sources, its inputs and constants
    (`Value`s); an edge per use carries ``value`` and ``operand`` (the schema name). The results
    of the model are edges to the string ``"outputs"``.

    The view is a copy: changing it changes nothing else.
    """
    view = networkx.MultiDiGraph()
    for value in graph.values:
        if value.producer is None:
            view.add_node(value)
    for node in graph.nodes:
        view.add_node(node)
        for name, operand in node.operands.items():
            for value in values_in({name: operand}):
                view.add_edge(value.producer or value, node, value=value, operand=name)
    view.add_node("outputs")
    for value in values_in({"outputs": list(graph.outputs)}):
        view.add_edge(value.producer or value, "outputs", value=value, operand="outputs")
    return view
