"""Kernel text for loops over the elements of a contiguous row, a few vectors at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from graphopt.kernels.loops import indent

UNROLLED = 4
"""Vectors per trip: independent accumulators hide the latency of an addition."""

SEGMENT = 128
"""Vectors that are summed in float32 before their sum is added to a longer one."""

Body = Callable[[int, str, bool], list[str]]
"""Lines for one vector: the number of its accumulator, its first element, whether under `mask`."""


def vectors(body: Body, unrolled: int = UNROLLED) -> list[str]:
    """Lines that go from element ``i`` up to ``limit``: whole vectors, then the rest masked."""
    lines: list[str] = []
    if unrolled > 1:
        trip = [
            line
            for number in range(unrolled)
            for line in body(number, f"(i + {number} * LANES)", False)
        ]
        lines += [
            f"while i + {unrolled} * LANES <= limit:",
            *indent(1, [*trip, f"i += {unrolled} * LANES"]),
        ]
    return [
        *lines,
        "while i + LANES <= limit:",
        *indent(1, [*body(0, "i", False), "i += LANES"]),
        "if i < limit:",
        "    mask = mask_first(limit - i, FLOAT32)",
        *indent(1, [*body(unrolled - 1, "i", True), "i = limit"]),
    ]


def segments(count: str, start: Iterable[str], body: Body, end: Iterable[str]) -> list[str]:
    """Lines that go over ``count`` elements, with ``start`` and ``end`` around each segment."""
    segment = [f"limit = min(i + {SEGMENT} * LANES, {count})", *start, *vectors(body), *end]
    return ["i = 0", f"while i < {count}:", *indent(1, segment)]


def accumulators(name: str, initial: str) -> list[str]:
    """Lines that start the accumulators ``name0``, ``name1``, ..."""
    return [f"{name}{number} = {initial}" for number in range(UNROLLED)]


def load(address: str, masked: bool, dtype: str = "float32") -> str:
    """Kernel text for a vector in memory."""
    kind = dtype.upper()
    return f"load_masked({address}, {kind}, mask)" if masked else f"load({address}, {kind})"


def store(address: str, value: str, masked: bool) -> str:
    """Kernel text that writes a vector."""
    if masked:
        return f"store_first({address}, {value}, mask)"
    return f"store({address}, {value})"
