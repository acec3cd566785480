"""A batch computed in parts, one after another, by a program for so many entries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from graphopt.engine.independence import batch_of
from graphopt.engine.program import Program, TensorSpec, check_count, check_input
from graphopt.engine.selection import key_of
from graphopt.ir import Graph
from graphopt.ir import sizes as free_sizes

PART_SIZES = (1, 4)
"""Entries of a batch that are tried as a part: one, and a few, which share the reading of
weights."""


def part_sizes(graph: Graph, sizes: Mapping[str, int]) -> list[int]:
    """The parts in which a batch may be computed; none where its entries are not independent."""
    if len(sizes) != 1:
        return []
    ((name, batch),) = sizes.items()
    fitting = [
        size
        for size in PART_SIZES
        if size < batch
        and batch % size == 0
        and not free_sizes.violated(graph.guards, {name: size})
    ]
    return fitting if fitting and batch_of(graph) == name else []


def part_keys(
    graph: Graph, sizes: Mapping[str, int], threads: int, parts: Sequence[int]
) -> list[str]:
    """Under what the times of a whole batch, and of its parts, are remembered.

    They depend on how many weights are zero, but not on what the others are.
    """
    nonzeros = [
        int(torch.count_nonzero(value.constant))
        for value in graph.constants
        if value.constant is not None
    ]
    key = key_of(repr((str(graph), nonzeros, dict(sizes), threads)))
    return [key, *(f"{key}/{size}" for size in parts)]


class PartsProgram:
    """Runs a program for some entries of a batch until all are done, and joins the results.

    For graphs whose entries do not depend on one another, see `independence`. What a part writes
    between input and output is still in the caches when it is read, where that of a whole batch
    would not be.

    Attributes:
        part: the program; dimension 0 of all its inputs and outputs is the batch.
        count: how many parts there are.
        threads, inputs, outputs, arena_bytes, arena_lower_bound: as for `Program`.
    """

    def __init__(self, part: Program, count: int) -> None:
        self.part = part
        self.count = count
        self.threads = part.threads
        self.inputs = tuple(map(self._whole, part.inputs))
        self.outputs = tuple(map(self._whole, part.outputs))
        self.arena_bytes = part.arena_bytes
        self.arena_lower_bound = part.arena_lower_bound

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run all parts; arguments, results and errors are those of `Program`."""
        check_count(inputs, self.inputs)
        for index, (tensor, spec) in enumerate(zip(inputs, self.inputs, strict=True)):
            check_input(tensor, index, spec)
        with torch.no_grad():
            parts = zip(*(tensor.chunk(self.count) for tensor in inputs), strict=True)
            results = [self.part(*part) for part in parts]
            return tuple(torch.cat(pieces) for pieces in zip(*results, strict=True))

    def profile(self, inputs: Sequence[Tensor], repeats: int = 5) -> list[tuple[str, float]]:
        """As `Program.profile`: a kernel's time is that of one part, times their number."""
        first = [tensor.chunk(self.count)[0] for tensor in inputs]
        return [(label, self.count * t) for label, t in self.part.profile(first, repeats)]

    def _whole(self, spec: TensorSpec) -> TensorSpec:
        return TensorSpec((self.count * spec.shape[0], *spec.shape[1:]), spec.dtype)
