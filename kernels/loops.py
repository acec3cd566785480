"""Loop nests over several strided operands at once, and the kernel text that walks them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from graphopt.kernels.registry import WHOLE, Argument


@dataclass(frozen=True)
class Nest:
    """``sizes`` from the outermost loop to the innermost; ``strides[operand][loop]``."""

    sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]

    @property
    def inner(self) -> int:
        """Trips of the innermost loop."""
        return self.sizes[-1]

    @property
    def rows(self) -> int:
        """Trips of all other loops together."""
        rows = 1
        for size in self.sizes[:-1]:
            rows *= size
        return rows


def broadcast_strides(
    shape: Sequence[int], strides: Sequence[int], target: Sequence[int]
) -> tuple[int, ...]:
    """Strides for walking a tensor as if it had the shape that it broadcasts to."""
    missing = len(target) - len(shape)
    fits = missing >= 0 and all(
        size in (1, wanted) for size, wanted in zip(shape, target[missing:], strict=True)
    )
    if not fits:
        raise ValueError(f"shape {tuple(shape)} does not broadcast to {tuple(target)}")
    own = zip(shape, strides, strict=True)
    return (0,) * missing + tuple(0 if size == 1 else stride for size, stride in own)


def collapse(
    shape: Sequence[int], strides: Sequence[Sequence[int]], order: Sequence[int] | None = None
) -> Nest:
    """The nest that visits every index of ``shape`` with the fewest loops.

    ``order`` lists the dimensions from the outermost loop to the innermost. Neighbouring loops
    become one where every operand walks through both in one stride.
    """
    dimensions = [axis for axis in (order or range(len(shape))) if shape[axis] != 1]
    sizes: list[int] = []
    steps: list[list[int]] = [[] for _ in strides]
    for axis in dimensions:
        joins = bool(sizes) and all(
            known[-1] == own[axis] * shape[axis] for known, own in zip(steps, strides, strict=True)
        )
        for known, own in zip(steps, strides, strict=True):
            if joins:
                known[-1] = own[axis]
            else:
                known.append(own[axis])
        if joins:
            sizes[-1] *= shape[axis]
        else:
            sizes.append(shape[axis])
    if not sizes:
        return Nest((1,), tuple((1,) for _ in strides))
    return Nest(tuple(sizes), tuple(tuple(known) for known in steps))


class Arguments:
    """A kernel's argument block: the values, and the lines that read them under their names."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.values: list[Argument] = []

    def add(self, name: str, value: Argument) -> None:
        """One more argument."""
        self.names.append(name)
        self.values.append(value)

    def add_all(self, values: Mapping[str, Argument]) -> None:
        """More arguments, in order."""
        for name, value in values.items():
            self.add(name, value)

    @property
    def tasks(self) -> int:
        """The argument of that name: how many equal tasks threads share."""
        tasks = self.values[self.names.index("tasks")]
        assert isinstance(tasks, int)
        return tasks

    def read(self) -> list[str]:
        """Lines that put every argument into a variable."""
        return [f"{name} = arguments[{place}]" for place, name in enumerate(self.names)]


class Odometer:
    """Kernel text that walks pointers through nested loops, one row after another.

    ``pointers`` maps the name of each pointer to its strides in bytes, one per loop of ``sizes``.
    A loop of its own level for each would be simpler, but could not start in the middle, where a
    thread's share begins.
    """

    def __init__(
        self,
        arguments: Arguments,
        sizes: Sequence[int],
        pointers: Mapping[str, Sequence[int]],
    ) -> None:
        self.loops = len(sizes)
        self.pointers = pointers
        for loop, size in enumerate(sizes):
            arguments.add(f"n{loop}", size)
        for pointer, strides in pointers.items():
            for loop, stride in enumerate(strides):
                if stride:
                    arguments.add(f"{pointer}_s{loop}", stride)

    def start(self, row: str) -> list[str]:
        """Lines that move the pointers from the first row to number ``row``, which is spent."""
        lines = []
        for loop in reversed(range(self.loops)):
            lines += [f"i{loop} = {row} % n{loop}", f"{row} //= n{loop}"]
            lines += [f"{pointer} += i{loop} * {step}" for pointer, step in self._steps(loop)]
        return lines

    def advance(self) -> list[str]:
        """Lines that move the pointers to the next row."""
        return self._advance(self.loops - 1) or ["pass"]

    def _advance(self, loop: int) -> list[str]:
        if loop < 0:
            return []
        moves = [f"{pointer} += {step}" for pointer, step in self._steps(loop)]
        resets = [f"{pointer} -= n{loop} * {step}" for pointer, step in self._steps(loop)]
        overflow = [f"i{loop} = 0", *resets, *self._advance(loop - 1)]
        return [f"i{loop} += 1", *moves, f"if i{loop} == n{loop}:", *indent(1, overflow)]

    def _steps(self, loop: int) -> list[tuple[str, str]]:
        return [
            (pointer, f"{pointer}_s{loop}")
            for pointer, strides in self.pointers.items()
            if strides[loop]
        ]


SHARE = [
    f"task = (begin * tasks + {WHOLE // 2}) // {WHOLE}",
    f"stop = (end * tasks + {WHOLE // 2}) // {WHOLE}",
]
"""Lines that give this thread its share, ``task`` to ``stop``, of ``tasks`` equal tasks."""


def indent(levels: int, lines: Iterable[str]) -> list[str]:
    """Lines moved into a nested block."""
    return ["    " * levels + line for line in lines]


def kernel_text(
    arguments: Arguments,
    body: Iterable[str],
    vocabulary: Sequence[str] = ("elementary", "simd"),
    functions: Sequence[str] = (),
) -> str:
    """A kernel's module.

    Args:
        arguments: what it reads first.
        body: its lines after that.
        vocabulary: the modules here whose names it uses.
        functions: lines that define functions it calls.
    """
    imports = [f"from graphopt.kernels.{module} import *" for module in vocabulary]
    body = ["align_stack()", *arguments.read(), *body]
    kernel = ["def kernel(arguments, thread, begin, end):", *indent(1, body)]
    before = ["", "", *functions] if functions else []
    return "\n".join(["import math", "", *imports, *before, "", "", *kernel]) + "\n"
