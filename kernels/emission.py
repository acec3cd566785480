"""From expressions to the lines of kernel text that compute them on vectors.

Whatever computes elementwise operators gets its lines from `emit`: fused pointwise kernels, and
epilogues of convolutions and matrix products. What an operator becomes is a rule in `elementwise`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from graphopt.kernels.elementwise import RULES, Call, Unsupported
from graphopt.kernels.expression import Expression, Instruction


@dataclass(frozen=True)
class Emission:
    """Kernel text for an expression.

    ``prologue`` belongs before the loops: it reads the variables ``literals`` from the argument
    block, where the kernel's caller puts ``immediates``. ``body`` computes the variables
    ``results`` from those and the ones that hold the inputs. Lines are not indented.
    """

    prologue: tuple[str, ...]
    body: tuple[str, ...]
    results: tuple[str, ...]
    literals: tuple[str, ...]
    immediates: tuple[int, ...]


def emit(
    expression: Expression, inputs: Sequence[str], argument: int = 0, prefix: str = "e"
) -> Emission:
    """The lines that compute ``expression`` on vectors.

    ``inputs`` names a variable for each input: a vector of its dtype from ``simd.VECTORS``. The
    literals are read from ``arguments[argument]`` on, so a kernel does not depend on their values.
    Variables that the lines make start with ``prefix``. The text needs the names of `simd` and
    `elementary`. Raises `Unsupported`.
    """
    emitter = _Emitter(argument, prefix)
    values = list(zip(inputs, expression.inputs, strict=True))
    for instruction in expression.instructions:
        values.append(emitter.instruction(instruction, values))
    results = tuple(values[result.index][0] for result in expression.results)
    return Emission(
        tuple(emitter.prologue),
        tuple(emitter.body),
        results,
        tuple(emitter.literals),
        tuple(emitter.immediates),
    )


def unsupported(expression: Expression) -> str | None:
    """Why ``expression`` cannot be computed exactly here, or None if it can."""
    try:
        emit(expression, [f"x{index}" for index in range(len(expression.inputs))])
    except Unsupported as reason:
        return str(reason)
    return None


def cost(expression: Expression) -> float:
    """Cycles per vector of elements, roughly."""
    return sum(
        RULES[instruction.op].cost * (2.0 if instruction.dtype in ("float64", "int64") else 1.0)
        for instruction in expression.instructions
    )


def immediate(value: bool | int | float, dtype: str) -> int:
    """A number as it stands in an argument block: the dtype's bits in an int64."""
    if dtype == "float32":
        try:
            return int(struct.unpack("<i", struct.pack("<f", value))[0])
        except OverflowError:
            return immediate(float("inf") if value > 0 else float("-inf"), dtype)
    if dtype == "float64":
        return int(struct.unpack("<q", struct.pack("<d", value))[0])
    if dtype == "bool":
        return int(bool(value))
    return (int(value) + 2**63) % 2**64 - 2**63


_READERS = {
    "float32": "float32_from_bits(arguments[{}])",
    "float64": "float64_from_bits(arguments[{}])",
    "bool": "arguments[{}] != 0",
}


@dataclass
class _Emitter:
    argument: int
    prefix: str
    prologue: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    literals: list[str] = field(default_factory=list)
    immediates: list[int] = field(default_factory=list)
    _names: int = 0
    _conversions: dict[tuple[str, str], str] = field(default_factory=dict)

    def _name(self) -> str:
        self._names += 1
        return f"{self.prefix}{self._names}"

    def let(self, text: str) -> str:
        name = self._name()
        self.body.append(f"{name} = {text}")
        return name

    def literal(self, value: bool | int | float, dtype: str) -> str:
        if dtype not in ("float32", "float64") and isinstance(value, float):
            raise Unsupported(f"the number {value} in {dtype}")
        bits = immediate(value, dtype)
        # Not shared by value: which literals happen to be equal must not change the kernel.
        name = self._name()
        place = self.argument + len(self.immediates)
        scalar = _READERS.get(dtype, "arguments[{}]").format(place)
        self.prologue.append(f"{name} = broadcast({scalar}, {dtype.upper()})")
        self.literals.append(name)
        self.immediates.append(bits)
        return name

    def converted(self, name: str, source: str, target: str) -> str:
        if source == target:
            return name
        known = self._conversions.get((name, target))
        if known is None:
            known = self.let(f"convert({name}, {target.upper()})")
            self._conversions[name, target] = known
        return known

    def instruction(
        self, instruction: Instruction, values: Sequence[tuple[str, str]]
    ) -> tuple[str, str]:
        rule = RULES.get(instruction.op)
        if rule is None:
            raise Unsupported(f"{instruction.op}: no rule for this operator")
        call = Call(self, instruction, values)
        if not rule.least <= len(instruction.operands) <= rule.most:
            raise call.refuse(f"{len(instruction.operands)} operands")
        call.dtype = rule.dtype(call)
        if call.dtype not in rule.dtypes:
            raise call.refuse(f"not in {call.dtype}")
        result = self.let(rule.text(call))
        made = "bool" if rule.boolean else call.dtype
        return self.converted(result, made, instruction.dtype), instruction.dtype
