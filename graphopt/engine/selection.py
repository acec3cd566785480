"""Which kernel solves a problem: ranked by the families' estimates, chosen by measured time.

Measured times are remembered on disk, so that the choice for one machine and one set of versions
is made once, and a result is reproducible.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import llvmlite
import numba
import numpy as np
import torch
from numba.core.registry import cpu_target

from graphopt.engine.builder import ProgramBuilder
from graphopt.engine.program import Program
from graphopt.errors import SelectionError
from graphopt.kernels import cache
from graphopt.kernels.operand import ConstantOperand, Operand
from graphopt.kernels.problem import Problem
from graphopt.kernels.registry import Candidate, candidates

TIMED_CANDIDATES = 3
CLEARLY_WORSE = 2.0
TURNS = 6
SECONDS_PER_TURN = 1e-3
FAR = 2**22
"""Bytes of activations that a network writes between two uses of one, in a measurement."""
MOST_SETS = 8
MEMORY_SPEED = 30e9
"""Bytes per second that come from memory, roughly."""
_NOT_MEANWHILE = 0.25
"""The part of the shorter of two times, of work and of memory, that is not hidden by the other."""


@dataclass(frozen=True)
class Selection:
    """How kernels are chosen.

    Attributes:
        measure: time the best candidates; otherwise the families' estimates decide, which needs
            no time and is the same everywhere.
    """

    measure: bool = True

    @staticmethod
    def default() -> Selection:
        """Measured, unless the environment says ``GRAPHOPT_SELECTION=estimate``.

        Raises:
            SelectionError: the variable has another value.
        """
        asked = os.environ.get("GRAPHOPT_SELECTION", "measure")
        if asked not in ("measure", "estimate"):
            raise SelectionError(
                f"GRAPHOPT_SELECTION is '{asked}'; it may be 'measure' or 'estimate'"
            )
        return Selection(measure=asked == "measure")


def contenders(
    problem: Problem, threads: int, selection: Selection, prefer: str | None = None
) -> list[Candidate]:
    """The candidates among which times that are to be measured decide; only one where nothing is
    to be measured.

    Args:
        problem: what is to be solved.
        threads: size of the team.
        selection: how to choose.
        prefer: the kernel to take if it is a candidate.

    Raises:
        SelectionError: no kernel solves the problem.
    """
    found = candidates(problem)
    if not found:
        raise SelectionError(f"no kernel solves {problem.key()}")
    preferred = next((c for c in found if c.kernel == prefer), None)
    if preferred is not None or len(found) == 1 or not selection.measure:
        return [preferred or found[0]]
    best = found[0].estimate * CLEARLY_WORSE
    timed = [candidate for candidate in found[:TIMED_CANDIDATES] if candidate.estimate <= best]
    times = _known_times(timed, threads)
    return timed if times is None else [timed[times.index(min(times))]]


def decide(
    timed: Sequence[Candidate], constants: Sequence[np.ndarray | None], threads: int
) -> Candidate:
    """The fastest of the contenders, by times that are measured now and remembered, unless an
    equal problem had them measured meanwhile.

    Args:
        timed: from `contenders`.
        constants: the array of each input that is constant, None for the others.
        threads: size of the team.
    """
    if len(timed) == 1:
        return timed[0]
    times = _known_times(timed, threads)
    if times is None:
        times = measure(timed, constants, threads)
        remember(dict(zip((_key(one, threads) for one in timed), times, strict=True)))
    return timed[times.index(min(times))]


def ratio(
    kernels: Sequence[Candidate], constants: Sequence[Sequence[np.ndarray | None]], threads: int
) -> float:
    """The time of the first kernel over that of all others in sequence, which do its parts.

    Each of these reads, as its first input, the result of the one before. They are measured in turn
    with the whole and the ratio is remembered: times of other minutes may be those of a faster or
    slower machine, and to call the parts one by one would cost more than their sequence.

    Args:
        kernels: the whole, then its parts.
        constants: of each kernel, the array of each input that is constant, None for the others.
        threads: size of the team.
    """
    key = key_of("\0".join(("sequence", *(_key(one, threads) for one in kernels))))
    known = remembered([key])
    if known is not None:
        return known[0]
    # What is not constant is in both the image and, in the same order, the further operands.
    sets = _sets(kernels[0].problem, constants[0])
    sequences = [(kernels[:1], constants[:1]), (kernels[1:], constants[1:])]
    whole, parts = _measure(sequences, sets, threads)
    remember({key: whole / parts})
    return whole / parts


def _known_times(timed: Sequence[Candidate], threads: int) -> list[float] | None:
    """Seconds of each candidate, if those of all are remembered."""
    return remembered([_key(candidate, threads) for candidate in timed])


def measure(
    timed: Sequence[Candidate], constants: Sequence[np.ndarray | None], threads: int
) -> list[float]:
    """Least time of one run of each in seconds, with random inputs and the real constants, as it
    will be about in a network.

    They take turns, so that what else the machine does hits them all. In a network other layers
    run between two runs of one: activations are taken from several sets in turn, so that they are
    not in the nearest caches, and what it takes to bring the packed constants from memory counts
    as well, though most of the shorter time passes meanwhile.
    """
    sets = _sets(timed[0].problem, constants)
    return _measure([([one], [constants]) for one in timed], sets, threads)


_Sequence = tuple[Sequence[Candidate], Sequence[Sequence[np.ndarray | None]]]
"""Kernels, each of which reads the result of the one before, and the constants of each."""


def _measure(
    sequences: Sequence[_Sequence], sets: Sequence[Sequence[torch.Tensor]], threads: int
) -> list[float]:
    """Seconds of each sequence, with the same sets of inputs."""
    packed = [
        [one.pack(own) for one, own in zip(kernels, constants, strict=True)]
        for kernels, constants in sequences
    ]
    programs = [
        (_program(kernels, constants, threads, arrays), sets)
        for (kernels, constants), arrays in zip(sequences, packed, strict=True)
    ]
    fetching = [
        sum(array.nbytes for arrays in own for array in arrays) / MEMORY_SPEED for own in packed
    ]
    return [
        max(pair) + _NOT_MEANWHILE * min(pair)
        for pair in zip(fetching, least_times(programs), strict=True)
    ]


def _sets(problem: Problem, constants: Sequence[np.ndarray | None]) -> list[list[torch.Tensor]]:
    """As many sets of equal random inputs as are not in the nearest caches together."""
    generator = torch.Generator().manual_seed(0)
    first = [
        _sample(operand, generator)
        for operand, constant in _with_constants(problem, constants)
        if constant is None
    ]
    once = max(sum(tensor.nbytes for tensor in first), 1)
    more = range(min(math.ceil(FAR / once), MOST_SETS) - 1)
    return [first, *([tensor.clone() for tensor in first] for _ in more)]


def _with_constants(
    problem: Problem, constants: Sequence[np.ndarray | None]
) -> list[tuple[Operand, np.ndarray | None]]:
    """The operands that a problem reads, each with its array if it is constant."""
    known = itertools.chain(constants, itertools.repeat(None))
    return [
        (operand, array if isinstance(operand, ConstantOperand) else None)
        for operand, array in zip(problem.inputs, known, strict=False)
    ]


def least_times(
    programs: Sequence[tuple[Callable[..., object], Sequence[Sequence[torch.Tensor]]]],
    turns: int = TURNS,
) -> list[float]:
    """Least time of a run of each program in seconds, after a first one that does not count.

    They take turns, and in each of these the sets of inputs, as often as `SECONDS_PER_TURN` allows.
    """
    for program, sets in programs:
        program(*sets[0])
    least = [float("inf")] * len(programs)
    for _ in range(turns):
        for place, (program, sets) in enumerate(programs):
            least[place] = min(least[place], _least_time(program, sets))
    return least


def _least_time(program: Callable[..., object], sets: Sequence[Sequence[torch.Tensor]]) -> float:
    best, spent = float("inf"), 0.0
    # Results are kept for a while: their memory would be used again at once.
    kept: deque[object] = deque(maxlen=len(sets))
    turns = itertools.cycle(sets)
    while spent < SECONDS_PER_TURN:
        inputs = next(turns)
        start = time.perf_counter()
        kept.append(program(*inputs))
        elapsed = time.perf_counter() - start
        best, spent = min(best, elapsed), spent + elapsed
    return best


def single_kernel(
    candidate: Candidate,
    constants: Sequence[np.ndarray | None],
    threads: int,
    packed: Sequence[np.ndarray],
) -> Program:
    """A program of one kernel with its packed constants."""
    return _program([candidate], [constants], threads, [packed])


def _program(
    kernels: Sequence[Candidate],
    constants: Sequence[Sequence[np.ndarray | None]],
    threads: int,
    packed: Sequence[Sequence[np.ndarray]],
) -> Program:
    """A program of kernels, each of which reads the first result of the one before it first."""
    builder = ProgramBuilder()
    made: list[tuple[int, str, int]] = []
    for number, (one, own, arrays) in enumerate(zip(kernels, constants, packed, strict=True)):
        problem = one.problem
        keys = [(number, "input", place) for place in range(len(problem.inputs))]
        if made:
            keys[0] = made[0]
        for key, (operand, constant) in zip(keys, _with_constants(problem, own), strict=True):
            if constant is not None:
                builder.add_constant(key, constant)
            elif key[0] == number:
                builder.add_input(key, _memory(operand), getattr(torch, operand.dtype))
        made = [(number, "output", place) for place in range(len(problem.outputs))]
        for key, operand in zip(made, problem.outputs, strict=True):
            builder.add_buffer(key, _memory(operand), getattr(torch, operand.dtype))
        builder.add_kernel(
            one.build(threads),
            keys,
            made,
            packed=arrays,
            scratch_bytes=one.scratch_bytes(threads),
            label=one.kernel,
            estimate=one.estimate,
        )
    for key in made:
        builder.add_output(key)
    return builder.build(threads)


def _memory(operand: Operand) -> tuple[int, ...]:
    return operand.memory if operand.layout.is_rearranged else operand.shape


def _sample(operand: Operand, generator: torch.Generator) -> torch.Tensor:
    dtype: torch.dtype = getattr(torch, operand.dtype)
    shape = _memory(operand)
    if dtype.is_floating_point:
        return torch.randn(shape, dtype=dtype, generator=generator)
    return torch.randint(0, 2, shape, generator=generator).to(dtype)


# -- the table on disk ---------------------------------------------------------------------------

_lock = threading.RLock()
_known: dict[str, float] | None = None
_unsaved: dict[str, float] = {}


def _key(candidate: Candidate, threads: int) -> str:
    return key_of("\0".join((candidate.kernel, _typical(candidate.problem).key(), str(threads))))


def key_of(text: str) -> str:
    """A key of the table that stands for a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _typical(problem: Problem) -> Problem:
    """The problem, but for where the zeros of its constants are: times hardly depend on that.

    So layers of one shape choose the same kernel, by times that were measured once.
    """
    operands = tuple(
        replace(operand, zeros=operand.zeros.typical())
        if isinstance(operand, ConstantOperand) and operand.zeros is not None
        else operand
        for operand in problem.inputs
    )
    return replace(problem, inputs=operands)  # type: ignore[type-var]  # problems are dataclasses


def remembered(keys: Sequence[str]) -> list[float] | None:
    """The seconds that each key stands for, if those of all are remembered."""
    with _lock:
        times = [_table().get(key) for key in keys]
    known = [seconds for seconds in times if seconds is not None]
    return known if len(known) == len(keys) else None


def remember(times: Mapping[str, float]) -> None:
    """Remember seconds; `save` writes them to disk."""
    with _lock:
        _table().update(times)
        _unsaved.update(times)


def _file() -> str:
    versions = (numba.__version__, llvmlite.__version__)
    machine = cpu_target.target_context.codegen().magic_tuple()
    digest = hashlib.sha256(repr((versions, machine)).encode()).hexdigest()[:16]
    return f"times-{digest}.json"


def _table() -> dict[str, float]:
    global _known
    if _known is None:
        _known = _read()
    return _known


def _read() -> dict[str, float]:
    try:
        stored = json.loads(cache.path("selection", _file()).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return {str(key): float(value) for key, value in stored.items()}


def save() -> None:
    """Write the times measured since the last call to disk."""
    with _lock:
        if not _unsaved:
            return
        merged = {**_read(), **_unsaved}
        _unsaved.clear()
        with contextlib.suppress(OSError):  # a full disk costs only the next process's time
            cache.write(cache.path("selection", _file()), json.dumps(merged).encode())


def forget() -> None:
    """Drop what this process remembers; the file on disk is read again."""
    global _known
    with _lock:
        _known = None
        _unsaved.clear()
