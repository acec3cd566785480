"""Softmax and its logarithm along any dimension.

Where the elements of one sum lie side by side, vectors run along them; elsewhere each lane makes
its own sum. Three passes: the largest element, the exponentials of the differences to it and their
sum, the division. Rows of nothing but -inf, and rows with inf or NaN, are NaN as in torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from graphopt.kernels import source
from graphopt.kernels.loops import (
    SHARE,
    Arguments,
    Nest,
    Odometer,
    collapse,
    indent,
    kernel_text,
)
from graphopt.kernels.pointwise import CYCLES_PER_SECOND, WORTH_SHARING, transfer_time
from graphopt.kernels.problem import SoftmaxProblem
from graphopt.kernels.registry import Candidate, Input, Output, Step, register
from graphopt.kernels.rows import UNROLLED, accumulators, load, segments, store, vectors
from graphopt.kernels.simd import LANES

_EXP_CYCLES = 12.0


@dataclass(frozen=True)
class SoftmaxCandidate(Candidate):
    """Vectors along the dimension, or across it; threads share the sums."""

    problem: SoftmaxProblem
    kept: Nest
    stride: int

    def build(self, threads: int) -> tuple[Step, ...]:
        if self.problem.outputs[0].size == 0:
            return ()
        kernel = (_Along if self.stride == 1 else _Across)(self)
        parallel = threads > 1 and kernel.tasks > 1 and self.estimate > WORTH_SHARING
        entry = source.build(self.kernel, kernel.text())
        return (Step(entry, tuple(kernel.block.values), parallel),)


@register(SoftmaxProblem)
def candidates(problem: SoftmaxProblem) -> list[Candidate]:
    """One kernel, for float32 in a layout whose innermost dimension is contiguous."""
    (x,), (y,) = problem.inputs, problem.outputs
    rank = len(x.shape)
    if y.shape != x.shape or not -max(rank, 1) <= problem.dimension < max(rank, 1):
        raise ValueError(f"{y.shape} is not the softmax of {x.shape} along {problem.dimension}")
    if x.dtype != "float32" or x.layout != y.layout:
        return []
    axis = problem.dimension % max(rank, 1)
    shape = [1 if dimension == axis else size for dimension, size in enumerate(x.shape)]
    kept = collapse(shape, (x.strides, y.strides), x.layout.order)
    stride = x.strides[axis] if rank else 1
    if stride != 1 and kept.strides[0][-1] != 1:
        return []
    name = "log_softmax" if problem.logarithm else "softmax"
    count = x.shape[axis] if rank else 1
    rows = math.prod(kept.sizes) if stride == 1 else kept.rows
    trips = math.ceil(count / LANES) if stride == 1 else count * math.ceil(kept.inner / LANES)
    cycles = rows * (trips * (_EXP_CYCLES + 6) + 60)
    estimate = max(transfer_time(problem.bytes), cycles / CYCLES_PER_SECOND, 1e-8)
    form = "along" if stride == 1 else "across"
    return [SoftmaxCandidate(f"{name}_{form}", problem, estimate, kept, stride)]


class _Kernel:
    """What both forms share: the argument block."""

    def __init__(self, candidate: SoftmaxCandidate) -> None:
        problem, kept = candidate.problem, candidate.kept
        self.logarithm = problem.logarithm
        shape = problem.inputs[0].shape
        self.block = Arguments()
        self.block.add("p", Input(0))
        self.block.add("q", Output(0))
        self.block.add("count", shape[problem.dimension] if shape else 1)
        self.block.add("step", candidate.stride * 4)
        self.tasks = self.schedule(kept)
        self.block.add("tasks", self.tasks)

    def schedule(self, kept: Nest) -> int:
        """Add the arguments of the loops over sums; the number of tasks."""
        raise NotImplementedError

    def walk(self, sizes: tuple[int, ...], kept: Nest) -> None:
        """Move both pointers through some of the kept dimensions."""
        steps = {
            name: [stride * 4 for stride in known[: len(sizes)]]
            for name, known in zip("pq", kept.strides, strict=True)
        }
        self.odometer = Odometer(self.block, sizes, steps)


class _Along(_Kernel):
    """The dimension is contiguous; a task is one sum."""

    def schedule(self, kept: Nest) -> int:
        self.walk(kept.sizes, kept)
        return math.prod(kept.sizes)

    def text(self) -> str:
        """The kernel's source."""
        finish = self._logarithms() if self.logarithm else self._quotients()
        task = [*self._peak(), *self._sum(), *finish, "task += 1", *self.odometer.advance()]
        body = [
            "zero = broadcast(0.0, FLOAT32)",
            "least = broadcast(-math.inf, FLOAT32)",
            *SHARE,
            "row = task",
            *self.odometer.start("row"),
            "while task < stop:",
            *indent(1, task),
        ]
        return kernel_text(self.block, body)

    def _peak(self) -> list[str]:
        def compare(number: int, place: str, masked: bool) -> list[str]:
            x = load(f"p + {place} * 4", masked)
            x = f"select(mask, {x}, least)" if masked else x
            return [f"c{number} = maximum(c{number}, {x})"]

        return [
            *accumulators("c", "least"),
            "i = 0",
            "limit = count",
            *vectors(compare),
            "c0 = maximum(maximum(c0, c1), maximum(c2, c3))",
            "peak = broadcast(reduce_maximum(c0), FLOAT32)",
        ]

    def _sum(self) -> list[str]:
        def add(number: int, place: str, masked: bool) -> list[str]:
            lines = [f"e = exp({load(f'p + {place} * 4', masked)} - peak)"]
            if not self.logarithm:
                lines.append(store(f"q + {place} * 4", "e", masked))
            return [*lines, f"c{number} += {'select(mask, e, zero)' if masked else 'e'}"]

        collect = ["total += reduce_add((c0 + c1) + (c2 + c3))"]
        return ["total = 0.0", *segments("count", accumulators("c", "zero"), add, collect)]

    def _quotients(self) -> list[str]:
        def multiply(number: int, place: str, masked: bool) -> list[str]:
            e = load(f"q + {place} * 4", masked)
            return [store(f"q + {place} * 4", f"{e} * scale", masked)]

        scale = "scale = broadcast(1.0 / total, FLOAT32)"
        return [scale, "i = 0", "limit = count", *vectors(multiply)]

    def _logarithms(self) -> list[str]:
        def subtract(number: int, place: str, masked: bool) -> list[str]:
            x = load(f"p + {place} * 4", masked)
            return [store(f"q + {place} * 4", f"({x} - peak) - logarithm", masked)]

        logarithm = "logarithm = log(broadcast(total, FLOAT32))"
        return [logarithm, "i = 0", "limit = count", *vectors(subtract)]


class _Across(_Kernel):
    """Sums are side by side; a task is a few vectors of them."""

    def schedule(self, kept: Nest) -> int:
        self.walk(kept.sizes[:-1], kept)
        blocks = math.ceil(kept.inner / (UNROLLED * LANES))
        self.block.add("inner", kept.inner)
        self.block.add("blocks", blocks)
        return kept.rows * blocks

    def text(self) -> str:
        """The kernel's source."""
        task = [
            f"first = part * {UNROLLED} * LANES",
            f"end = min(inner, first + {UNROLLED} * LANES)",
            f"if end - first == {UNROLLED} * LANES:",
            *indent(1, self._columns(UNROLLED, masked=False)),
            "else:",
            "    while first < end:",
            "        mask = mask_first(end - first, FLOAT32)",
            *indent(2, self._columns(1, masked=True)),
            "        first += LANES",
            "task += 1",
            "part += 1",
            "if part == blocks:",
            *indent(1, ["part = 0", *self.odometer.advance()]),
        ]
        body = [
            "zero = broadcast(0.0, FLOAT32)",
            "least = broadcast(-math.inf, FLOAT32)",
            *SHARE,
            "row = task // blocks",
            "part = task - row * blocks",
            *self.odometer.start("row"),
            "while task < stop:",
            *indent(1, task),
        ]
        return kernel_text(self.block, body)

    def _columns(self, count: int, masked: bool) -> list[str]:
        """Lines that make ``count`` vectors of sums from column ``first`` on."""
        numbers = range(count)

        def at(pointer: str, number: int) -> str:
            return f"{pointer} + {number} * LANES * 4"

        lines = [f"peak{n} = least" for n in numbers]
        compare = [f"peak{n} = maximum(peak{n}, {load(at('a', n), masked)})" for n in numbers]
        lines += _walk("count", ["a"], compare)
        lines += [f"total{n} = zero" for n in numbers]
        add = []
        for n in numbers:
            add.append(f"e = exp({load(at('a', n), masked)} - peak{n})")
            if not self.logarithm:
                add.append(store(at("b", n), "e", masked))
            add.append(f"c{n} += e")
        lines += ["a = p + first * 4", "b = q + first * 4", "i = 0", "while i < count:"]
        segment = [
            "limit = min(i + 64, count)",
            *(f"c{n} = zero" for n in numbers),
            "while i < limit:",
            *indent(1, [*add, "a += step", "b += step", "i += 1"]),
            *(f"total{n} += c{n}" for n in numbers),
        ]
        lines += indent(1, segment)
        if self.logarithm:
            lines += [f"scale{n} = log(total{n})" for n in numbers]
            results = [f"({load(at('a', n), masked)} - peak{n}) - scale{n}" for n in numbers]
        else:
            lines += [f"scale{n} = 1.0 / total{n}" for n in numbers]
            results = [f"{load(at('b', n), masked)} * scale{n}" for n in numbers]
        finish = [store(at("b", n), result, masked) for n, result in enumerate(results)]
        return [*lines, *_walk("count", ["a", "b"], finish)]


def _walk(count: str, pointers: list[str], body: list[str]) -> list[str]:
    """Lines that go along the dimension with pointers into x (``a``) and y (``b``)."""
    starts = {"a": "a = p + first * 4", "b": "b = q + first * 4"}
    trip = [*body, *(f"{pointer} += step" for pointer in pointers), "i += 1"]
    return [*(starts[p] for p in pointers), "i = 0", f"while i < {count}:", *indent(1, trip)]
