"""What a kernel is asked to do: plain, hashable facts about shapes and memory.

A problem knows nothing of graphs. Its operands are numbered; `registry.Input` and
`registry.Output` refer to them by that number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import pairwise
from typing import Any

from graphopt.kernels.expression import Expression
from graphopt.kernels.operand import Operand


class Problem:
    """Base of all problems, which are frozen dataclasses.

    ``inputs`` and ``outputs`` are tuples of `Operand`.
    """

    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]

    @property
    def flops(self) -> int:
        """Arithmetic operations; a multiplication and its addition are two."""
        raise NotImplementedError

    @property
    def bytes(self) -> int:
        """Memory traffic if every operand is read or written once."""
        return sum(operand.bytes for operand in (*self.inputs, *self.outputs))

    def key(self) -> str:
        """A text that is equal for equal problems only, in every process and version."""
        return _text(self)


def _text(fact: Any) -> str:
    if is_dataclass(fact) and not isinstance(fact, type):
        parts = (f"{entry.name}={_text(getattr(fact, entry.name))}" for entry in fields(fact))
        return f"{type(fact).__name__}({','.join(parts)})"
    if isinstance(fact, tuple):
        return f"[{','.join(map(_text, fact))}]"
    return repr(fact)


@dataclass(frozen=True)
class PointwiseProblem(Problem):
    """``outputs = expression(*inputs)``, element by element.

    All outputs have one shape; inputs broadcast to it as in torch.
    """

    expression: Expression
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]

    @property
    def flops(self) -> int:
        return len(self.expression.instructions) * self.outputs[0].size


@dataclass(frozen=True)
class Piece:
    """A rectangle of elements that a copy moves: strides and offsets in elements.

    ``source`` numbers the input that it comes from; None fills it with the problem's ``fill``.
    Strides of 0 repeat, negative strides reverse.
    """

    source: int | None
    shape: tuple[int, ...]
    source_strides: tuple[int, ...]
    source_offset: int
    target_strides: tuple[int, ...]
    target_offset: int


@dataclass(frozen=True)
class CopyProblem(Problem):
    """Elements moved without arithmetic: permutations, slices, concatenation, padding.

    The pieces cover every element of the one output exactly once; `copy` has functions that make
    them. All operands have one dtype.
    """

    pieces: tuple[Piece, ...]
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    fill: bool | int | float = 0

    @property
    def flops(self) -> int:
        return 0

    @property
    def bytes(self) -> int:
        return 2 * self.outputs[0].bytes


@dataclass(frozen=True)
class GatherProblem(Problem):
    """Rows of a table, by their numbers.

    Inputs are a table (rows, *row) and int64 or int32 indices of any shape. Outputs are
    (*indices, *row), and a note of two int64: whether an index is outside of the table, and the
    first that is; the rows picked for such indices are any. If ``wraps``, negative indices count
    from the end.
    """

    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    wraps: bool = False

    @property
    def flops(self) -> int:
        return 0

    @property
    def bytes(self) -> int:
        return self.inputs[1].bytes + 2 * self.outputs[0].bytes

    def check(self) -> None:
        """Raise ValueError where the operands do not belong together."""
        (table, indices), (y, note) = self.inputs, self.outputs
        expected = (*indices.shape, *table.shape[1:])
        if y.shape != expected or y.dtype != table.dtype:
            raise ValueError(f"the output is {y.dtype} {y.shape}, it should be {expected}")
        if indices.dtype not in ("int64", "int32") or note != Operand.plain("int64", (2,)):
            raise ValueError(f"indices are {indices.dtype} and the note is {note}")


@dataclass(frozen=True)
class ReductionProblem(Problem):
    """One operand reduced over some of its dimensions.

    ``operator`` is ``sum``, ``mean``, ``amax``, ``amin`` or ``prod``. ``prologue`` (one input, one
    result) is applied to every element first, and ``epilogue`` to every result. The output's shape
    has the reduced dimensions as size 1 or not at all. The reduction is done in the dtype that the
    prologue yields, or the input's.
    """

    operator: str
    dimensions: tuple[int, ...]
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    prologue: Expression | None = None
    epilogue: Expression | None = None

    @property
    def flops(self) -> int:
        steps = len(self.prologue.instructions) if self.prologue else 0
        return self.inputs[0].size * (1 + steps)


@dataclass(frozen=True)
class ConvolutionProblem(Problem):
    """``aten.convolution`` (not transposed) and elementwise operators on its result.

    Inputs are x (N, C, *spatial), the constant weight (O, C / groups, *kernel) and the further
    inputs of ``epilogue``, whose first input is the convolution's result: each broadcasts to the
    output as in torch, or has the shape (O,), one element per output channel, as a bias has.
    ``stride``, ``padding`` (before and after) and ``dilation`` have an entry per spatial dimension;
    padding is with zeros.
    """

    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int = 1
    epilogue: Expression | None = None

    @property
    def flops(self) -> int:
        steps = len(self.epilogue.instructions) if self.epilogue else 0
        return self.outputs[0].size * (2 * math.prod(self.inputs[1].shape[1:]) + steps)

    def check(self) -> None:
        """Raise ValueError where the shapes do not belong together."""
        x, weight, *_ = self.inputs
        sizes = [
            (size + before + after - reach * (kernel - 1) - 1) // step + 1
            for size, kernel, step, (before, after), reach in zip(
                x.shape[2:], weight.shape[2:], self.stride, self.padding, self.dilation, strict=True
            )
        ]
        if weight.shape[0] % self.groups or x.shape[1] != weight.shape[1] * self.groups:
            raise ValueError(f"{x.shape} does not divide into {self.groups} of {weight.shape}")
        expected = (x.shape[0], weight.shape[0], *sizes)
        if self.outputs[0].shape != expected:
            raise ValueError(f"the output is {self.outputs[0].shape}, it should be {expected}")


@dataclass(frozen=True)
class ChainStage:
    """A convolution of a `ConvolutionChainProblem`; the names are those of `ConvolutionProblem`.

    ``constants`` is the number of its inputs beside x: the weight and the further inputs of the
    epilogue. ``output`` has the shape of its result.
    """

    constants: int
    output: Operand
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    epilogue: Expression | None


@dataclass(frozen=True)
class ConvolutionChainProblem(Problem):
    """Convolutions of which each reads the result of the one before, which nothing else reads.

    Inputs are x of the first, then of each its weight and the further inputs of its epilogue.
    """

    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    stages: tuple[ChainStage, ...]

    @staticmethod
    def of(convolutions: Sequence[ConvolutionProblem]) -> ConvolutionChainProblem:
        """The chain of some convolutions.

        Raises ValueError where one does not read what the one before computes.
        """
        for one, following in pairwise(convolutions):
            if one.outputs[0].shape != following.inputs[0].shape:
                raise ValueError(
                    f"{one.outputs[0].shape} is followed by {following.inputs[0].shape}"
                )
        stages = tuple(
            ChainStage(
                len(one.inputs) - 1,
                one.outputs[0],
                one.stride,
                one.padding,
                one.dilation,
                one.groups,
                one.epilogue,
            )
            for one in convolutions
        )
        constants = [operand for one in convolutions for operand in one.inputs[1:]]
        return ConvolutionChainProblem(
            (convolutions[0].inputs[0], *constants), convolutions[-1].outputs, stages
        )

    @property
    def convolutions(self) -> tuple[ConvolutionProblem, ...]:
        """Each convolution on its own."""
        found = []
        x, first = self.inputs[0], 1
        for stage in self.stages:
            inputs = (x, *self.inputs[first : first + stage.constants])
            found.append(
                ConvolutionProblem(
                    inputs,
                    (stage.output,),
                    stage.stride,
                    stage.padding,
                    stage.dilation,
                    stage.groups,
                    stage.epilogue,
                )
            )
            x, first = stage.output, first + stage.constants
        return tuple(found)

    @property
    def flops(self) -> int:
        return sum(one.flops for one in self.convolutions)

    def check(self) -> None:
        """Raise ValueError where the shapes do not belong together."""
        for one in self.convolutions:
            one.check()


@dataclass(frozen=True)
class MatmulProblem(Problem):
    """``aten.matmul`` of at least two dimensions and elementwise operators on its result.

    Inputs are a (*batch, M, K), b (*batch, K, N), whose batch dimensions broadcast, and the
    further inputs of ``epilogue``, whose first input is the product: they broadcast to the output
    (*batch, M, N) as in torch. If ``transposed[i]``, the last two dimensions of input i stand the
    other way round: a linear layer has b (N, K) transposed. Operands may have any layout.
    """

    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    transposed: tuple[bool, bool] = (False, False)
    epilogue: Expression | None = None

    @property
    def depth(self) -> int:
        """The size that is summed over."""
        return self.inputs[0].shape[-2 if self.transposed[0] else -1]

    @property
    def flops(self) -> int:
        steps = len(self.epilogue.instructions) if self.epilogue else 0
        return self.outputs[0].size * (2 * self.depth + steps)

    def check(self) -> None:
        """Raise ValueError where the shapes do not belong together."""
        shapes = []
        for operand, transposed in zip(self.inputs, self.transposed, strict=False):
            *batch, rows, columns = operand.shape
            shapes.append((*batch, columns, rows) if transposed else operand.shape)
        a, b = shapes
        y = self.outputs[0].shape
        if a[-1] != b[-2] or y[-2:] != (a[-2], b[-1]):
            raise ValueError(f"{a} times {b} is not {y}")


@dataclass(frozen=True)
class NormalizationProblem(Problem):
    """Rows brought to mean 0 and variance 1, and elementwise operators on the result.

    Inputs are x (*rows, *row), where a row has ``dimensions`` dimensions, and the further inputs of
    ``epilogue``, whose first input is ``(x - mean) / sqrt(variance + epsilon)`` with the (biased)
    moments of each row: they broadcast to the output as in torch, as a learned scale and shift
    do. If not ``centered``, it is ``x / sqrt(mean(x * x) + epsilon)``. A group norm is the
    normalisation of (N, groups, C / groups, *spatial).
    """

    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    dimensions: int
    epsilon: float
    centered: bool = True
    epilogue: Expression | None = None

    @property
    def flops(self) -> int:
        steps = len(self.epilogue.instructions) if self.epilogue else 0
        return self.outputs[0].size * ((6 if self.centered else 3) + steps)


@dataclass(frozen=True)
class SoftmaxProblem(Problem):
    """``aten.softmax`` of one operand along a dimension, or its logarithm."""

    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    dimension: int
    logarithm: bool = False

    @property
    def flops(self) -> int:
        return 5 * self.inputs[0].size


@dataclass(frozen=True)
class AttentionProblem(Problem):
    """``aten.scaled_dot_product_attention`` without dropout.

    Inputs are query (*batch, L, E), key (*batch, S, E), value (*batch, S, V), and perhaps a mask
    (*batch, L, S), float32 to be added to the scaled scores or bool with True for what is seen.
    Batch dimensions, and the mask's rows, broadcast to those of the output (*batch, L, V). If
    ``causal``, query i sees keys 0 to i alone. A query that sees nothing yields zeros.
    """

    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    scale: float
    causal: bool = False

    @property
    def flops(self) -> int:
        query, key = self.inputs[:2]
        length, size = query.shape[-2], key.shape[-2]
        per_score = 2 * query.shape[-1] + 2 * self.outputs[0].shape[-1] + 6
        return math.prod(self.outputs[0].shape[:-2]) * length * size * per_score

    def check(self) -> None:
        """Raise ValueError where the shapes do not belong together."""
        query, key, value = (operand.shape for operand in self.inputs[:3])
        y = self.outputs[0].shape
        if query[-1] != key[-1] or key[-2] != value[-2] or y[-2:] != (query[-2], value[-1]):
            raise ValueError(f"attention of {query} to {key} with {value} is not {y}")


@dataclass(frozen=True)
class PoolingProblem(Problem):
    """The largest element or the average of each window, and elementwise operators on it.

    Inputs are x (N, C, *spatial) and the further inputs of ``epilogue``, as a convolution has them.
    ``operator`` is ``max`` or ``mean``; NaN spreads to every window that sees it. Padding (before
    and after) is -inf for a maximum and 0 for an average. Windows may reach beyond it by less than
    a stride, as ``ceil_mode`` has it, where there is nothing. An average divides by ``divisor``, or
    by the number of a window's elements inside the padded image if ``count_padding``, else inside
    the image.
    """

    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    operator: str
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    count_padding: bool = True
    divisor: int | None = None
    epilogue: Expression | None = None

    @property
    def flops(self) -> int:
        steps = len(self.epilogue.instructions) if self.epilogue else 0
        return self.outputs[0].size * (math.prod(self.kernel) + steps)

    def check(self) -> None:
        """Raise ValueError where the shapes do not belong together."""
        x, y = self.inputs[0].shape, self.outputs[0].shape
        if x[:2] != y[:2] or len(x) != len(y):
            raise ValueError(f"{y} is not {x} pooled")
        for size, count, kernel, step, (before, after), reach in zip(
            x[2:], y[2:], self.kernel, self.stride, self.padding, self.dilation, strict=True
        ):
            least = (size + before + after - reach * (kernel - 1) - 1) // step + 1
            if not least <= count <= least + 1 or (count - 1) * step >= size + before:
                raise ValueError(f"{size} elements do not pool to {count}, but to {least}")


@dataclass(frozen=True)
class AdaptivePoolingProblem(Problem):
    """``aten.adaptive_avg_pool``: averages over as many bins as the output (N, C, *bins) has.

    Bin i of n over m elements reaches from floor(i * m / n) to ceil((i + 1) * m / n).
    """

    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]

    @property
    def flops(self) -> int:
        return self.inputs[0].size
