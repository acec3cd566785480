"""Which kernel families solve which problems, and what a family hands to its caller.

How to write a family, in one file:

1. Declare the problem in `problem`: a frozen dataclass derived from ``Problem``.
2. Generate the kernel as Python text that defines ``kernel(arguments, thread, begin, end)`` with
   the vocabulary of `simd` and `elementary`; ``source.build(name, text)`` compiles and caches it.
   ``arguments`` is a pointer to int64: addresses, sizes, strides in bytes, and float immediates
   (``float32_from_bits(arguments[7])``). Read them into locals first. Every thread of the team
   calls the kernel with its own number and does its share of the work, from ``begin`` to ``end``
   of `WHOLE` (`loops.SHARE` makes a range of tasks of it); the kernel never allocates, never
   raises, and touches nothing outside its operands (masked loads and stores for remainders).
   Generate per schedule, dtype and epilogue; sizes are arguments.
3. Derive from `Candidate`: one per schedule worth trying. ``pack`` rearranges constants once,
   ``scratch_bytes`` asks for memory that the steps share, ``build`` returns the steps.
4. Register a function from problem to candidates:

       @register(MatmulProblem)
       def candidates(problem: MatmulProblem) -> list[Candidate]: ...

   Return [] for what the family cannot do exactly; the caller then looks elsewhere.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from graphopt.kernels.problem import Problem

WHOLE = 2**20
"""The work of a step, of which threads get shares."""


@dataclass(frozen=True)
class Entry:
    """A compiled kernel: ``void (int64_t *arguments, int64_t thread, int64_t begin, int64_t end)``.

    A thread's share is from ``begin`` to ``end`` of `WHOLE`; shares differ in size as threads do
    in speed, and results do not depend on them.
    """

    address: int
    name: str
    keep_alive: Any = field(repr=False, compare=False, default=None)


@dataclass(frozen=True)
class Input:
    """An address in the problem's input ``index``, ``offset`` bytes from its start."""

    index: int
    offset: int = 0


@dataclass(frozen=True)
class Output:
    """An address in the problem's output ``index``, ``offset`` bytes from its start."""

    index: int
    offset: int = 0


@dataclass(frozen=True)
class Packed:
    """The address of the array ``index`` that ``Candidate.pack`` returned."""

    index: int


@dataclass(frozen=True)
class Table:
    """The address of numbers (int64) that the step reads."""

    numbers: tuple[int, ...]


@dataclass(frozen=True)
class Scratch:
    """An address in the candidate's scratch memory, ``offset`` bytes from its start."""

    offset: int = 0


Argument = Input | Output | Packed | Table | Scratch | int | float
"""A float stands for the bits of its float32 in the low half of the int64."""


@dataclass(frozen=True)
class Step:
    """One call of a kernel: by every thread of the team, or by the first alone.

    Between the steps of a candidate there is a barrier. ``tasks`` is how many equal parts threads
    share, where the kernel's author knows.
    """

    entry: Entry
    arguments: tuple[Argument, ...]
    parallel: bool = True
    tasks: int = 0


@dataclass(frozen=True)
class Candidate(ABC):
    """One way to solve a problem. ``estimate`` is in seconds on one thread."""

    kernel: str
    problem: Problem
    estimate: float

    def pack(self, constants: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        """Constants rearranged for this kernel.

        ``constants`` has an array for each input that is constant and None for the others. The
        arrays returned start on 64-byte lines and may be shared by candidates of equal problems.
        """
        return []

    def packing(self) -> tuple[Any, ...] | None:
        """What `pack` depends on beside the constants, where it saves packing them again.

        Candidates of one class with equal constants and equal packing pack alike; None says that
        it is not known.
        """
        return None

    def scratch_bytes(self, threads: int) -> int:
        """Bytes of memory that the steps need beside their operands, for a team of ``threads``."""
        return 0

    def overwrites(self) -> tuple[int, ...]:
        """Inputs of which one, at most, may lie where the first output does.

        The kernel reads each of their elements before it writes the element of the output that
        takes its place, and never again; they have the output's shape, dtype and layout.
        """
        return ()

    @abstractmethod
    def build(self, threads: int) -> tuple[Step, ...]:
        """The steps for a team of ``threads``, compiled."""


def like_output(problem: Problem, inputs: range) -> tuple[int, ...]:
    """Those of ``inputs`` (by index) whose elements lie as those of the first output."""
    y = problem.outputs[0]
    return tuple(
        index
        for index in inputs
        if (problem.inputs[index].shape, problem.inputs[index].layout) == (y.shape, y.layout)
    )


P = TypeVar("P", bound=Problem)
Family = Callable[[Any], Sequence[Candidate]]

_families: dict[type[Problem], list[Family]] = {}


def register(problem: type[P]) -> Callable[[Callable[[P], Sequence[Candidate]]], Family]:
    """Register a function that lists a family's candidates for problems of one type."""

    def add(family: Callable[[P], Sequence[Candidate]]) -> Family:
        if family.__module__.partition(".")[0] == "kernels":
            raise ImportError(
                f"{family.__module__} was imported under a second name; its name is "
                f"graphopt.{family.__module__}"
            )
        _families.setdefault(problem, []).append(family)
        return family

    return add


def candidates(problem: Problem) -> list[Candidate]:
    """All candidates for a problem, the fastest by the families' own estimates first.

    Empty where no family can do it exactly.
    """
    found = [choice for family in _families.get(type(problem), ()) for choice in family(problem)]
    return sorted(found, key=lambda choice: choice.estimate)


def least_estimate(problem: Problem) -> float:
    """Seconds that the family expects which expects to be fastest; infinity if none can do it."""
    return min((choice.estimate for choice in candidates(problem)), default=math.inf)


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An uninitialised C-contiguous array that starts on a 64-byte line."""
    kind = np.dtype(dtype)
    count = int(np.prod(shape, dtype=np.int64))
    memory = np.empty(count * kind.itemsize + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + count * kind.itemsize].view(kind).reshape(shape)
