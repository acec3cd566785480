"""`graphopt.trace`: a PyTorch model becomes a graph."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from graphopt import exported
from graphopt.errors import GraphError, TraceError
from graphopt.functional import make_functional, name_dropout_alias
from graphopt.ir import TENSOR, Graph, Interface
from graphopt.ir import sizes as free_sizes

# torch makes this module a configuration object, which type checkers do not see.
symbolic_config: Any = importlib.import_module("torch.fx.experimental._config")

# dimension -> name of its size
FreeDimensions = Mapping[int, str]
Dynamic = Mapping[str, FreeDimensions]

BATCH = "batch"


@dataclass(frozen=True)
class Arguments:
    """Example arguments in canonical form."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    parameters: tuple[str, ...]
    tensors: list[torch.Tensor]
    names: list[str]
    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec

    def with_tensors(
        self, tensors: Sequence[torch.Tensor]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same call with other tensors."""
        following = iter(tensors)
        leaves = [next(following) if leaf is TENSOR else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return args, kwargs


def trace(model: nn.Module, example_inputs: Any, dynamic: Dynamic | None = None) -> Graph:
    """Trace a model into a graph.

    Args:
        model: traced in evaluation mode; left as it is, its training flags included.
        example_inputs: a tensor, a tuple of positional arguments, a dict of keyword arguments, or
            a pair of such a tuple and such a dict.
        dynamic: which sizes are free, by argument and dimension, such as
            ``{"input_ids": {0: "batch", 1: "tokens"}}``. An argument that is not named has a free
            dimension 0; ``{"x": {}}`` fixes all of x.

    Returns:
        A graph with types under the example's sizes. Sizes that the model does not leave free are
        fixed, with a warning.

    Raises:
        TraceError: the model cannot be traced, changes its own state or its inputs, or branches on
            data.
    """
    arguments = canonical_arguments(model, example_inputs)
    wanted = _free_dimensions(arguments, dynamic)
    with evaluation_mode(model), torch.no_grad(), _quiet():
        try:
            return _export(model, arguments, wanted)
        except TraceError:
            raise
        except Exception as error:
            reason = error
        try:
            graph = _trace_operators(model, arguments)
        except TraceError:
            raise
        except Exception as second:
            raise TraceError(
                f"{type(model).__name__} cannot be traced.\n  torch.export: {_short(reason)}\n"
                f"  make_fx: {_short(second)}\nData-dependent control flow has to be written "
                "with tensor operators such as torch.where; a part that cannot be traced can be "
                "kept outside of the optimized model."
            ) from reason
    warnings.warn(
        f"all sizes of {type(model).__name__} are fixed to the example's, since torch.export "
        f"refused it: {_short(reason)}",
        stacklevel=2,
    )
    return graph


def canonical_arguments(model: nn.Module, example_inputs: Any) -> Arguments:
    """Example inputs in the one form that all ways of writing them share.

    Raises:
        TraceError: they are of no such form, or do not fit the model's signature.
    """
    args, kwargs = split_arguments(example_inputs)
    parameters = positional_parameters(model)
    args, kwargs = Interface.canonical(parameters, args, kwargs)
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise TraceError(f"{type(model).__name__}.forward: {error}") from error
    tensors, leaves, spec = Interface.flatten(args, kwargs)
    names = []
    tops = list(
        zip([*parameters, *map(str, range(len(parameters), len(args)))], args, strict=False)
    )
    for name, argument in [*tops, *kwargs.items()]:
        below = pytree.tree_flatten_with_path(argument)[0]
        for path, leaf in below:
            if isinstance(leaf, torch.Tensor):
                parts = [str(getattr(key, "key", getattr(key, "idx", key))) for key in path]
                names.append("_".join([name if name.isidentifier() else f"input_{name}", *parts]))
    return Arguments(args, kwargs, parameters, tensors, names, leaves, spec)


def split_arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of `trace`'s ``example_inputs``."""
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        if (
            len(example_inputs) == 2
            and isinstance(example_inputs[0], tuple)
            and isinstance(example_inputs[1], dict)
        ):
            return example_inputs[0], dict(example_inputs[1])
        return tuple(example_inputs), {}
    raise TraceError(
        "example_inputs is a tensor, a tuple of positional arguments, a dict of keyword arguments "
        f"or a (tuple, dict) of both, not a {type(example_inputs).__name__}"
    )


def positional_parameters(model: nn.Module) -> tuple[str, ...]:
    """Names of the parameters that a call may give by position."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    return tuple(p.name for p in parameters if p.kind in kinds)


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while, without calling the model's own ``train()``."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _free_dimensions(arguments: Arguments, dynamic: Dynamic | None) -> list[FreeDimensions]:
    dynamic = dict(dynamic or {})
    tops: list[str] = []
    for index, argument in enumerate(arguments.args):
        parameters = arguments.parameters
        name = parameters[index] if index < len(parameters) else str(index)
        tops += [name] * _tensor_count(argument)
    for name, argument in arguments.kwargs.items():
        tops += [name] * _tensor_count(argument)
    for name, free in dynamic.items():
        if name not in tops:
            close = difflib.get_close_matches(name, tops, 1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            raise TraceError(
                f"dynamic names '{name}', but the tensors among the arguments are "
                f"{', '.join(dict.fromkeys(tops))}{hint}"
            )
        if not isinstance(free, Mapping) or not all(
            isinstance(d, int) and isinstance(n, str) and n.isidentifier() for d, n in free.items()
        ):
            raise TraceError(
                f"dynamic['{name}'] maps dimensions to names, such as {{0: 'batch'}}, got {free!r}"
            )
    wanted: list[FreeDimensions] = []
    for name, tensor in zip(tops, arguments.tensors, strict=True):
        free = dynamic.get(name, {0: BATCH} if tensor.dim() else {})
        for dimension in free:
            if not 0 <= dimension < tensor.dim():
                raise TraceError(
                    f"dynamic['{name}'] names dimension {dimension} of a tensor of shape "
                    f"{tuple(tensor.shape)}"
                )
        wanted.append(dict(free))
    return wanted


def _tensor_count(argument: Any) -> int:
    return sum(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(argument))


def _export(model: nn.Module, arguments: Arguments, wanted: list[FreeDimensions]) -> Graph:
    """Export with as many free sizes as the model allows.

    What the exporter fixes, or guards against the example, is fixed at the example's size and
    exported again, since the trace itself is made with sizes of at least 2.
    """
    asked = wanted
    reasons: list[str] = []
    for _ in range(1 + sum(map(len, wanted))):
        try:
            program = _run_export(model, arguments, wanted)
        except Exception as error:
            if not any(wanted):
                raise
            reasons.append(_short(error))
            wanted = [{} for _ in wanted]
            continue
        names = exported.free_sizes(program, wanted)
        fixed, reason = _fixed_by(program, arguments, wanted, names)
        if not any(fixed):
            graph = _import(model, program, arguments, wanted, names)
            _warn_fixed(model, arguments, asked, wanted, reasons)
            return graph
        reasons.append(reason)
        wanted = [
            {d: name for d, name in free.items() if d not in gone}
            for free, gone in zip(wanted, fixed, strict=True)
        ]
    raise TraceError(f"{type(model).__name__}: no choice of free sizes satisfies torch.export")


def _run_export(
    model: nn.Module, arguments: Arguments, wanted: list[FreeDimensions]
) -> ExportedProgram:
    tensors = [
        _enlarge(tensor, free) for tensor, free in zip(arguments.tensors, wanted, strict=True)
    ]
    args, kwargs = arguments.with_tensors(tensors)
    marks = iter({d: Dim.AUTO for d in free} or None for free in wanted)
    shapes = [next(marks) if leaf is TENSOR else None for leaf in arguments.leaves]
    shape_args, shape_kwargs = pytree.tree_unflatten(shapes, arguments.spec)
    parameters = inspect.signature(model.forward).parameters
    dynamic_shapes = _dynamic_shapes(parameters, shape_args, shape_kwargs)
    # Sizes of 0 and 1 stay possible: nothing is concluded from sizes above 1.
    with symbolic_config.patch(backed_size_oblivious=True):
        program = torch.export.export(
            model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False
        )
        name_dropout_alias(program.graph)
        if _has_wrappers(program) or not make_functional(program.graph):
            program = program.run_decompositions({})
    exported.check_signature(program)
    return program


def _dynamic_shapes(
    parameters: Mapping[str, inspect.Parameter], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    shapes: dict[str, Any] = {}
    rest = list(args)
    for name, parameter in parameters.items():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            shapes[name], rest = tuple(rest), []
        elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
            extra = {k: v for k, v in kwargs.items() if k not in parameters}
            if extra:
                shapes[name] = extra
        elif rest and parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            shapes[name] = rest.pop(0)
        elif name in kwargs:
            shapes[name] = kwargs[name]
    return {name: shape for name, shape in shapes.items() if shape != ()}


def _enlarge(tensor: torch.Tensor, free: FreeDimensions) -> torch.Tensor:
    """The tensor with free sizes of at least 2, for which tracing burns nothing in."""
    for dimension in free:
        size = tensor.shape[dimension]
        if size == 1:
            tensor = torch.cat([tensor, tensor], dimension)
        elif size == 0:
            shape = list(tensor.shape)
            shape[dimension] = 2
            tensor = tensor.new_zeros(shape)
    return tensor


def _has_wrappers(program: ExportedProgram) -> bool:
    """Whether the graph holds autocast or gradient regions, which torch knows how to inline."""
    return any(
        isinstance(node.target, torch._ops.HigherOrderOperator) for node in program.graph.nodes
    )


def _fixed_by(
    program: ExportedProgram,
    arguments: Arguments,
    wanted: list[FreeDimensions],
    names: exported.Sizes,
) -> tuple[list[set[int]], str]:
    """Per input, the wanted dimensions that the export fixed or that its guards rule out, and
    why."""
    inputs = exported.user_inputs(program)
    fixed: list[set[int]] = []
    expressions: list[dict[int, str]] = []
    for node, free in zip(inputs, wanted, strict=True):
        shape = node.meta["val"].shape
        texts = {d: names.expression(shape[d]) for d in free}
        fixed.append({d for d, text in texts.items() if text is None})
        expressions.append({d: text for d, text in texts.items() if text is not None})
    if any(fixed):
        return fixed, "the model computes with this size as a number"
    try:
        shapes = [tuple(t.shape) for t in arguments.tensors]
        sizes = free_sizes.bind(shapes, expressions, names.names.values())
    except GraphError as error:
        return [set(free) for free in wanted], str(error)
    guard = free_sizes.violated(names.guards, sizes)
    if guard is not None:
        mentioned = {name for name in sizes if name in guard}
        reason = f"with this size free, the trace holds only where {guard}"
    elif sizes and free_sizes.other_assignment(sizes, names.guards) is None:
        mentioned, reason = set(sizes), "the trace holds for no other size"
    else:
        return fixed, ""
    return [
        {d for d, text in texts.items() if any(name in text for name in mentioned)}
        for texts in expressions
    ], reason


def _import(
    model: nn.Module,
    program: ExportedProgram,
    arguments: Arguments,
    wanted: list[FreeDimensions],
    names: exported.Sizes,
) -> Graph:
    tensors = _state(model)
    sources = list(
        exported.program_sources(
            program, arguments.tensors, arguments.names, names.expression, tensors
        )
    )
    inputs = [source for source in sources if source.example is not None]
    sizes = free_sizes.bind(
        [tuple(t.shape) for t in arguments.tensors],
        [source.free or {} for source in inputs],
        names.names.values(),
    )
    graph = exported.build(program.graph, sources, sizes, names.guards)
    graph.interface = Interface(
        arguments.spec, arguments.leaves, program.call_spec.out_spec, arguments.parameters
    )
    return graph


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, under every name they have."""
    state: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    state.update(model.named_buffers(remove_duplicate=False))
    return state


def _warn_fixed(
    model: nn.Module,
    arguments: Arguments,
    asked: list[FreeDimensions],
    kept: list[FreeDimensions],
    reasons: list[str],
) -> None:
    lost = [
        f"dimension {dimension} ('{label}') of {name}"
        for name, free, left in zip(arguments.names, asked, kept, strict=True)
        for dimension, label in free.items()
        if dimension not in left
    ]
    if lost:
        warnings.warn(
            f"{type(model).__name__}: {', '.join(lost)} is fixed to the example's size: "
            f"{'; '.join(dict.fromkeys(reasons))}",
            stacklevel=4,
        )


def _trace_operators(model: nn.Module, arguments: Arguments) -> Graph:
    """Trace with make_fx, every size fixed."""
    state = _state(model)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    out_spec: list[pytree.TreeSpec] = []

    def call(state: dict[str, torch.Tensor], tensors: list[torch.Tensor]) -> list[Any]:
        args, kwargs = arguments.with_tensors(tensors)
        result = torch.func.functional_call(model, state, args, kwargs)
        leaves, spec = pytree.tree_flatten(result)
        out_spec[:] = [spec]
        for leaf in leaves:
            if not isinstance(leaf, (torch.Tensor, int, float, bool, str, type(None))):
                raise TraceError(
                    f"the model returns a {type(leaf).__name__}; register it with "
                    "torch.export.register_dataclass or torch.utils._pytree"
                )
        return leaves

    with symbolic_config.patch(backed_size_oblivious=True):
        module = make_fx(call, tracing_mode="fake", pre_dispatch=True, _allow_non_fake_inputs=True)(
            state, arguments.tensors
        )
    body = module.graph
    name_dropout_alias(body)
    if not make_functional(body):
        raise TraceError(
            f"{type(model).__name__} writes in place to a tensor that is also read elsewhere, and "
            "torch.export, which could resolve that, refuses the model"
        )
    sources = [
        exported.Source(name, tensor, trainable=name in parameters)
        for name, tensor in state.items()
    ]
    sources += [
        exported.Source(name, example=tensor)
        for name, tensor in zip(arguments.names, arguments.tensors, strict=True)
    ]
    _lift_attributes(module, sources)
    graph = exported.build(body, sources, {}, ())
    graph.interface = Interface(arguments.spec, arguments.leaves, out_spec[0], arguments.parameters)
    return graph


def _lift_attributes(module: torch.fx.GraphModule, sources: list[exported.Source]) -> None:
    """Turn tensors that the trace met in passing into placeholders after the others."""
    body = module.graph
    last = [node for node in body.nodes if node.op == "placeholder"][-1]
    for node in [node for node in body.nodes if node.op == "get_attr"]:
        tensor = getattr(module, str(node.target))
        with body.inserting_after(last):
            last = body.placeholder(f"lifted_{node.name}")
        last.meta.update(node.meta)
        node.replace_all_uses_with(last)
        body.erase_node(node)
        sources.append(exported.Source(f"lifted.{node.name}", tensor))


def _short(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's own log lines about a trace that is going to be explained anyway."""
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch.fx", "torch._export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
