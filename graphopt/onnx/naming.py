"""Names in an ONNX file: the model's own for inputs and outputs, the modules' for nodes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import onnx_ir
from torch.utils import _pytree as pytree

from graphopt.errors import ExportError
from graphopt.ir import Graph, Node, Value

_SCOPES = "pkg.torch.onnx.name_scopes"


def describe(node: Node) -> str:
    """A node as an error names it."""
    module = f"module '{node.origin.module}', " if node.origin.module else ""
    return f"{module}operator {node.op} (%{node.name})"


def apply(model: onnx_ir.Model, graph: Graph, sources: Mapping[str, Node]) -> None:
    """Name everything in an exported model.

    Args:
        model: what torch's exporter made; its own metadata goes.
        graph: the graph it was made from, for the names of inputs, outputs and free sizes.
        sources: the graph's node by the scope that the exporter noted.

    Raises:
        ExportError: the exporter has fixed a size that the graph leaves free.
    """
    _name_nodes(model, sources)
    _name_sizes(model, graph)
    _name_results(model, graph)
    onnx_ir.passes.common.ClearMetadataAndDocStringPass()(model)
    for node in model.graph:
        node.doc_string = node.meta.get("graphopt")


def output_names(spec: pytree.TreeSpec | None, count: int) -> list[str]:
    """A name per leaf of a result: ``output`` for a single tensor, else the keys of dicts, the
    fields of dataclasses and named tuples, and ``output_0``, ``output_1`` for positions."""
    if spec is None:
        return ["output"] if count == 1 else [f"output_{index}" for index in range(count)]
    if spec.is_leaf():
        return ["output"]
    return ["_".join(path) for path in _paths(spec, ())]


def _paths(spec: pytree.TreeSpec, path: tuple[str, ...]) -> Iterable[tuple[str, ...]]:
    if spec.is_leaf():
        yield path
        return
    for key, child in zip(_keys(spec), spec.children(), strict=True):
        # A name of its own is enough for a field; a position needs what it is a position in.
        yield from _paths(child, (*path, key) if path or not key.isdecimal() else ("output", key))


def _keys(spec: pytree.TreeSpec) -> list[str]:
    """Keys of a container, from what its registration with pytree stores about it."""
    count, context = len(spec.children()), spec.context
    if isinstance(context, type):
        context = getattr(context, "_fields", ())
    candidates = [context, *context] if isinstance(context, (list, tuple)) else []
    for keys in candidates:
        is_list = isinstance(keys, (list, tuple)) and len(keys) == count
        if is_list and all(isinstance(key, (str, int)) for key in keys):
            return [str(key) for key in keys]
    return [str(index) for index in range(count)]


def _name_nodes(model: onnx_ir.Model, sources: Mapping[str, Node]) -> None:
    """Every node is called after its module and ONNX operator, and says what it computes."""
    taken: dict[str, int] = {}
    for node in model.graph:
        source = _source(node, sources)
        scope = (source.origin.module or source.name) if source else "graph"
        name = f"{scope}/{node.op_type}"
        taken[name] = count = taken.get(name, 0) + 1
        node.name = name if count == 1 else f"{name}_{count}"
        if source is not None:
            made_by = f", made by {source.origin.made_by}" if source.origin.made_by else ""
            node.meta["graphopt"] = f"{describe(source)}{made_by}"


def _source(node: onnx_ir.Node, sources: Mapping[str, Node]) -> Node | None:
    scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    return next((sources[scope] for scope in reversed(scopes) if scope in sources), None)


def _name_sizes(model: onnx_ir.Model, graph: Graph) -> None:
    """Symbols of torch.export become the names of the free sizes."""
    names: dict[str, str] = {}
    for value, twin in zip(graph.inputs, model.graph.inputs, strict=True):
        for dimension, expression in value.free.items():
            assert twin.shape is not None
            symbol = twin.shape[dimension]
            if isinstance(symbol, int):
                raise ExportError(
                    f"torch's exporter fixes dimension {dimension} of the input %{value.name}, "
                    f"which is free ('{expression}'), to {symbol}"
                )
            names.setdefault(str(symbol.value), expression)
    for known in _values(model):
        if known.shape is not None:
            known.shape = onnx_ir.Shape([_renamed(size, names) for size in known.shape])


def _renamed(size: Any, names: Mapping[str, str]) -> Any:
    if isinstance(size, int) or size.value is None:
        return size
    if size.value in names:
        return names[size.value]

    def rename(match: re.Match[str]) -> str:
        name = names.get(match.group(), match.group())
        return name if name.isidentifier() else f"({name})"

    return re.sub(r"[A-Za-z_]\w*", rename, size.value)


def _values(model: onnx_ir.Model) -> Iterable[onnx_ir.Value]:
    yield from model.graph.inputs
    for node in onnx_ir.traversal.RecursiveGraphIterator(model.graph):
        yield from node.outputs


def _name_results(model: onnx_ir.Model, graph: Graph) -> None:
    spec = graph.interface.out_spec if graph.interface is not None else None
    names = output_names(spec, len(graph.outputs))
    wanted = [
        name for name, output in zip(names, graph.outputs, strict=True) if isinstance(output, Value)
    ]
    _separate_outputs(model)
    inputs = [value.name for value in graph.inputs]
    final = _unique([*inputs, *wanted])
    ends = [*model.graph.inputs, *model.graph.outputs]
    _make_way(model, set(final), ends)
    for value, name in zip(ends, final, strict=True):
        value.name = name


def _separate_outputs(model: onnx_ir.Model) -> None:
    """An output that is an input, a constant, or another output gets an Identity of its own."""
    graph = model.graph
    seen: set[onnx_ir.Value] = set()
    for index, value in enumerate(graph.outputs):
        if value.producer() is None or value in seen:
            copy = onnx_ir.node("Identity", [value])
            copy.outputs[0].shape, copy.outputs[0].type = value.shape, value.type
            graph.append(copy)
            graph.outputs[index] = copy.outputs[0]
        seen.add(graph.outputs[index])


def _unique(names: Sequence[str]) -> list[str]:
    taken: set[str] = set()
    unique = []
    for name in names:
        candidate, count = name, 1
        while candidate in taken:
            count += 1
            candidate = f"{name}_{count}"
        taken.add(candidate)
        unique.append(candidate)
    return unique


def _make_way(model: onnx_ir.Model, wanted: set[str], ends: Sequence[onnx_ir.Value]) -> None:
    """Rename values inside the model that have a name which an input or output is to get."""
    inner = [*model.graph.initializers.values(), *_values(model)]
    taken = wanted | {str(value.name) for value in inner}
    for value in inner:
        if value.name in wanted:
            count = 1
            while f"{value.name}_{count}" in taken:
                count += 1
            value.name = f"{value.name}_{count}"
            taken.add(value.name)
