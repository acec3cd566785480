"""Shapes in which weights are pruned: single ones, N of M, blocks; and the masks they give.

Weights and scores are [groups, output channels, input channels, taps] here, as `PrunableLayer.taps`
gives them. A mask is True where a weight is kept.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from graphopt.errors import PassError


@dataclass(frozen=True)
class Blocks:
    """Blocks of ``rows`` output channels x ``columns`` input channels at one position of the
    kernel, pruned or kept as one; 1 x 1 is unstructured.

    Where the channels of a group do not divide, the last block is filled up with zeros that are
    not counted: its score is the mean over the weights it has, and pruning it gains only those.
    """

    rows: int = 1
    columns: int = 1

    def __str__(self) -> str:
        return "unstructured" if self.rows == self.columns == 1 else f"{self.rows}x{self.columns}"

    def obstacle(self, shape: torch.Size) -> str | None:
        """Why a weight of this shape cannot have such blocks."""
        if shape[1] < self.rows or shape[2] < self.columns:
            return f"{shape[1]} x {shape[2]} channels are narrower than a {self} block"
        return None

    def sums(self, taps: Tensor) -> Tensor:
        """Sums over blocks: [groups, blocks of rows, blocks of columns, taps]."""
        groups, outputs, inputs, positions = taps.shape
        fill = (0, 0, 0, -inputs % self.columns, 0, -outputs % self.rows)
        filled = functional.pad(taps, fill)
        shape = (groups, -1, self.rows, filled.shape[2] // self.columns, self.columns, positions)
        return filled.reshape(shape).sum(dim=(2, 4))

    def sizes(self, shape: torch.Size) -> Tensor:
        """How many weights each block has, in float64."""
        return self.sums(torch.ones(shape, dtype=torch.float64))

    def scores(self, taps: Tensor) -> Tensor:
        """Mean score of every block."""
        return self.sums(taps.double()) / self.sizes(taps.shape)

    def counted(self, remaining: Tensor) -> Tensor:
        """Which weights count as not zero: all those of blocks that are not zero altogether."""
        return self.expand(self.sums(remaining.double()) > 0, remaining.shape)

    def expand(self, blocks: Tensor, shape: torch.Size) -> Tensor:
        """What is said of blocks, said of each of their weights."""
        each = blocks.repeat_interleave(self.rows, 1).repeat_interleave(self.columns, 2)
        return each[:, : shape[1], : shape[2]]

    def mask(self, scores: Tensor, remaining: Tensor, sparsity: float) -> Tensor:
        """Keep the best blocks.

        Args:
            scores: of single weights.
            remaining: which weights are not zero. A block of zeros alone stays pruned and does
                not count; any other block counts with all of its weights.
            sparsity: fraction of the remaining weights to prune, met to the rounding of a block.
        """
        shape, blocks = scores.shape, self.scores(scores)
        alive = self.sums(remaining.double()) > 0
        sizes = self.sizes(shape) * alive
        ranked = blocks.masked_fill(~alive, -torch.inf).flatten()
        order = ranked.argsort(stable=True)
        removed = sizes.flatten()[order].cumsum(0)
        dead = int((~alive).sum())
        count = nearest(removed[dead:], sparsity * float(sizes.sum())) + dead
        kept = torch.ones(blocks.numel(), dtype=torch.bool)
        kept[order[:count]] = False
        return self.expand(kept.reshape(blocks.shape), shape)


@dataclass(frozen=True)
class Pattern:
    """At most ``n`` weights of every ``m`` neighbouring input channels, at each position of the
    kernel; a last group of fewer channels is filled up with zeros."""

    n: int
    m: int

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    def obstacle(self, shape: torch.Size) -> str | None:
        """Why a weight of this shape cannot have the pattern."""
        if shape[2] < self.m:
            return f"{shape[2]} input channels are fewer than the {self.m} of the pattern {self}"
        return None

    def counted(self, remaining: Tensor) -> Tensor:
        """Which weights count as not zero: just those."""
        return remaining

    def mask(self, scores: Tensor, remaining: Tensor, sparsity: float) -> Tensor:
        """Keep the best ``n`` of each ``m``, or all remaining where the sparsity is 0. Weights
        that are zero already are the first to go."""
        if sparsity == 0:
            return remaining.clone()
        groups, outputs, inputs, positions = scores.shape
        ranked = scores.double().masked_fill(~remaining, -torch.inf)
        filled = functional.pad(ranked, (0, 0, 0, -inputs % self.m), value=-torch.inf)
        sets = filled.reshape(groups, outputs, -1, self.m, positions)
        best = sets.argsort(dim=3, descending=True, stable=True)[:, :, :, : self.n]
        kept = torch.zeros(sets.shape, dtype=torch.bool).scatter_(3, best, True)
        return kept.reshape(groups, outputs, -1, positions)[:, :, :inputs] & remaining


Granularity = Blocks | Pattern


def parse_granularity(text: str) -> Granularity:
    """``unstructured``, ``N:M`` or ``RxC``.

    Raises:
        PassError: it is none of these.
    """
    if text == "unstructured":
        return Blocks()
    if found := re.fullmatch(r"(\d+):(\d+)", text):
        n, m = map(int, found.groups())
        if 0 < n < m:
            return Pattern(n, m)
        raise PassError(f"the granularity '{text}' keeps {n} of {m}; N:M wants 0 < N < M")
    if found := re.fullmatch(r"(\d+)x(\d+)", text):
        rows, columns = map(int, found.groups())
        if rows > 0 and columns > 0:
            return Blocks(rows, columns)
    raise PassError(
        f"the granularity '{text}' is unknown; there are 'unstructured', 'N:M' such as '2:4', "
        "blocks 'RxC' such as '1x4', 'channel', 'head' and 'residual-block'"
    )


def nearest(ascending: Tensor, wanted: float) -> int:
    """How many items to take so that their running sum is nearest to what is wanted."""
    if wanted <= 0 or len(ascending) == 0:
        return 0
    place = int(torch.searchsorted(ascending, torch.tensor(wanted, dtype=ascending.dtype)))
    if place == len(ascending):
        return place
    below = float(ascending[place - 1]) if place else 0.0
    return place + (float(ascending[place]) - wanted <= wanted - below)
