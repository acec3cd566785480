"""Linear layers with many zero weights in float32, for a single row or a few.

Outputs are in the lanes of vectors, as many neighbours as there are lanes. Each has a list of its
non-zero weights and of the distances of what they multiply, which is gathered; lists of one vector
are filled up with zeros to the length of the longest (sliced ELLPACK: A. Monakov, A. Lokhmotov and
A. Avetisyan, "Automatically tuning sparse matrix-vector multiplication for GPU architectures",
2010). A weight that is zero multiplies nothing, those that fill up included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.kernels import source
from graphopt.kernels.epilogue import Epilogue
from graphopt.kernels.loops import SHARE, Arguments, kernel_text
from graphopt.kernels.matmul import Product, offset_lines, product_epilogue, product_offsets
from graphopt.kernels.problem import MatmulProblem
from graphopt.kernels.registry import (
    Argument,
    Candidate,
    Input,
    Output,
    Packed,
    Step,
    aligned_empty,
    register,
)
from graphopt.kernels.simd import LANES
from graphopt.kernels.sparse_matmul import sparse_product
from graphopt.kernels.tile import CYCLES_PER_SECOND, VOCABULARY, WORTH_SHARING, fill

MOST_ROWS = max(LANES // 2, 4)
_GATHER_CYCLES = 1.5
"""Cycles per element."""
_AHEAD = 4096
"""Bytes that are fetched in advance: weights come from the main memory once a call."""


@dataclass(frozen=True)
class SparseVectorCandidate(Candidate):
    """The only schedule."""

    problem: MatmulProblem
    product: Product

    def packing(self) -> tuple[object, ...]:
        return (self.product.offsets, self.product.a_strides[1])

    def pack(self, constants: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        weight = constants[1]
        assert weight is not None
        matrix = weight if self.problem.transposed[1] else weight.T
        offsets = product_offsets(self.problem, self.product)
        slices = [
            _slice(matrix[first : first + LANES], 4 * self.product.a_strides[1])
            for first in range(0, len(matrix), LANES)
        ]
        starts = aligned_empty((len(slices) + 1,), np.int64)
        starts[:] = np.cumsum([0, *(words.nbytes for words in slices)])
        words = aligned_empty((int(starts[-1]) // 4,), np.int32)
        np.concatenate([part.reshape(-1) for part in slices], out=words)
        return [offsets, starts, words]

    def build(self, threads: int) -> tuple[Step, ...]:
        product, block = self.product, Arguments()
        values: dict[str, Argument] = {
            "a": Input(0), "y": Output(0), "offsets": Packed(0), "starts": Packed(1),
            "words": Packed(2), "matrices": len(product.offsets), "height": product.rows,
            "width": product.columns, "a_row": 4 * product.a_strides[0],
            "c_row": 4 * product.row_stride, "tasks": math.ceil(product.columns / LANES),
        }  # fmt: skip
        block.add_all(values)
        epilogue = product_epilogue(self.problem, product, block)
        text = kernel_text(block, _lines(epilogue), VOCABULARY, epilogue.functions())
        entry = source.build("sparse_vector", text)
        parallel = threads > 1 and self.estimate > WORTH_SHARING
        return (Step(entry, (*block.values, *epilogue.immediates), parallel, block.tasks),)


def _slice(rows: np.ndarray, step: int) -> np.ndarray:
    """What the kernel reads for neighbouring outputs: (longest, weights or distances, LANES)."""
    lanes, columns = np.nonzero(rows)
    lengths = np.bincount(lanes, minlength=LANES)
    places = np.arange(len(lanes)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    words = np.zeros((lengths.max(), 2, LANES), np.int32)
    words[places, 0, lanes] = np.ascontiguousarray(rows[lanes, columns]).view(np.int32)
    words[places, 1, lanes] = columns * step
    return words


@register(MatmulProblem)
def candidates(problem: MatmulProblem) -> list[Candidate]:
    """One kernel for a few rows and a constant second operand with many zeros."""
    found = sparse_product(problem)
    if found is None:
        return []
    product, zeros = found
    rows = product.rows * len(product.offsets)
    if rows >= MOST_ROWS or problem.inputs[0].bytes >= 2**31:
        return []
    weights = zeros.density(1) * problem.inputs[1].size
    seconds = rows * (_GATHER_CYCLES * weights + 20 * product.columns / LANES) / CYCLES_PER_SECOND
    return [SparseVectorCandidate("sparse vector", problem, seconds, product)]


def _lines(epilogue: Epilogue) -> list[str]:
    """The kernel's body."""
    parts = {
        "prologue": epilogue.prologue(),
        "share": SHARE,
        "offsets": offset_lines(epilogue),
        "starts": [
            f"e{index} = extra{index} + own_e{index} + row * e{index}_row"
            + (f" + {extra.width} * column" if extra.along else "")
            for index, extra in enumerate(epilogue.extras)
        ],
        "finish": [*epilogue.row_lines(), *epilogue.register_lines("total", 0, "present")],
    }
    return fill(_BODY, parts, {"AHEAD": _AHEAD})


_BODY = """
<prologue>
<share>
while task < stop:
    column = task * LANES
    present = mask_first(width - column, FLOAT32)
    first = words + read(starts + 8 * task, INT64)
    last = words + read(starts + 8 * task + 8, INT64)
    matrix = 0
    while matrix < matrices:
        <offsets>
        row = 0
        while row < height:
            place = a + own_a + row * a_row
            total = broadcast(0.0, FLOAT32)
            p = first
            while p < last:
                prefetch(p + AHEAD)
                prefetch(p + AHEAD + 4 * LANES)
                value = load(p, FLOAT32)
                distances = load(p + 4 * LANES, INT32)
                total = fma(gather(place, distances, FLOAT32, value != 0.0), value, total)
                p += 8 * LANES
            c = y + own_y + row * c_row + 4 * column
            <starts>
            <finish>
            row += 1
        matrix += 1
    task += 1
"""
