"""Linear layers whose rows are quantized while the network runs.

A first step finds the scale of every row and stores its steps, plus 128 since instructions multiply
unsigned bytes, in scratch memory; then the rows are multiplied as those of other integer layers
are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.kernels import source
from graphopt.kernels.integer_matmul import (
    VOCABULARY,
    pack_features,
    pack_weight,
    product_cycles,
    product_step,
)
from graphopt.kernels.integer_problems import DynamicMatmulProblem
from graphopt.kernels.loops import SHARE, Arguments, kernel_text
from graphopt.kernels.registry import Argument, Candidate, Input, Scratch, Step, register
from graphopt.kernels.simd import LANES
from graphopt.kernels.tile import CYCLES_PER_SECOND, WORTH_SHARING, fill
from graphopt.kernels.words import ROUNDING_BITS

_MIDDLE = 128
_MOST_DEPTH = 2**31 // (255 * 128)


@dataclass(frozen=True)
class DynamicMatmulCandidate(Candidate):
    """Rows quantized, then multiplied."""

    problem: DynamicMatmulProblem

    @property
    def _rows(self) -> int:
        return math.prod(self.problem.inputs[0].shape[:-1])

    @property
    def _scales_bytes(self) -> int:
        return math.ceil(4 * self._rows / 64) * 64

    def packing(self) -> tuple[()]:
        return ()

    def pack(self, constants: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        _, weight, multiplier, bias = constants
        assert weight is not None
        assert multiplier is not None
        assert bias is not None
        middle = (-_MIDDLE * weight.sum(axis=1, dtype=np.int64)).astype(np.int32)
        return [pack_weight(weight), pack_features((middle, multiplier, bias))]

    def scratch_bytes(self, threads: int) -> int:
        return self._scales_bytes + self._rows * self.problem.inputs[1].shape[1]

    def build(self, threads: int) -> tuple[Step, ...]:
        weight = self.problem.inputs[1].shape
        team = threads if threads > 1 and self.estimate > WORTH_SHARING else 1
        block = Arguments()
        values: dict[str, Argument] = {
            "x": Input(0), "scales": Scratch(), "steps": Scratch(self._scales_bytes),
            "depth": weight[1], "tasks": self._rows,
        }  # fmt: skip
        block.add_all(values)
        block.add("least", float(self.problem.least_scale))
        sizes = {"OFFSET": _MIDDLE - ROUNDING_BITS}
        body = fill(_QUANTIZE, {"share": SHARE}, sizes)
        entry = source.build("quantize_rows", kernel_text(block, body, VOCABULARY))
        more: dict[str, Argument] = {"x": Scratch(self._scales_bytes), "scales": Scratch()}
        return (
            Step(entry, tuple(block.values), team > 1 and self._rows > 1),
            product_step(weight, self._rows, "dynamic", more, team),
        )


@register(DynamicMatmulProblem)
def candidates(problem: DynamicMatmulProblem) -> list[Candidate]:
    """For any rows."""
    problem.check()
    outputs, depth = problem.inputs[1].shape
    rows = math.prod(problem.outputs[0].shape[:-1])
    if not outputs or not depth or not rows or depth >= _MOST_DEPTH:
        return []
    cycles = product_cycles(rows, depth, outputs) + 20 * rows * math.ceil(depth / LANES)
    return [DynamicMatmulCandidate("dynamic matmul", problem, cycles / CYCLES_PER_SECOND)]


_QUANTIZE = """
floor = broadcast(float32_from_bits(least), FLOAT32)
<share>
while task < stop:
    origin = x + 4 * task * depth
    largest = broadcast(0.0, FLOAT32)
    column = 0
    while column < depth:
        mask = mask_first(depth - column, FLOAT32)
        largest = maximum(largest, absolute(load_masked(origin + 4 * column, FLOAT32, mask)))
        column += LANES
    scale = at_least(broadcast(reduce_maximum(largest), FLOAT32) / 127.0, floor)
    write(scales + 4 * task, reduce_maximum(scale), FLOAT32)
    target = steps + task * depth
    column = 0
    while column < depth:
        mask = mask_first(depth - column, FLOAT32)
        t = load_masked(origin + 4 * column, FLOAT32, mask) / scale
        bits = rounded_bits(at_most(at_least(t, -127.0), 127.0))
        store_first(target + column, convert(bits + OFFSET, UINT8), mask)
        column += LANES
    task += 1
"""
