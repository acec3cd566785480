"""Samples of torch's OpInfo database that graphopt does not have to answer, each with its reason.

The table may only shrink: `tests/test_operators.py` fails when an entry is no longer needed.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Skip:
    """Samples of one OpInfo that are left out.

    `operator` is the OpInfo's `formatted_name`; `samples` are labels as the tests print them, such
    as `float32[3]`, `in-place float32[3]` or `error[0]`.
    """

    operator: str
    samples: tuple[str, ...]
    reason: str


def numbered(prefix: str, *numbers: int) -> tuple[str, ...]:
    return tuple(f"{prefix}[{number}]" for number in numbers)


RANDOM = "draws random numbers, from a stream that a compiled network does not share with torch"
DATA_DEPENDENT = "a shape or an offset is read from data, which tracing refuses"
WRITES_INPUT = "writes to its input, which tracing refuses"

SKIPS: tuple[Skip, ...] = (
    Skip("nn_functional_dropout", numbered("float32", 2, 8, 14), RANDOM),
    Skip("nn_functional_dropout", numbered("in-place float32", 2, 8, 14), RANDOM),
    Skip(
        "nn_functional_scaled_dot_product_attention",
        numbered("float32", 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23),
        RANDOM,
    ),
    Skip(
        "__getitem__",
        (*numbered("float32", 14), *numbered("int64", 14), *numbered("bool", 14)),
        DATA_DEPENDENT,
    ),
    Skip("nn_functional_batch_norm", numbered("float32", 0, 2, 3, 5, 8), WRITES_INPUT),
    Skip("nn_functional_instance_norm", numbered("float32", 0, 1, 2, 3, 4, 5, 6, 7), WRITES_INPUT),
    Skip("nn_functional_embedding", numbered("float32", 5, 6, 9), WRITES_INPUT),
    Skip(
        "narrow",
        (
            *numbered("float32", 1, 3, 5, 7, 9),
            *numbered("int64", 1, 3, 5, 7, 9),
            *numbered("bool", 1, 3, 5, 7, 9),
        ),
        DATA_DEPENDENT,
    ),
)
