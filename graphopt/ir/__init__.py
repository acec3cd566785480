"""The graph: values, nodes, types, text form, verifier and views."""

from graphopt.ir import quantization
from graphopt.ir.graph import Graph
from graphopt.ir.interface import TENSOR, Interface
from graphopt.ir.types import ScalarType, TensorType, Type
from graphopt.ir.value import Node, Operand, Origin, Value

__all__ = [
    "TENSOR",
    "Graph",
    "Interface",
    "Node",
    "Operand",
    "Origin",
    "ScalarType",
    "TensorType",
    "Type",
    "Value",
    "quantization",
]
