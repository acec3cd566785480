"""Attention as a layer."""

from __future__ import annotations

import math

from graphopt.engine.layer_rules import Layer, layer_rule
from graphopt.engine.work import Scope, dtype_name
from graphopt.ir import Node
from graphopt.kernels.expression import Expression
from graphopt.kernels.operand import Operand
from graphopt.kernels.problem import AttentionProblem, Problem


@layer_rule("aten.scaled_dot_product_attention")
def _attention(scope: Scope, node: Node) -> Layer | None:
    values = [node["query"], node["key"], node["value"]]
    mask = node["attn_mask"]
    if not scope.all_float32(*values) or scope.literal(node["dropout_p"]) != 0:
        return None
    shapes = [scope.shape(value) for value in values]
    if any(len(shape) < 3 for shape in shapes) or (mask is not None and node["is_causal"]):
        return None
    result = scope.shape(node.output)
    query, key, value = shapes
    mask_shape = scope.shape(mask) if mask is not None else ()
    if node["enable_gqa"] and query[-3] != key[-3]:
        if value[-3] != key[-3] or len(mask_shape) > 2:
            return None
        query, result = _grouped(query, key[-3]), _grouped(result, key[-3])
        key, value = _grouped(key, key[-3]), _grouped(value, key[-3])
    scale = scope.literal(node["scale"])
    scale = 1 / math.sqrt(query[-1]) if scale is None and query[-1] else scale
    if scale is None:
        return None
    operands = tuple(Operand.plain("float32", shape) for shape in (query, key, value))
    if mask is not None:
        values.append(mask)
        name = dtype_name(scope.tensor_type(mask).dtype)
        operands = (*operands, Operand.plain(name, mask_shape))
    output = Operand.plain("float32", result)
    problem = AttentionProblem(operands, (output,), float(scale), bool(node["is_causal"]))

    def make(epilogue: Expression | None, extra: tuple[Operand, ...]) -> Problem | None:
        return problem if epilogue is None else None

    return Layer(scope, node.output, tuple(values), make)


def _grouped(shape: tuple[int, ...], groups: int) -> tuple[int, ...]:
    """Heads divided among the groups that share keys and values."""
    *batch, heads, length, size = shape
    return (*batch, groups, heads // groups, length, size)
