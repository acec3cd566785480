"""The flat tape: one row per step, and all their argument blocks in one array of int64.

An argument block holds addresses, and addresses are known at different times: those of constants
when the tape is written, those of buffers in the arena when an execution context is made, those
of externals (the caller's tensors, and results of call-backs) at each call.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.engine import walker
from graphopt.kernels.registry import Argument, Input, Output, Packed, Scratch, Step, Table

_FINE = 24
"""Tasks of a step from which threads can get about the shares that suit their speeds."""


@dataclass(frozen=True)
class Fixed:
    """An address that is known now."""

    address: int


@dataclass(frozen=True)
class InArena:
    """`offset` bytes from the start of the arena."""

    offset: int


@dataclass(frozen=True)
class InExternal:
    """`offset` bytes from the start of external `index`."""

    index: int
    offset: int = 0


Location = Fixed | InArena | InExternal


def moved(location: Location, offset: int) -> Location:
    """The location `offset` bytes further on."""
    if isinstance(location, Fixed):
        return Fixed(location.address + offset)
    if isinstance(location, InArena):
        return InArena(location.offset + offset)
    return InExternal(location.index, location.offset + offset)


@dataclass(frozen=True)
class Operands:
    """Where the operands of one kernel are, in the order in which its steps number them."""

    inputs: Sequence[Location]
    outputs: Sequence[Location]
    packed: Sequence[Location]
    scratch: Location | None

    def locate(self, argument: Input | Output | Packed | Scratch) -> Location:
        """Raises ValueError for an operand that the kernel was not given."""
        try:
            if isinstance(argument, Input):
                return moved(self.inputs[argument.index], argument.offset)
            if isinstance(argument, Output):
                return moved(self.outputs[argument.index], argument.offset)
            if isinstance(argument, Packed):
                return self.packed[argument.index]
        except IndexError:
            raise ValueError(f"a step wants {argument}, which its kernel was not given") from None
        if self.scratch is None:
            raise ValueError(f"a step wants {argument}, but its kernel asked for no scratch memory")
        return moved(self.scratch, argument.offset)


@dataclass(frozen=True)
class Tape:
    """Steps, their arguments, and which words of the arguments are still to be completed.

    Attributes:
        steps: (n, 3): entry address, byte offset of the argument block, flags.
        arguments: 1-d template; each execution context has a copy.
        arena_words: indices of the words that are offsets in the arena.
        relocations: (m, 3): index of the word, index of the external, offset in bytes.
        tables: what addresses in the arguments point to.
    """

    steps: np.ndarray
    arguments: np.ndarray
    arena_words: np.ndarray
    relocations: np.ndarray
    tables: tuple[np.ndarray, ...]


class TapeWriter:
    """Writes kernels one after another; `finish` gives the tape."""

    def __init__(self) -> None:
        self._steps: list[tuple[int, int, int]] = []
        self._words: list[int] = []
        self._arena_words: list[int] = []
        self._relocations: list[tuple[int, int, int]] = []
        self._tables: list[np.ndarray] = []

    @property
    def position(self) -> tuple[int, int]:
        """How many steps and relocations there are so far."""
        return len(self._steps), len(self._relocations)

    def write(self, steps: Sequence[Step], operands: Operands) -> None:
        """Append a kernel's steps. Raises ValueError for an argument that has no value."""
        for number, step in enumerate(steps):
            flags = walker.PARALLEL if step.parallel else 0
            flags |= walker.BEGINS_KERNEL if number == 0 else 0
            flags |= walker.FINE if step.tasks >= _FINE else 0
            self._steps.append((step.entry.address, 8 * len(self._words), flags))
            for argument in step.arguments:
                self._words.append(self._word(argument, operands.locate))

    def finish(self) -> Tape:
        """Place the barriers: after each step but where thread 0 alone goes on to the next."""
        for index, (entry, arguments, flags) in enumerate(self._steps):
            following = self._steps[index + 1 : index + 2]
            if flags & walker.PARALLEL or any(f & walker.PARALLEL for _, _, f in following):
                self._steps[index] = (entry, arguments, flags | walker.BARRIER)
        return Tape(
            np.array(self._steps, dtype=np.int64).reshape(-1, 3),
            np.array(self._words, dtype=np.int64),
            np.array(self._arena_words, dtype=np.int64),
            np.array(self._relocations, dtype=np.int64).reshape(-1, 3),
            tuple(self._tables),
        )

    def _word(
        self, argument: Argument, locate: Callable[[Input | Output | Packed | Scratch], Location]
    ) -> int:
        if isinstance(argument, float):
            return int(struct.unpack("<I", struct.pack("<f", argument))[0])
        if isinstance(argument, Input | Output | Packed | Scratch):
            location = locate(argument)
            if isinstance(location, Fixed):
                return location.address
            if isinstance(location, InArena):
                self._arena_words.append(len(self._words))
                return location.offset
            self._relocations.append((len(self._words), location.index, location.offset))
            return 0
        if isinstance(argument, Table):
            self._tables.append(np.array(argument.numbers, dtype=np.int64))
            return int(self._tables[-1].ctypes.data)
        return int(argument)
