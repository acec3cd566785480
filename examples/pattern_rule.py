"""A pass made of a pattern rule: two clamps in a row become one.

python examples/pattern_rule.py
"""

from dataclasses import dataclass

import torch
from torch import nn

import graphopt
from graphopt.ir.rewriting import Match, literal, op, rewrite, rule, value


@rule(
    "hardtanh(hardtanh(x, a, b), c, d) => hardtanh(x, max(a, c), min(b, d))",
    op(
        "aten.hardtanh",
        op("aten.hardtanh", value("x"), literal("a"), literal("b")),
        literal("c"),
        literal("d"),
    ),
)
def clamp_once(graph: graphopt.Graph, match: Match) -> object:
    low, high = max(match["a"], match["c"]), min(match["b"], match["d"])
    return graph.add("aten.hardtanh", match["x"], low, high) if low <= high else None


@graphopt.register_pass("clamp-once")
@dataclass(frozen=True)
class ClampOnce:
    """Merge clamps that follow one another."""

    def run(self, graph: graphopt.Graph, ctx: graphopt.Context) -> bool:
        return rewrite(graph, [clamp_once])


def main() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Hardtanh(0.0, 8.0), nn.Hardtanh(-1.0, 6.0)).eval()
    x = torch.randn(3, 4)
    optimized = graphopt.optimize(model, x, passes=[ClampOnce()])
    print(optimized.graph)
    print(optimized.compare(x))


if __name__ == "__main__":
    main()
