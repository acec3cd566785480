"""Embeddings, and indexing along the first dimension, as rows of a table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from graphopt.engine.work import KernelWork, Scope, Work
from graphopt.ir import Node, Value
from graphopt.kernels.operand import Operand
from graphopt.kernels.problem import GatherProblem
from graphopt.kernels.registry import candidates


def lower_gather(scope: Scope, node: Node) -> list[Work] | None:
    """The work of a node that picks rows of a table; None for other nodes."""
    if node.op == "aten.embedding":
        table, indices, wraps = node["weight"], node["indices"], False
    elif node.op == "aten.index_select" and scope.literal(node["dim"]) == 0:
        table, indices, wraps = node["self"], node["index"], False
    elif node.op == "aten.index.Tensor" and len(node["indices"]) == 1:
        table, indices, wraps = node["self"], node["indices"][0], True
    else:
        return None
    if not isinstance(indices, Value) or not scope.has_kernels(table, indices):
        return None
    if node.op == "aten.index_select" and not scope.shape(indices):
        return None  # a single number, which keeps the dimension that it picks from
    if not scope.shape(table) or scope.operand(indices).dtype not in ("int64", "int32"):
        return None
    note = Operand.plain("int64", (2,))
    operands = (scope.operand(table), scope.operand(indices))
    problem = GatherProblem(operands, (scope.operand(node.output), note), wraps)
    if not candidates(problem):
        return None
    check = _check(node, scope.shape(table)[0])
    return [KernelWork(problem, (table, indices), (node.output,), (node,), check)]


def _check(node: Node, rows: int) -> Callable[[torch.Tensor], Any]:
    name = node.name

    def check(note: torch.Tensor) -> None:
        wrong, index = note.tolist()
        if wrong:
            raise IndexError(
                f"index {index} is out of range for the {rows} rows that %{name} picks from"
            )

    return check
