"""Elementwise expressions: what a fused pointwise kernel computes.

Convolutions and matrix products compute them too, on their results before these leave the
registers. `emission` turns them into kernel text.

Operators carry the base names of ATen's (``aten.add.Tensor`` is ``"add"``) and take their operands
in the order of ATen's schemas; trailing operands may be left out where the schema has defaults.
Arithmetic is done in the dtype of an instruction's result, comparisons in the dtype that their
operands promote to. Literals never widen a dtype; a 0-dim tensor is treated as any other, so where
torch's promotion ignores one, convert it with ``"to"`` first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FLOATING = ("float32", "float64")
INTEGER = ("uint8", "int8", "int16", "int32", "int64")


@dataclass(frozen=True)
class Ref:
    """A value of an expression: its inputs are numbered first, then its instructions."""

    index: int


Literal = bool | int | float | str | None


@dataclass(frozen=True)
class Instruction:
    """One operator application; ``dtype`` is that of the result."""

    op: str
    operands: tuple[Ref | Literal, ...]
    dtype: str


@dataclass(frozen=True)
class Expression:
    """``inputs`` are dtypes, ``results`` the values that are wanted.

    Equality does not tell -0.0 from 0.0 or 1 from True in literals; ``Problem.key()`` does.
    """

    inputs: tuple[str, ...]
    instructions: tuple[Instruction, ...]
    results: tuple[Ref, ...]

    def dtype(self, value: Ref) -> str:
        """The dtype of a value."""
        count = len(self.inputs)
        if value.index < count:
            return self.inputs[value.index]
        return self.instructions[value.index - count].dtype

    @property
    def result_dtypes(self) -> tuple[str, ...]:
        return tuple(self.dtype(result) for result in self.results)


class Builder:
    """Makes an expression one value at a time."""

    def __init__(self) -> None:
        self._inputs: list[str] = []
        self._instructions: list[Instruction] = []

    def input(self, dtype: str = "float32") -> Ref:
        """The next input; all inputs come before the first instruction."""
        if self._instructions:
            raise ValueError("the inputs of an expression come before its instructions")
        self._inputs.append(dtype)
        return Ref(len(self._inputs) - 1)

    def apply(self, op: str, *operands: Ref | Literal, dtype: str = "float32") -> Ref:
        """The result of one operator."""
        self._instructions.append(Instruction(op, operands, dtype))
        return Ref(len(self._inputs) + len(self._instructions) - 1)

    def finish(self, *results: Ref) -> Expression:
        """The expression that yields ``results``."""
        return Expression(tuple(self._inputs), tuple(self._instructions), results)


def promote(dtypes: Sequence[str], literals: Sequence[bool | int | float] = ()) -> str:
    """torch's promotion of tensors of one or more dimensions, and of Python numbers with them."""
    result = ""
    for dtype in dtypes:
        result = dtype if not result else _promote_two(result, dtype)
    for literal in literals:
        if isinstance(literal, float) and result not in FLOATING:
            result = "float32"
        elif not isinstance(literal, bool) and result in ("", "bool"):
            result = "int64"
    return result or "bool"


def _promote_two(a: str, b: str) -> str:
    if "uint8" in (a, b) and "int8" in (a, b):
        return "int16"
    order = ("bool", *INTEGER, *FLOATING)
    return max(a, b, key=order.index)
