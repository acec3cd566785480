"""A graph as an ordinary torch module."""

from __future__ import annotations

import keyword
import operator
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo

from graphopt.ir.inference import map_operand
from graphopt.ir.interface import TENSOR
from graphopt.ir.value import Operand, Value

if TYPE_CHECKING:
    from graphopt.ir.graph import Graph


def to_torch(graph: Graph) -> fx.GraphModule:
    """An `nn.Module` in evaluation mode that is called like the source model.

    Constants that were parameters of the source become parameters, all others buffers, under
    their names in the source network; they are copies, so training the module changes neither
    the graph nor the source.
    """
    root = nn.Module()
    body = fx.Graph()
    names: dict[Value, fx.Node] = {}
    for value in graph.inputs:
        placeholder = names[value] = body.placeholder(_identifier(value.name))
        placeholder.meta["tensor_type"] = value.type
    for value in graph.constants:
        path = _attach(root, value)
        names[value] = body.get_attr(path)

    def argument(operand: Operand) -> Any:
        return map_operand(operand, lambda leaf: names[leaf] if isinstance(leaf, Value) else leaf)

    for node in graph.nodes:
        args, kwargs = node.operator.arguments(node.operands)
        call = body.call_function(
            node.operator.target,
            tuple(argument(operand) for operand in args),
            {name: argument(operand) for name, operand in kwargs.items()},
        )
        call.meta["origin"] = node.origin
        single = len(node.outputs) == 1 and not _returns_several(node.operator.target)
        for value in node.outputs:
            item = call if single else body.call_function(operator.getitem, (call, value.index))
            names[value] = item
            if not single:
                item.meta["origin"] = node.origin
    results = [argument(operand) for operand in graph.outputs]
    body.output(results if graph.interface is not None else tuple(results))
    if graph.interface is not None:
        _call_like_source(body, graph)
    module = fx.GraphModule(root, body, class_name="GraphModule")
    return module.eval()


def _returns_several(target: Any) -> bool:
    if not isinstance(target, torch._ops.OpOverload):
        return False
    returns = target._schema.returns
    return len(returns) != 1 or "[]" in str(returns[0].type) or "List" in str(returns[0].type)


def _identifier(name: str) -> str:
    identifier = re.sub(r"\W", "_", name)
    return f"{identifier}_" if identifier == "self" else identifier


def _attach(root: nn.Module, value: Value) -> str:
    """Store a constant under its dotted name; modules on the way are made."""
    assert value.constant is not None
    *path, leaf = [
        f"{part}_" if not part or keyword.iskeyword(part) else part
        for part in value.name.split(".")
    ]
    owner = root
    walked = []
    for part in path:
        while hasattr(owner, part) and not isinstance(getattr(owner, part), nn.Module):
            part += "_"
        if not hasattr(owner, part):
            owner.add_module(part, nn.Module())
        owner = getattr(owner, part)
        walked.append(part)
    while hasattr(owner, leaf):
        leaf += "_"
    tensor = value.constant.clone()
    if value.trainable and tensor.is_floating_point():
        owner.register_parameter(leaf, nn.Parameter(tensor))
    else:
        owner.register_buffer(leaf, tensor)
    return ".".join([*walked, leaf])


def _call_like_source(body: fx.Graph, graph: Graph) -> None:
    """Give the module the source's arguments and the structure of its results."""
    interface = graph.interface
    assert interface is not None
    placeholders = iter([node for node in body.nodes if node.op == "placeholder"])
    following = next(placeholders, None)
    for index, leaf in enumerate(interface.leaves):
        if leaf is TENSOR:
            following = next(placeholders, None)
        else:
            anchor = following or next(node for node in body.nodes if node.op != "placeholder")
            with body.inserting_before(anchor):
                body.placeholder(f"argument_{index}")
    body.set_codegen(
        _PyTreeCodeGen(
            _PyTreeInfo(interface.argument_names(), interface.in_spec, interface.out_spec)
        )
    )
