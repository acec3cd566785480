"""Where the zeros of a constant are, as far as the choice of a kernel depends on it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

WORTH_SKIPPING = 0.5
"""The fraction of non-zeros above which no kernel that skips zeros is faster than a dense one."""
GROUP = 4
"""Input channels that integer kernels multiply at once."""
NEIGHBOURS = (1, 2, 4)
"""Numbers of rows that a kernel may treat as one."""


@dataclass(frozen=True)
class ZeroPattern:
    """The zeros of a constant.

    Attributes:
        digest: identifies the pattern.
        densities: for each of `NEIGHBOURS`, the fraction of groups of so many neighbours along
            dimension 0 that are not zero altogether. Where they are equal, neighbours share their
            pattern: blocks of rows were pruned.
    """

    digest: str
    densities: tuple[float, ...]

    def density(self, rows: int) -> float:
        """The fraction of groups of ``rows`` neighbours along dimension 0 that are not zero."""
        return self.densities[NEIGHBOURS.index(rows)]

    def typical(self) -> ZeroPattern:
        """What is the same for all patterns of about as many zeros, whose neighbours share them
        about as much."""
        density = float(f"{self.densities[0]:.2g}")
        shared = (round(one / max(self.densities[0], 1e-9)) for one in self.densities)
        return ZeroPattern("", tuple(density * ratio for ratio in shared))


def zero_pattern(array: np.ndarray) -> ZeroPattern | None:
    """The pattern of an array's zeros; None where they are too few to be skipped."""
    if array.ndim < 2 or array.size == 0:
        return None
    nonzero = array != 0
    if np.count_nonzero(nonzero) > WORTH_SKIPPING * nonzero.size:
        return None
    digest = hashlib.sha256(np.packbits(nonzero).tobytes()).hexdigest()[:16]
    flat = nonzero.reshape(len(nonzero), -1)
    return ZeroPattern(digest, tuple(float(group_rows(flat, n).mean()) for n in NEIGHBOURS))


def word_pattern(array: np.ndarray) -> ZeroPattern | None:
    """The pattern of an int8 weight (O, C, *) in words: four neighbours along dimension 1.

    None where too few words are zero to be skipped.
    """
    if array.ndim < 2 or array.size == 0:
        return None
    channels = array.shape[1]
    nonzero = array.reshape(len(array), channels, -1) != 0
    return zero_pattern(group_rows(nonzero.swapaxes(0, 1), GROUP).swapaxes(0, 1))


def group_rows(nonzero: np.ndarray, rows: int) -> np.ndarray:
    """For groups of ``rows`` neighbouring rows, which columns are not zero in all of them.

    The last group may have fewer rows.
    """
    grouped: np.ndarray = nonzero[::rows].copy()
    for offset in range(1, rows):
        others = nonzero[offset::rows]
        grouped[: len(others)] |= others
    return grouped
