"""How the images between kernels lie in memory.

Sparse products of a 1x1 convolution read their image where it is, if its channels start on cache
lines that are in many sets of the cache. Other images, as those of 14 x 14 or 112 x 112 pixels, get
padded planes (`Layout.padded`) where all that write or read them can, and where the families expect
to be faster so. Where threads should not share pages, images come in halves before that
(`Layout.halved`).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from graphopt.engine.work import Derived, KernelWork, Work
from graphopt.ir import Value
from graphopt.kernels.operand import Operand
from graphopt.kernels.problem import ConvolutionProblem
from graphopt.kernels.register import AMD, LANES
from graphopt.kernels.registry import least_estimate

HALVES = LANES == 16 and not AMD
"""Whether it is slow if threads share pages of an image, as was measured on Intel's servers: two
threads that update 1,024 planes of 14 x 14 pixels take four times as long as with halves."""
_MOST_FOR_HALVES = 1.15
"""What part of the time before works may take whose images are in halves: what is gained by that,
that threads do not share pages, is not in the estimates."""


def with_layouts(works: Sequence[Work]) -> list[Work]:
    """The same works, some with padded planes or halves in their problems."""
    found = list(works)
    users: dict[Value, list[int]] = defaultdict(list)
    for number, work in enumerate(found):
        for value in dict.fromkeys((*work.inputs, *work.outputs)):
            if isinstance(value, Value):
                users[value].append(number)
    for work in works:
        for value in work.outputs:
            alike = _alike(value, users, works) if HALVES else []
            if not (alike and _change(alike, users, found, _halved, _MOST_FOR_HALVES)):
                _change([value], users, found, _padded, 1.0)
    return found


def _alike(
    value: Value, users: Mapping[Value, Sequence[int]], works: Sequence[Work]
) -> list[Value]:
    """A value and those that are in halves if it is: what convolutions add, and their results."""
    alike: dict[Value, None] = {value: None}
    more = [value]
    while more:
        one = more.pop()
        for work in (works[number] for number in users[one]):
            if not (isinstance(work, KernelWork) and isinstance(work.problem, ConvolutionProblem)):
                continue
            operands = _operands(work)
            added = [operands[place] for place in range(2, len(operands))]
            together = [v for operand, v in added if operand.shape == operands[-1][0].shape]
            if one in together:
                new = [v for v in together if isinstance(v, Value) and v not in alike]
                alike |= dict.fromkeys(new)
                more += new
    return list(alike)


def _change(
    values: Sequence[Value],
    users: Mapping[Value, Sequence[int]],
    works: list[Work],
    change: Callable[[Operand], Operand | None],
    most: float,
) -> bool:
    """Change the layout of values in the works that use them, if these can and then take less than
    ``most`` of the time that they took; whether they did."""
    numbers = sorted({number for value in values for number in users[value]})
    if any(value.is_output or len(users[value]) < 2 for value in values):
        return False
    old: list[KernelWork] = []
    new: list[KernelWork] = []
    for number in numbers:
        work = works[number]
        if not isinstance(work, KernelWork):
            return False
        changed = _changed(work, values, change)
        if changed is None:
            return False
        old.append(work)
        new.append(changed)
    for value in values:
        shapes = {o.shape for work in new for o, one in _operands(work) if one is value}
        if len(shapes) > 1:
            return False
    after = 0.0
    for changed in new:
        after += least_estimate(changed.problem)
        if math.isinf(after):  # mostly the first: no kernel knows of this layout
            return False
    if after >= most * sum(least_estimate(work.problem) for work in old):
        return False
    for number, changed in zip(numbers, new, strict=True):
        works[number] = changed
    return True


def _padded(operand: Operand) -> Operand | None:
    """An image with padded planes; None where it needs no padding."""
    return operand.padded if operand.padded.bytes != operand.bytes else None


def _halved(operand: Operand) -> Operand | None:
    """An image in halves; None where it has none."""
    whole = len(operand.shape) != 4 or operand.shape[0] != 1 or operand.shape[2] % 2
    return None if whole else operand.halved


def _operands(work: KernelWork) -> list[tuple[Operand, Value | Derived]]:
    """The operands of a convolution with their values, the inputs first."""
    operands = (*work.problem.inputs, *work.problem.outputs)
    return list(zip(operands, (*work.inputs, *work.outputs), strict=True))


def _changed(
    work: KernelWork, values: Sequence[Value], change: Callable[[Operand], Operand | None]
) -> KernelWork | None:
    """A work with another layout of values; None where there is none."""
    problem = work.problem
    if not isinstance(problem, ConvolutionProblem):
        return None
    operands: list[Operand] = []
    for operand, one in _operands(work):
        new: Operand | None = operand
        if one in values:
            new = change(operand) if operand == Operand.plain("float32", operand.shape) else None
        if new is None:
            return None
        operands.append(new)
    inputs, outputs = operands[: len(work.inputs)], operands[len(work.inputs) :]
    problem = replace(problem, inputs=tuple(inputs), outputs=tuple(outputs))
    return replace(work, problem=problem)
