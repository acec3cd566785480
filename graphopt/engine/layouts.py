"""How the images between kernels lie in memory.

Sparse products of a 1x1 convolution read their image where it is, if its channels start on cache
lines that are in many sets of the cache. Other images, as those of 14 x 14 or 112 x 112 pixels, get
padded planes (`Layout.padded`) where all that write or read them can, and where the families expect
to be faster so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from graphopt.engine.work import Derived, KernelWork, Work
from graphopt.ir import Value
from graphopt.kernels.operand import Operand
from graphopt.kernels.problem import ConvolutionProblem
from graphopt.kernels.registry import least_estimate


def with_padded_planes(works: Sequence[Work]) -> list[Work]:
    """The same works, some with padded planes in their problems."""
    found = list(works)
    users: dict[Value, list[int]] = defaultdict(list)
    for number, work in enumerate(found):
        for value in dict.fromkeys((*work.inputs, *work.outputs)):
            if isinstance(value, Value):
                users[value].append(number)
    for work in works:
        for value in work.outputs:
            _pad(value, users[value], found)
    return found


def _pad(value: Value, users: Sequence[int], works: list[Work]) -> None:
    """Pad the planes of a value in the works that use it, if that makes them faster."""
    if value.is_output or len(users) < 2:
        return
    changed: list[KernelWork] = []
    saved = 0.0
    for number in users:
        work = works[number]
        if not isinstance(work, KernelWork):
            return
        padded = _padded(work, value)
        if padded is None:
            return
        changed.append(padded)
        saved += least_estimate(work.problem) - least_estimate(padded.problem)
    shapes = {operand.shape for work in changed for operand, one in _operands(work) if one is value}
    if saved > 0 and len(shapes) == 1:
        for number, padded in zip(users, changed, strict=True):
            works[number] = padded


def _operands(work: KernelWork) -> list[tuple[Operand, Value | Derived]]:
    """The operands of a problem with their values, the inputs first."""
    operands = (*work.problem.inputs, *work.problem.outputs)
    return list(zip(operands, (*work.inputs, *work.outputs), strict=True))


def _padded(work: KernelWork, value: Value) -> KernelWork | None:
    """A work with padded planes of a value; None where there are none or they need no padding."""
    problem = work.problem
    if not isinstance(problem, ConvolutionProblem):
        return None
    operands = []
    for operand, one in _operands(work):
        if one is value:
            plain = operand == Operand.plain("float32", operand.shape)
            if not plain or operand.padded.bytes == operand.bytes:
                return None
        operands.append(operand.padded if one is value else operand)
    inputs, outputs = operands[: len(work.inputs)], operands[len(work.inputs) :]
    problem = replace(problem, inputs=tuple(inputs), outputs=tuple(outputs))
    return replace(work, problem=problem)
