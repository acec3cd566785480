"""Chains of convolutions in float32, computed in bands of rows.

A thread computes one band after another: the rows of the first result that the band needs, from
them those of the second, and so forth to the last. What lies between the convolutions stays in its
second cache, where layer by layer it would pass through the third one and between the processors
(compare M. Alwani, H. Chen, M. Ferdman and P. Milder, "Fused-layer CNN accelerators", 2016). Where
kernels are higher than one row, the rows between two bands are computed for both.

Each convolution of a band is a problem of its own: kernels of the other families do it, as
sub-programs of which every band has its own arguments.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from graphopt.kernels import source
from graphopt.kernels.caches import SECOND_CACHE
from graphopt.kernels.direct_convolution import DirectCandidate
from graphopt.kernels.loops import Arguments, kernel_text
from graphopt.kernels.memory import LINE
from graphopt.kernels.operand import ConstantOperand, Layout, Operand
from graphopt.kernels.problem import ConvolutionChainProblem, ConvolutionProblem
from graphopt.kernels.register import LANES
from graphopt.kernels.registry import (
    Argument,
    Candidate,
    Input,
    Output,
    Packed,
    Scratch,
    Step,
    register,
)
from graphopt.kernels.registry import candidates as candidates_of
from graphopt.kernels.shares import panel_shares, share_lines
from graphopt.kernels.sparse_convolution import SparseConvolutionCandidate
from graphopt.kernels.tile import WORTH_SHARING, fill

_BETWEEN = (SECOND_CACHE // 4, SECOND_CACHE // 2, SECOND_CACHE)
"""Bytes between the convolutions of a band, at most, to try."""
_MOST_WORDS = 128
"""Arguments of one kernel, at most."""

Rows = tuple[int, int]
"""The first row and the one behind the last."""


@dataclass(frozen=True)
class Part:
    """A convolution of one band: its problem, and the rows of x and of the result.

    ``before`` are the rows of x in memory that come before those.
    """

    problem: ConvolutionProblem
    rows: Rows
    out_rows: Rows
    before: int


@dataclass(frozen=True)
class ChainCandidate(Candidate):
    """A number of bands; ``stages`` are the kernels of each convolution, by band."""

    problem: ConvolutionChainProblem
    bands: tuple[tuple[Part, ...], ...]
    stages: tuple[tuple[Candidate, ...], ...]

    def pack(self, constants: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        packed: list[np.ndarray] = []
        for number, stage in enumerate(self.stages):
            first = self._first_constant(number)
            own = [None, *constants[first : first + self.problem.stages[number].constants]]
            for choice in _packing_apart(stage):
                packed += choice.pack(own)
        return packed

    def packing(self) -> tuple[object, ...]:
        # Kernels of two families may describe what they pack alike.
        return tuple(
            (type(one), one.packing()) for stage in self.stages for one in _packing_apart(stage)
        )

    def _first_constant(self, number: int) -> int:
        """Which input is the weight of a convolution."""
        return 1 + sum(stage.constants for stage in self.problem.stages[:number])

    def scratch_bytes(self, threads: int) -> int:
        return self._team(threads) * self._slot

    def _team(self, threads: int) -> int:
        return threads if self.estimate > WORTH_SHARING else 1

    @property
    def _between(self) -> list[int]:
        """Bytes of each result that is not the last, and of the kernels' own scratch memory."""
        results = [
            max(part.problem.outputs[0].bytes for part in parts)
            for parts in list(zip(*self.bands, strict=True))[:-1]
        ]
        return [*results, max(own.scratch_bytes(1) for stage in self.stages for own in stage)]

    @property
    def _slot(self) -> int:
        """Scratch memory of a thread: what is between, and the arguments of a kernel."""
        return sum(map(_whole_lines, [*self._between, 8 * _MOST_WORDS]))

    def _place(self, number: int) -> int:
        """Where, in a thread's memory, result ``number`` is; behind the results is scratch."""
        return sum(map(_whole_lines, self._between[:number]))

    def build(self, threads: int) -> tuple[Step, ...]:
        steps = self._steps()
        seconds = [sum(own.estimate for own in band) for band in zip(*self.stages, strict=True)]
        block = Arguments()
        values: dict[str, Argument] = {
            "scratch": Scratch(), "slot": self._slot, "stages": len(self.stages), "parts": 1,
            "places": 1, "bands": len(self.bands),
            "shares": panel_shares((0.0, one) for one in seconds),
            "own": self._place(len(self.stages)),
        }  # fmt: skip
        block.add_all(values)
        head = len(block.values)
        body = fill(_BODY, {"share": share_lines("bands")}, {"HEAD": head})
        entry = source.build("convolution_chain", kernel_text(block, body, ("simd", "shares")))
        arguments = (*block.values, *_calls(steps, head))
        return (Step(entry, arguments, self._team(threads) > 1, len(self.bands)),)

    def _steps(self) -> list[Step]:
        """The calls of all kernels, band by band."""
        stages, packed = [], 0
        for number, stage in enumerate(self.stages):
            # Most bands have the same kernel.
            built = {choice: choice.build(1) for choice in dict.fromkeys(stage)}
            firsts = {}
            for choice in _packing_apart(stage):
                firsts[choice.packing()] = packed
                packed += _arrays(*built[choice])
            steps = []
            for band, choice in zip(self.bands, stage, strict=True):
                (step,) = built[choice]
                first = firsts[choice.packing()]
                words = tuple(
                    self._argument(one, number, band[number], first) for one in step.arguments
                )
                assert len(words) <= _MOST_WORDS, f"{choice.kernel} has {len(words)} arguments"
                steps.append(replace(step, arguments=words))
            stages.append(steps)
        return [step for band in zip(*stages, strict=True) for step in band]

    def _argument(self, argument: Argument, number: int, part: Part, packed: int) -> Argument:
        """What an argument of a convolution's kernel is to the whole, whose arrays have those of
        the kernel from number ``packed`` on."""
        if isinstance(argument, Packed):
            return Packed(packed + argument.index)
        if isinstance(argument, Scratch):
            return Scratch(self._place(len(self.stages) - 1) + argument.offset)
        if isinstance(argument, Output):
            if number + 1 < len(self.stages):
                return Scratch(self._place(number) + argument.offset)
            (y,) = self.problem.outputs
            return Output(0, argument.offset + _row_bytes(y) * part.out_rows[0])
        if isinstance(argument, Input) and argument.index == 0 and number:
            return Scratch(self._place(number - 1) + argument.offset)
        if isinstance(argument, Input):
            place = self._first_constant(number) + argument.index - 1 if argument.index else 0
            rows = part.out_rows if argument.index else part.rows
            operand = self.problem.inputs[place]
            moved = _row_bytes(operand) * rows[0] if argument.index != 1 else 0
            return Input(place, argument.offset + moved)
        return argument


def _whole_lines(size: int) -> int:
    return math.ceil(size / LINE) * LINE


def _arrays(step: Step) -> int:
    """How many arrays of packed constants a kernel reads."""
    numbers = [one.index for one in step.arguments if isinstance(one, Packed)]
    return max(numbers, default=-1) + 1


def _row_bytes(operand: Operand) -> int:
    """Bytes from one row of an image to the next; 0 for what is the same for all rows."""
    if len(operand.shape) != 4 or operand.shape[2] == 1:
        return 0
    return 4 * operand.strides[2]


def _packing_apart(stage: Sequence[Candidate]) -> list[Candidate]:
    """Of the kernels of all bands, one of each way to pack the constants."""
    return list({choice.packing(): choice for choice in stage}.values())


def _calls(steps: Sequence[Step], head: int) -> list[Argument]:
    """Where in all arguments, of which ``head`` come before, each call is, and then the calls.

    A call is its kernel, the number of its arguments, and behind each of these whether it is an
    address in the memory of a thread.
    """
    places: list[Argument] = []
    calls: list[Argument] = []
    for step in steps:
        places.append(head + len(steps) + len(calls))
        calls += [step.entry.address, len(step.arguments)]
        for argument in step.arguments:
            calls += [argument, int(isinstance(argument, Scratch))]
    return [*places, *calls]


@register(ConvolutionChainProblem)
def candidates(problem: ConvolutionChainProblem) -> list[Candidate]:
    """Bands of a few heights, for single images of two spatial dimensions."""
    return list(_candidates(problem))


@functools.lru_cache(maxsize=64)
def _candidates(problem: ConvolutionChainProblem) -> tuple[Candidate, ...]:
    """`candidates`; layers of a network are often equal, and asked for more than once."""
    problem.check()
    convolutions = problem.convolutions
    if len(convolutions) < 2 or not all(map(_in_bands, convolutions)):
        return ()
    if problem.outputs[0].shape[2] < 2:
        return ()
    found: list[Candidate] = []
    for count in sorted(set(_counts(convolutions))):
        bands = tuple(_band(convolutions, number, count) for number in range(count))
        offered = [_offered(parts) for parts in zip(*bands, strict=True)]
        tried = []
        for in_place in (False, True):
            stages = tuple(_kernels(stage, in_place) for stage in offered)
            if not all(stages) or stages in tried:
                continue
            tried.append(stages)
            seconds = sum(own.estimate for stage in stages for own in stage)
            name = f"chain of {len(stages)} in {count} bands" + ", in place" * in_place
            found.append(ChainCandidate(name, problem, seconds, bands, stages))
    return tuple(found)


def _in_bands(convolution: ConvolutionProblem) -> bool:
    """Whether a convolution can be computed row by row."""
    x, _, *extras = convolution.inputs
    (y,) = convolution.outputs
    if len(x.shape) != 4 or x.shape[0] != 1 or y.size == 0:
        return False
    if any(replace(image.layout, plane=0) != Layout.plain("float32", 4) for image in (x, y)):
        return False
    # Every window has a row of the image.
    reach = (convolution.inputs[1].shape[2] - 1) * convolution.dilation[0]
    if max(convolution.padding[0]) > reach or min(convolution.padding[0]) < 0:
        return False
    return all(len(extra.shape) == 1 or _is_image(extra, y) for extra in extras)


def _is_image(extra: Operand, y: Operand) -> bool:
    """Whether an operand of an epilogue has rows as the result has, or none."""
    return len(extra.shape) == 4 and extra.shape[2] in (1, y.shape[2])


def _counts(convolutions: Sequence[ConvolutionProblem]) -> Iterator[int]:
    """Numbers of bands to try."""
    rows = convolutions[-1].outputs[0].shape[2]

    def between(count: int) -> int:
        parts = _band(convolutions, count // 2, count)
        return sum(part.problem.outputs[0].bytes for part in parts[:-1])

    # Equal bands: others wait for the highest, and kernels suit all of them alike.
    counts = [count for count in range(2, rows + 1) if rows % count == 0]
    for size in _BETWEEN:
        yield next((count for count in counts if between(count) <= size), rows)


def _band(convolutions: Sequence[ConvolutionProblem], band: int, count: int) -> tuple[Part, ...]:
    """The convolutions of one of so many bands."""
    parts: list[Part] = []
    between = 0
    height = convolutions[-1].outputs[0].shape[2]
    out_rows = (band * height // count, (band + 1) * height // count)
    for number, convolution in reversed(list(enumerate(convolutions))):
        before, height = convolution.padding[0][0], convolution.inputs[0].shape[2]
        reach = (convolution.inputs[1].shape[2] - 1) * convolution.dilation[0]
        low = out_rows[0] * convolution.stride[0] - before
        high = (out_rows[1] - 1) * convolution.stride[0] - before + reach + 1
        rows = (max(low, 0), min(high, height))
        padding = ((rows[0] - low, high - rows[1]), *convolution.padding[1:])
        x, weight, *extras = convolution.inputs
        (y,) = convolution.outputs
        inputs = (
            _cut(x, rows, high - low if number else 0),
            weight,
            *(extra if _row_bytes(extra) == 0 else _cut(extra, out_rows) for extra in extras),
        )
        cut = _cut(y, out_rows, between)
        problem = replace(convolution, inputs=inputs, outputs=(cut,), padding=padding)
        parts.append(Part(problem, rows, out_rows, 0 if number else rows[0]))
        out_rows, between = rows, high - low
    return tuple(reversed(parts))


def _cut(image: Operand, rows: Rows, between: int = 0) -> Operand:
    """Rows of an image where they are, or between two convolutions, with room for so many."""
    images, channels, _, width = image.shape
    shape = (images, channels, rows[1] - rows[0], width)
    if between:
        return Operand(shape, Layout.padded(image.dtype, (images, channels, between, width)))
    return Operand(shape, replace(image.layout, plane=image.strides[1]))


def _offered(parts: Sequence[Part]) -> list[list[Candidate]]:
    """The kernels that may do a convolution in each band, by estimates."""
    known = {problem: candidates_of(problem) for problem in {part.problem for part in parts}}
    return [[one for one in known[part.problem] if _stays_inside(one, part)] for part in parts]


def _kernels(offered: Sequence[Sequence[Candidate]], in_place: bool) -> tuple[Candidate, ...]:
    """What does a convolution in each band: the kernel that is fastest by estimates in the middle,
    or if ``in_place`` a dense one that reads the image where it lies. () where there is none."""
    choices = offered[len(offered) // 2]
    direct = [one for one in choices if isinstance(one, DirectCandidate) and _is_dense(one)]
    for choice in (*(direct if in_place else ()), *choices):
        own = [_like(choice, others) for others in offered]
        if None not in own:
            return tuple(one for one in own if one is not None)
    return ()


def _is_dense(candidate: Candidate) -> bool:
    weight = candidate.problem.inputs[1]
    return isinstance(weight, ConstantOperand) and weight.zeros is None


def _stays_inside(candidate: Candidate, part: Part) -> bool:
    """Whether a kernel reads nothing behind an image of which it is given some rows.

    Sparse products in place read whole vectors: they may, behind a plane, but not behind all.
    """
    if not isinstance(candidate, SparseConvolutionCandidate) or not candidate.schedule.pitch:
        return True
    x = part.problem.inputs[0]
    width = x.shape[3]
    vectors = math.ceil((part.rows[1] - part.rows[0]) * width / LANES)
    return part.before * width + vectors * LANES <= x.layout.plane


def _like(choice: Candidate, others: Sequence[Candidate]) -> Candidate | None:
    """The kernel for another band: of the same family, with constants packed alike if possible."""
    alike = [one for one in others if type(one) is type(choice) and one.packing() is not None]
    same = (one for one in alike if one.packing() == choice.packing())
    return next(same, alike[0] if alike else None)


_BODY = """
memory = scratch + thread * slot
<share>
while task < stop:
    stage = 0
    while stage < stages:
        call = arguments[HEAD + task * stages + stage]
        words = arguments[call + 1]
        word = 0
        while word < words:
            place = call + 2 + 2 * word
            value = arguments[place] + arguments[place + 1] * thread * slot
            write(memory + own + 8 * word, value, INT64)
            word += 1
        call_step(arguments[call], memory + own)
        stage += 1
    task += 1
"""
