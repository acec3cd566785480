"""Nodes that move elements or only look at them differently: views, copies, concatenation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from graphopt.engine.work import AliasWork, KernelWork, Scope, Work
from graphopt.ir import Node, Value
from graphopt.kernels import copy
from graphopt.kernels.problem import CopyProblem

Region = tuple[tuple[int, ...], tuple[int, ...], int]
ViewRule = Callable[[Scope, Node, tuple[int, ...]], "list[Region] | None"]

_VIEWS: dict[str, ViewRule] = {}


def _view(*ops: str) -> Callable[[ViewRule], ViewRule]:
    def add(rule: ViewRule) -> ViewRule:
        _VIEWS.update(dict.fromkeys(ops, rule))
        return rule

    return add


def lower_view(scope: Scope, node: Node) -> list[Work] | None:
    """Views as aliases where they are contiguous, as copies elsewhere; None for other nodes."""
    rule = _VIEWS.get(node.op)
    if rule is None:
        return None
    source = node.operands.get("self", node.operands.get("input"))
    if not isinstance(source, Value) or not scope.is_tensor(source):
        return None
    regions = rule(scope, node, scope.shape(source))
    if regions is None:
        return None
    works: list[Work] = []
    for value, (shape, strides, offset) in zip(node.outputs, regions, strict=True):
        if shape != scope.shape(value):
            return None
        kind = scope.tensor_type(value)
        if _is_contiguous(shape, strides) and not source.is_constant:
            start = offset if kind.numel else 0  # an empty view may begin past the end
            works.append(AliasWork(value, source, start * kind.dtype.itemsize, node))
        elif scope.has_kernels(source):
            problem = copy.view(scope.operand(source), shape, strides, offset)
            works.append(KernelWork(problem, (source,), (value,), (node,)))
        else:
            return None
    return works


def _is_contiguous(shape: Sequence[int], strides: Sequence[int]) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return 0 in shape
        expected *= size
    return True


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides in elements of a contiguous tensor."""
    return tuple(math.prod(shape[k + 1 :]) for k in range(len(shape)))


@_view(
    "aten.reshape",
    "aten.flatten.using_ints",
    "aten.unflatten.int",
    "aten.squeeze",
    "aten.squeeze.dim",
    "aten.squeeze.dims",
    "aten.unsqueeze",
    "aten.contiguous",
    "aten.alias",
    "aten.detach",
    "aten.reshape_as",
    "aten.view_as",
    "aten.lift_fresh",
)
def _same_elements(scope: Scope, node: Node, shape: tuple[int, ...]) -> list[Region]:
    result = scope.shape(node.output)
    return [(result, contiguous_strides(result), 0)]


_PERMUTATIONS = (
    "aten.permute",
    "aten.transpose.int",
    "aten.swapaxes",
    "aten.t",
    "aten.numpy_T",
    "aten.mT",
)


@_view(*_PERMUTATIONS)
def _permute(scope: Scope, node: Node, shape: tuple[int, ...]) -> list[Region] | None:
    order = permutation(node, len(shape))
    return None if order is None else [_permuted(shape, order)]


def permutation(node: Node, rank: int) -> tuple[int, ...] | None:
    """Which of the source's ``rank`` dimensions each dimension of a permuted view is.

    None for nodes that do something else.
    """
    if node.op not in _PERMUTATIONS:
        return None
    order = list(range(rank))
    if node.op == "aten.permute":
        order = [d % rank for d in node["dims"]]
    elif node.op == "aten.mT":
        order[-2:] = order[-2:][::-1]
    elif node.op in ("aten.t", "aten.numpy_T"):
        order.reverse()
    elif order:
        first = "dim0" if "dim0" in node.operands else "axis0"
        a, b = node[first] % rank, node[first[:-1] + "1"] % rank
        order[a], order[b] = order[b], order[a]
    return tuple(order)


def _permuted(shape: tuple[int, ...], order: Sequence[int]) -> Region:
    strides = contiguous_strides(shape)
    return tuple(shape[d] for d in order), tuple(strides[d] for d in order), 0


@_view("aten.expand", "aten.expand_as", "aten.broadcast_to")
def _expand(scope: Scope, node: Node, shape: tuple[int, ...]) -> list[Region]:
    result = scope.shape(node.output)
    missing = len(result) - len(shape)
    own = contiguous_strides(shape)
    strides = [
        0 if size == 1 and wanted != 1 else stride
        for size, stride, wanted in zip(shape, own, result[missing:], strict=True)
    ]
    return [(result, (0,) * missing + tuple(strides), 0)]


@_view("aten.slice.Tensor")
def _slice(scope: Scope, node: Node, shape: tuple[int, ...]) -> list[Region]:
    dimension = node["dim"] % len(shape)
    start, end = scope.literal(node["start"]), scope.literal(node["end"])
    indices = range(*slice(start, end, scope.literal(node["step"])).indices(shape[dimension]))
    return [_strided(shape, dimension, indices)]


@_view("aten.narrow")
def _narrow(scope: Scope, node: Node, shape: tuple[int, ...]) -> list[Region]:
    dimension = node["dim"] % len(shape)
    start = scope.literal(node["start"]) % max(shape[dimension], 1)
    indices = range(start, start + scope.literal(node["length"]))
    return [_strided(shape, dimension, indices)]


@_view("aten.select.int")
def _select(scope: Scope, node: Node, shape: tuple[int, ...]) -> list[Region]:
    dimension = node["dim"] % len(shape)
    return [_selected(shape, dimension, scope.literal(node["index"]) % shape[dimension])]


@_view("aten.unbind.int")
def _unbind(scope: Scope, node: Node, shape: tuple[int, ...]) -> list[Region]:
    dimension = node["dim"] % len(shape)
    return [_selected(shape, dimension, index) for index in range(shape[dimension])]


@_view(
    "aten.split.Tensor",
    "aten.split_with_sizes",
    "aten.split.sizes",
    "aten.chunk",
    "aten.unsafe_chunk",
    "aten.unsafe_split.Tensor",
)
def _split(scope: Scope, node: Node, shape: tuple[int, ...]) -> list[Region]:
    dimension = node["dim"] % len(shape)
    regions, start = [], 0
    for value in node.outputs:
        size = scope.shape(value)[dimension]
        regions.append(_strided(shape, dimension, range(start, start + size)))
        start += size
    return regions


def _strided(shape: tuple[int, ...], dimension: int, indices: range) -> Region:
    strides = contiguous_strides(shape)
    sizes = (*shape[:dimension], len(indices), *shape[dimension + 1 :])
    steps = (
        *strides[:dimension],
        strides[dimension] * indices.step,
        *strides[dimension + 1 :],
    )
    offset = indices.start * strides[dimension] if len(indices) else 0
    return sizes, steps, offset


def _selected(shape: tuple[int, ...], dimension: int, index: int) -> Region:
    strides = contiguous_strides(shape)
    return (
        (*shape[:dimension], *shape[dimension + 1 :]),
        (*strides[:dimension], *strides[dimension + 1 :]),
        index * strides[dimension],
    )


def lower_copy(scope: Scope, node: Node) -> list[Work] | None:
    """Nodes that put elements elsewhere without arithmetic; None for others."""
    rule = _COPIES.get(node.op)
    if rule is None or len(node.outputs) != 1:
        return None
    inputs = [value for value in node.input_values() if scope.is_tensor(value)]
    if not scope.has_kernels(*inputs, node.output):
        return None
    made = rule(scope, node)
    if made is None:
        return None
    problem, sources = made
    assert problem.outputs[0].shape == scope.shape(node.output)
    return [KernelWork(problem, tuple(sources), (node.output,), (node,))]


CopyRule = Callable[[Scope, Node], "tuple[CopyProblem, list[Value]] | None"]


def _concatenate(scope: Scope, node: Node) -> tuple[CopyProblem, list[Value]] | None:
    result = scope.tensor_type(node.output)
    # torch lets empty vectors stand for nothing in a concatenation of any rank.
    parts = [value for value in node["tensors"] if scope.shape(value) != (0,) or result.rank == 1]
    if any(scope.tensor_type(value).dtype != result.dtype for value in parts):
        return None
    operands = [scope.operand(value) for value in parts]
    return copy.concatenate(operands, node["dim"] % result.rank), parts


def _constant_pad(scope: Scope, node: Node) -> tuple[CopyProblem, list[Value]] | None:
    if node.op == "aten.pad" and node["mode"] != "constant":
        return None
    operand = scope.operand(node["self"])
    before, after, value = _padding(scope, node)
    if any(low + high + n < 0 for low, high, n in zip(before, after, operand.shape, strict=True)):
        return None
    return copy.pad(operand, before, after, value), [node["self"]]


def _padding(scope: Scope, node: Node) -> tuple[list[int], list[int], bool | int | float]:
    """What constant padding adds before and after each dimension, and of which value."""
    value, padding = scope.literal(node["value"]), scope.literal(node["pad"])
    rank = len(scope.shape(node["self"]))
    before, after = [0] * rank, [0] * rank
    for place in range(len(padding) // 2):
        before[rank - 1 - place] = padding[2 * place]
        after[rank - 1 - place] = padding[2 * place + 1]
    return before, after, 0 if value is None else value


PADS = ("aten.pad", "aten.constant_pad_nd")


def zero_padding(scope: Scope, value: Value) -> tuple[Value, list[tuple[int, int]]]:
    """What a value was before zeros were put around it, and how many along each dimension.

    The value itself and none where it is something else, or cropped.
    """
    node = value.producer
    nothing = [(0, 0)] * len(scope.shape(value))
    if node is None or node.op not in PADS:
        return value, nothing
    if node.op == "aten.pad" and node["mode"] != "constant":
        return value, nothing
    before, after, fill = _padding(scope, node)
    if fill != 0 or min(*before, *after) < 0 or 0 in scope.shape(node["self"]):
        return value, nothing
    return node["self"], list(zip(before, after, strict=True))


def _roll(scope: Scope, node: Node) -> tuple[CopyProblem, list[Value]] | None:
    shifts, dimensions = scope.literal(node["shifts"]), node["dims"]
    if len(dimensions) != 1 or len(shifts) != 1:
        return None
    operand = scope.operand(node["self"])
    return copy.roll(operand, shifts[0], dimensions[0] % len(operand.shape)), [node["self"]]


_COPIES: dict[str, CopyRule] = {
    "aten.cat": _concatenate,
    **dict.fromkeys(PADS, _constant_pad),
    "aten.roll": _roll,
}
