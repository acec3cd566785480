"""Free sizes: the dimensions that may differ from the example, and the guards on them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from types import CodeType
from typing import Any

from graphopt.errors import GraphError

_FUNCTIONS = {"math": math, "max": max, "min": min, "abs": abs, "__builtins__": {}}


@lru_cache(maxsize=4096)
def _compile(expression: str) -> CodeType:
    return compile(expression, "<size>", "eval")


def evaluate(expression: str, sizes: Mapping[str, int]) -> Any:
    """The value of a size expression, such as ``2*batch``, or of a guard, ``batch % 2 == 0``."""
    return eval(_compile(expression), _FUNCTIONS, dict(sizes))


def violated(guards: Iterable[str], sizes: Mapping[str, int]) -> str | None:
    """The first guard that does not hold under an assignment of the free sizes."""
    return next((guard for guard in guards if not evaluate(guard, sizes)), None)


def other_assignment(example: Mapping[str, int], guards: Sequence[str]) -> dict[str, int] | None:
    """A second assignment of the free sizes, for checks that must not hold by coincidence.

    Every size differs from the example, from 1 and, where the guards allow it, from every other
    size. Returns None where nothing but the example satisfies the guards.
    """
    if not example:
        return None
    primes = [5, 7, 11, 13, 17, 19, 23, 29, 31]
    others = [n for n in range(2, 129) if n not in primes]
    candidates = primes + others + [2**k for k in range(8, 13)]
    names = list(example)
    ranked = [
        [c for c in candidates[k % 5 :] + candidates[: k % 5] if c != example[name]]
        for k, name in enumerate(names)
    ]
    per_name = max(2, int(200_000 ** (1 / len(names))))
    for values in itertools.islice(itertools.product(*(r[:per_name] for r in ranked)), 200_000):
        sizes = dict(zip(names, values, strict=True))
        if violated(guards, sizes) is None:
            return sizes
    return None


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
    for shape, free in zip(shapes, expressions, strict=True):
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
