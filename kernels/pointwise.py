"""Fused elementwise kernels, generated for any expression.

One loop nest computes the whole expression: the innermost loop runs over vectors of elements,
operands that do not vary along it are read once per row, operands that are strided along it are
gathered. A kernel is made per expression, kind of each operand along the innermost loop and number
of loops; sizes, strides and numbers in the expression are arguments.

An output may be the very memory of an input of the same shape, dtype and layout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from graphopt.kernels import source
from graphopt.kernels.emission import Emission, cost, emit, unsupported
from graphopt.kernels.expression import Expression
from graphopt.kernels.loops import (
    SHARE,
    Arguments,
    Nest,
    Odometer,
    broadcast_strides,
    collapse,
    indent,
    kernel_text,
)
from graphopt.kernels.operand import ITEM_BYTES
from graphopt.kernels.problem import PointwiseProblem
from graphopt.kernels.registry import Argument, Candidate, Input, Output, Step, register
from graphopt.kernels.simd import LANES

CYCLES_PER_SECOND = 3e9
WORTH_SHARING = 3e-6
"""Seconds of work from which a team of threads is used."""

_CHUNK = 64
"""Elements that a row is cut at multiples of, so that no two threads write one cache line."""


@dataclass(frozen=True)
class PointwiseCandidate(Candidate):
    """The generated loop nest."""

    problem: PointwiseProblem
    nest: Nest

    def build(self, threads: int) -> tuple[Step, ...]:
        if self.problem.outputs[0].size == 0:
            return ()
        parallel = threads > 1 and self.estimate > WORTH_SHARING
        inputs = [(Input(i), operand.dtype) for i, operand in enumerate(self.problem.inputs)]
        outputs = [(Output(i), operand.dtype) for i, operand in enumerate(self.problem.outputs)]
        loop = ElementwiseLoop(self.problem.expression, self.nest, [*inputs, *outputs])
        entry = source.build("pointwise", loop.text())
        return (Step(entry, loop.arguments(threads if parallel else 1), parallel),)


def transfer_time(size: int) -> float:
    """Seconds to move ``size`` bytes, roughly: through a cache, or where too many, from memory."""
    return size / (5e10 if size < 8 * 2**20 else 1.5e10)


@register(PointwiseProblem)
def candidates(problem: PointwiseProblem) -> list[Candidate]:
    """The fused loop; none where an operator of the expression has no exact kernel text."""
    operands = (*problem.inputs, *problem.outputs)
    if any(operand.dtype not in ITEM_BYTES for operand in operands):
        return []
    if unsupported(problem.expression) is not None:
        return []
    _check(problem)
    shape = problem.outputs[0].shape
    strides = [broadcast_strides(operand.shape, operand.strides, shape) for operand in operands]
    nest = collapse(shape, strides, problem.outputs[0].layout.order)
    arithmetic = cost(problem.expression) + 1.5 * len(operands)
    vectors = math.ceil(nest.inner / LANES) * nest.rows + 2 * nest.rows
    estimate = max(transfer_time(problem.bytes), vectors * arithmetic / CYCLES_PER_SECOND, 1e-8)
    name = "pointwise " + "+".join(step.op for step in problem.expression.instructions)
    return [PointwiseCandidate(name, problem, estimate, nest)]


def _check(problem: PointwiseProblem) -> None:
    if tuple(operand.dtype for operand in problem.inputs) != problem.expression.inputs:
        raise ValueError("the inputs' dtypes are not those of the expression")
    if tuple(operand.dtype for operand in problem.outputs) != problem.expression.result_dtypes:
        raise ValueError("the outputs' dtypes are not those of the expression")
    if len({operand.shape for operand in problem.outputs}) != 1:
        raise ValueError("the outputs of a pointwise problem have one shape")


class ElementwiseLoop:
    """The kernel that runs an expression over a nest, and its argument block.

    ``operands`` are the inputs, then the outputs: where each begins and its dtype.
    """

    def __init__(
        self,
        expression: Expression,
        nest: Nest,
        operands: Sequence[tuple[Argument, str]],
        offsets: Sequence[int] | None = None,
    ) -> None:
        self.nest = nest
        self.inputs = len(expression.inputs)
        self.dtypes = [dtype for _, dtype in operands]
        self.widths = [ITEM_BYTES[dtype] for dtype in self.dtypes]
        self.block = Arguments()
        for index, (start, _) in enumerate(operands):
            self.block.add(f"p{index}", start)
        for index, offset in enumerate(offsets or ()):
            self.block.add(f"o{index}", offset * self.widths[index])
        self.offsets = [f"p{index} += o{index}" for index in range(len(offsets or ()))]
        steps = [
            [stride * width for stride in strides]
            for strides, width in zip(nest.strides, self.widths, strict=True)
        ]
        for index, strides in enumerate(steps):
            if self._kind(index) == "strided":
                self.block.add(f"t{index}", strides[-1])
        pointers = {f"p{index}": strides[:-1] for index, strides in enumerate(steps)}
        self.odometer = Odometer(self.block, nest.sizes[:-1], pointers)
        for name in ("inner", "block", "blocks", "tasks"):
            self.block.add(name, 0)
        self.emission: Emission = emit(
            expression,
            [f"x{index}" for index in range(self.inputs)],
            argument=len(self.block.names),
        )

    def _kind(self, index: int) -> str:
        """How an operand runs along the innermost loop."""
        stride = self.nest.strides[index][-1]
        if stride == 1:
            return "contiguous"
        return "broadcast" if stride == 0 and index < self.inputs else "strided"

    def arguments(self, threads: int) -> tuple[Argument, ...]:
        """The argument block for a team of ``threads``."""
        rows, inner = self.nest.rows, self.nest.inner
        block = inner
        if rows < 4 * threads:
            parts = threads if rows == 1 else math.ceil(4 * threads / rows)
            block = math.ceil(inner / parts / _CHUNK) * _CHUNK
        blocks = math.ceil(inner / block)
        shares = (inner, block, blocks, rows * blocks)
        return (*self.block.values[:-4], *shares, *self.emission.immediates)

    def text(self) -> str:
        """The kernel's source."""
        body = [
            *self.emission.prologue,
            *self.offsets,
            *SHARE,
            "row = task // blocks",
            "part = task - row * blocks",
            *self.odometer.start("row"),
            "while task < stop:",
            *indent(1, self._part()),
            *indent(1, ["task += 1", "part += 1", "if part == blocks:", "    part = 0"]),
            *indent(2, self.odometer.advance()),
        ]
        return kernel_text(self.block, body)

    def _part(self) -> list[str]:
        """Lines for a part of a row: whole vectors, then the remainder under a mask."""
        lines = ["first = part * block", "count = min(inner - first, block)"]
        for index, dtype in enumerate(self.dtypes):
            kind = self._kind(index)
            if kind == "contiguous":
                lines.append(f"q{index} = p{index} + first * {self.widths[index]}")
            elif kind == "strided":
                lines.append(f"q{index} = p{index} + first * t{index}")
            else:
                vector = dtype.upper()
                lines.append(f"x{index} = broadcast(read(p{index}, {vector}), {vector})")
        return [
            *lines,
            "i = 0",
            "while i + LANES <= count:",
            *indent(1, self._vector(masked=False)),
            *indent(1, ["i += LANES"]),
            "if i < count:",
            *indent(1, ["mask = mask_first(count - i, FLOAT32)"]),
            *indent(1, self._vector(masked=True)),
        ]

    def _vector(self, masked: bool) -> list[str]:
        """Lines for one vector of elements."""
        lines = []
        mask = "mask" if masked else "mask_first(LANES, FLOAT32)"
        for index in range(self.inputs):
            vector, kind = self.dtypes[index].upper(), self._kind(index)
            address = f"q{index} + i * {self.widths[index]}"
            if kind == "strided":
                text = f"gather(q{index} + i * t{index}, t{index}, {vector}, {mask})"
            elif masked:
                text = f"load_masked({address}, {vector}, mask)"
            else:
                text = f"load({address}, {vector})"
            if kind != "broadcast":
                lines.append(f"x{index} = {text}")
        lines += self.emission.body
        for index, result in enumerate(self.emission.results, self.inputs):
            address = f"q{index} + i * {self.widths[index]}"
            if self._kind(index) == "strided":
                lines.append(f"scatter(q{index} + i * t{index}, t{index}, {result}, {mask})")
            elif masked:
                lines.append(f"store_first({address}, {result}, mask)")
            else:
                lines.append(f"store({address}, {result})")
        return lines
