"""The operator vocabulary: ATen and other torch operators, and arithmetic on sizes.

An operator is known by its text name. For a torch operator this is ``namespace.name`` with the
overload appended unless it is ``default`` (``aten.conv2d``, ``aten.add.Tensor``). Arithmetic on
sizes keeps the Python names that torch.export uses (``operator.mul``, ``torch.sym_max``).
"""

from __future__ import annotations

import builtins
import inspect
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from graphopt.errors import GraphError

REQUIRED = inspect.Parameter.empty


@dataclass(frozen=True)
class Parameter:
    """One operand of an operator, as its schema declares it."""

    name: str
    default: Any = REQUIRED
    keyword_only: bool = False
    is_tensor: bool = False


@dataclass(frozen=True, eq=False)
class Operator:
    """A callable with a schema: what a node applies to its operands."""

    name: str
    target: Callable[..., Any]
    parameters: tuple[Parameter, ...]

    @property
    def is_size_arithmetic(self) -> bool:
        """Whether it computes on Python numbers instead of tensors."""
        return not isinstance(self.target, torch._ops.OpOverload)

    @property
    def is_random(self) -> bool:
        """Whether two calls with the same operands may differ."""
        tags = getattr(self.target, "tags", ())
        return torch.Tag.nondeterministic_seeded in tags

    @property
    def is_mutable(self) -> bool:
        """Whether it writes to one of its operands."""
        schema = getattr(self.target, "_schema", None)
        return schema is not None and schema.is_mutable

    def parameter(self, name: str) -> Parameter:
        for parameter in self.parameters:
            if parameter.name == name:
                return parameter
        known = ", ".join(p.name for p in self.parameters)
        raise GraphError(f"{self.name} has no operand '{name}'; it has: {known}")

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Operands by name in schema order; those that equal their default are left out.

        Raises:
            GraphError: an operand is missing, unknown, or given twice.
        """
        positional = [p for p in self.parameters if not p.keyword_only]
        if len(args) > len(positional):
            raise GraphError(
                f"{self.name} takes {len(positional)} positional operands, got {len(args)}"
            )
        given = {p.name: a for p, a in zip(positional, args, strict=False)}
        for name, operand in kwargs.items():
            self.parameter(name)
            if name in given:
                raise GraphError(f"{self.name}: operand '{name}' is given twice")
            given[name] = operand
        bound: dict[str, Any] = {}
        for parameter in self.parameters:
            if parameter.name in given:
                operand = given[parameter.name]
                if not _is_default(operand, parameter.default):
                    bound[parameter.name] = operand
            elif parameter.default is REQUIRED:
                raise GraphError(f"{self.name}: operand '{parameter.name}' is missing")
        return bound

    def call(self, operands: dict[str, Any]) -> Any:
        """Apply to real (or fake) operands given by name."""
        args, kwargs = self.arguments(operands)
        return self.target(*args, **kwargs)

    def arguments(self, operands: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Operands by name as positional and keyword arguments, the way the schema wants them."""
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        contiguous = True
        for parameter in self.parameters:
            present = parameter.name in operands
            contiguous = contiguous and present and not parameter.keyword_only
            if contiguous:
                args.append(operands[parameter.name])
            elif present:
                kwargs[parameter.name] = operands[parameter.name]
        return args, kwargs


def _is_default(operand: Any, default: Any) -> bool:
    if default is REQUIRED:
        return False
    if isinstance(operand, (list, tuple)) and isinstance(default, (list, tuple)):
        return len(operand) == len(default) and all(map(_is_default, operand, default))
    return type(operand) is type(default) and not hasattr(operand, "types") and operand == default


def _binary(*names: str) -> dict[str, tuple[str, ...]]:
    return dict.fromkeys(names, ("a", "b"))


_SIZE_ARITHMETIC: dict[Any, dict[str, tuple[str, ...]]] = {
    operator: {
        **_binary("add", "sub", "mul", "floordiv", "truediv", "mod", "pow"),
        **_binary("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_"),
        "neg": ("a",),
        "not_": ("a",),
    },
    math: {"trunc": ("x",), "floor": ("x",), "ceil": ("x",), "sqrt": ("x",)},
    torch: {
        **_binary("sym_max", "sym_min"),
        "sym_not": ("a",),
        "sym_int": ("a",),
        "sym_float": ("a",),
        "sym_ite": ("b", "t", "f"),
        "sym_sum": ("args",),
    },
    builtins: {"round": ("number",), "abs": ("x",)},
}


def _size_operators() -> dict[str, Operator]:
    table = {}
    for module, functions in _SIZE_ARITHMETIC.items():
        for function, parameters in functions.items():
            name = f"{module.__name__}.{function}"
            target = getattr(module, function)
            table[name] = Operator(name, target, tuple(Parameter(p) for p in parameters))
    return table


_SIZE_OPERATORS = _size_operators()
_NAME_BY_CALLABLE = {op.target: name for name, op in _SIZE_OPERATORS.items()}
_NAME_BY_CALLABLE[operator.pos] = "torch.sym_int"


def name_of(target: Callable[..., Any]) -> str:
    """The text name of a torch operator or size function.

    Raises:
        GraphError: the callable is neither.
    """
    if isinstance(target, torch._ops.OpOverload):
        namespace, name = target._schema.name.split("::")
        overload = target._overloadname
        return f"{namespace}.{name}" + ("" if overload == "default" else f".{overload}")
    if target in _NAME_BY_CALLABLE:
        return _NAME_BY_CALLABLE[target]
    raise GraphError(f"{target!r} is not an operator that a graph can hold")


@cache
def resolve(name: str) -> Operator:
    """The operator of a text name.

    Raises:
        GraphError: torch knows no such operator or overload.
    """
    if name in _SIZE_OPERATORS:
        return _SIZE_OPERATORS[name]
    namespace, _, rest = name.partition(".")
    base, _, overload = rest.partition(".")
    try:
        target = getattr(getattr(getattr(torch.ops, namespace), base), overload or "default")
    except AttributeError:
        raise GraphError(
            f"unknown operator '{name}': expected 'namespace.name' or 'namespace.name.overload' "
            "of a registered torch operator, such as 'aten.conv2d' or 'aten.add.Tensor'"
        ) from None
    parameters = tuple(
        Parameter(
            argument.name,
            argument.default_value if argument.has_default_value() else REQUIRED,
            argument.kwarg_only,
            "Tensor" in str(argument.type),
        )
        for argument in target._schema.arguments
    )
    return Operator(name, target, parameters)
