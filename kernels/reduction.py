"""Sums, means, products and extrema over any dimensions, global average pooling among them.

Where the reduced elements of one result lie side by side, vectors run along them and are combined
at the end; where results lie side by side, each lane makes its own. Long sums are summed in
segments, and the sums of these with compensation (T. J. Dekker's and D. E. Knuth's error-free sum),
so that the rounding error does not grow with the number of elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from graphopt.kernels import source
from graphopt.kernels.emission import Emission, cost, emit, unsupported
from graphopt.kernels.expression import FLOATING, Expression, Ref
from graphopt.kernels.loops import (
    SHARE,
    Arguments,
    Nest,
    Odometer,
    collapse,
    indent,
    kernel_text,
)
from graphopt.kernels.operand import ITEM_BYTES
from graphopt.kernels.pointwise import CYCLES_PER_SECOND, WORTH_SHARING, transfer_time
from graphopt.kernels.problem import ReductionProblem
from graphopt.kernels.registry import Candidate, Input, Output, Step, register
from graphopt.kernels.simd import LANES

_COMBINE = {
    "sum": ("{} + {}", "reduce_add"),
    "mean": ("{} + {}", "reduce_add"),
    "prod": ("{} * {}", "reduce_multiply"),
    "amax": ("maximum({}, {})", "reduce_maximum"),
    "amin": ("minimum({}, {})", "reduce_minimum"),
}
_UNROLLED = 4
"""Independent accumulators, which hide the latency of an addition."""


@dataclass(frozen=True)
class ReductionCandidate(Candidate):
    """Vectors along the reduced elements, or across results."""

    problem: ReductionProblem
    kept: Nest
    reduced: Nest

    def build(self, threads: int) -> tuple[Step, ...]:
        if self.problem.outputs[0].size == 0:
            return ()
        across = self.reduced.strides[0][-1] != 1
        kernel = (_Across if across else _Along)(self.problem, self.kept, self.reduced)
        parallel = threads > 1 and kernel.tasks > 1 and self.estimate > WORTH_SHARING
        name = f"{self.problem.operator}_{'across' if across else 'along'}"
        entry = source.build(name, kernel.text())
        return (Step(entry, (*kernel.block.values, *kernel.immediates), parallel),)


@register(ReductionProblem)
def candidates(problem: ReductionProblem) -> list[Candidate]:
    """The reduction, where its expressions are supported and it is defined."""
    (operand,), (result,) = problem.inputs, problem.outputs
    if problem.operator not in _COMBINE or {operand.dtype, result.dtype} - ITEM_BYTES.keys():
        return []
    expressions = [part for part in (problem.prologue, problem.epilogue) if part is not None]
    if any(unsupported(expression) is not None for expression in expressions):
        return []
    if _accumulated(problem) not in FLOATING and problem.operator == "mean":
        return []
    kept, reduced = _nests(problem)
    if 0 in reduced.sizes and problem.operator in ("amax", "amin"):
        return []
    across = reduced.strides[0][-1] != 1
    if across and (kept.strides[0][-1] != 1 or kept.strides[1][-1] != 1):
        return []
    trips = math.prod(kept.sizes) * math.prod(reduced.sizes) / LANES
    cycles = trips * (1.5 + sum(map(cost, expressions))) + 20 * math.prod(kept.sizes)
    estimate = max(transfer_time(operand.bytes), cycles / CYCLES_PER_SECOND)
    return [ReductionCandidate(problem.operator, problem, estimate, kept, reduced)]


def _nests(problem: ReductionProblem) -> tuple[Nest, Nest]:
    """The loops over results (strides of input and output), and those over what each reduces."""
    (operand,), (result,) = problem.inputs, problem.outputs
    rank = len(operand.shape)
    gone = {dimension % rank for dimension in problem.dimensions} if rank else set()
    shape = [1 if axis in gone else size for axis, size in enumerate(operand.shape)]
    flat = [size for axis, size in enumerate(operand.shape) if axis not in gone]
    if list(result.shape) not in (shape, flat):
        raise ValueError(f"{result.shape} is not {operand.shape} reduced over {sorted(gone)}")
    steps = list(result.strides)
    if len(steps) < rank:
        for axis in sorted(gone):
            steps.insert(axis, 0)
    order = operand.layout.order
    kept = collapse(shape, (operand.strides, steps), order)
    lengths = [size if axis in gone else 1 for axis, size in enumerate(operand.shape)]
    return kept, collapse(lengths, (operand.strides,), order)


def _accumulated(problem: ReductionProblem) -> str:
    """The dtype that is summed."""
    if problem.prologue is not None:
        return problem.prologue.result_dtypes[0]
    return problem.inputs[0].dtype


def _identity(operator: str, dtype: str) -> str:
    """What changes nothing when it is combined, as kernel text."""
    if operator in ("sum", "mean"):
        return "0"
    if operator == "prod":
        return "1"
    if dtype == "bool":
        return "False" if operator == "amax" else "True"
    if dtype in FLOATING:
        return "-math.inf" if operator == "amax" else "math.inf"
    limits = np.iinfo(dtype)
    return str(limits.min if operator == "amax" else limits.max)


class _Kernel:
    """What both forms share: arguments, expressions, and loops over the reduced dimensions."""

    def __init__(self, problem: ReductionProblem, kept: Nest, reduced: Nest) -> None:
        self.reduced = reduced
        self.operator = problem.operator
        self.read_dtype, self.dtype = problem.inputs[0].dtype, _accumulated(problem)
        self.compensated = problem.operator in ("sum", "mean") and self.dtype in FLOATING
        self.width = ITEM_BYTES[self.read_dtype]
        self.write_width = ITEM_BYTES[problem.outputs[0].dtype]
        self.pattern, self.collect = _COMBINE[problem.operator]
        self.block = Arguments()
        self.block.add("p", Input(0))
        self.block.add("q", Output(0))
        for loop, (size, stride) in enumerate(zip(reduced.sizes, reduced.strides[0], strict=True)):
            self.block.add(f"m{loop}", size)
            self.block.add(f"step{loop}", stride * self.width)
        self.block.add("divisor", math.prod(reduced.sizes))
        self.tasks = self.schedule(kept)
        self.block.add("tasks", self.tasks)
        place = len(self.block.names)
        self.prologue = self._emit(problem.prologue, self.read_dtype, "x", place, "e")
        place += len(self.prologue.immediates)
        self.epilogue = self._emit(problem.epilogue, self.dtype, "y", place, "f")
        self.immediates = (*self.prologue.immediates, *self.epilogue.immediates)

    @staticmethod
    def _emit(part: Expression | None, dtype: str, name: str, place: int, prefix: str) -> Emission:
        return emit(part or Expression((dtype,), (), (Ref(0),)), [name], place, prefix)

    def schedule(self, kept: Nest) -> int:
        """Add the arguments of the loops over results; the number of tasks."""
        raise NotImplementedError

    def results(self) -> list[str]:
        """Lines of the loops over results, with this thread's share set."""
        raise NotImplementedError

    def text(self) -> str:
        """The kernel's source."""
        vector = self.dtype.upper()
        identity = f"identity = broadcast({_identity(self.operator, self.dtype)}, {vector})"
        setup = [*self.prologue.prologue, *self.epilogue.prologue, identity, *SHARE]
        return kernel_text(self.block, [*setup, *self.results()])

    def combine(self, into: str, other: str) -> str:
        return f"{into} = {self.pattern.format(into, other)}"

    def start(self, total: str) -> list[str]:
        """Lines that begin a total of segments."""
        return [f"{total} = identity", *([f"{total}_lost = identity"] if self.compensated else [])]

    def add_segment(self, total: str, segment: str) -> list[str]:
        """Lines that combine a segment into a total."""
        if not self.compensated:
            return [self.combine(total, segment)]
        return [
            f"sum = {total} + {segment}",
            f"added = sum - {total}",
            f"{total}_lost += ({total} - (sum - added)) + ({segment} - added)",
            f"{total} = sum",
        ]

    def end(self, total: str) -> list[str]:
        """Lines after the last segment."""
        if not self.compensated:
            return []
        # What an infinite total lost is not a number.
        return [f"{total} = select(absolute({total}) < math.inf, {total} + {total}_lost, {total})"]

    def element(self, into: str, address: str, masked: bool = False) -> list[str]:
        """Lines that combine one vector of the operand into an accumulator."""
        kind = self.read_dtype.upper()
        load = f"load_masked({address}, {kind}, mask)" if masked else f"load({address}, {kind})"
        value = self.prologue.results[0]
        value = f"select(mask, {value}, identity)" if masked else value
        return [f"x = {load}", *self.prologue.body, self.combine(into, value)]

    def finish(self, total: str) -> list[str]:
        """Lines that make the result from the accumulated vector ``total``."""
        divided = f"{total} / broadcast(divisor, {self.dtype.upper()})"
        return [f"y = {divided if self.operator == 'mean' else total}", *self.epilogue.body]

    def outer(self, body: Callable[[str], list[str]]) -> list[str]:
        """Lines of the loops over all reduced dimensions but the last, around ``body(pointer)``."""
        last = len(self.reduced.sizes) - 1
        lines = body(f"a{last}")
        for loop in reversed(range(last)):
            inner = [f"a{loop + 1} = a{loop}", *lines]
            trip = [*inner, f"a{loop} += step{loop}", f"r{loop} += 1"]
            lines = [f"r{loop} = 0", f"while r{loop} < m{loop}:", *indent(1, trip)]
        return lines


class _Along(_Kernel):
    """The last reduced dimension is contiguous; a task is one result."""

    def schedule(self, kept: Nest) -> int:
        widths = (self.width, self.write_width)
        walked = {
            name: [stride * width for stride in strides]
            for name, width, strides in zip("pq", widths, kept.strides, strict=True)
        }
        self.odometer = Odometer(self.block, kept.sizes, walked)
        return math.prod(kept.sizes)

    def results(self) -> list[str]:
        vector = self.dtype.upper()
        last = len(self.reduced.sizes) - 1
        one = [
            *self.start("total"),
            "a0 = p",
            *self.outer(lambda pointer: self._row(pointer, f"m{last}")),
            *self.end("total"),
            *self.finish(f"broadcast({self.collect}(total), {vector})"),
            f"store_first(q, {self.epilogue.results[0]}, mask_first(1, FLOAT32))",
            "task += 1",
            *self.odometer.advance(),
        ]
        return [
            "row = task",
            *self.odometer.start("row"),
            "while task < stop:",
            *indent(1, one),
        ]

    def _row(self, pointer: str, count: str) -> list[str]:
        """Lines that combine ``count`` contiguous elements into ``total``, by segments."""

        def address(lanes: int) -> str:
            return f"{pointer} + (i + {lanes} * LANES) * {self.width}"

        unrolled: list[str] = []
        for number in range(_UNROLLED):
            unrolled += self.element(f"c{number}", address(number))
        segment = [
            f"limit = min(i + 128 * LANES, {count})",
            *(f"c{number} = identity" for number in range(_UNROLLED)),
            f"while i + {_UNROLLED} * LANES <= limit:",
            *indent(1, [*unrolled, f"i += {_UNROLLED} * LANES"]),
            "while i + LANES <= limit:",
            *indent(1, [*self.element("c0", address(0)), "i += LANES"]),
            "if i < limit:",
            "    mask = mask_first(limit - i, FLOAT32)",
            *indent(1, [*self.element("c1", address(0), masked=True), "i = limit"]),
            *(self.combine("c0", f"c{number}") for number in range(1, _UNROLLED)),
            *self.add_segment("total", "c0"),
        ]
        return ["i = 0", f"while i < {count}:", *indent(1, segment)]


class _Across(_Kernel):
    """Results are contiguous; a task is a few vectors of them."""

    def schedule(self, kept: Nest) -> int:
        widths = (self.width, self.write_width)
        walked = {
            name: [stride * width for stride in strides[:-1]]
            for name, width, strides in zip("pq", widths, kept.strides, strict=True)
        }
        self.odometer = Odometer(self.block, kept.sizes[:-1], walked)
        blocks = math.ceil(kept.inner / (_UNROLLED * LANES))
        self.block.add("inner", kept.inner)
        self.block.add("blocks", blocks)
        return kept.rows * blocks

    def results(self) -> list[str]:
        one = [
            f"first = part * {_UNROLLED} * LANES",
            f"stop_column = min(inner, first + {_UNROLLED} * LANES)",
            f"if stop_column - first == {_UNROLLED} * LANES:",
            *indent(1, self._columns(_UNROLLED, masked=False)),
            "else:",
            "    while first < stop_column:",
            "        mask = mask_first(stop_column - first, FLOAT32)",
            *indent(2, self._columns(1, masked=True)),
            "        first += LANES",
            "task += 1",
            "part += 1",
            "if part == blocks:",
            *indent(1, ["part = 0", *self.odometer.advance()]),
        ]
        return [
            "row = task // blocks",
            "part = task - row * blocks",
            *self.odometer.start("row"),
            "while task < stop:",
            *indent(1, one),
        ]

    def _columns(self, vectors: int, masked: bool) -> list[str]:
        """Lines that make ``vectors`` vectors of results from column ``first`` on."""
        lines = [f"a0 = p + first * {self.width}"]
        for number in range(vectors):
            lines += self.start(f"t{number}")
        lines += self.outer(lambda pointer: self._segments(pointer, vectors, masked))
        for number in range(vectors):
            address = f"q + (first + {number} * LANES) * {self.write_width}"
            lines += [*self.end(f"t{number}"), *self.finish(f"t{number}")]
            result = self.epilogue.results[0]
            store = f"store_first({address}, {result}, mask)"
            lines.append(store if masked else f"store({address}, {result})")
        return lines

    def _segments(self, pointer: str, vectors: int, masked: bool) -> list[str]:
        last = len(self.reduced.sizes) - 1
        step: list[str] = []
        for number in range(vectors):
            address = f"{pointer} + {number} * LANES * {self.width}"
            step += self.element(f"c{number}", address, masked)
        segment = [
            f"limit = min(i + 64, m{last})",
            *(f"c{number} = identity" for number in range(vectors)),
            "while i < limit:",
            *indent(1, [*step, f"{pointer} += step{last}", "i += 1"]),
            *(line for n in range(vectors) for line in self.add_segment(f"t{n}", f"c{n}")),
        ]
        return ["i = 0", f"while i < m{last}:", *indent(1, segment)]
