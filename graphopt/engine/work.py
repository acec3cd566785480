"""What a graph becomes before it is a program: kernels' problems, views, and torch's own steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from graphopt.errors import GraphError
from graphopt.ir import Graph, Node, ScalarType, TensorType, Type, Value
from graphopt.ir.inference import flatten_results, map_operand, may_alias
from graphopt.kernels.operand import ITEM_BYTES, ConstantOperand, Operand
from graphopt.kernels.problem import Problem
from graphopt.kernels.zeros import ZeroPattern, word_pattern, zero_pattern


@dataclass(eq=False, frozen=True)
class Derived:
    """A constant that is no value of the graph but follows from some, as kernels need it."""

    name: str
    constant: torch.Tensor

    is_constant = True


@dataclass(frozen=True)
class KernelWork:
    """A problem for a kernel.

    Attributes:
        problem: what is to be solved.
        inputs: the value, or constant, that each of the problem's inputs is.
        outputs: the value that each of its outputs is.
        nodes: the nodes that it covers, the one that names it first.
        check: given the problem's last output, which is no value of the graph, raises where the
            call was wrong; None where the problem has no such output.
    """

    problem: Problem
    inputs: tuple[Value | Derived, ...]
    outputs: tuple[Value, ...]
    nodes: tuple[Node, ...]
    check: Callable[[torch.Tensor], None] | None = None


@dataclass(frozen=True)
class AliasWork:
    """A value that is another name for (part of) another's memory.

    Attributes:
        value: the view.
        of: whose memory it is.
        offset: where it starts, in bytes.
        node: the node that makes it.
    """

    value: Value
    of: Value
    offset: int
    node: Node

    @property
    def inputs(self) -> tuple[Value, ...]:
        return (self.of,)

    @property
    def outputs(self) -> tuple[Value, ...]:
        return (self.value,)


@dataclass(frozen=True)
class ConstantWork:
    """A value that follows from constants alone, computed when the plan is made."""

    node: Node
    inputs: tuple[Value, ...] = ()

    @property
    def outputs(self) -> tuple[Value, ...]:
        return tuple(self.node.outputs)

    def evaluate(self) -> torch.Tensor:
        """The value, as torch computes it."""
        operands = {
            name: operand.constant if isinstance(operand, Value) else operand
            for name, operand in self.node.operands.items()
        }
        with torch.no_grad():
            result: torch.Tensor = self.node.operator.call(operands)
        return result


@dataclass(frozen=True)
class CallBackWork:
    """A node that torch computes."""

    node: Node
    function: Callable[..., Any]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]


Work = KernelWork | AliasWork | ConstantWork | CallBackWork


class Scope:
    """A graph under one assignment of its free sizes, as the lowering rules see it."""

    def __init__(self, graph: Graph, types: dict[Value, Type]) -> None:
        self.graph = graph
        self.types = types

    def literal(self, operand: Any) -> Any:
        """An operand with the sizes in it as numbers.

        Raises:
            GraphError: it is a tensor.
        """

        def number(leaf: Any) -> Any:
            if not isinstance(leaf, Value):
                return leaf
            kind = self.types[leaf]
            if isinstance(kind, ScalarType):
                return kind.value
            raise GraphError(f"%{leaf.name} is a tensor where a number is expected")

        return map_operand(operand, number)

    def tensor_type(self, value: Value) -> TensorType:
        kind = self.types[value]
        if not isinstance(kind, TensorType):
            raise GraphError(f"%{value.name} is a number where a tensor is expected")
        return kind

    def shape(self, value: Value) -> tuple[int, ...]:
        return self.tensor_type(value).shape

    def is_tensor(self, operand: Any) -> bool:
        return isinstance(operand, Value) and isinstance(self.types[operand], TensorType)

    def has_kernels(self, *values: Value) -> bool:
        """Whether kernels know the dtypes of all values."""
        return all(dtype_name(self.tensor_type(value).dtype) in ITEM_BYTES for value in values)

    def all_float32(self, *values: Value | None) -> bool:
        return all(
            value is None or self.tensor_type(value).dtype == torch.float32 for value in values
        )

    def operand(self, value: Value | Derived) -> Operand:
        """A value as a kernel sees it: contiguous."""
        if value.constant is not None:
            return constant_operand(value.constant)
        assert isinstance(value, Value)
        kind = self.tensor_type(value)
        return Operand.plain(dtype_name(kind.dtype), kind.shape)


def constant_operand(tensor: torch.Tensor) -> ConstantOperand:
    """A constant as a kernel sees it: contiguous."""
    plain = Operand.plain(dtype_name(tensor.dtype), tuple(tensor.shape))
    return ConstantOperand(plain.shape, plain.layout, _zeros(tensor))


# By tensor, which a graph never writes to: plans for other sizes do not look for zeros again.
_patterns: Any = WeakIdKeyDictionary()


def _zeros(tensor: torch.Tensor) -> ZeroPattern | None:
    find = {torch.float32: zero_pattern, torch.int8: word_pattern}.get(tensor.dtype)
    if find is None or tensor.dim() < 2:
        return None
    if tensor not in _patterns:
        _patterns[tensor] = find(tensor.detach().numpy())
    pattern: ZeroPattern | None = _patterns[tensor]
    return pattern


def dtype_name(dtype: torch.dtype) -> str:
    """The name that kernels have for a dtype."""
    return str(dtype).removeprefix("torch.")


def call_back(scope: Scope, node: Node) -> CallBackWork:
    """Let torch compute a node."""
    inputs = [value for value in dict.fromkeys(node.input_values()) if scope.is_tensor(value)]
    places = {value: place for place, value in enumerate(inputs)}

    def to_type(leaf: Any) -> Any:
        return scope.types[leaf] if isinstance(leaf, Value) else leaf

    def to_number(leaf: Any) -> Any:
        return leaf if leaf in places else scope.literal(leaf)

    def mapped(function: Callable[[Any], Any]) -> dict[str, Any]:
        return {name: map_operand(operand, function) for name, operand in node.operands.items()}

    aliasing = may_alias(node.operator, mapped(to_type))
    # Sizes are numbers of this plan; only tensors differ from call to call.
    prepared = mapped(to_number)

    def run(*tensors: torch.Tensor) -> Sequence[Any]:
        def given(leaf: Any) -> Any:
            return tensors[places[leaf]] if isinstance(leaf, Value) else leaf

        operands = {name: map_operand(operand, given) for name, operand in prepared.items()}
        results = flatten_results(node.operator.call(operands))
        return [result.clone() for result in results] if aliasing else results

    return CallBackWork(node, run, tuple(inputs), tuple(node.outputs))
