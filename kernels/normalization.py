"""Layer, root-mean-square, group and instance normalisation, with an elementwise epilogue.

The moments of a row are found in two passes over it, the second around the mean of the first, and
corrected for the rounding of that mean (T. F. Chan, G. H. Golub, R. J. LeVeque, "Algorithms for
Computing the Sample Variance", The American Statistician 37, 1983): rows lie in the cache, and the
result is as good for a large mean as for a small one. Long rows are summed in segments, whose sums
are added in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from graphopt.kernels import source
from graphopt.kernels.emission import cost, emit, immediate, unsupported
from graphopt.kernels.expression import Expression, Ref
from graphopt.kernels.loops import (
    SHARE,
    Arguments,
    Odometer,
    broadcast_strides,
    collapse,
    indent,
    kernel_text,
)
from graphopt.kernels.operand import ITEM_BYTES, Layout
from graphopt.kernels.pointwise import CYCLES_PER_SECOND, WORTH_SHARING, transfer_time
from graphopt.kernels.problem import NormalizationProblem
from graphopt.kernels.registry import Candidate, Input, Output, Step, register
from graphopt.kernels.rows import accumulators, load, segments, store, vectors
from graphopt.kernels.simd import LANES

_IDENTITY = Expression(("float32",), (), (Ref(0),))


@dataclass(frozen=True)
class NormalizationCandidate(Candidate):
    """Threads share the rows."""

    problem: NormalizationProblem

    def build(self, threads: int) -> tuple[Step, ...]:
        if self.problem.outputs[0].size == 0:
            return ()
        kernel = _Kernel(self.problem)
        parallel = threads > 1 and kernel.rows > 1 and self.estimate > WORTH_SHARING
        name = "layer_norm" if self.problem.centered else "rms_norm"
        entry = source.build(name, kernel.text())
        return (Step(entry, (*kernel.block.values, *kernel.emission.immediates), parallel),)


@register(NormalizationProblem)
def candidates(problem: NormalizationProblem) -> list[Candidate]:
    """One kernel, for contiguous float32 rows and a supported epilogue."""
    x, y = problem.inputs[0], problem.outputs[0]
    epilogue = problem.epilogue or _IDENTITY
    _check(problem, epilogue)
    if x.dtype != "float32" or {o.dtype for o in problem.inputs} - ITEM_BYTES.keys():
        return []
    if any(operand.layout != Layout.plain(operand.dtype, len(x.shape)) for operand in (x, y)):
        return []
    if unsupported(epilogue) is not None:
        return []
    count = math.prod(x.shape[len(x.shape) - problem.dimensions :])
    rows = x.size // max(count, 1)
    trips = rows * math.ceil(count / LANES)
    cycles = trips * (4 + cost(epilogue) + 1.5 * len(problem.inputs)) + 60 * rows
    estimate = max(transfer_time(problem.bytes), cycles / CYCLES_PER_SECOND, 1e-8)
    name = "layer_norm" if problem.centered else "rms_norm"
    steps = "".join(f"+{step.op}" for step in epilogue.instructions)
    return [NormalizationCandidate(name + steps, problem, estimate)]


def _check(problem: NormalizationProblem, epilogue: Expression) -> None:
    x, y = problem.inputs[0], problem.outputs[0]
    if x.shape != y.shape or not 0 < problem.dimensions <= len(x.shape):
        raise ValueError(f"{y.shape} is not {x.shape} normalised over {problem.dimensions}")
    dtypes = ("float32", *(operand.dtype for operand in problem.inputs[1:]))
    if dtypes != epilogue.inputs or (y.dtype,) != epilogue.result_dtypes:
        raise ValueError("the operands' dtypes are not those of the epilogue")


class _Kernel:
    """The kernel and its argument block: a task is a row."""

    def __init__(self, problem: NormalizationProblem) -> None:
        x, y = problem.inputs[0], problem.outputs[0]
        self.centered = problem.centered
        self.dtypes = [operand.dtype for operand in problem.inputs]
        self.widths = [ITEM_BYTES[dtype] for dtype in self.dtypes]
        self.y_width = ITEM_BYTES[y.dtype]
        operands = (*problem.inputs, y)
        strides = [broadcast_strides(o.shape, o.strides, x.shape) for o in operands]
        first = len(x.shape) - problem.dimensions
        outer = collapse(x.shape[:first], [known[:first] for known in strides])
        self.nest = collapse(x.shape[first:], [known[first:] for known in strides])
        self.rows = math.prod(outer.sizes)

        self.block = Arguments()
        for index in range(len(problem.inputs)):
            self.block.add(f"p{index}", Input(index))
        self.block.add("q", Output(0))
        self.block.add("count", math.prod(self.nest.sizes))
        self.block.add("epsilon_bits", immediate(problem.epsilon, "float64"))
        self.block.add("tasks", self.rows)
        for loop, size in enumerate(self.nest.sizes):
            self.block.add(f"m{loop}", size)
        for index in range(1, len(problem.inputs)):
            for loop, stride in enumerate(self.nest.strides[index]):
                self.block.add(f"step{index}_{loop}", stride * self.widths[index])
        names = [*(f"p{index}" for index in range(len(problem.inputs))), "q"]
        widths = [*self.widths, self.y_width]
        walked = {
            name: [stride * width for stride in known]
            for name, width, known in zip(names, widths, outer.strides, strict=True)
        }
        self.odometer = Odometer(self.block, outer.sizes, walked)
        values = [f"x{index}" for index in range(len(problem.inputs))]
        self.emission = emit(problem.epilogue or _IDENTITY, values, len(self.block.names))

    def text(self) -> str:
        """The kernel's source."""
        moments = self._centered_moments() if self.centered else self._mean_square()
        task = [*moments, *self._write(), "task += 1", *self.odometer.advance()]
        body = [
            *self.emission.prologue,
            "zero = broadcast(0.0, FLOAT32)",
            "epsilon = float64_from_bits(epsilon_bits)",
            *SHARE,
            "row = task",
            *self.odometer.start("row"),
            "while task < stop:",
            *indent(1, task),
        ]
        return kernel_text(self.block, body)

    def _centered_moments(self) -> list[str]:
        """Lines that set ``center``, ``scale`` and ``shift``: y = (x - center) * scale + shift."""

        def add(number: int, place: str, masked: bool) -> list[str]:
            return [f"c{number} += {load(f'p0 + {place} * 4', masked)}"]

        def deviate(number: int, place: str, masked: bool) -> list[str]:
            deviation = f"{load(f'p0 + {place} * 4', masked)} - center"
            return [
                f"d = {f'select(mask, {deviation}, zero)' if masked else deviation}",
                f"c{number} += d",
                f"s{number} = fma(d, d, s{number})",
            ]

        both = [*accumulators("c", "zero"), *accumulators("s", "zero")]
        return [
            "total = 0.0",
            *segments("count", accumulators("c", "zero"), add, _collected("total", "c")),
            "center = broadcast(total / count, FLOAT32)",
            "deviations = 0.0",
            "squares = 0.0",
            *segments(
                "count",
                both,
                deviate,
                [*_collected("deviations", "c"), *_collected("squares", "s")],
            ),
            "rest = deviations / count",
            "variance = squares / count - rest * rest",
            "if variance < 0.0:",
            "    variance = 0.0",
            "factor = 1.0 / math.sqrt(variance + epsilon)",
            "scale = broadcast(factor, FLOAT32)",
            "shift = broadcast(-rest * factor, FLOAT32)",
        ]

    def _mean_square(self) -> list[str]:
        """Lines that set ``scale``: y = x * scale."""

        def square(number: int, place: str, masked: bool) -> list[str]:
            value = load(f"p0 + {place} * 4", masked)
            return [f"d = {value}", f"s{number} = fma(d, d, s{number})"]

        return [
            "squares = 0.0",
            *segments("count", accumulators("s", "zero"), square, _collected("squares", "s")),
            "scale = broadcast(1.0 / math.sqrt(squares / count + epsilon), FLOAT32)",
        ]

    def _write(self) -> list[str]:
        """Lines that write the row: loops over its dimensions, the epilogue's operands beside."""
        last = len(self.nest.sizes) - 1
        others = range(1, len(self.dtypes))
        lines = [
            *(line for index in others for line in self._fixed(index, f"a{index}_{last}")),
            "i = 0",
            f"limit = m{last}",
            *vectors(self._vector, unrolled=1),
            f"source += m{last} * 4",
            f"target += m{last} * {self.y_width}",
        ]
        for loop in reversed(range(last)):
            trip = [
                *(f"a{index}_{loop + 1} = a{index}_{loop}" for index in others),
                *lines,
                *(f"a{index}_{loop} += step{index}_{loop}" for index in others),
                f"r{loop} += 1",
            ]
            lines = [f"r{loop} = 0", f"while r{loop} < m{loop}:", *indent(1, trip)]
        begin = ["source = p0", "target = q", *(f"a{index}_0 = p{index}" for index in others)]
        return [*begin, *lines]

    def _fixed(self, index: int, pointer: str) -> list[str]:
        """Lines that read an operand that does not vary along the innermost loop."""
        if self.nest.strides[index][-1] != 0:
            return []
        vector = self.dtypes[index].upper()
        return [f"x{index} = broadcast(read({pointer}, {vector}), {vector})"]

    def _vector(self, number: int, place: str, masked: bool) -> list[str]:
        """Lines that normalise one vector."""
        x = load(f"source + {place} * 4", masked)
        value = f"fma({x} - center, scale, shift)" if self.centered else f"{x} * scale"
        lines = [f"x0 = {value}"]
        last = len(self.nest.sizes) - 1
        for index in range(1, len(self.dtypes)):
            stride, pointer = self.nest.strides[index][-1], f"a{index}_{last}"
            dtype = self.dtypes[index]
            if stride == 1:
                text = load(f"{pointer} + {place} * {self.widths[index]}", masked, dtype)
                lines.append(f"x{index} = {text}")
            elif stride != 0:
                step = f"step{index}_{last}"
                lanes = "mask" if masked else "mask_first(LANES, FLOAT32)"
                where = f"{pointer} + {place} * {step}"
                lines.append(f"x{index} = gather({where}, {step}, {dtype.upper()}, {lanes})")
        address = f"target + {place} * {self.y_width}"
        return [*lines, *self.emission.body, store(address, self.emission.results[0], masked)]


def _collected(total: str, name: str) -> list[str]:
    """Lines that add the sum of four accumulators to a float64."""
    return [f"{total} += reduce_add(({name}0 + {name}1) + ({name}2 + {name}3))"]
