"""Simplification: removes what computes nothing, and undoes what the next operator undoes."""

from __future__ import annotations

from dataclasses import dataclass

from graphopt.ir import Graph, Node
from graphopt.ir.rewriting import rewrite
from graphopt.passes import canonical_rules, concatenation_rules, identity_rules, view_rules
from graphopt.pipeline import Context, register_pass

RULES = (
    *identity_rules.RULES,
    *view_rules.RULES,
    *concatenation_rules.RULES,
    *canonical_rules.RULES,
)


@register_pass("simplification")
@dataclass(frozen=True)
class Simplification:
    """Removes identities, assertions, no-op views and casts, and merges chains of views.

    Bits stay what they are, signs of zeros included; what depends on a free size must hold
    whatever that size is.
    """

    def run(self, graph: Graph, ctx: Context) -> bool:
        asserted = _remove_assertions(graph)
        return rewrite(graph, RULES) or asserted


def _remove_assertions(graph: Graph) -> bool:
    assertions = [node for node in graph.nodes if _is_assertion(node)]
    with graph.edit():
        for node in assertions:
            graph.erase(node)
    return bool(assertions)


def _is_assertion(node: Node) -> bool:
    name = node.op.split(".")[1]
    return not node.outputs and name.startswith(("_assert", "sym_constrain_range"))
