"""The elementwise operators: for each, the kernel text that computes it on vectors.

Semantics are those of ``torch``'s CPU operators in the same dtype, NaN, infinities and signed
zeros included. An operator that has no rule here, or whose rule refuses its operands, is left to
others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from graphopt.kernels.expression import FLOATING, INTEGER, Instruction, Ref, promote


class Unsupported(Exception):
    """An instruction that cannot be computed exactly; the text says which and why."""


class Emitter(Protocol):
    """What a rule needs of the text being generated."""

    def let(self, text: str) -> str:
        """A new variable with the value of ``text``."""

    def literal(self, value: bool | int | float, dtype: str) -> str:
        """A variable with a number in every lane."""

    def converted(self, name: str, source: str, target: str) -> str:
        """The variable ``name`` of dtype ``source`` as one of dtype ``target``."""


@dataclass
class Call:
    """An instruction as its rule sees it; ``dtype`` is the one that it computes in."""

    emitter: Emitter
    instruction: Instruction
    values: Sequence[tuple[str, str]]
    dtype: str = ""

    def has(self, index: int) -> bool:
        """Whether an operand is given and not None."""
        operands = self.instruction.operands
        return index < len(operands) and operands[index] is not None

    def is_number(self, index: int) -> bool:
        """Whether an operand is a literal number."""
        return self.has(index) and isinstance(self.instruction.operands[index], (bool, int, float))

    def vector(self, index: int, dtype: str = "") -> str:
        """The variable of an operand, converted to ``dtype`` (by default the one computed in)."""
        operand = self.instruction.operands[index]
        dtype = dtype or self.dtype
        if isinstance(operand, Ref):
            name, source = self.values[operand.index]
            return self.emitter.converted(name, source, dtype)
        return self.emitter.literal(self.number(index), dtype)

    def number(self, index: int, default: float | None = None) -> bool | int | float:
        """The value of a literal operand."""
        if not self.has(index) and default is not None:
            return default
        operand = self.instruction.operands[index]
        if isinstance(operand, (bool, int, float)):
            return operand
        raise self.refuse(f"operand {index} must be a number")

    def text(self, index: int, default: str) -> str:
        """The value of a string operand."""
        operand = self.instruction.operands[index] if self.has(index) else default
        if isinstance(operand, str):
            return operand
        raise self.refuse(f"operand {index} must be a string")

    def let(self, text: str) -> str:
        """A new variable with the value of ``text``."""
        return self.emitter.let(text)

    def literal(self, value: bool | int | float) -> str:
        """A variable with a number in every lane, in the dtype computed in."""
        return self.emitter.literal(value, self.dtype)

    def refuse(self, why: str) -> Unsupported:
        """The exception to raise where the operator cannot be computed exactly."""
        return Unsupported(f"{self.instruction.op}: {why}")


def result_dtype(call: Call) -> str:
    """Compute in the dtype of the result."""
    return call.instruction.dtype


def promoted_dtype(call: Call) -> str:
    """Compute in what the operands promote to."""
    operands = call.instruction.operands
    tensors = [call.values[operand.index][1] for operand in operands if isinstance(operand, Ref)]
    literals = [operand for operand in operands if isinstance(operand, (bool, int, float))]
    return promote(tensors, literals)


def bool_dtype(call: Call) -> str:
    """Compute on masks."""
    return "bool"


@dataclass(frozen=True)
class Rule:
    """How an operator is emitted.

    ``text`` gives an expression of kernel text; ``least`` and ``most`` bound the operands;
    ``dtypes`` are those it can compute in, chosen by ``dtype``; ``boolean`` says that it yields a
    mask; ``cost`` is in cycles per vector.
    """

    text: Callable[[Call], str]
    least: int
    most: int
    dtypes: frozenset[str]
    dtype: Callable[[Call], str]
    boolean: bool
    cost: float


RULES: dict[str, Rule] = {}
"""By ATen base name."""

_FLOAT32 = frozenset({"float32"})
_FLOATS = frozenset(FLOATING)
_NUMBERS = frozenset(FLOATING + INTEGER)
_BITS = frozenset((*INTEGER, "bool"))
_ANY = _NUMBERS | {"bool"}

Text = Callable[[Call], str]


def _rule(
    names: str,
    operands: tuple[int, int],
    dtypes: frozenset[str],
    *,
    dtype: Callable[[Call], str] = result_dtype,
    boolean: bool = False,
    cost: float = 1.0,
) -> Callable[[Text], Text]:
    """Register a rule for operators of ``operands`` = (least, most) operands."""

    def add(text: Text) -> Text:
        for name in names.split():
            RULES[name] = Rule(text, *operands, dtypes, dtype, boolean, cost)
        return text

    return add


def _lines(
    dtypes: frozenset[str],
    templates: dict[str, str],
    *,
    dtype: Callable[[Call], str] = result_dtype,
    boolean: bool = False,
    cost: float = 1.0,
) -> None:
    """Rules of one line, with {0}, {1}, ... for the operands."""
    for names, template in templates.items():
        arity = sum(f"{{{index}}}" in template for index in range(3))

        def text(call: Call, template: str = template, arity: int = arity) -> str:
            return template.format(*(call.vector(index) for index in range(arity)))

        _rule(names, (arity, arity), dtypes, dtype=dtype, boolean=boolean, cost=cost)(text)


_lines(_ANY, {"to _to_copy clone alias contiguous": "{0}"}, cost=0.5)
_lines(
    _NUMBERS,
    {
        "relu": "at_least({0}, 0)",
        "relu6": "at_most(at_least({0}, 0), 6)",
        "neg": "-{0}",
        "abs": "absolute({0})",
        "square": "{0} * {0}",
    },
)
_lines(_ANY, {"minimum min": "minimum({0}, {1})", "maximum max": "maximum({0}, {1})"}, cost=2.0)
_lines(_FLOATS, {"reciprocal": "1 / {0}", "sqrt": "sqrt({0})", "rsqrt": "1 / sqrt({0})"}, cost=8.0)
_lines(
    _FLOATS,
    {
        "floor": "floor({0})",
        "ceil": "ceil({0})",
        "trunc fix": "truncate({0})",
        "hardsigmoid": "at_most(at_least({0} + 3, 0), 6) * (1 / 6)",
        "hardswish": "at_most(at_least({0} + 3, 0), 6) * (1 / 6) * {0}",
    },
    cost=3.0,
)
_lines(
    _FLOAT32,
    {
        "exp": "exp({0})",
        "expm1": "expm1({0})",
        "log": "log({0})",
        "log1p": "log1p({0})",
        "sigmoid": "sigmoid({0})",
        "silu": "{0} * sigmoid({0})",
        "tanh": "tanh({0})",
        "erf": "erf({0})",
        "sin": "sin({0})",
        "cos": "cos({0})",
        "log_sigmoid": "at_most({0}, 0) - log1p(exp(-absolute({0})))",
    },
    cost=20.0,
)
_lines(
    _ANY,
    {"eq": "{0} == {1}", "ne": "{0} != {1}", "lt": "{0} < {1}", "le": "{0} <= {1}",
     "gt": "{0} > {1}", "ge": "{0} >= {1}"},
    dtype=promoted_dtype,
    boolean=True,
)  # fmt: skip
_lines(
    _FLOATS,
    {
        "isnan": "{0} != {0}",
        "isinf": "absolute({0}) == math.inf",
        "isfinite": "absolute({0}) < math.inf",
    },
    dtype=promoted_dtype,
    boolean=True,
)
_lines(
    frozenset({"bool"}),
    {
        "logical_and": "{0} & {1}",
        "logical_or": "{0} | {1}",
        "logical_xor": "{0} ^ {1}",
        "logical_not": "~{0}",
    },
    dtype=bool_dtype,
    boolean=True,
)
_lines(
    _BITS,
    {
        "bitwise_and __and__": "{0} & {1}",
        "bitwise_or __or__": "{0} | {1}",
        "bitwise_xor __xor__": "{0} ^ {1}",
        "bitwise_not": "~{0}",
    },
)


@_rule("fill", (1, 1), _ANY)
def _fill(call: Call) -> str:
    return call.vector(0)


@_rule("add", (2, 3), _ANY)
def _add(call: Call) -> str:
    return _scaled_sum(call, 0, 1, "+")


@_rule("sub", (2, 3), _NUMBERS)
def _sub(call: Call) -> str:
    return _scaled_sum(call, 0, 1, "-")


@_rule("rsub", (2, 3), _NUMBERS)
def _rsub(call: Call) -> str:
    return _scaled_sum(call, 1, 0, "-")


def _scaled_sum(call: Call, left: int, right: int, sign: str) -> str:
    """``left + alpha * right`` or ``left - alpha * right``; alpha is operand 2."""
    a, b = call.vector(left), call.vector(right)
    alpha = call.number(2, default=1)
    if call.dtype == "bool":
        if alpha != 1:
            raise call.refuse("alpha with bool")
        return f"{a} | {b}"
    if alpha == 1:
        return f"{a} {sign} {b}"
    factor = call.literal(alpha if sign == "+" else -alpha)
    return f"fma({b}, {factor}, {a})"


@_rule("mul", (2, 2), _ANY)
def _mul(call: Call) -> str:
    return f"{call.vector(0)} {'&' if call.dtype == 'bool' else '*'} {call.vector(1)}"


@_rule("div true_divide", (2, 3), _FLOATS, cost=5.0)
def _div(call: Call) -> str:
    quotient = f"{call.vector(0)} / {call.vector(1)}"
    if not call.has(2):
        return quotient
    if call.text(2, "") != "trunc":
        raise call.refuse("rounds a remainder away from what torch computes")
    return f"truncate({quotient})"


@_rule("sign", (1, 1), _NUMBERS, cost=3.0)
def _sign(call: Call) -> str:
    x, zero, one = call.vector(0), call.literal(0), call.literal(1)
    return f"select({x} > 0, {one}, {zero}) - select({x} < 0, {one}, {zero})"


@_rule("round", (1, 2), _FLOATS)
def _round(call: Call) -> str:
    if call.number(1, default=0) != 0:
        raise call.refuse("decimals")
    return f"nearest({call.vector(0)})"


@_rule("clamp hardtanh", (1, 3), _NUMBERS, cost=2.0)
def _clamp(call: Call) -> str:
    hardtanh = call.instruction.op == "hardtanh"
    lower: bool | int | float | None = -1 if hardtanh else None
    upper: bool | int | float | None = 1 if hardtanh else None
    x = call.vector(0)
    if call.has(1):
        lower = None if not call.is_number(1) else call.number(1)
        x = call.let(_bounded(call, x, 1, "at_least", "maximum"))
    elif lower is not None:
        x = call.let(f"at_least({x}, {call.literal(lower)})")
    if call.has(2):
        return _bounded(call, x, 2, "at_most", "minimum")
    return x if upper is None else f"at_most({x}, {call.literal(upper)})"


@_rule("clamp_min", (2, 2), _NUMBERS)
def _clamp_min(call: Call) -> str:
    return _bounded(call, call.vector(0), 1, "at_least", "maximum")


@_rule("clamp_max", (2, 2), _NUMBERS)
def _clamp_max(call: Call) -> str:
    return _bounded(call, call.vector(0), 1, "at_most", "minimum")


def _bounded(call: Call, x: str, index: int, number: str, tensor: str) -> str:
    if not call.is_number(index):
        return f"{tensor}({x}, {call.vector(index)})"
    if math.isnan(call.number(index)):
        raise call.refuse("a bound that is NaN")
    return f"{number}({x}, {call.vector(index)})"


@_rule("gelu", (1, 2), _FLOAT32, cost=25.0)
def _gelu(call: Call) -> str:
    x = call.vector(0)
    if call.text(1, "none") == "none":
        return f"0.5 * {x} * (1 + erf({x} * {math.sqrt(0.5)!r}))"
    # (1 + tanh(u)) / 2 is sigmoid(2 u), which does not cancel for negative u.
    factor = math.sqrt(8 / math.pi)
    return f"{x} * sigmoid({x} * fma({x} * {x}, {0.044715 * factor!r}, {factor!r}))"


@_rule("leaky_relu", (1, 2), _FLOATS, cost=2.0)
def _leaky_relu(call: Call) -> str:
    x, slope = call.vector(0), call.literal(call.number(1, default=0.01))
    return f"select({x} > 0, {x}, {x} * {slope})"


@_rule("prelu", (2, 2), _FLOATS, cost=2.0)
def _prelu(call: Call) -> str:
    x = call.vector(0)
    return f"select({x} > 0, {x}, {x} * {call.vector(1)})"


@_rule("elu", (1, 4), _FLOAT32, cost=25.0)
def _elu(call: Call) -> str:
    x, alpha, scale = call.vector(0), call.number(1, default=1), call.number(2, default=1)
    below, above = call.literal(alpha * scale), call.literal(scale)
    rate = call.literal(call.number(3, default=1))
    return f"select({x} > 0, {x} * {above}, expm1({x} * {rate}) * {below})"


@_rule("selu", (1, 1), _FLOAT32, cost=25.0)
def _selu(call: Call) -> str:
    x, alpha, scale = (
        call.vector(0),
        1.6732632423543772848170429916717,
        1.0507009873554804934193349852946,
    )
    return f"select({x} > 0, {x} * {scale!r}, expm1({x}) * {alpha * scale!r})"


@_rule("celu", (1, 2), _FLOAT32, cost=25.0)
def _celu(call: Call) -> str:
    x, alpha = call.vector(0), call.number(1, default=1)
    factor, rate = call.literal(alpha), call.literal(1 / alpha)
    return f"select({x} > 0, {x}, expm1({x} * {rate}) * {factor})"


@_rule("softplus", (1, 3), _FLOAT32, cost=45.0)
def _softplus(call: Call) -> str:
    x, beta = call.vector(0), call.number(1, default=1)
    threshold = call.literal(call.number(2, default=20))
    scaled = call.let(f"{x} * {call.literal(beta)}")
    soft = call.let(f"log1p(exp({scaled})) * {call.literal(1 / beta)}")
    return f"select({scaled} > {threshold}, {x}, {soft})"


@_rule("mish", (1, 1), _FLOAT32, cost=30.0)
def _mish(call: Call) -> str:
    # tanh(log(1 + e)) = n / (n + 2) with n = e (e + 2); beyond 20 it rounds to 1.
    x = call.vector(0)
    e = call.let(f"exp(at_most({x}, 20))")
    n = call.let(f"{e} * ({e} + 2)")
    return f"{x} * ({n} / ({n} + 2))"


_WHOLE_POWERS: dict[float, str] = {1: "{0}", 2: "{0} * {0}", 3: "{0} * {0} * {0}"}
_POWERS: dict[float, str] = _WHOLE_POWERS | {
    0.5: "sqrt({0})",
    -0.5: "1 / sqrt({0})",
    -1: "1 / {0}",
    -2: "1 / ({0} * {0})",
}


@_rule("pow", (2, 2), _FLOATS | {"int32", "int64"}, cost=4.0)
def _pow(call: Call) -> str:
    exponent = call.number(1)
    if exponent == 0:
        return call.literal(1)
    powers = _POWERS if call.dtype in FLOATING else _WHOLE_POWERS
    if exponent not in powers:
        raise call.refuse(f"exponent {exponent}")
    return powers[exponent].format(call.vector(0))


@_rule("where", (3, 3), _ANY)
def _where(call: Call) -> str:
    return f"select({call.vector(0, 'bool')}, {call.vector(1)}, {call.vector(2)})"


@_rule("masked_fill", (3, 3), _ANY)
def _masked_fill(call: Call) -> str:
    return f"select({call.vector(1, 'bool')}, {call.vector(2)}, {call.vector(0)})"


@_rule("threshold", (3, 3), _NUMBERS, cost=2.0)
def _threshold(call: Call) -> str:
    x, bound, value = call.vector(0), call.vector(1), call.vector(2)
    return f"select({x} <= {bound}, {value}, {x})"


@_rule("lerp", (3, 3), _FLOATS, cost=4.0)
def _lerp(call: Call) -> str:
    start, end, weight = call.vector(0), call.vector(1), call.vector(2)
    span = call.let(f"{end} - {start}")
    near, far = f"{start} + {weight} * {span}", f"{end} - {span} * (1 - {weight})"
    return f"select(absolute({weight}) < 0.5, {near}, {far})"


@_rule("addcmul", (3, 4), _FLOATS, cost=2.0)
def _addcmul(call: Call) -> str:
    value = call.literal(call.number(3, default=1))
    return f"{call.vector(0)} + {value} * {call.vector(1)} * {call.vector(2)}"


@_rule("addcdiv", (3, 4), _FLOATS, cost=6.0)
def _addcdiv(call: Call) -> str:
    value = call.literal(call.number(3, default=1))
    return f"{call.vector(0)} + {value} * {call.vector(1)} / {call.vector(2)}"
