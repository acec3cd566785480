"""Linear layers of a few float32 rows with an int8 or int4 weight: bound by reading the weight.

Output features are in the lanes of vectors. The weight lies in the order in which it is read, and
becomes float32 in registers: bytes by conversion, nibbles, eight of one feature in a word, by a
table of the sixteen numbers that they stand for. What a group of inputs adds up to is multiplied
with the group's scale once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.kernels import source
from graphopt.kernels.integer_problems import WeightOnlyMatmulProblem
from graphopt.kernels.loops import SHARE, Arguments, kernel_text
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
from graphopt.kernels.tile import CYCLES_PER_SECOND, WORTH_SHARING, fill

VOCABULARY = ("simd", "words")
_WIDTH = 4
"""Vectors of features at once."""
_NIBBLES = 8
"""Nibbles of a word."""
_MOST_ROWS = 4
_BYTES_PER_CYCLE = 5
"""Of a weight that comes from the main memory."""


@dataclass(frozen=True)
class WeightOnlyCandidate(Candidate):
    """Tiles of features, one row after another."""

    problem: WeightOnlyMatmulProblem

    @property
    def _tiles(self) -> int:
        return math.ceil(self.problem.inputs[1].shape[0] / (_WIDTH * LANES))

    @property
    def _step(self) -> int:
        """Inputs that the weight has in one element of memory."""
        return _NIBBLES if self.problem.bits == 4 else 1

    def packing(self) -> tuple[int]:
        return (self.problem.bits,)

    def pack(self, constants: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        _, weight, scale, bias = constants
        assert weight is not None
        assert scale is not None
        assert bias is not None
        outputs, depth = weight.shape
        tiles, columns = self._tiles, _WIDTH * LANES
        padded = np.zeros((tiles * columns, depth), np.int8)
        padded[:outputs] = weight
        whole = padded.reshape(tiles, columns, depth)
        if self.problem.bits == 4:
            nibbles = (whole & 15).astype(np.uint32).reshape(tiles, columns, -1, _NIBBLES)
            shifts = 4 * np.arange(_NIBBLES, dtype=np.uint32)
            words = np.bitwise_or.reduce(nibbles << shifts, axis=-1)
            packed = aligned_empty((tiles, depth // _NIBBLES, columns), np.uint32)
            packed[...] = words.swapaxes(1, 2)
        else:
            packed = aligned_empty((tiles, depth, columns), np.int8)
            packed[...] = whole.swapaxes(1, 2)
        # The biases come first, then the scales of one group after another.
        finish = aligned_empty((tiles, 1 + scale.shape[1], columns), np.float32)
        rows = np.zeros((tiles * columns, 1 + scale.shape[1]), np.float32)
        rows[:outputs, 0] = bias
        rows[:outputs, 1:] = scale
        finish[...] = rows.reshape(tiles, columns, -1).swapaxes(1, 2)
        return [packed, finish]

    def build(self, threads: int) -> tuple[Step, ...]:
        problem = self.problem
        outputs, depth = problem.inputs[1].shape
        values: dict[str, Argument] = {
            "x": Input(0), "weight": Packed(0), "finish": Packed(1), "y": Output(0),
            "rows": math.prod(problem.outputs[0].shape[:-1]), "outputs": outputs,
            "depth": depth, "group": problem.group, "groups": problem.inputs[2].shape[1],
            "tasks": self._tiles,
        }  # fmt: skip
        block = Arguments()
        block.add_all(values)
        text = kernel_text(block, _lines(problem.bits, self._step), VOCABULARY)
        entry = source.build(f"weight_only_matmul_{problem.bits}", text)
        parallel = threads > 1 and self.estimate > WORTH_SHARING
        return (Step(entry, tuple(block.values), parallel, block.tasks),)


@register(WeightOnlyMatmulProblem)
def candidates(problem: WeightOnlyMatmulProblem) -> list[Candidate]:
    """For few rows; more are faster with a weight in float32."""
    problem.check()
    outputs, depth = problem.inputs[1].shape
    rows = math.prod(problem.outputs[0].shape[:-1])
    if not outputs or not depth or not 0 < rows <= _MOST_ROWS:
        return []
    if problem.bits == 4 and (depth % _NIBBLES or problem.group % _NIBBLES):
        return []
    arithmetic = rows * depth * outputs / LANES * 2
    cycles = max(arithmetic, outputs * depth * problem.bits / 8 / _BYTES_PER_CYCLE)
    name = f"weight-only matmul, {problem.bits} bits"
    return [WeightOnlyCandidate(name, problem, cycles / CYCLES_PER_SECOND)]


def _lines(bits: int, step: int) -> list[str]:
    """The kernel's body."""
    columns = range(_WIDTH)
    products = []
    if bits == 4:
        products = [f"v{column} = load(q + {4 * LANES * column}, INT32)" for column in columns]
    for number in range(step):
        products.append(f"factor = broadcast(read(place + {4 * number}, FLOAT32), FLOAT32)")
        for column in columns:
            value = f"convert(load(q + {LANES * column}, INT8), FLOAT32)"
            if bits == 4:
                value = f"signed_nibble(v{column}, {number})"
            products.append(f"s{column} = fma({value}, factor, s{column})")
    vectors = [(column, 4 * LANES * column) for column in columns]
    parts = {
        "share": SHARE,
        "begin": [f"t{column} = load(own + {place}, FLOAT32)" for column, place in vectors],
        "zero": [f"s{column} = broadcast(0.0, FLOAT32)" for column in columns],
        "products": products,
        "scale": [
            f"t{column} = fma(s{column}, load(scales + {place}, FLOAT32), t{column})"
            for column, place in vectors
        ],
        "store": [
            f"store_first(c + {place}, t{column}, "
            f"mask_first(outputs - feature - {LANES * column}, FLOAT32))"
            for column, place in vectors
        ],
    }
    columns_bytes = 4 * _WIDTH * LANES
    sizes = {
        "STEP": step,
        "ADVANCE": columns_bytes if bits == 4 else columns_bytes // 4,
        "COLUMNS": _WIDTH * LANES,
    }
    return fill(_BODY, parts, sizes)


_BODY = """
<share>
while task < stop:
    feature = task * COLUMNS
    row = 0
    while row < rows:
        q = weight + task * (depth // STEP) * ADVANCE
        own = finish + 4 * task * (1 + groups) * COLUMNS
        scales = own + 4 * COLUMNS
        place = x + 4 * row * depth
        last = place + 4 * depth
        <begin>
        while place < last:
            <zero>
            group_last = min(place + 4 * group, last)
            while place < group_last:
                prefetch(q + 4096)
                <products>
                q += ADVANCE
                place += 4 * STEP
            <scale>
            scales += 4 * COLUMNS
        c = y + 4 * (row * outputs + feature)
        <store>
        row += 1
    task += 1
"""
