"""Values and nodes: what a graph is made of. They change only through their graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from graphopt.errors import GraphError
from graphopt.ir.inference import map_operand
from graphopt.ir.operators import REQUIRED, Operator
from graphopt.ir.types import TensorType, Type

if TYPE_CHECKING:
    from graphopt.ir.graph import Graph


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a node comes from: a module of the source network, and the pass that made it."""

    module: str = ""
    module_type: str = ""
    made_by: str = ""

    def __str__(self) -> str:
        return f"{self.module} by {self.made_by}".strip() if self.made_by else self.module


@dataclass(eq=False, slots=True)
class Value:
    """A tensor or a number that flows along the edges of a graph.

    Attributes:
        name: unique within its graph; a constant carries its name in the source model.
        types: the type under each of the graph's assignments of free sizes.
        producer: the node that computes it; None for an input or a constant.
        index: its place among the producer's outputs.
        users: the nodes with this value among their operands (graph outputs are not users).
        constant: the tensor of a constant; it may alias the source model and is never written.
        trainable: whether a constant was a parameter of the source model.
        free: for an input, the size expression of each free dimension.
    """

    graph: Graph
    name: str
    types: tuple[Type, ...]
    producer: Node | None = None
    index: int = 0
    users: dict[Node, None] = field(default_factory=dict)
    constant: torch.Tensor | None = None
    trainable: bool = False
    free: dict[int, str] = field(default_factory=dict)
    _serial: int = 0

    @property
    def type(self) -> Type:
        """The type under the example's sizes."""
        return self.types[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape under the example's sizes. Raises GraphError for a scalar."""
        return self._tensor_type().shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of a tensor. Raises GraphError for a scalar."""
        return self._tensor_type().dtype

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def is_tensor(self) -> bool:
        return isinstance(self.types[0], TensorType)

    @property
    def is_constant(self) -> bool:
        return self.constant is not None

    @property
    def is_input(self) -> bool:
        return self.producer is None and self.constant is None

    @property
    def is_output(self) -> bool:
        return any(output is self for output in self.graph.outputs)

    def fixed_size(self, dimension: int) -> int | None:
        """The size of a dimension if it is the same whatever the free sizes, else None."""
        sizes = {t.shape[dimension] for t in self.types if isinstance(t, TensorType)}
        return sizes.pop() if len(sizes) == 1 else None

    def only_user(self) -> Node | None:
        """The node that alone uses this value, in one operand or several; None if there is no
        such node or the value is an output of the graph."""
        if len(self.users) == 1 and not self.is_output:
            return next(iter(self.users))
        return None

    def _tensor_type(self) -> TensorType:
        kind = self.types[0]
        if not isinstance(kind, TensorType):
            raise GraphError(f"%{self.name} is a {kind.kind.__name__}, not a tensor")
        return kind

    def __repr__(self) -> str:
        return f"%{self.name}: {self.type}"


# A value, a literal, None, or a list of operands.
Operand = Any


@dataclass(eq=False, slots=True)
class Node:
    """An operator applied to operands.

    ``node["weight"]`` gives an operand or attribute by the name that the operator's schema gives
    it, or its default where the node leaves it out.
    """

    graph: Graph
    operator: Operator
    operands: dict[str, Operand]
    outputs: list[Value]
    origin: Origin
    _key: float = 0.0
    _previous: Node | None = None
    _next: Node | None = None

    @property
    def op(self) -> str:
        """The operator's text name, such as ``aten.conv2d`` or ``aten.add.Tensor``."""
        return self.operator.name

    @property
    def output(self) -> Value:
        """The only output. Raises GraphError if there are several."""
        if len(self.outputs) != 1:
            raise GraphError(f"{self} has {len(self.outputs)} outputs")
        return self.outputs[0]

    def __getitem__(self, name: str) -> Operand:
        if name in self.operands:
            return self.operands[name]
        default = self.operator.parameter(name).default
        if default is REQUIRED:
            raise GraphError(f"{self} lacks its operand '{name}'")
        return default

    def input_values(self) -> Iterator[Value]:
        """The values among the operands, in order, repeated where they are used repeatedly."""
        return values_in(self.operands)

    @property
    def name(self) -> str:
        """The name of the first output; what messages call the node."""
        return self.outputs[0].name if self.outputs else self.op

    def before(self, other: Node) -> bool:
        """Whether this node precedes another in the graph's order."""
        return self._key < other._key

    def __repr__(self) -> str:
        from graphopt.ir.text import format_node

        return format_node(self)


def values_in(operands: dict[str, Operand]) -> Iterator[Value]:
    """The values among operands, in order."""
    found: list[Value] = []

    def collect(leaf: Any) -> None:
        if isinstance(leaf, Value):
            found.append(leaf)

    for operand in operands.values():
        map_operand(operand, collect)
    return iter(found)


def substitute(operands: dict[str, Operand], mapping: dict[Value, Operand]) -> dict[str, Operand]:
    """A copy of operands with values replaced."""

    def swap(leaf: Any) -> Any:
        return mapping.get(leaf, leaf) if isinstance(leaf, Value) else leaf

    return {name: map_operand(operand, swap) for name, operand in operands.items()}
