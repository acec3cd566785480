"""Fused elementwise kernels, generated for any expression.

One loop nest computes the whole expression: the innermost loop runs over vectors of elements,
operands that do not vary along it are read once per row, operands that are strided along it are
gathered. A kernel is made per expression, kind of each operand along the innermost loop and number
of loops; sizes, strides and numbers in the expression are arguments.

An output may be the very memory of an input of the same shape, dtype and layout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from graphopt.kernels import source
from graphopt.kernels.emission import Emission, cost, emit, unsupported
from graphopt.kernels.loops import Nest, broadcast_strides, collapse
from graphopt.kernels.problem import ITEM_BYTES, Operand, PointwiseProblem
from graphopt.kernels.registry import Argument, Candidate, Input, Output, Step, register

BYTES_PER_SECOND = 1.2e10
CYCLES_PER_SECOND = 3e9
ESTIMATED_LANES = 8
WORTH_SHARING = 3e-6
"""Seconds of work from which a team of threads is used."""

_CHUNK = 64
"""Elements that a row is cut at multiples of, so that no two threads write one cache line."""

_HEADER = """import math

from graphopt.kernels.elementary import *
from graphopt.kernels.simd import *

"""


@dataclass(frozen=True)
class PointwiseCandidate(Candidate):
    """The generated loop nest."""

    problem: PointwiseProblem
    nest: Nest

    def build(self, threads: int) -> tuple[Step, ...]:
        if self.problem.outputs[0].size == 0:
            return ()
        parallel = threads > 1 and self.estimate > WORTH_SHARING
        generator = _Generator(self.problem, self.nest)
        entry = source.build("pointwise", generator.text())
        return (Step(entry, generator.arguments(threads if parallel else 1), parallel),)


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
    vectors = math.ceil(nest.inner / ESTIMATED_LANES) * nest.rows + 2 * nest.rows
    estimate = max(problem.bytes / BYTES_PER_SECOND, vectors * arithmetic / CYCLES_PER_SECOND, 1e-8)
    name = "pointwise " + "+".join(step.op for step in problem.expression.instructions)
    return [PointwiseCandidate(name, problem, estimate, nest)]


def _check(problem: PointwiseProblem) -> None:
    if tuple(operand.dtype for operand in problem.inputs) != problem.expression.inputs:
        raise ValueError("the inputs' dtypes are not those of the expression")
    if tuple(operand.dtype for operand in problem.outputs) != problem.expression.result_dtypes:
        raise ValueError("the outputs' dtypes are not those of the expression")
    if len({operand.shape for operand in problem.outputs}) != 1:
        raise ValueError("the outputs of a pointwise problem have one shape")


class _Generator:
    """Kernel text and argument block, which must agree on the order of the arguments."""

    def __init__(self, problem: PointwiseProblem, nest: Nest) -> None:
        self.problem = problem
        self.nest = nest
        self.operands: tuple[Operand, ...] = (*problem.inputs, *problem.outputs)
        self.inputs = len(problem.inputs)
        self.loops = len(nest.sizes) - 1
        self.names: list[str] = []
        self.values: list[Argument] = []
        for index in range(len(self.operands)):
            into = index - self.inputs
            self._argument(f"p{index}", Input(index) if into < 0 else Output(into))
        for loop in range(self.loops):
            self._argument(f"n{loop}", nest.sizes[loop])
        for index, operand in enumerate(self.operands):
            width = ITEM_BYTES[operand.dtype]
            for loop in range(self.loops):
                self._argument(f"s{index}_{loop}", nest.strides[index][loop] * width)
            if self._kind(index) == "strided":
                self._argument(f"t{index}", nest.strides[index][-1] * width)
        self.names += ["inner", "block", "blocks", "tasks"]
        self.emission: Emission = emit(
            problem.expression,
            [f"x{index}" for index in range(self.inputs)],
            argument=len(self.names),
        )

    def _argument(self, name: str, value: Argument) -> None:
        self.names.append(name)
        self.values.append(value)

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
        return (*self.values, inner, block, blocks, rows * blocks, *self.emission.immediates)

    def text(self) -> str:
        """The kernel's source."""
        lines = ["def kernel(arguments, thread, threads):"]
        lines += _indent(1, [f"{name} = arguments[{i}]" for i, name in enumerate(self.names)])
        lines += _indent(1, self.emission.prologue)
        lines += _indent(1, self._start())
        lines += _indent(1, ["while task < stop:"])
        lines += _indent(2, self._block())
        lines += _indent(2, ["task += 1", "part += 1", "if part == blocks:"])
        lines += _indent(3, ["part = 0", *self._advance(self.loops - 1)])
        return _HEADER + "\n" + "\n".join(lines) + "\n"

    def _start(self) -> list[str]:
        """Lines that find this thread's tasks and move the pointers to the first."""
        lines = [
            "task = thread * tasks // threads",
            "stop = (thread + 1) * tasks // threads",
            "row = task // blocks",
            "part = task - row * blocks",
        ]
        for loop in reversed(range(self.loops)):
            lines.append(f"i{loop} = row % n{loop}")
            lines.append(f"row //= n{loop}")
            for index in range(len(self.operands)):
                if self.nest.strides[index][loop]:
                    lines.append(f"p{index} += i{loop} * s{index}_{loop}")
        return lines

    def _advance(self, loop: int) -> list[str]:
        """Lines that move the pointers to the next row: an odometer."""
        if loop < 0:
            return ["pass"]
        moves = []
        resets = []
        for index in range(len(self.operands)):
            if self.nest.strides[index][loop]:
                moves.append(f"p{index} += s{index}_{loop}")
                resets.append(f"p{index} -= n{loop} * s{index}_{loop}")
        outer = [] if loop == 0 else self._advance(loop - 1)
        overflow = [f"i{loop} = 0", *resets, *outer]
        return [f"i{loop} += 1", *moves, f"if i{loop} == n{loop}:", *_indent(1, overflow)]

    def _block(self) -> list[str]:
        """Lines for a part of a row: whole vectors, then the remainder under a mask."""
        lines = ["first = part * block", "count = min(inner - first, block)"]
        for index, operand in enumerate(self.operands):
            kind = self._kind(index)
            if kind == "contiguous":
                lines.append(f"q{index} = p{index} + first * {ITEM_BYTES[operand.dtype]}")
            elif kind == "strided":
                lines.append(f"q{index} = p{index} + first * t{index}")
            else:
                vector = operand.dtype.upper()
                lines.append(f"x{index} = broadcast(read(p{index}, {vector}), {vector})")
        return [
            *lines,
            "i = 0",
            "while i + LANES <= count:",
            *_indent(1, self._vector(masked=False)),
            *_indent(1, ["i += LANES"]),
            "if i < count:",
            *_indent(1, ["mask = mask_first(count - i, FLOAT32)"]),
            *_indent(1, self._vector(masked=True)),
        ]

    def _vector(self, masked: bool) -> list[str]:
        """Lines for one vector of elements."""
        lines = []
        mask = "mask" if masked else "mask_first(LANES, FLOAT32)"
        for index, operand in enumerate(self.operands[: self.inputs]):
            vector, kind = operand.dtype.upper(), self._kind(index)
            address = f"q{index} + i * {ITEM_BYTES[operand.dtype]}"
            if kind == "strided":
                text = f"gather(q{index} + i * t{index}, t{index}, {vector}, {mask})"
            elif masked:
                text = f"load_masked({address}, {vector}, mask)"
            else:
                text = f"load({address}, {vector})"
            if kind != "broadcast":
                lines.append(f"x{index} = {text}")
        lines += self.emission.body
        for number, result in enumerate(self.emission.results):
            index = self.inputs + number
            address = f"q{index} + i * {ITEM_BYTES[self.operands[index].dtype]}"
            if self._kind(index) == "strided":
                lines.append(f"scatter(q{index} + i * t{index}, t{index}, {result}, {mask})")
            elif masked:
                lines.append(f"store_masked({address}, {result}, mask)")
            else:
                lines.append(f"store({address}, {result})")
        return lines


def _indent(levels: int, lines: list[str] | tuple[str, ...]) -> list[str]:
    return ["    " * levels + line for line in lines]
