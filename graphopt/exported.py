"""Builds a graph from what torch traced: an exported program, or an fx graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.utils._sympy.printers import PythonPrinter

from graphopt.errors import GraphError, TraceError
from graphopt.ir import Graph, Node, Operand, Origin, TensorType, Value
from graphopt.ir.inference import map_operand
from graphopt.ir.operators import name_of, resolve

# Layouts are the engine's business: these operators differ from reshape only in strides.
_RESHAPES = {"aten.view", "aten._unsafe_view", "aten._reshape_alias"}
_ASSERTIONS = {
    "aten._assert_tensor_metadata",
    "aten._assert_scalar",
    "aten._assert_async",
    "aten._assert_async.msg",
    "aten.sym_constrain_range",
    "aten.sym_constrain_range_for_size",
}
# Operators that update running statistics, which their schemas do not say, by the operand that
# asks them to.
_STATISTICS = {"aten.batch_norm": "training", "aten.instance_norm": "use_input_stats"}
_REFUSED = {
    "aten.as_strided": "reads memory by strides, which a graph does not know; "
    "write it as a slice, view or unfold",
    "aten.item": "turns data into a Python number, so that what follows depends on data",
    "aten._local_scalar_dense": "turns data into a Python number, so that what follows depends "
    "on data",
}


@dataclass(frozen=True)
class Source:
    """A placeholder of a traced graph: an input of the model, or one of its tensors.

    Attributes:
        name: the name of a tensor in the model, or of the argument.
        tensor: the model's tensor; None for an input.
        example: the example's tensor; for an input.
        free: the size expression per free dimension; for an input.
        trainable: whether the tensor is a parameter.
        skipped: whether it is an argument that is no tensor, which the trace has burnt in.
    """

    name: str
    tensor: torch.Tensor | None = None
    example: torch.Tensor | None = None
    free: Mapping[int, str] | None = None
    trainable: bool = False
    skipped: bool = False


@dataclass(frozen=True)
class Sizes:
    """The free sizes of an exported program.

    Attributes:
        names: the name given to each symbol.
        guards: what must hold of them, as Python expressions.
    """

    names: Mapping[sympy.Symbol, str]
    guards: tuple[str, ...]

    def expression(self, size: Any) -> str | None:
        """A symbolic size in terms of the free sizes; None for a number."""
        if not isinstance(size, torch.SymInt) or size.node.expr.is_number:
            return None
        return render(size.node.expr, self.names)


def render(expression: Any, names: Mapping[sympy.Symbol, str]) -> str:
    """A sympy expression as Python, with symbols renamed."""
    swap = {symbol: sympy.Symbol(name, integer=True) for symbol, name in names.items()}
    text: str = PythonPrinter().doprint(expression.xreplace(swap))
    return text


def user_inputs(program: ExportedProgram) -> list[fx.Node]:
    """The placeholders of the arguments that are tensors."""
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    return [
        node
        for node, spec in zip(placeholders, program.graph_signature.input_specs, strict=True)
        if spec.kind == InputKind.USER_INPUT and not isinstance(spec.arg, ConstantArgument)
    ]


def free_sizes(program: ExportedProgram, wanted: Sequence[Mapping[int, str]]) -> Sizes:
    """Name the symbols in the shapes of a program's inputs and collect the guards on them.

    Args:
        program: what was exported.
        wanted: per input, the name asked for each free dimension.
    """
    names: dict[sympy.Symbol, str] = {}
    shape_env = None
    inputs = user_inputs(program)
    for node, asked in zip(inputs, wanted, strict=True):
        for dimension, size in enumerate(node.meta["val"].shape):
            if not isinstance(size, torch.SymInt):
                continue
            shape_env = size.node.shape_env
            expression = size.node.expr
            if isinstance(expression, sympy.Symbol) and expression not in names:
                # The same name asked twice for sizes that the model keeps apart means that they
                # are equal, which binding the inputs checks.
                names[expression] = asked.get(dimension, f"size_{len(names)}")
    guards: dict[str, None] = {}
    if shape_env is not None:
        for guard in shape_env.guards:
            if guard.expr.free_symbols and guard.expr.free_symbols <= names.keys():
                guards[render(guard.expr, names)] = None
    for symbol, bounds in program.range_constraints.items():
        if symbol in names:
            if bounds.lower > 0:
                guards[f"{names[symbol]} >= {bounds.lower}"] = None
            if not isinstance(bounds.upper, (sympy.core.numbers.Infinity,)) and (
                bounds.upper.is_finite and bounds.upper < 2**31
            ):
                guards[f"{names[symbol]} <= {bounds.upper}"] = None
    return Sizes(names, tuple(guards))


def check_signature(program: ExportedProgram) -> None:
    """Refuse a model that changes its own state or its inputs. Raises TraceError."""
    for spec in program.graph_signature.output_specs:
        if spec.kind == OutputKind.BUFFER_MUTATION:
            raise TraceError(
                f"the model writes to its buffer '{spec.target}' in evaluation mode; graphopt "
                "needs a model whose call changes nothing: return the new state, or do not update"
                " it in eval()"
            )
        if spec.kind == OutputKind.USER_INPUT_MUTATION:
            raise TraceError(
                f"the model writes to its input '{spec.target}'; clone it before changing it"
            )
        if spec.kind != OutputKind.USER_OUTPUT:
            raise TraceError(f"the model returns a {spec.kind.name.lower()}, which is unsupported")


def build(
    body: fx.Graph, sources: Sequence[Source], sizes: Mapping[str, int], guards: Sequence[str]
) -> Graph:
    """A graph from a functional fx graph.

    Args:
        body: calls of operators only.
        sources: what each placeholder of the body is.
        sizes: the free sizes under the example.
        guards: conditions on them.

    Raises:
        TraceError: an operator cannot be part of a graph; names the module.
    """
    graph = Graph(sizes, guards)
    environment: dict[fx.Node, Any] = {}
    placeholders = [node for node in body.nodes if node.op == "placeholder"]
    _add_sources(graph, placeholders, sources, environment)
    with torch.no_grad():
        for node in body.nodes:
            if node.op == "call_function":
                _add_call(graph, node, environment)
            elif node.op == "output":
                outputs = _read(node.args[0], environment)
                graph.set_outputs(outputs)
            elif node.op != "placeholder":
                raise TraceError(f"{_module(node)}: a traced graph with {node.op} of {node.target}")
    graph.drop_unused_constants()
    return graph


def _add_sources(
    graph: Graph,
    placeholders: Sequence[fx.Node],
    sources: Sequence[Source],
    environment: dict[fx.Node, Any],
) -> None:
    known: dict[Any, Value] = {}
    for node, source in zip(placeholders, sources, strict=True):
        if source.skipped:
            continue
        if source.tensor is None:
            assert source.example is not None
            environment[node] = graph.add_input(
                source.name, TensorType.of(source.example), source.free
            )
            continue
        tensor = source.tensor
        if tensor.layout != torch.strided:
            raise TraceError(f"'{source.name}' is {tensor.layout}; make it dense first")
        identity = (
            tensor.data_ptr() or id(tensor),
            tensor.dtype,
            tuple(tensor.shape),
            tensor.stride(),
        )
        if identity not in known:
            known[identity] = graph.constant(tensor, source.name, trainable=source.trainable)
        environment[node] = known[identity]


def _add_call(
    graph: Graph,
    call: fx.Node,
    environment: dict[fx.Node, Any],
) -> None:
    if call.target is operator.getitem:
        source, index = call.args
        assert isinstance(source, fx.Node)
        environment[call] = environment[source][index]
        return
    try:
        op = name_of(call.target)  # type: ignore[arg-type]
        if op in _ASSERTIONS:
            return
        if op in _REFUSED:
            raise GraphError(f"{op} {_REFUSED[op]}")
        args = tuple(_read(argument, environment) for argument in call.args)
        kwargs = {name: _read(argument, environment) for name, argument in call.kwargs.items()}
        if op in _RESHAPES:
            op = "aten.reshape"
            kwargs = {"shape" if name == "size" else name: o for name, o in kwargs.items()}
        operands = resolve(op).bind(args, kwargs)
        _refuse_hidden_write(op, operands)
        node = graph.add_node(op, origin=_origin(call), **operands)
        _check_dtype(node, call.meta.get("val"))
        if op == "aten._native_batch_norm_legit_no_training":
            environment[call] = _plain_batch_norm(graph, node)
            return
    except GraphError as error:
        raised = TraceError(f"{_module(call)}: {error}")
        if call.stack_trace:
            raised.add_note(call.stack_trace.strip())
        raise raised from error
    several = len(node.outputs) != 1 or isinstance(call.meta.get("val"), (list, tuple))
    environment[call] = list(node.outputs) if several else node.output


def _refuse_hidden_write(op: str, operands: Mapping[str, Operand]) -> None:
    if op not in _STATISTICS or not operands.get(_STATISTICS[op]):
        return
    for name in ("running_mean", "running_var"):
        statistics = operands.get(name)
        if isinstance(statistics, Value):
            raise GraphError(
                f"{op} updates the running statistics '{statistics.name}' in evaluation mode; "
                "pass None for them, or use them instead of the batch's own"
            )


def _check_dtype(node: Node, traced: Any) -> None:
    """What the graph infers must be what torch saw while it traced."""
    if isinstance(traced, torch.Tensor) and traced.dtype != node.output.dtype:
        raise GraphError(f"{node} has another dtype than in the trace, {traced.dtype}")


def _plain_batch_norm(graph: Graph, native: Node) -> list[Operand]:
    """The layer that torch's decomposition took apart; its statistics are used by nobody."""
    operands = dict(native.operands)
    output = graph.add(
        "aten.batch_norm",
        operands["input"],
        operands.get("weight"),
        operands.get("bias"),
        operands["running_mean"],
        operands["running_var"],
        False,
        operands["momentum"],
        operands["eps"],
        True,
        origin=native.origin,
    )
    statistics = native.outputs[1:]
    graph.replace(native.outputs[0], output)
    graph.erase(native)
    return [output, *[None for _ in statistics]]


def _read(argument: Any, environment: Mapping[fx.Node, Any]) -> Operand:
    return map_operand(
        argument, lambda leaf: environment[leaf] if isinstance(leaf, fx.Node) else leaf
    )


def _module(call: fx.Node) -> str:
    origin = _origin(call)
    return f"module '{origin.module}' ({origin.module_type})" if origin.module else "the model"


def _origin(call: fx.Node) -> Origin:
    stack: Mapping[str, tuple[str, Any]] = call.meta.get("nn_module_stack") or {}
    for path, module_type in reversed(list(stack.values())):
        if path.startswith("_empty_nn_module_stack"):
            continue
        name = module_type if isinstance(module_type, str) else module_type.__qualname__
        path = path.partition("@")[0].removeprefix("L['self'].").removeprefix("L__self__.")
        return Origin(path, name.rpartition(".")[2])
    return Origin()


def program_sources(
    program: ExportedProgram,
    examples: Sequence[torch.Tensor],
    names: Sequence[str],
    expression: Callable[[Any], str | None],
    tensors: Mapping[str, torch.Tensor],
) -> Iterator[Source]:
    """What every placeholder of an exported program is.

    Args:
        program: what was exported.
        examples: the tensors among the arguments, in the shapes the graph is to have.
        names: a name for each.
        expression: turns a symbolic size into a size expression.
        tensors: the model's own parameters and buffers by name.
    """
    inputs = iter(zip(examples, names, strict=True))
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    for node, spec in zip(placeholders, program.graph_signature.input_specs, strict=True):
        if spec.kind == InputKind.USER_INPUT:
            if isinstance(spec.arg, ConstantArgument):
                yield Source(spec.arg.name, skipped=True)
                continue
            example, name = next(inputs)
            shape = enumerate(node.meta["val"].shape)
            free = {d: text for d, size in shape if (text := expression(size)) is not None}
            yield Source(name, example=example, free=free)
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            assert spec.target is not None
            tensor = tensors.get(spec.target)
            if tensor is None:
                tensor = program.constants.get(spec.target, program.state_dict.get(spec.target))
            if not isinstance(tensor, torch.Tensor):
                raise TraceError(f"'{spec.target}' is a {type(tensor).__name__}, not a tensor")
            yield Source(spec.target, tensor, trainable=spec.kind == InputKind.PARAMETER)
        else:
            raise TraceError(
                f"the model holds '{spec.target}', a {spec.kind.name.lower()}; only tensors work"
            )
