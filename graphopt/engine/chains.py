"""Which convolutions may be computed together, band by band of rows.

A depthwise convolution does little with much memory: where it shares bands with the convolution
whose result it reads, and with the one of single pixels that reads its own (the blocks of mobile
networks), what is between them stays in the caches. Whether that is faster is measured, chain
against single kernels. Bottlenecks, of which a 3x3 convolution with all channels is the middle,
were not: the rows between two bands, computed twice, cost more than the memory saves.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from graphopt.engine.work import KernelWork, Work
from graphopt.kernels.problem import ConvolutionChainProblem, ConvolutionProblem, Problem
from graphopt.kernels.registry import least_estimate

_WORTH_TRYING = 1.5
"""By how much, at most, the estimates of a chain may exceed those of its parts: these know nothing
of what memory costs."""


@dataclass(frozen=True)
class Chain:
    """Works that may become one.

    Attributes:
        work: the whole.
        parts: the works that it replaces, in order; the last one yields the result.
    """

    work: KernelWork
    parts: tuple[KernelWork, ...]


def chains(works: Sequence[Work]) -> list[Chain]:
    """The chains that are worth measuring, no two of which share a work."""
    users: dict[object, list[Work]] = defaultdict(list)
    makers: dict[object, Work] = {}
    for work in works:
        for value in dict.fromkeys(work.inputs):
            users[value].append(work)
        makers.update(dict.fromkeys(work.outputs, work))
    found: list[Chain] = []
    taken: set[int] = set()
    for work in works:
        if not _is_convolution(work) or not _is_depthwise(work.problem):
            continue
        parts = [work]
        before = makers.get(work.inputs[0])
        if before is not None and _is_convolution(before) and _is_private(before, users):
            parts.insert(0, before)
        after = users[work.outputs[0]][0] if _is_private(work, users) else work
        if _is_convolution(after) and _is_pointwise(after.problem):
            parts.append(after)
        if len(parts) > 1 and taken.isdisjoint(map(id, parts)) and _is_worth_trying(parts):
            taken.update(map(id, parts))
            found.append(Chain(_joined(parts), tuple(parts)))
    return found


def with_chain(works: Sequence[Work], chain: Chain) -> list[Work]:
    """The works with a chain in the place of its last part, and without the others."""
    *others, last = map(id, chain.parts)
    kept = [work for work in works if id(work) not in others]
    return [chain.work if id(work) == last else work for work in kept]


def _is_convolution(work: Work) -> TypeGuard[KernelWork]:
    return isinstance(work, KernelWork) and isinstance(work.problem, ConvolutionProblem)


def _is_depthwise(problem: Problem) -> bool:
    assert isinstance(problem, ConvolutionProblem)
    weight = problem.inputs[1]
    return problem.groups > 1 and weight.shape[1] == 1 and len(weight.shape) == 4


def _is_pointwise(problem: Problem) -> bool:
    assert isinstance(problem, ConvolutionProblem)
    weight = problem.inputs[1]
    return problem.groups == 1 and set(weight.shape[2:]) == set(problem.stride) == {1}


def _is_private(work: KernelWork, users: Mapping[object, Sequence[Work]]) -> bool:
    """Whether one work alone reads a result, as its image."""
    (value,) = work.outputs
    readers = users[value]
    if value.is_output or len(readers) != 1:
        return False
    return list(readers[0].inputs).count(value) == 1 and readers[0].inputs[0] is value


def _is_worth_trying(parts: Sequence[KernelWork]) -> bool:
    whole = least_estimate(_joined(parts).problem)
    return whole < _WORTH_TRYING * sum(least_estimate(part.problem) for part in parts)


def _joined(parts: Sequence[KernelWork]) -> KernelWork:
    """The work that does all parts."""
    convolutions = [part.problem for part in parts if isinstance(part.problem, ConvolutionProblem)]
    return KernelWork(
        ConvolutionChainProblem.of(convolutions),
        (parts[0].inputs[0], *(value for part in parts for value in part.inputs[1:])),
        parts[-1].outputs,
        tuple(node for part in parts for node in part.nodes),
    )
