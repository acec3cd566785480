"""Rows of a table picked by their numbers: embeddings, and indexing along the first dimension.

A number outside of the table is never followed: the kernel notes the first of them, and picks
another row. Whoever calls the kernel reads the note and raises.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from graphopt.kernels import source
from graphopt.kernels.loops import SHARE, Arguments, kernel_text
from graphopt.kernels.operand import ITEM_BYTES, Layout
from graphopt.kernels.pointwise import WORTH_SHARING, transfer_time
from graphopt.kernels.problem import GatherProblem
from graphopt.kernels.registry import Argument, Candidate, Input, Output, Step, register
from graphopt.kernels.tile import fill

_KINDS = {4: "INT32", 8: "INT64"}
"""Vectors that move elements of so many bytes."""


@dataclass(frozen=True)
class GatherCandidate(Candidate):
    """One step that looks at the numbers, and one that copies the rows."""

    problem: GatherProblem

    def build(self, threads: int) -> tuple[Step, ...]:
        problem = self.problem
        table, indices = problem.inputs
        block = Arguments()
        values: dict[str, Argument] = {
            "table": Input(0), "indices": Input(1), "y": Output(0), "note": Output(1),
            "rows": table.shape[0], "tasks": indices.size,
            "row_size": math.prod(table.shape[1:]),
            "lowest": -table.shape[0] if problem.wraps else 0,
        }  # fmt: skip
        block.add_all(values)
        replaced = {
            "WIDTH": str(ITEM_BYTES[table.dtype]), "PITCH": str(ITEM_BYTES[indices.dtype]),
            "KIND": _KINDS[ITEM_BYTES[table.dtype]], "INDEX": indices.dtype.upper(),
        }  # fmt: skip

        def step(name: str, body: str, parallel: bool) -> Step:
            for word, text in replaced.items():
                body = body.replace(word, text)
            entry = source.build(name, kernel_text(block, fill(body, {"share": SHARE}, {})))
            return Step(entry, tuple(block.values), parallel)

        parallel = threads > 1 and self.estimate > WORTH_SHARING
        return (step("gather_check", _CHECK, False), step("gather", _COPY, parallel))


@register(GatherProblem)
def candidates(problem: GatherProblem) -> list[Candidate]:
    """One kernel, for contiguous tables of elements of 4 and 8 bytes."""
    problem.check()
    table, indices = problem.inputs
    contiguous = table.layout == Layout.plain(table.dtype, len(table.shape))
    if ITEM_BYTES[table.dtype] not in _KINDS or not contiguous:
        return []
    seconds = max(transfer_time(2 * problem.outputs[0].bytes), indices.size * 2e-9, 1e-8)
    return [GatherCandidate("gather", problem, seconds)]


_CHECK = """
write(note, 0, INT64)
write(note + 8, 0, INT64)
task = 0
while task < tasks:
    number = read(indices + PITCH * task, INDEX)
    if number < lowest or number >= rows:
        write(note, 1, INT64)
        write(note + 8, number, INT64)
        task = tasks
    task += 1
"""

_COPY = """
<share>
while task < stop and rows > 0:
    number = read(indices + PITCH * task, INDEX)
    if number < 0:
        number += rows
    number = max(min(number, rows - 1), 0)
    origin = table + WIDTH * number * row_size
    target = y + WIDTH * task * row_size
    i = 0
    while i + LANES <= row_size:
        store(target + WIDTH * i, load(origin + WIDTH * i, KIND))
        i += LANES
    if i < row_size:
        mask = mask_first(row_size - i, KIND)
        store_first(target + WIDTH * i, load_masked(origin + WIDTH * i, KIND, mask), mask)
    task += 1
"""
