"""In-place operators of a traced fx graph become functional where nobody sees the write.

A write is unseen if the written tensor was computed in the graph and no other tensor that may share
its memory is read afterwards. Where that cannot be shown, the graph has to be functionalised by
torch instead.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from graphopt.errors import GraphError
from graphopt.ir.inference import infer, map_operand, may_alias
from graphopt.ir.operators import Operator, name_of, resolve
from graphopt.ir.types import ScalarType, TensorType


def written_operands(node: fx.Node) -> list[fx.Node]:
    """The tensors that an fx node writes to."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.is_mutable:
        return []
    written = []
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            operand = node.kwargs.get(argument.name)
            if position < len(node.args):
                operand = node.args[position]
            if isinstance(operand, fx.Node):
                written.append(operand)
    return written


def functional_form(target: Any) -> torch._ops.OpOverload | None:
    """The operator that computes what an in-place operator writes, if torch has it."""
    namespace, name = target._schema.name.split("::")
    if not name.endswith("_") or name.startswith("__"):
        return None
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    form = getattr(packet, target._overloadname, None)
    if not isinstance(form, torch._ops.OpOverload):
        return None
    same = len(form._schema.arguments) == len(target._schema.arguments)
    return form if same and not form._schema.is_mutable else None


def name_dropout_alias(graph: fx.Graph) -> None:
    """Outside training a dropout returns its operand itself, so that who writes to one writes to
    the other; torch's functionalisation takes the result for a copy."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target in _DROPOUTS and node.args[2] is False:
            node.target, node.args = torch.ops.aten.alias.default, node.args[:1]


_DROPOUTS = {
    getattr(torch.ops.aten, name + suffix).default
    for name in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
    for suffix in ("", "_")
}


def make_functional(graph: fx.Graph) -> bool:
    """Replace every in-place operator by its functional form, if all writes are unseen.

    Returns:
        Whether the graph is functional now; if not, it is unchanged.
    """
    nodes = list(graph.nodes)
    writers = [node for node in nodes if written_operands(node)]
    if not writers:
        return True
    position = {node: k for k, node in enumerate(nodes)}
    family = _families(nodes)
    members: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        members.setdefault(family(node), []).append(node)
    for writer in writers:
        written = written_operands(writer)
        if len(written) != 1 or not _keeps_dtype(writer, written[0]):
            return False
        if not _unseen(written[0], writer, members[family(written[0])], position):
            return False
    for writer in writers:
        (target,) = written_operands(writer)
        form = functional_form(writer.target)
        assert form is not None
        writer.target = form
        for user in list(target.users):
            if position[user] > position[writer]:
                user.replace_input_with(target, writer)
    return True


def _unseen(
    written: fx.Node, writer: fx.Node, family: Iterable[fx.Node], position: dict[fx.Node, int]
) -> bool:
    """Whether no tensor but the written one, and the writer's result, is read after the write."""
    for member in family:
        if member.op in ("placeholder", "get_attr"):
            return False
        if member is written or position[member] >= position[writer]:
            continue
        # An earlier writer's result is another name for the written tensor; uses of the tensor
        # that it wrote have been given that name, unless they come before.
        if any(position[user] > position[writer] for user in member.users):
            if written in written_operands(member) or member in written_operands(written):
                continue
            return False
    return True


def _families(nodes: list[fx.Node]) -> Any:
    """Union-find over values that may share memory."""
    parent: dict[fx.Node, fx.Node] = {}

    def find(node: fx.Node) -> fx.Node:
        while parent.get(node, node) is not node:
            node = parent[node]
        return node

    for node in nodes:
        for source in _aliased_operands(node):
            parent[find(node)] = find(source)
    return find


def _aliased_operands(node: fx.Node) -> list[fx.Node]:
    if node.op != "call_function":
        return []
    if not isinstance(node.target, torch._ops.OpOverload):
        return [operand for operand in node.all_input_nodes if _is_tensor_like(operand)]
    operands = [operand for operand in node.all_input_nodes if _is_tensor_like(operand)]
    if any(argument.alias_info is not None for argument in node.target._schema.arguments):
        return operands
    return operands if _observed_alias(node) else []


def _keeps_dtype(writer: fx.Node, written: fx.Node) -> bool:
    """Whether the functional form exists and has the dtype of what is written; the in-place one
    casts to it, the functional one promotes."""
    form = functional_form(writer.target)
    if form is None:
        return False
    try:
        (result,) = infer(*_typed_call(writer, form))
    except GraphError:
        return False  # torch functionalises what cannot be inferred here
    return isinstance(result, TensorType) and result.dtype == written.meta["val"].dtype


def _observed_alias(node: fx.Node) -> bool:
    """Whether an operator whose schema promises a fresh result returns its operand after all, as
    dropout does in evaluation mode."""
    try:
        return may_alias(*_typed_call(node, node.target))
    except GraphError:
        return True  # what cannot be observed is taken to alias; torch functionalises then


def _typed_call(node: fx.Node, target: Any) -> tuple[Operator, dict[str, Any]]:
    """An operator and the types of an fx node's operands, by the operator's names for them."""

    def to_type(leaf: Any) -> Any:
        if not isinstance(leaf, fx.Node):
            return leaf
        value = leaf.meta.get("val")
        if isinstance(value, torch.Tensor):
            return TensorType(value.dtype, tuple(_hint(size) for size in value.shape))
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return ScalarType(value.node.hint)
        return leaf

    operator = resolve(name_of(target))
    args = tuple(map_operand(operand, to_type) for operand in node.args)
    kwargs = {name: map_operand(operand, to_type) for name, operand in node.kwargs.items()}
    return operator, operator.bind(args, kwargs)


def _hint(size: int | torch.SymInt) -> int:
    """A size under the example, without asking for it in a way that leaves a guard behind."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else size


def _is_tensor_like(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return not isinstance(value, (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool))
