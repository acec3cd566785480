"""Nodes with a kernel family of their own: what a layer is, convolutions, reductions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from graphopt.engine.quantization import folded
from graphopt.engine.view_rules import zero_padding
from graphopt.engine.work import Derived, Scope
from graphopt.ir import Node, Value
from graphopt.kernels.expression import Expression, Instruction, Literal, Ref
from graphopt.kernels.operand import ConstantOperand, Operand
from graphopt.kernels.problem import ConvolutionProblem, Problem, ReductionProblem

MakeProblem = Callable[[Expression | None, tuple[Operand, ...]], Problem | None]


@dataclass(frozen=True)
class Layer:
    """A node as a problem, which may take an epilogue.

    Attributes:
        output: what the node yields.
        inputs: the values of the problem's first inputs.
        make: the problem, given an epilogue (its first input is the layer's result, the others
            are further inputs of the problem) and the operands of those others.
        bias: is added to the result before anything else, per channel.
        takes_epilogue: whether elementwise nodes may follow inside the kernel.
    """

    scope: Scope
    output: Value
    inputs: tuple[Value | Derived, ...]
    make: MakeProblem
    bias: Value | None = None
    takes_epilogue: bool = False

    def problem(self, epilogue: Expression | None, extra: Sequence[Value]) -> Problem | None:
        """The problem with an epilogue; None where the kernels do not take it."""
        rank = len(self.scope.shape(self.output))
        operands = tuple(_with_rank(self.scope.operand(value), rank) for value in extra)
        if self.bias is not None:
            epilogue = _after_bias(epilogue, len(extra))
            operands = (*operands, self.scope.operand(self.bias))
        return self.make(epilogue, operands)

    def values(self, extra: Sequence[Value]) -> tuple[Value | Derived, ...]:
        """The value of each of the problem's inputs."""
        bias = () if self.bias is None else (self.bias,)
        return (*self.inputs, *extra, *bias)


def _with_rank(operand: Operand, rank: int) -> Operand:
    """An operand with leading sizes of 1; one of rank 1 would mean an element per channel."""
    missing = rank - len(operand.shape)
    plain = Operand.plain(operand.dtype, (1,) * missing + operand.shape)
    if isinstance(operand, ConstantOperand):
        return ConstantOperand(plain.shape, plain.layout, operand.zeros)
    return plain


def _after_bias(epilogue: Expression | None, extra: int) -> Expression:
    """An epilogue that adds a bias, its last input, before it does anything else."""
    old = epilogue or Expression(("float32",), (), (Ref(0),))
    bias, biased = extra + 1, extra + 2

    def moved(ref: Ref) -> Ref:
        if ref.index == 0:
            return Ref(biased)
        return ref if ref.index <= extra else Ref(ref.index + 2)

    def read(operand: Ref | Literal) -> Ref | Literal:
        return moved(operand) if isinstance(operand, Ref) else operand

    body = [Instruction("add", (Ref(0), Ref(bias)), "float32")]
    for step in old.instructions:
        body.append(Instruction(step.op, tuple(map(read, step.operands)), step.dtype))
    return Expression((*old.inputs, "float32"), tuple(body), tuple(map(moved, old.results)))


Rule = Callable[[Scope, Node], "Layer | None"]

LAYERS: dict[str, Rule] = {}
"""By operator: the rule that turns a node into a layer, or declines."""


def layer_rule(*ops: str) -> Callable[[Rule], Rule]:
    """Register the rule of some operators."""

    def add(rule: Rule) -> Rule:
        LAYERS.update(dict.fromkeys(ops, rule))
        return rule

    return add


CONVOLUTIONS = (
    "aten.conv1d", "aten.conv2d", "aten.conv1d.padding", "aten.conv2d.padding", "aten.convolution"
)  # fmt: skip


@layer_rule(*CONVOLUTIONS)
def _convolution(scope: Scope, node: Node) -> Layer | None:
    x, weight, bias = node["input"], folded(node["weight"]), node["bias"]
    if not scope.all_float32(x, node["weight"], bias) or not weight.is_constant:
        return None
    geometry = convolution_geometry(scope, node)
    if geometry is None:
        return None
    operands = (scope.operand(geometry.x), scope.operand(weight))
    result = scope.operand(node.output)
    shape = geometry.stride, geometry.padding, geometry.dilation, geometry.groups

    def make(epilogue: Expression | None, extra: tuple[Operand, ...]) -> Problem | None:
        return ConvolutionProblem((*operands, *extra), (result,), *shape, epilogue)

    return Layer(scope, node.output, (geometry.x, weight), make, bias, takes_epilogue=True)


@dataclass(frozen=True)
class Geometry:
    """How a convolution passes over ``x``; padding is before and after each dimension."""

    x: Value
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int


def convolution_geometry(scope: Scope, node: Node) -> Geometry | None:
    """That of a convolution, which pads as zeros around its input do; None if it is transposed."""
    x, weight = node["input"], node["weight"]
    spatial = len(scope.shape(weight)) - 2
    if len(scope.shape(x)) != spatial + 2:
        return None
    if node.op == "aten.convolution" and (node["transposed"] or any(node["output_padding"])):
        return None
    dilation = per_dimension(scope, node["dilation"], spatial)
    padding = _padding(scope, node, scope.shape(weight)[2:], dilation)
    stride = per_dimension(scope, node["stride"], spatial)
    groups = scope.literal(node["groups"])
    # Padding of its own may differ before and after, which no convolution of torch can say.
    source, zeros = zero_padding(scope, x)
    if zeros[0] == zeros[1] == (0, 0):
        x = source
        padding = tuple(
            (before + own_before, after + own_after)
            for (before, after), (own_before, own_after) in zip(padding, zeros[2:], strict=True)
        )
    return Geometry(x, stride, padding, dilation, groups)


def per_dimension(scope: Scope, given: Any, count: int) -> tuple[int, ...]:
    """A number for each of ``count`` dimensions, where one may stand for all."""
    numbers = scope.literal(given)
    if isinstance(numbers, int):
        numbers = [numbers]
    return tuple(numbers) * count if len(numbers) == 1 else tuple(numbers)


def _padding(
    scope: Scope, node: Node, kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    """Zeros before and after each spatial dimension."""
    given = node["padding"]
    if given == "valid":
        return ((0, 0),) * len(kernel)
    if given == "same":
        reach = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
        return tuple((total // 2, total - total // 2) for total in reach)
    return tuple((n, n) for n in per_dimension(scope, given, len(kernel)))


_REDUCTIONS = {
    "aten.sum": "sum",
    "aten.sum.dim_IntList": "sum",
    "aten.mean": "mean",
    "aten.mean.dim": "mean",
    "aten.amax": "amax",
    "aten.amin": "amin",
    "aten.max": "amax",
    "aten.min": "amin",
}


@layer_rule(*_REDUCTIONS)
def _reduction(scope: Scope, node: Node) -> Layer | None:
    source = node["self"]
    rank = len(scope.shape(source))
    dimensions = _dimensions(node, "dim", rank)
    same = scope.tensor_type(source).dtype == scope.tensor_type(node.output).dtype
    if not same or not dimensions or not scope.has_kernels(source):
        return None
    return reduction_layer(scope, node, source, _REDUCTIONS[node.op], dimensions)


def _dimensions(node: Node, name: str, rank: int) -> tuple[int, ...]:
    """The dimensions that a node reduces, all where it names none."""
    names = [parameter.name for parameter in node.operator.parameters]
    given: Any = node[name] if name in names else None
    if isinstance(given, int):
        given = [given]
    if rank == 0:  # torch lets a scalar be reduced over dimension 0
        return ()
    return tuple(sorted({d % rank for d in given})) if given else tuple(range(rank))


def reduction_layer(
    scope: Scope, node: Node, source: Value, operator: str, dimensions: tuple[int, ...]
) -> Layer | None:
    """A node that reduces ``source`` over ``dimensions`` as a layer."""
    operand, result = scope.operand(source), scope.operand(node.output)
    empty = any(operand.shape[d] == 0 for d in dimensions)
    if empty and operator != "sum":
        return None

    def make(epilogue: Expression | None, extra: tuple[Operand, ...]) -> Problem | None:
        if extra:
            return None
        dtype = epilogue.result_dtypes[0] if epilogue is not None else result.dtype
        outputs = (Operand.plain(dtype, result.shape),)
        return ReductionProblem(operator, dimensions, (operand,), outputs, epilogue=epilogue)

    return Layer(scope, node.output, (source,), make, takes_epilogue=True)
