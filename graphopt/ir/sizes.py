"""Free sizes: the dimensions that may differ from the example, and the guards on them."""

from __future__ import annotations

import ast
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from types import CodeType
from typing import Any

from graphopt.errors import GraphError
from graphopt.ir.types import TensorType, Type

_FUNCTIONS: dict[str, Any] = {
    "math": math,
    **{function.__name__: function for function in (max, min, abs, int, float, round)},
    "__builtins__": {},
}
_PRIMES = (5, 7, 11, 13, 17, 19, 23, 29, 31)
_OTHERS = (*(n for n in range(2, 129) if n not in _PRIMES), *(2**k for k in range(8, 13)))
_MOST_ATTEMPTS = 200_000
_ALLOWED = (
    *(ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.UAdd),
    *(ast.BinOp, ast.operator, ast.Compare, ast.cmpop, ast.IfExp, ast.Call, ast.Attribute),
    *(ast.Name, ast.Load, ast.Constant),
)


@lru_cache(maxsize=4096)
def _compile(expression: str) -> tuple[CodeType, frozenset[str]]:
    """The code of a size expression, and the free sizes in it.

    Expressions come from texts and files too, so only arithmetic is let through.
    """
    try:
        tree = ast.parse(expression.strip(), "<size>", "eval")
    except SyntaxError as error:
        raise GraphError(f"the size expression '{expression}' cannot be read") from error
    names = set()
    for node in ast.walk(tree):
        of_math = isinstance(node, ast.Attribute) and (
            isinstance(node.value, ast.Name) and node.value.id == "math" and node.attr[0] != "_"
        )
        if not isinstance(node, _ALLOWED) or (isinstance(node, ast.Attribute) and not of_math):
            raise GraphError(f"the size expression '{expression}' is more than arithmetic on sizes")
        if isinstance(node, ast.Name) and node.id not in _FUNCTIONS:
            names.add(node.id)
    return compile(tree, "<size>", "eval"), frozenset(names)


def evaluate(expression: str, sizes: Mapping[str, int]) -> Any:
    """The value of a size expression, such as ``2*batch``, or of a guard, ``batch % 2 == 0``.

    Raises:
        GraphError: it is not arithmetic, names a size that is not given, or divides by zero.
    """
    code, names = _compile(expression)
    if unknown := names - sizes.keys():
        raise GraphError(f"the size expression '{expression}' names '{min(unknown)}', unknown here")
    try:
        return eval(code, _FUNCTIONS, dict(sizes))
    except (ArithmeticError, TypeError, ValueError, AttributeError) as error:
        raise GraphError(
            f"the size expression '{expression}' has no value for {dict(sizes)}: {error}"
        ) from error


def violated(guards: Iterable[str], sizes: Mapping[str, int]) -> str | None:
    """The first guard that does not hold under an assignment of the free sizes."""
    return next((guard for guard in guards if not evaluate(guard, sizes)), None)


def other_assignment(example: Mapping[str, int], guards: Sequence[str]) -> dict[str, int] | None:
    """A second assignment of the free sizes, for checks that must not hold by coincidence.

    Every size differs from 1 and, where the guards allow it, from the example and from every
    other size. Returns None where nothing but the example satisfies the guards.
    """
    names = list(example)
    tests = [(guard, _compile(guard)[1]) for guard in guards]
    candidates = [*_PRIMES, *_OTHERS]
    attempts = itertools.count()

    def extend(chosen: dict[str, int]) -> dict[str, int] | None:
        if len(chosen) == len(names):
            return None if chosen == dict(example) else dict(chosen)
        name = names[len(chosen)]
        known = {*chosen, name}
        decided = [guard for guard, used in tests if name in used and used <= known]
        fresh = [c for c in candidates if c != example[name]]
        used_sizes = set(chosen.values())
        fresh.sort(key=lambda size: size in used_sizes)  # stable: the new ones first
        for size in [*fresh, example[name]]:
            if next(attempts) > _MOST_ATTEMPTS:
                return None
            trial = {**chosen, name: size}
            if _hold(decided, trial) and (found := extend(trial)) is not None:
                return found
        return None

    return extend({})


def _hold(guards: Sequence[str], sizes: Mapping[str, int]) -> bool:
    try:
        return violated(guards, sizes) is None
    except GraphError:  # such as a division by zero, for these sizes
        return False


def bind(
    shapes: Sequence[Sequence[int]],
    expressions: Sequence[Mapping[int, str]],
    names: Iterable[str],
) -> dict[str, int]:
    """The free sizes that given input shapes stand for.

    Args:
        shapes: the shape of every input.
        expressions: per input, the size expression of each free dimension.
        names: the free sizes.

    Raises:
        GraphError: a size occurs in no dimension on its own, or two dimensions disagree.
    """
    sizes: dict[str, int] = {}
    wanted = set(names)
    for index, (shape, free) in enumerate(zip(shapes, expressions, strict=True)):
        if free and max(free) >= len(shape):
            raise GraphError(f"input {index} has rank {len(shape)} and no dimension {max(free)}")
        for dimension, expression in free.items():
            if expression in wanted:
                sizes.setdefault(expression, shape[dimension])
    missing = wanted - sizes.keys()
    if missing:
        raise GraphError(f"free size '{min(missing)}' is the size of no input dimension")
    for index, (shape, free) in enumerate(zip(shapes, expressions, strict=True)):
        for dimension, expression in free.items():
            expected = evaluate(expression, sizes)
            if shape[dimension] != expected:
                raise GraphError(
                    f"input {index} has size {shape[dimension]} in dimension {dimension}, "
                    f"but {expression} is {expected}"
                )
    return sizes


def type_under(type: Type, free: Mapping[int, str], sizes: Mapping[str, int]) -> Type:
    """The type of an input under an assignment of the free sizes."""
    if not free or not isinstance(type, TensorType):
        return type
    shape = [
        evaluate(free[dimension], sizes) if dimension in free else size
        for dimension, size in enumerate(type.shape)
    ]
    return TensorType(type.dtype, tuple(shape))
