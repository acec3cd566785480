"""Samples of torch's OpInfo database that graphopt does not have to answer, each with its reason.

The table may only shrink: `tests/test_operators.py` fails when an entry is no longer needed.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Skip:
    """Samples of one OpInfo that are left out.

    `operator` is the OpInfo's name, with its variant after a dot-free space where it has one.
    `samples` are labels as the test prints them (`float32[3]`, `error[0]`), or None for all.
    """

    operator: str
    reason: str
    samples: tuple[str, ...] | None = None


SKIPS: tuple[Skip, ...] = ()
