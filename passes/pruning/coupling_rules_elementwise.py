"""Coupling rules of operators that keep channels apart: elementwise ones, reductions over other
dimensions, pooling."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from graphopt.ir import Node, Value
from graphopt.passes.pruning.axes import Axis
from graphopt.passes.pruning.coupling import Axes, Coupling, Rule, describe


def broadcast(c: Coupling, node: Node, rank: int, operands: Iterable[Axes]) -> Axes:
    """The axes of an elementwise result: those of the operands, aligned at the end and tied. An
    axis of size 1 is repeated for as many channels as the others have."""
    result: list[Axis | None] = [None] * rank
    for axes in operands:
        for dimension, axis in enumerate(axes, start=rank - len(axes)):
            so_far = result[dimension]
            if so_far is None or is_one(so_far):
                result[dimension] = axis
            elif not is_one(axis):
                result[dimension] = c.tie(so_far, axis, node)
    return tuple(axis for axis in result if axis is not None)


def is_one(axis: Axis) -> bool:
    return all(size == 1 for size in axis.sizes)


def is_pointwise(node: Node) -> bool:
    """Whether torch itself says that an operator works element by element."""
    return torch.Tag.pointwise in getattr(node.operator.target, "tags", ())


def pointwise(c: Coupling, node: Node) -> list[Axes]:
    operands = [c.axes[value] for value in node.input_values() if value.is_tensor]
    return [broadcast(c, node, out.rank, operands) for out in node.outputs]


def _same(c: Coupling, node: Node) -> list[Axes]:
    """The result is like the first operand; others only lend it their dtype."""
    return [c.axes[next(node.input_values())]]


def _reduction(c: Coupling, node: Node) -> list[Axes]:
    """What is summed up, averaged or compared must stay complete."""
    value = next(node.input_values())
    axes = c.axes[value]
    reduced = _dimensions(node, value)
    reason = f"{describe(node)} reduces it"
    for dimension in reduced:
        c.pin(axes[dimension], reason)
    single = c.fixed((1,) * c.assignments, reason)
    if node.outputs[0].rank == len(axes):
        left = [single if d in reduced else axis for d, axis in enumerate(axes)]
    else:
        left = [axis for d, axis in enumerate(axes) if d not in reduced]
    return [tuple(left)] * len(node.outputs)


def _dimensions(node: Node, value: Value) -> set[int]:
    """The dimensions that an operator names, or all if it names none."""
    given = node.operands.get("dim", node.operands.get("dims"))
    if given is None or (isinstance(given, (list, tuple)) and not given):
        return set(range(value.rank))
    return {d % value.rank for d in (given if isinstance(given, (list, tuple)) else [given])}


def _along(c: Coupling, node: Node) -> list[Axes]:
    """Elements of a dimension depend on each other, or on their places in it."""
    value = next(node.input_values())
    axes = list(c.axes[value])
    reason = f"{describe(node)} computes along it"
    for dimension in _dimensions(node, value):
        c.pin(axes[dimension], reason)
    return [
        tuple(
            axis if axis.sizes == c.sizes(out, d) else c.fixed(c.sizes(out, d), reason)
            for d, axis in enumerate(axes)
        )
        for out in node.outputs
    ]


def _spatial(count: int) -> Rule:
    """Pooling and interpolation: the last dimensions are an image."""

    def rule(c: Coupling, node: Node) -> list[Axes]:
        axes = c.axes[next(node.input_values())]
        reason = f"{describe(node)} works on images"
        for axis in axes[-count:]:
            c.pin(axis, reason)
        return [(*axes[:-count], *c.all_fixed(out, reason)[-count:]) for out in node.outputs]

    return rule


def _glu(c: Coupling, node: Node) -> list[Axes]:
    """The second half of a dimension gates the first."""
    axes = list(c.axes[node["self"]])
    dimension = node["dim"] % len(axes)
    flat = axes[dimension].flat()
    if flat is None:
        reason = f"{describe(node)} halves a size that is free"
        c.pin(axes[dimension], reason)
        axes[dimension] = c.fixed(c.sizes(node.output, dimension), reason)
    else:
        half = c.tie_all(flat, np.arange(len(flat)) % (len(flat) // 2))
        axes[dimension] = c.row(half)
    return [tuple(axes)]


def _padding(c: Coupling, node: Node) -> list[Axes]:
    axes = list(c.axes[node["self"]])
    widths = node["pad"] if "pad" in node.operands else node["padding"]
    for place in range(len(widths) // 2):
        if any(width != 0 for width in widths[2 * place : 2 * place + 2]):
            dimension = len(axes) - 1 - place
            reason = f"{describe(node)} pads it"
            c.pin(axes[dimension], reason)
            axes[dimension] = c.fixed(c.sizes(node.output, dimension), reason)
    return [tuple(axes)]


def _creation(c: Coupling, node: Node) -> list[Axes]:
    """A tensor that is made of sizes alone."""
    return [c.all_fixed(out, f"{describe(node)} makes it") for out in node.outputs]


def _table(names: str, rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys((f"aten.{name}" for name in names.split()), rule)


_DIMENSIONS = (1, 2, 3)


def _by_dimensions(names: Sequence[str], overloads: Sequence[str] = ("",)) -> dict[str, Rule]:
    return {
        f"aten.{name.format(d)}{overload}": _spatial(d)
        for d in _DIMENSIONS
        for name in names
        for overload in overloads
    }


ELEMENTWISE_RULES: dict[str, Rule] = {
    **_table(
        """
        contiguous clone alias detach lift_fresh_copy to.dtype to.dtype_layout to.device to.other
        _to_copy type_as dropout alpha_dropout feature_dropout zeros_like ones_like full_like
        empty_like bernoulli nan_to_num
        """,
        _same,
    ),
    **_table(
        """
        masked_fill.Scalar masked_fill.Tensor where.self where.ScalarOther where.ScalarSelf
        where.Scalar relu6 hardtanh selu celu silu mish gelu logsigmoid log_sigmoid clip
        bitwise_and.Tensor __and__.Tensor __or__.Tensor square true_divide.Tensor divide.Tensor
        multiply.Tensor subtract.Tensor not_equal.Tensor ge.Scalar softplus hardswish hardsigmoid
        """,
        pointwise,
    ),
    **_table(
        """
        sum sum.dim_IntList mean mean.dim amax amin max.dim min.dim max min prod prod.dim_int
        var.correction std.correction var.dim std.dim var_mean.correction logsumexp argmax argmin
        any any.dim all all.dim linalg_vector_norm norm.ScalarOpt_dim norm.Scalar median.dim
        """,
        _reduction,
    ),
    **_table(
        """
        softmax.int _softmax log_softmax.int _log_softmax cumsum cumprod logcumsumexp flip roll
        sort sort.stable argsort topk diff
        """,
        _along,
    ),
    **_by_dimensions(
        ("max_pool{}d", "avg_pool{}d", "adaptive_avg_pool{}d", "adaptive_max_pool{}d",
         "max_pool{}d_with_indices", "lp_pool{}d", "_adaptive_avg_pool{}d")
    ),
    **_by_dimensions(
        ("upsample_nearest{}d", "_upsample_nearest_exact{}d"), ("", ".vec")
    ),
    **{
        f"aten.upsample_{kind}{overload}": _spatial(d)
        for kind, d in {"linear1d": 1, "bilinear2d": 2, "bicubic2d": 2, "trilinear3d": 3,
                        "_bilinear2d_aa": 2, "_bicubic2d_aa": 2}.items()
        for overload in ("", ".vec")
    },
    **_table(
        """
        pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d
        replication_pad2d replication_pad3d
        """,
        _padding,
    ),
    "aten.glu": _glu,
    **_table(
        """
        zeros ones full empty.memory_format arange arange.start arange.start_step eye linspace rand
        randn scalar_tensor new_zeros new_ones new_full new_empty
        """,
        _creation,
    ),
}  # fmt: skip
