"""The text form of a graph: what people read and golden tests compare.

::

    graph(%x: f32[batch=2, 3, 8, 8]) where batch != 1 {
      %conv.weight: f32[4, 3, 3, 3] = parameter
      %constant: f32[] = constant 0.5
      %conv2d: f32[2, 4, 6, 6] = aten.conv2d(%x, %conv.weight)  # conv
      %mul: f32[2, 4, 6, 6] = aten.mul.Tensor(%conv2d, %constant)
      return %mul
    }

Operands stand in the schema's order; from the first that is left out on, they carry their names.
Constants stand before the node that first uses them; small ones are spelled out.
"""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any

import torch

from graphopt.ir.types import TensorType
from graphopt.ir.value import Node, Operand, Value, values_in

if TYPE_CHECKING:
    from graphopt.ir.graph import Graph

_PLAIN_NAME = re.compile(r"[\w.\-]+")
SPELLED_OUT = 8  # constants of at most so many elements are part of the text


def format_graph(graph: Graph) -> str:
    """The whole graph; the same graph always gives the same text."""
    inputs = ", ".join(
        f"{format_name(value.name)}: {_input_type(graph, value)}" for value in graph.inputs
    )
    guards = f" where {'; '.join(graph.guards)}" if graph.guards else ""
    lines = [f"graph({inputs}){guards} {{"]
    shown: set[Value] = set()

    def show_constants(operands: dict[str, Operand]) -> None:
        for value in values_in(operands):
            if value.is_constant and value not in shown:
                shown.add(value)
                lines.append("  " + format_constant(value))

    for node in graph.nodes:
        show_constants(node.operands)
        lines.append("  " + format_node(node))
    outputs = {"outputs": list(graph.outputs)}
    show_constants(outputs)
    lines.append(f"  return {', '.join(map(format_operand, graph.outputs))}".rstrip())
    lines.append("}")
    return "\n".join(lines)


def format_node(node: Node) -> str:
    """One line: results with types, operator, operands, and the module it comes from."""
    results = ", ".join(f"{format_name(value.name)}: {value.type}" for value in node.outputs)
    args, kwargs = node.operator.arguments(node.operands)
    operands = [format_operand(operand) for operand in args]
    operands += [f"{name}={format_operand(operand)}" for name, operand in kwargs.items()]
    origin = f"  # {node.origin}" if str(node.origin) else ""
    return f"{results}{' = ' if results else ''}{node.op}({', '.join(operands)}){origin}"


def format_constant(value: Value) -> str:
    """One line; the elements only where there are few."""
    assert value.constant is not None
    kind = "parameter" if value.trainable else "constant"
    line = f"{format_name(value.name)}: {value.type} = {kind}"
    if 0 < value.constant.numel() <= SPELLED_OUT and not value.dtype.is_complex:
        line += f" {format_operand(value.constant.tolist())}"
    return line


def format_name(name: str) -> str:
    """A value's name as the text shows it; modules may have names that need quotes."""
    return f"%{name}" if _PLAIN_NAME.fullmatch(name) else f"%{json.dumps(name)}"


def format_operand(operand: Operand) -> str:
    if isinstance(operand, Value):
        return format_name(operand.name)
    if isinstance(operand, (list, tuple)):
        return f"[{', '.join(map(format_operand, operand))}]"
    if isinstance(operand, torch.device):
        return f'device("{operand}")'
    if isinstance(operand, str):
        return json.dumps(operand)
    if isinstance(operand, complex):
        return f"complex({format_operand(operand.real)}, {format_operand(operand.imag)})"
    if isinstance(operand, float) and not math.isfinite(operand):
        return "nan" if math.isnan(operand) else ("inf" if operand > 0 else "-inf")
    return repr(operand)


def excerpt(node: Node, context: int = 3) -> str:
    """The node with its neighbours in the graph's order, the node marked."""
    lines: list[str] = []
    before: list[Node] = []
    current = node._previous
    while current is not None and len(before) < context:
        before.append(current)
        current = current._previous
    lines += [f"    {format_node(other)}" for other in reversed(before)]
    lines.append(f"--> {format_node(node)}")
    current = node._next
    for _ in range(context):
        if current is None:
            break
        lines.append(f"    {format_node(current)}")
        current = current._next
    return "\n".join(lines)


def _input_type(graph: Graph, value: Value) -> str:
    kind: Any = value.type
    if not isinstance(kind, TensorType) or not value.free:
        return str(kind)
    plain = TensorType(kind.dtype, ())
    shape = ", ".join(
        f"{value.free[d]}={size}" if d in value.free else str(size)
        for d, size in enumerate(kind.shape)
    )
    return str(plain).replace("[]", f"[{shape}]")
