"""Elementwise nodes as instructions of a kernel's expression."""

from __future__ import annotations

from typing import Any

import torch

from graphopt.engine.quantization import DEQUANTIZE, QUANTIZE, scheme
from graphopt.engine.work import Scope, dtype_name
from graphopt.ir import Node, Value
from graphopt.kernels.elementwise import RULES
from graphopt.kernels.emission import unsupported
from graphopt.kernels.expression import Expression, Instruction, Literal, Ref
from graphopt.kernels.operand import ITEM_BYTES

_COMPARISONS = {"eq", "ne", "lt", "le", "gt", "ge"}
# Overloads whose operands mean something else than those of the kernels' rule of that name.
# prelu's weight lies along dimension 1, the kernels' along the last.
_OTHER_MEANINGS = {"aten.to.other", "aten.fill.Tensor", "aten.pow.Scalar", "aten.prelu"}

# An instruction whose operands are values and literals of the graph.
Draft = tuple[str, tuple[Any, ...], str]


def instructions(scope: Scope, node: Node) -> list[tuple[Value | str, Draft]] | None:
    """A node as instructions, each with the value (or a made-up name) that it yields.

    None if the node is not elementwise, or has no exact kernel.
    """
    if node.op in (QUANTIZE, DEQUANTIZE):
        return _between_scales(scope, node)
    base = node.op.split(".")[1]
    if not node.op.startswith("aten.") or base not in RULES or node.op in _OTHER_MEANINGS:
        return None
    if len(node.outputs) != 1 or not scope.is_tensor(node.output):
        return None
    result = scope.tensor_type(node.output)
    operands = _operands(scope, node, base)
    if operands is None:
        return None
    tensors = [operand for operand in operands if isinstance(operand, Value)]
    names = {dtype_name(scope.tensor_type(value).dtype) for value in tensors}
    dtype = dtype_name(result.dtype)
    if not tensors or not names | {dtype} <= ITEM_BYTES.keys():
        return None
    drafts: list[tuple[Value | str, Draft]] = []
    if base in _COMPARISONS:
        operands = _promoted(scope, node, operands, drafts)
    drafts.append((node.output, (base, tuple(operands), dtype)))
    return drafts if _is_exact(scope, drafts) else None


def _between_scales(scope: Scope, node: Node) -> list[tuple[Value | str, Draft]] | None:
    """Quantizing or dequantizing with one scale, step by step as the operators are defined."""
    found = scheme(node, node.op)
    source: Value = node["x"]
    if found is None or source.is_constant or not scope.has_kernels(source, node.output):
        return None
    drafts: list[tuple[Value | str, Draft]] = []

    def then(op: str, *operands: Any, dtype: str = "float32") -> None:
        before = drafts[-1][0] if drafts else source
        drafts.append((f"{node.name}.{len(drafts)}", (op, (before, *operands), dtype)))

    if node.op == QUANTIZE:
        if not scope.all_float32(source):
            return None
        then("div", found.scale)
        then("round")
        then("add", float(found.zero_point))
        then("clamp", float(found.low), float(found.high))
        then("to", dtype=dtype_name(scope.tensor_type(node.output).dtype))
    else:
        then("to", dtype="int32")
        then("sub", found.zero_point, dtype="int32")
        then("to")
        then("mul", found.scale)
    drafts[-1] = (node.output, drafts[-1][1])
    return drafts if _is_exact(scope, drafts) else None


def _operands(scope: Scope, node: Node, base: str) -> list[Any] | None:
    """Operands in the schema's order, sizes as numbers; None where one is no number or tensor."""
    operands: list[Any] = []
    if base in ("to", "_to_copy", "clone", "contiguous"):
        return [node.operands["self"]]
    for parameter in node.operator.parameters:
        operand = node[parameter.name]
        if isinstance(operand, Value) and scope.is_tensor(operand):
            operands.append(operand)
            continue
        operand = scope.literal(operand)
        if isinstance(operand, (list, tuple, torch.dtype, complex)):
            return None
        operands.append(operand)
    while operands and operands[-1] is None:
        operands.pop()
    return operands


def _promoted(
    scope: Scope, node: Node, operands: list[Any], drafts: list[tuple[Value | str, Draft]]
) -> list[Any]:
    """A comparison's operands in the dtype that torch compares in, where 0-dim tensors do not
    widen others."""
    samples = [_sample(scope, operand) for operand in operands]
    common = dtype_name(torch.result_type(samples[0], samples[1]))
    promoted: list[Any] = []
    for place, operand in enumerate(operands):
        if isinstance(operand, Value) and dtype_name(scope.tensor_type(operand).dtype) != common:
            name = f"{node.name}.{place}"
            drafts.append((name, ("to", (operand,), common)))
            promoted.append(name)
        else:
            promoted.append(operand)
    return promoted


def _sample(scope: Scope, operand: Any) -> Any:
    if not isinstance(operand, Value):
        return operand
    kind = scope.tensor_type(operand)
    return torch.empty((1,) * kind.rank, dtype=kind.dtype, device="meta")


def _is_exact(scope: Scope, drafts: list[tuple[Value | str, Draft]]) -> bool:
    expression, _ = assemble(scope, drafts, [drafts[-1][0]])
    return unsupported(expression) is None


def assemble(
    scope: Scope,
    drafts: list[tuple[Value | str, Draft]],
    results: list[Value | str],
    first: tuple[Value, ...] = (),
) -> tuple[Expression, list[Value]]:
    """One expression from instructions in order.

    Args:
        scope: gives the dtypes.
        drafts: the instructions.
        results: what they are to yield.
        first: values that are the expression's first inputs, in this order.

    Returns:
        the expression, and the value of each of its inputs.
    """
    made = {name for name, _ in drafts}
    inputs = list(first)
    for _, (_, operands, _) in drafts:
        for operand in operands:
            if isinstance(operand, Value) and operand not in made and operand not in inputs:
                inputs.append(operand)
    places: dict[Value | str, Ref] = {value: Ref(k) for k, value in enumerate(inputs)}
    body: list[Instruction] = []

    def read(operand: Any) -> Ref | Literal:
        if isinstance(operand, Value) or (isinstance(operand, str) and operand in places):
            return places[operand]
        literal: Literal = operand
        return literal

    for name, (op, operands, dtype) in drafts:
        body.append(Instruction(op, tuple(read(operand) for operand in operands), dtype))
        places[name] = Ref(len(inputs) + len(body) - 1)
    kinds = tuple(dtype_name(scope.tensor_type(value).dtype) for value in inputs)
    return Expression(kinds, tuple(body), tuple(places[name] for name in results)), inputs
