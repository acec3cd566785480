"""Constant folding: what depends on constants alone is computed now, once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from graphopt.errors import PassError
from graphopt.ir import Graph, Node, ScalarType, TensorType, Value
from graphopt.ir.value import substitute, values_in
from graphopt.pipeline import Context, register_pass
from graphopt.reference import results_of

_SIZE = "aten.sym_size.int"
_TRANSIENT_BYTES = 1 << 28  # the most that one intermediate result may take while folding


@register_pass("constant-folding")
@dataclass(frozen=True)
class ConstantFolding:
    """Replaces what is computed from constants alone by its value.

    A result is folded only if it is no larger than the constants that disappear with it, or than
    `growth_bytes`. Sizes that are fixed become literals in their users; nothing that derives from
    a free size is folded, nor is a random operator, nor the dequantize of a constant, which is
    what keeps a quantized weight small.

    Attributes:
        growth_bytes: size up to which a result may be folded although it frees less.
    """

    growth_bytes: int = 1 << 18

    def __post_init__(self) -> None:
        if self.growth_bytes < 0:
            raise PassError(f"growth_bytes must not be negative, got {self.growth_bytes}")

    def run(self, graph: Graph, ctx: Context) -> bool:
        changed = False
        # What was folded can let larger results fold: they free it.
        while self._fold_sizes(graph) or self._fold_tensors(graph):
            changed = True
        return changed

    def _fold_sizes(self, graph: Graph) -> bool:
        """Replace fixed numbers by literals in their users; they cannot be graph outputs."""
        version = graph.version
        with graph.edit():
            for node in graph.nodes:
                if not _is_fixed_size(graph, node):
                    continue
                numbers = {value: _number(value) for value in node.outputs}
                for user in _users(node):
                    for name, operand in substitute(user.operands, numbers).items():
                        if any(value in numbers for value in values_in({"": user.operands[name]})):
                            graph.set_operand(user, name, operand)
                _erase_if_unused(graph, node)
        return graph.version != version

    def _fold_tensors(self, graph: Graph) -> bool:
        version = graph.version
        foldable = _foldable(graph)
        computed: dict[Value, Any] = {}
        names: dict[Value, list[str]] = {}
        with graph.edit():
            # From the end: what is folded whole takes its intermediate results with it; what is
            # too large to fold leaves its operands to be folded in its place.
            for node in reversed(graph.nodes):
                if node not in foldable:
                    continue
                wanted = [v for v in node.outputs if v.users or v.is_output]
                if wanted and not self._is_bounded(wanted, _cone(node, foldable)):
                    foldable.discard(node)
                    continue
                for value in wanted:
                    parameters = _parameters(_cone(node, foldable))
                    tensor = _compute(value, computed).contiguous()
                    trainable = bool(parameters) and tensor.is_floating_point()
                    new = graph.constant(tensor, value.name, trainable=trainable)
                    # What is made of one parameter is that parameter to whoever reads the result.
                    names[new] = [p.name for p in parameters[:1] if len(parameters) == 1]
                    names[new].append(value.name)
                    graph.replace(value, new)
                _erase_if_unused(graph, node)
        _rename(graph, names)
        return graph.version != version

    def _is_bounded(self, wanted: list[Value], cone: set[Node]) -> bool:
        size = sum(_bytes(value) for value in wanted)
        if size <= self.growth_bytes:
            return True
        sources = {v for node in cone for v in node.input_values() if v.is_constant}
        freed = [v for v in sources if not v.is_output and cone.issuperset(v.users)]
        return size <= sum(_bytes(value) for value in freed)


def _is_fixed_size(graph: Graph, node: Node) -> bool:
    """Whether a node gives numbers that are the same for all free sizes, and somebody uses them.

    That the numbers agree under two assignments proves nothing; here they come from literals, from
    constants, or from dimensions of inputs that are not free.
    """
    if not any(value.users for value in node.outputs):
        return False
    if not all(isinstance(value.type, ScalarType) for value in node.outputs):
        return False
    if node.op != _SIZE:
        return node.operator.is_size_arithmetic and not any(node.input_values())
    x, dimension = node["self"], node["dim"]
    if not isinstance(dimension, int):
        return False
    return not graph.sizes or x.is_constant or (x.is_input and dimension % x.rank not in x.free)


def _number(value: Value) -> int | float | bool:
    assert isinstance(value.type, ScalarType)
    return value.type.value


def _foldable(graph: Graph) -> set[Node]:
    """Nodes that depend on nothing but constants and literals."""
    known: set[Value] = {value for value in graph.constants}
    nodes: set[Node] = set()
    for node in graph.nodes:
        if (
            node.outputs
            and not node.operator.is_random
            and node.op != "graphopt.dequantize"
            and all(value in known for value in node.input_values())
            and all(isinstance(value.type, TensorType) for value in node.outputs)
            and sum(_bytes(value) for value in node.outputs) <= _TRANSIENT_BYTES
        ):
            nodes.add(node)
            known.update(node.outputs)
    return nodes


def _cone(node: Node, foldable: set[Node]) -> set[Node]:
    """The node with those before it that are of use to nothing else."""
    cone = {node}
    pending = list(_producers(node))
    while pending:
        before = pending.pop()
        if before in cone or before not in foldable:
            continue
        if not any(v.is_output or not cone.issuperset(v.users) for v in before.outputs):
            cone.add(before)
            pending += _producers(before)
    return cone


def _producers(node: Node) -> Iterator[Node]:
    return (value.producer for value in node.input_values() if value.producer is not None)


def _compute(value: Value, computed: dict[Value, Any]) -> torch.Tensor:
    """The tensor of a value that depends on constants alone; operands are computed on the way."""
    pending = [value]
    while pending:
        current = pending[-1]
        if current in computed:
            pending.pop()
        elif current.constant is not None:
            computed[current] = current.constant
        else:
            node = current.producer
            assert node is not None
            missing = [v for v in node.input_values() if v not in computed]
            pending += missing
            if not missing:
                with torch.no_grad():
                    results = results_of(node, computed)
                computed.update(zip(node.outputs, results, strict=True))
    tensor: torch.Tensor = computed[value]
    return tensor


def _parameters(cone: Iterable[Node]) -> list[Value]:
    values = [value for node in cone for value in node.input_values()]
    return list(dict.fromkeys(value for value in values if value.trainable))


def _rename(graph: Graph, wishes: dict[Value, list[str]]) -> None:
    """Give values the first of the names they might have that is free."""
    taken = {value.name for value in graph.values}
    with graph.edit():
        for value, names in wishes.items():
            name = next((name for name in names if name not in taken), None)
            if name is not None:
                taken.add(name)
                graph.rename(value, name)


def _erase_if_unused(graph: Graph, node: Node) -> None:
    if not any(value.users or value.is_output for value in node.outputs):
        graph.erase(node)


def _users(node: Node) -> list[Node]:
    return list(dict.fromkeys(user for value in node.outputs for user in value.users))


def _bytes(value: Value) -> int:
    return value.type.nbytes if isinstance(value.type, TensorType) else 0
