"""A Numba type whose value is one LLVM vector, and the code-generation view of it.

`Vector` is the type; `Register` is a value of it while code is generated, with operators that emit
LLVM instructions. A function of registers becomes callable from kernels by `operation`. The
vocabulary that kernels use is in `simd`; this module is for those who extend it.

Nothing here is "fast math": no reassociation, no contraction, and NaN, infinities, signed zeros
and denormals behave as IEEE 754 says.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model


def cpu_features() -> frozenset[str]:
    """Features that generated code may use, as LLVM names them (``"avx512f"``, ``"fma"``)."""
    listed = cpu_target.target_context.codegen().magic_tuple()[2]
    return frozenset(entry[1:] for entry in listed.split(",") if entry.startswith("+"))


def _register_lanes(features: frozenset[str]) -> int:
    if "avx512f" in features:
        return 16
    return 8 if "avx" in features else 4


CPU = str(cpu_target.target_context.codegen().magic_tuple()[1])
"""The processor that code is generated for, as LLVM names it."""
AMD = CPU.startswith(("znver", "bdver", "btver"))
FEATURES = cpu_features()
LANES = _register_lanes(FEATURES)
_ONE_A_CYCLE = ("znver4", "cannonlake", "icelake-client", "tigerlake", "rocketlake")
"""CPUs, as LLVM names them, that need both of their units to multiply 16 lanes."""
VECTORS_PER_CYCLE = 1 if LANES == 16 and CPU in _ONE_A_CYCLE else 2
"""Whole vectors that are multiplied, or loaded, per cycle."""
FUSED = "fma" in FEATURES or "neon" in FEATURES
MASK_REGISTERS = "avx512f" in FEATURES
"""Whether the CPU has masks of one bit per lane, as good as free to load and store with."""


class Vector(types.Type):
    """The Numba type of ``lanes`` values of the scalar type ``element`` in one LLVM vector."""

    def __init__(self, element: Any, lanes: int) -> None:
        self.element = element
        self.lanes = lanes
        super().__init__(name=f"Vector({element}, {lanes})")

    @property
    def floating(self) -> bool:
        return isinstance(self.element, types.Float)

    @property
    def signed(self) -> bool:
        return bool(getattr(self.element, "signed", False))

    @property
    def bits(self) -> int:
        """Bits of one element in a register (1 for bool, which takes a byte in memory)."""
        return 1 if self.element == types.boolean else self.element.bitwidth

    def of(self, element: types.Type) -> Vector:
        """The vector type with as many lanes of another element type."""
        return Vector(element, self.lanes)

    @property
    def llvm_element(self) -> ir.Type:
        if not self.floating:
            return ir.IntType(self.bits)
        return ir.FloatType() if self.bits == 32 else ir.DoubleType()

    @property
    def llvm(self) -> ir.VectorType:
        return ir.VectorType(self.llvm_element, self.lanes)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, vector.llvm)


FLOAT32 = Vector(types.float32, LANES)
FLOAT64 = Vector(types.float64, LANES)
INT64 = Vector(types.int64, LANES)
INT32 = Vector(types.int32, LANES)
INT16 = Vector(types.int16, LANES)
INT8 = Vector(types.int8, LANES)
UINT8 = Vector(types.uint8, LANES)
BOOL = Vector(types.boolean, LANES)

VECTORS: dict[str, Vector] = {
    "float32": FLOAT32,
    "float64": FLOAT64,
    "int64": INT64,
    "int32": INT32,
    "int16": INT16,
    "int8": INT8,
    "uint8": UINT8,
    "bool": BOOL,
}


def call(builder: ir.IRBuilder, name: str, result: ir.Type, arguments: list[ir.Value]) -> ir.Value:
    """Call the LLVM intrinsic or C function ``name``, declaring it if needed."""
    function_type = ir.FunctionType(result, [argument.type for argument in arguments])
    function = cgutils.get_or_insert_function(builder.module, function_type, name)
    return builder.call(function, arguments)


class Register:
    """A vector while code is generated: operators emit LLVM instructions.

    Python numbers as operands are constants of the vector's element type.
    """

    __slots__ = ("builder", "type", "value")

    def __init__(self, builder: ir.IRBuilder, type: Vector, value: ir.Value) -> None:
        self.builder = builder
        self.type = type
        self.value = value

    def constant(self, number: float | list[int]) -> Register:
        """A constant of this register's type; a list gives each lane its own."""
        return Register(self.builder, self.type, ir.Constant(self.type.llvm, number))

    def _operand(self, other: Register | float) -> ir.Value:
        return other.value if isinstance(other, Register) else self.constant(other).value

    def _with(self, value: ir.Value) -> Register:
        return Register(self.builder, self.type, value)

    def _arithmetic(self, floating: str, integer: str, other: Register | float) -> Register:
        emit = getattr(self.builder, floating if self.type.floating else integer)
        return self._with(emit(self.value, self._operand(other)))

    def __add__(self, other: Register | float) -> Register:
        return self._arithmetic("fadd", "add", other)

    def __sub__(self, other: Register | float) -> Register:
        return self._arithmetic("fsub", "sub", other)

    def __rsub__(self, other: float) -> Register:
        return self.constant(other) - self

    def __mul__(self, other: Register | float) -> Register:
        return self._arithmetic("fmul", "mul", other)

    __radd__ = __add__
    __rmul__ = __mul__

    def __truediv__(self, other: Register | float) -> Register:
        return self._with(self.builder.fdiv(self.value, self._operand(other)))

    def __rtruediv__(self, other: float) -> Register:
        return self.constant(other) / self

    def __neg__(self) -> Register:
        if self.type.floating:
            return self._with(self.builder.fneg(self.value))
        return self.constant(0) - self

    def __and__(self, other: Register | float) -> Register:
        return self._with(self.builder.and_(self.value, self._operand(other)))

    def __or__(self, other: Register | float) -> Register:
        return self._with(self.builder.or_(self.value, self._operand(other)))

    def __xor__(self, other: Register | float) -> Register:
        return self._with(self.builder.xor(self.value, self._operand(other)))

    def __invert__(self) -> Register:
        return self._with(self.builder.not_(self.value))

    def __lshift__(self, bits: Register | int) -> Register:
        return self._with(self.builder.shl(self.value, self._operand(bits)))

    def __rshift__(self, bits: Register | int) -> Register:
        """Shift right; the sign is extended for signed elements."""
        shift = self.builder.ashr if self.type.signed else self.builder.lshr
        return self._with(shift(self.value, self._operand(bits)))

    def compare(self, relation: str, other: Register | float) -> Register:
        """A mask; ``relation`` is one of ``< <= > >= == !=``, false for NaN except ``!=``."""
        operand = self._operand(other)
        if self.type.floating:
            emit = self.builder.fcmp_unordered if relation == "!=" else self.builder.fcmp_ordered
        else:
            emit = self.builder.icmp_signed if self.type.signed else self.builder.icmp_unsigned
        mask = emit(relation, self.value, operand)
        return Register(self.builder, self.type.of(types.boolean), mask)

    def __lt__(self, other: Register | float) -> Register:
        return self.compare("<", other)

    def __le__(self, other: Register | float) -> Register:
        return self.compare("<=", other)

    def __gt__(self, other: Register | float) -> Register:
        return self.compare(">", other)

    def __ge__(self, other: Register | float) -> Register:
        return self.compare(">=", other)

    def equal(self, other: Register | float) -> Register:
        return self.compare("==", other)

    def not_equal(self, other: Register | float) -> Register:
        return self.compare("!=", other)

    def is_nan(self) -> Register:
        return self.not_equal(self)

    def select(self, chosen: Register | float, otherwise: Register | float) -> Register:
        """On a mask: ``chosen`` where it is set, else ``otherwise`` (one must be a register)."""
        like = chosen if isinstance(chosen, Register) else otherwise
        assert isinstance(like, Register)
        value = self.builder.select(self.value, like._operand(chosen), like._operand(otherwise))
        return like._with(value)

    def fma(self, factor: Register | float, addend: Register | float) -> Register:
        """``self * factor + addend``, rounded once where the CPU has the instruction.

        Elsewhere it is a multiplication and an addition: a call of C's ``fmaf`` per lane would
        cost more than the last bit is worth.
        """
        factor, addend = self._with(self._operand(factor)), self._with(self._operand(addend))
        if not self.type.floating or not FUSED:
            return self * factor + addend
        return self.llvm("llvm.fma", factor, addend)

    def llvm(self, name: str, *others: Register) -> Register:
        """The overloaded LLVM intrinsic ``name`` on this register and others of its type."""
        registers = [self.value, *(other.value for other in others)]
        full = f"{name}.{self._mangled(self.type)}"
        return self._with(call(self.builder, full, self.type.llvm, registers))

    @staticmethod
    def _mangled(vector: Vector) -> str:
        return f"v{vector.lanes}{'f' if vector.floating else 'i'}{vector.bits}"

    def __abs__(self) -> Register:
        if self.type.floating:
            return self.llvm("llvm.fabs")
        return (self < 0).select(-self, self) if self.type.signed else self

    def copysign(self, sign: Register) -> Register:
        return self.llvm("llvm.copysign", sign)

    def minimum(self, other: Register | float) -> Register:
        """The smaller; NaN if either is NaN (``torch.minimum``)."""
        return self._extremum("<", other)

    def maximum(self, other: Register | float) -> Register:
        """The larger; NaN if either is NaN (``torch.maximum``)."""
        return self._extremum(">", other)

    def _extremum(self, relation: str, other: Register | float) -> Register:
        # Written so that x86 needs one MINPS or MAXPS, which give the second operand for NaN.
        right = self._with(self._operand(other))
        number = not isinstance(other, Register)
        left, right = (right, self) if number else (self, right)
        result = left.compare(relation, right).select(left, right)
        if number or not self.type.floating:
            return result
        return left.is_nan().select(left, result)

    def reinterpret(self, element: types.Type) -> Register:
        """The same bits as elements of another type of equal width."""
        target = self.type.of(element)
        return Register(self.builder, target, self.builder.bitcast(self.value, target.llvm))

    def convert(self, element: types.Type) -> Register:
        """Convert each element.

        Floating to integer truncates towards zero, with saturation at the limits of int32 (for
        results of at most 32 bits) or int64 and 0 for NaN; bool is "not equal to zero".
        """
        source, target = self.type, self.type.of(element)
        builder = self.builder
        if source == target:
            return self
        if element == types.boolean:
            return self.not_equal(0)
        if source.floating and target.floating:
            resize = builder.fpext if target.bits > source.bits else builder.fptrunc
        elif target.floating:
            resize = builder.sitofp if source.signed else builder.uitofp
        elif source.floating:
            return self._saturate(target)
        elif target.bits < source.bits:
            resize = builder.trunc
        elif target.bits > source.bits:
            resize = builder.sext if source.signed else builder.zext
        else:
            return Register(builder, target, self.value)
        return Register(builder, target, resize(self.value, target.llvm))

    def _saturate(self, target: Vector) -> Register:
        wide = target.of(types.int32 if target.signed and target.bits <= 32 else types.int64)
        name = f"llvm.fptosi.sat.{self._mangled(wide)}.{self._mangled(self.type)}"
        value = call(self.builder, name, wide.llvm, [self.value])
        return Register(self.builder, wide, value).convert(target.element)

    def shuffle(self, lanes: list[int], other: Register | None = None) -> Register:
        """Lanes picked by number out of this register followed by ``other``."""
        second = self.value if other is None else other.value
        mask = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes)
        value = self.builder.shuffle_vector(self.value, second, mask)
        return Register(self.builder, Vector(self.type.element, len(lanes)), value)

    def resize(self, lanes: int) -> Register:
        """The first ``lanes`` lanes; those that this register lacks hold anything."""
        if lanes == self.type.lanes:
            return self
        undefined = self._with(ir.Constant(self.type.llvm, ir.Undefined))
        return self.shuffle([min(lane, self.type.lanes) for lane in range(lanes)], undefined)

    def reduce(self, combine: Callable[[Register, Register], Register]) -> ir.Value:
        """All lanes combined pairwise, halves first; a scalar of the element type."""
        rest = self
        while rest.type.lanes > 1:
            half = rest.type.lanes // 2
            low = rest.shuffle(list(range(half)))
            rest = combine(low, rest.shuffle(list(range(half, 2 * half))))
        return self.builder.extract_element(rest.value, ir.Constant(ir.IntType(32), 0))


def splat(builder: ir.IRBuilder, vector: Vector, scalar: ir.Value) -> Register:
    """A register with ``scalar`` (of the element's LLVM type) in every lane."""
    undefined = ir.Constant(vector.llvm, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), vector.lanes), [0] * vector.lanes)
    return Register(builder, vector, builder.shuffle_vector(first, undefined, zeros))


def scalar_bits(context: Any, builder: ir.IRBuilder, vector: Vector, value: Any, numba: Any) -> Any:
    """A Numba scalar cast to the vector's element, as it sits in a register."""
    value = context.cast(builder, value, numba, vector.element)
    return (
        builder.trunc(value, ir.IntType(1)) if vector.bits == 1 and value.type.width > 1 else value
    )


def _registers(
    context: Any, builder: Any, numba: Any, values: Any, vector: Vector
) -> list[Register]:
    return [
        Register(builder, kind, value)
        if isinstance(kind, Vector)
        else splat(builder, vector, scalar_bits(context, builder, vector, value, kind))
        for kind, value in zip(numba, values, strict=True)
    ]


def _vector_among(arguments: tuple[types.Type, ...]) -> Vector | None:
    """The vector type that number operands are converted to; None if the types do not fit."""
    vectors = [kind for kind in arguments if isinstance(kind, Vector)]
    numbers = all(isinstance(kind, (Vector, types.Number, types.Boolean)) for kind in arguments)
    if not vectors or not numbers or len({kind.lanes for kind in vectors}) > 1:
        return None
    return vectors[-1]


@functools.cache
def _result_type(emit: Callable[..., Register], arguments: tuple[types.Type, ...]) -> Vector:
    """The type of what ``emit`` returns, found by emitting into a function that is thrown away."""
    vector = _vector_among(arguments)
    assert vector is not None
    kinds = [kind if isinstance(kind, Vector) else vector for kind in arguments]
    function_type = ir.FunctionType(ir.VoidType(), [kind.llvm for kind in kinds])
    function = ir.Function(ir.Module(), function_type, "probe")
    builder = ir.IRBuilder(function.append_basic_block())
    pairs = zip(kinds, function.args, strict=True)
    return emit(*(Register(builder, kind, value) for kind, value in pairs)).type


def operation(emit: Callable[..., Register]) -> Any:
    """Make a function of one to three registers callable from kernels, on vectors and numbers."""

    def plan(arguments: tuple[types.Type, ...]) -> Any:
        vector = _vector_among(arguments)
        if vector is None:
            return None
        result = _result_type(emit, arguments)

        def generate(context: Any, builder: Any, sig: Any, values: Any) -> ir.Value:
            return emit(*_registers(context, builder, sig.args, values, vector)).value

        return result(*arguments), generate

    def unary(typing: Any, a: Any) -> Any:
        return plan((a,))

    def binary(typing: Any, a: Any, b: Any) -> Any:
        return plan((a, b))

    def ternary(typing: Any, a: Any, b: Any, c: Any) -> Any:
        return plan((a, b, c))

    define: Any = (unary, binary, ternary)[emit.__code__.co_argcount - 1]
    define.__name__ = define.__qualname__ = emit.__name__.lstrip("_")
    define.__module__ = emit.__module__
    define.__doc__ = emit.__doc__
    return intrinsic(define)


_OF_INTEGERS: dict[Any, Any] = {
    **dict.fromkeys((operator.add, operator.sub, operator.mul), types.int64),
    **dict.fromkeys((operator.iadd, operator.isub, operator.imul), types.int64),
    **dict.fromkeys((operator.floordiv, operator.mod, operator.and_, operator.or_), types.int64),
    **dict.fromkeys((operator.lt, operator.le, operator.gt, operator.ge), types.boolean),
    **dict.fromkeys((operator.eq, operator.ne), types.boolean),
}
"""The types of what operators make of two int64, as Numba itself knows."""


def _infer_first(python: Callable[..., Any], result: Callable[..., Vector | None]) -> None:
    """Let ``result`` say what ``python`` makes of operands of some types, or nothing.

    It is asked before the templates for all targets. Those are many, NumPy's among them, and to
    hear from each that it does not fit took most of the time that Numba needed for a kernel.
    """

    @infer_global(python)
    class Template(AbstractTemplate):
        metadata = {"target": "cpu"}  # noqa: RUF012  # as Numba declares it

        def generic(self, args: Any, kws: Any) -> Any:
            integers = args == (types.int64, types.int64)
            kind = _OF_INTEGERS.get(python) if integers else result(args)
            return signature(kind, *args) if kind is not None else None


def _overload(python: Callable[..., Any], emit: Callable[..., Register]) -> None:
    """Give Python's operator ``python`` its meaning on vectors."""
    count = emit.__code__.co_argcount

    def result(arguments: Any) -> Vector | None:
        fits = len(arguments) == count and _vector_among(arguments) is not None
        return _result_type(emit, arguments) if fits else None

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> ir.Value:
        vector = _vector_among(sig.args)
        assert vector is not None
        return emit(*_registers(context, builder, sig.args, values, vector)).value

    _infer_first(python, result)
    if count == 1:
        lower_builtin(python, Vector)(generate)
        return
    for kinds in ((Vector, Vector), (Vector, types.Any), (types.Any, Vector)):
        lower_builtin(python, *kinds)(generate)


def _overload_binary(python: Callable[..., Any], emit: Callable[..., Any]) -> None:
    _overload(python, lambda a, b: emit(a, b))


for _name in ("add", "sub", "mul", "truediv", "and_", "or_", "xor", "lt", "le", "gt", "ge"):
    _overload_binary(getattr(operator, _name), getattr(operator, _name))
for _name in ("add", "sub", "mul", "truediv", "and", "or", "xor"):
    _function = getattr(operator, _name, None) or getattr(operator, f"{_name}_")
    _overload_binary(getattr(operator, f"i{_name}"), _function)
_overload(operator.eq, lambda a, b: a.equal(b))
_overload(operator.ne, lambda a, b: a.not_equal(b))
_overload(operator.neg, lambda a: -a)
_overload(operator.invert, lambda a: ~a)
for _python in (operator.floordiv, operator.mod):
    _infer_first(_python, lambda arguments: None)
