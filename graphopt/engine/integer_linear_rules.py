"""Linear layers of bytes, of rows quantized on the way, and with a quantized weight alone."""

from __future__ import annotations

import torch

from graphopt.engine.integer_units import (
    IntegerUnit,
    Target,
    derived,
    int8_constant,
    layer_constants,
    make_unit,
)
from graphopt.engine.quantization import DEQUANTIZE, is_grouped, quantized_rows, rows_of
from graphopt.engine.work import Scope
from graphopt.ir import Node
from graphopt.kernels.integer_problems import (
    DynamicMatmulProblem,
    IntegerMatmulProblem,
    WeightOnlyMatmulProblem,
)
from graphopt.kernels.operand import Operand


def linear(scope: Scope, node: Node, target: Target) -> IntegerUnit | None:
    rows = rows_of(scope, node["input"])
    constants = None if rows is None else layer_constants(scope, node, rows.scheme, target)
    if rows is None or constants is None or is_grouped(scope, target.output):
        return None
    weight = constants[0]
    x = Operand.plain("uint8", scope.shape(node["input"]))
    problem = IntegerMatmulProblem(
        (x, scope.operand(weight), *map(scope.operand, constants[1:])),
        (scope.operand(target.output),),
    )
    return make_unit(problem, (rows.value, *constants), target, node)


def dynamic_linear(scope: Scope, node: Node) -> IntegerUnit | None:
    """A linear layer of floats whose rows are quantized on the way, each with its own scale."""
    rows = quantized_rows(node["input"])
    weight = int8_constant(node["weight"].producer)
    bias = node["bias"]
    if rows is None or weight is None or not scope.all_float32(rows.value, bias):
        return None
    if bias is not None and not bias.is_constant:
        return None
    outputs = scope.shape(weight)[0]
    scales = node["weight"].producer["scale"].constant.detach().reshape(-1).expand(outputs)
    own = torch.zeros(outputs) if bias is None else bias.constant.detach()
    target = Target((node,), node.output, None)
    constants = (
        derived(target, "multiplier", scales.contiguous().numpy()),
        derived(target, "bias", own.contiguous().numpy()),
    )
    problem = DynamicMatmulProblem(
        (scope.operand(rows.value), scope.operand(weight), *map(scope.operand, constants)),
        (scope.operand(node.output),),
        rows.least_scale,
    )
    return make_unit(problem, (rows.value, weight, *constants), target)


def weight_only_linear(scope: Scope, node: Node) -> IntegerUnit | None:
    """A linear layer of floats, few rows of them, whose weight alone is quantized."""
    x, bias, dequantize = node["input"], node["bias"], node["weight"].producer
    if dequantize is None or dequantize.op != DEQUANTIZE or not scope.all_float32(x, bias):
        return None
    weight, scale, zero_point = (dequantize[name] for name in ("x", "scale", "zero_point"))
    if not (weight.is_constant and scale.is_constant and weight.constant.dtype == torch.int8):
        return None
    if zero_point is not None and not (zero_point.is_constant and not zero_point.constant.any()):
        return None
    if bias is not None and not bias.is_constant:
        return None
    outputs, depth = scope.shape(weight)
    axis, group = dequantize["axis"], dequantize["block_size"] or depth
    if (dequantize["block_size"] is None) == (axis == 1) or not depth:
        return None
    scales = scale.constant.detach().float().reshape(-1, -(-depth // group))
    own = torch.zeros(outputs) if bias is None else bias.constant.detach()
    is_short = dequantize["quant_min"] >= -8 and dequantize["quant_max"] <= 7
    target = Target((node,), node.output, None)
    constants = (
        derived(target, "scales", scales.expand(outputs, -1).contiguous().numpy()),
        derived(target, "bias", own.contiguous().numpy()),
    )
    problem = WeightOnlyMatmulProblem(
        (scope.operand(x), scope.operand(weight), *map(scope.operand, constants)),
        (scope.operand(node.output),),
        4 if is_short else 8,
        group,
    )
    return make_unit(problem, (x, weight, *constants), target)
