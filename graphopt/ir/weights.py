"""A layer's weight, read and rewritten wherever it is kept: as a constant, or quantized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from graphopt.errors import GraphError
from graphopt.ir.operators import resolve
from graphopt.ir.types import TensorType
from graphopt.ir.value import Node, Value

if TYPE_CHECKING:
    from graphopt.ir.graph import Graph

# The operand that holds the weight, where its name is not "weight".
_OPERANDS = {"aten.matmul": "other", "aten.mm": "mat2", "aten.addmm": "mat2", "aten.bmm": "mat2"}
_DEQUANTIZE = "graphopt.dequantize"
_QUANTIZATION = ("scale", "zero_point")


@dataclass(frozen=True)
class Weight:
    """The weight of one node.

    Attributes:
        graph: the node's graph.
        node: the layer.
        operand: the name of its operand.
        constant: where the elements are kept.
        dequantize: the node between the constant and the layer, if the weight is quantized.
    """

    graph: Graph
    node: Node
    operand: str
    constant: Value
    dequantize: Node | None = None

    @property
    def tensor(self) -> torch.Tensor:
        """The elements that the layer computes with; not to be written to."""
        stored = self.constant.constant
        assert stored is not None
        if self.dequantize is None:
            return stored
        return _apply(self.dequantize, _DEQUANTIZE, stored)

    def write(self, tensor: torch.Tensor) -> None:
        """Give the layer other elements; other users of the same constant keep theirs.

        A quantized weight is quantized again with its scale and zero point.

        Raises:
            GraphError: the shape or dtype is another.
        """
        expected = self.node[self.operand].type
        if TensorType.of(tensor) != expected:
            raise GraphError(
                f"the weight of %{self.node.name} is {expected}, got {TensorType.of(tensor)}"
            )
        if self.dequantize is not None:
            tensor = _apply(self.dequantize, "graphopt.quantize", tensor)
        user = self.node if self.dequantize is None else self.dequantize
        alone = self.constant.only_user() is user and (
            self.dequantize is None or self.dequantize.output.only_user() is self.node
        )
        with self.graph.edit():
            if alone:
                self.graph.set_constant(self.constant, tensor)
                return
            made = self.graph.constant(
                tensor, self.constant.name, trainable=self.constant.trainable
            )
            if self.dequantize is not None:
                operands = {**self.dequantize.operands, "x": made}
                made = self.graph.add(
                    _DEQUANTIZE, before=self.node, origin=self.dequantize.origin, **operands
                )
            self.graph.set_operand(self.node, self.operand, made)


def weight_of(graph: Graph, node: Node) -> Weight:
    """See `Graph.weight`."""
    operand = _OPERANDS.get(node.op, "weight")
    value = node.operands.get(operand)
    if not isinstance(value, Value):
        raise GraphError(f"%{node.name} ({node.op}) has no weight")
    if value.is_constant:
        return Weight(graph, node, operand, value)
    producer = value.producer
    if producer is not None and producer.op == _DEQUANTIZE:
        parts = [producer["x"], *(producer[name] for name in _QUANTIZATION)]
        if all(part is None or part.is_constant for part in parts):
            return Weight(graph, node, operand, producer["x"], producer)
    raise GraphError(f"the weight of %{node.name} ({node.op}), %{value.name}, is not a constant")


def _apply(dequantize: Node, op: str, x: torch.Tensor) -> torch.Tensor:
    """Quantize or dequantize with the parameters of a node."""
    operands = {
        name: operand.constant if isinstance(operand, Value) else operand
        for name, operand in dequantize.operands.items()
    }
    with torch.no_grad():
        result: torch.Tensor = resolve(op).call({**operands, "x": x})
    return result
