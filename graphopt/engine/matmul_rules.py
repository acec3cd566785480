"""Linear layers and matrix products as layers.

A product reads permuted operands where they lie, so that the permutation moves nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from graphopt.engine.layer_rules import Layer, layer_rule
from graphopt.engine.quantization import folded
from graphopt.engine.view_rules import permutation
from graphopt.engine.work import Derived, Scope
from graphopt.ir import Node, Value
from graphopt.kernels.expression import Expression
from graphopt.kernels.operand import Layout, Operand
from graphopt.kernels.problem import MatmulProblem, Problem


@dataclass(frozen=True)
class _Factor:
    """What a product reads for one of its operands; ``transposed`` as in `MatmulProblem`."""

    value: Value | Derived
    operand: Operand
    transposed: bool


@layer_rule("aten.linear")
def _linear(scope: Scope, node: Node) -> Layer | None:
    return _product(scope, node, node["input"], node["weight"], node["bias"], transposed=True)


@layer_rule("aten.mm", "aten.bmm")
def _plain_product(scope: Scope, node: Node) -> Layer | None:
    return _product(scope, node, node["self"], node["mat2"])


@layer_rule("aten.matmul")
def _matmul(scope: Scope, node: Node) -> Layer | None:
    return _product(scope, node, node["self"], node["other"])


@layer_rule("aten.addmm", "aten.baddbmm")
def _product_and_sum(scope: Scope, node: Node) -> Layer | None:
    if scope.literal(node["alpha"]) != 1 or scope.literal(node["beta"]) != 1:
        return None
    names = ("mat1", "mat2") if node.op == "aten.addmm" else ("batch1", "batch2")
    return _product(scope, node, node[names[0]], node[names[1]], node["self"])


def _product(
    scope: Scope,
    node: Node,
    a: Value,
    b: Value,
    addend: Value | None = None,
    transposed: bool = False,
) -> Layer | None:
    """The layer of a product and what is added to it, which broadcasts to the product.

    If ``transposed``, the last two dimensions of b stand the other way round.
    """
    if not scope.all_float32(a, b, addend):
        return None
    if len(scope.shape(a)) < 2 or len(scope.shape(b)) < 2:
        return None
    left, right = _factor(scope, a), _factor(scope, b)
    turned = (left.transposed, right.transposed != transposed)
    result = scope.operand(node.output)

    def make(epilogue: Expression | None, extra: tuple[Operand, ...]) -> Problem | None:
        inputs = (left.operand, right.operand, *extra)
        return MatmulProblem(inputs, (result,), turned, epilogue)

    inputs = (left.value, right.value)
    return Layer(scope, node.output, inputs, make, addend, takes_epilogue=True)


def _factor(scope: Scope, value: Value) -> _Factor:
    """An operand as it lies in memory before it was permuted."""
    rank = len(scope.shape(value))
    source, order = value, tuple(range(rank))
    while (node := source.producer) is not None:
        inner = permutation(node, rank)
        if inner is None:
            break
        source, order = node["self"], tuple(inner[dimension] for dimension in order)
    if order[:-2] == tuple(range(rank - 2)):
        kept = folded(source)
        return _Factor(kept, scope.operand(kept), transposed=order[-1] != rank - 1)
    if source.is_constant:
        return _Factor(value, scope.operand(value), transposed=False)
    places = tuple(order.index(dimension) for dimension in range(rank))
    layout = Layout("float32", places)
    return _Factor(source, Operand(scope.shape(value), layout), transposed=False)
