"""Linear layers with many zero weights in float32, for many rows.

Rows of the other operand, such as tokens, are in the lanes of vectors: they are transposed into a
panel, multiplied as `nonzeros` says, and the sums are transposed back into the rows of the result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.kernels import source
from graphopt.kernels.epilogue import Epilogue, epilogue_supported
from graphopt.kernels.loops import Arguments, kernel_text
from graphopt.kernels.matmul import (
    Product,
    offset_lines,
    product_epilogue,
    product_of,
    product_offsets,
)
from graphopt.kernels.nonzeros import (
    VOCABULARY,
    Schedule,
    pack_streams,
    panels_of,
    product_cycles,
    product_lines,
    schedules,
    wait_line,
)
from graphopt.kernels.operand import ConstantOperand
from graphopt.kernels.problem import MatmulProblem
from graphopt.kernels.registry import (
    Argument,
    Candidate,
    Input,
    Output,
    Packed,
    Scratch,
    Step,
    register,
)
from graphopt.kernels.shares import panel_shares, share_lines
from graphopt.kernels.simd import LANES
from graphopt.kernels.tile import CYCLES_PER_SECOND, WORTH_SHARING, fill
from graphopt.kernels.zeros import ZeroPattern

_TRANSPOSE_CYCLES = 5
"""Cycles to transpose one vector."""


@dataclass(frozen=True)
class SparseMatmulCandidate(Candidate):
    """One schedule.

    ``cycles`` are those of each panel: to copy it, and of all its tasks.
    """

    problem: MatmulProblem
    product: Product
    schedule: Schedule
    cycles: tuple[tuple[float, float], ...]

    @property
    def _blocks(self) -> int:
        """Blocks of depth."""
        return math.ceil(self.product.depth / self.schedule.depth)

    @property
    def _panels(self) -> int:
        return self.schedule.panels(self.product.rows)

    @property
    def _parts(self) -> int:
        # Whatever the number of rows, so that streams are packed once for all batches.
        return self.schedule.parts(self.product.columns, 1)

    def packing(self) -> tuple[object, ...]:
        return (self.schedule, self.product.offsets)

    def pack(self, constants: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        weight = constants[1]
        assert weight is not None
        matrix = weight if self.problem.transposed[1] else weight.T
        depth = self.schedule.depth
        blocks = [matrix[:, first : first + depth] for first in range(0, matrix.shape[1], depth)]
        offsets = product_offsets(self.problem, self.product)
        return [offsets, *pack_streams(blocks, self.schedule, self._parts)]

    def scratch_bytes(self, threads: int) -> int:
        return (threads if self._parallel(threads) else 1) * self._thread_scratch

    @property
    def _thread_scratch(self) -> int:
        return self.schedule.panel_bytes + self.schedule.sums_bytes(self.product.columns)

    def _parallel(self, threads: int) -> bool:
        return threads > 1 and self.estimate > WORTH_SHARING

    def build(self, threads: int) -> tuple[Step, ...]:
        block, epilogue = self._arguments()
        name = f"sparse_matmul_{self.schedule.rows}x{self.schedule.width}"
        text = kernel_text(block, _lines(self.schedule, epilogue), VOCABULARY, epilogue.functions())
        arguments = (*block.values, *epilogue.immediates)
        return (Step(source.build(name, text), arguments, self._parallel(threads), block.tasks),)

    def _arguments(self) -> tuple[Arguments, Epilogue]:
        product, block = self.product, Arguments()
        values: dict[str, Argument] = {
            "a": Input(0), "y": Output(0), "offsets": Packed(0), "starts": Packed(1),
            "words": Packed(2), "scratch": Scratch(), "thread_scratch": self._thread_scratch,
            "panel_bytes": self.schedule.panel_bytes, "tail_start": self.schedule.tail_start,
            "height": product.rows, "width": product.columns, "depth": product.depth,
            "a_row": 4 * product.a_strides[0], "a_step": 4 * product.a_strides[1],
            "c_row": 4 * product.row_stride,
            "block_depth": self.schedule.depth, "blocks": self._blocks,
            "shares": panel_shares(self.cycles), "places": len(product.offsets),
            "panels": self._panels, "parts": self._parts,
            "row_groups": self.schedule.row_groups(product.columns),
            "tasks": len(product.offsets) * self._panels * self._parts,
        }  # fmt: skip
        block.add_all(values)
        return block, product_epilogue(self.problem, product, block)


@register(MatmulProblem)
def candidates(problem: MatmulProblem) -> list[Candidate]:
    """Schedules that may suit the zeros of a constant second operand."""
    found = sparse_product(problem)
    if found is None or found[0].rows < LANES // 2:
        return []
    product, zeros = found
    if not problem.transposed[1]:
        # The pattern tells of neighbours in the depth, not of rows that share their columns.
        zeros = ZeroPattern(zeros.digest, (zeros.density(1), 1.0, 1.0))
    made: list[Candidate] = []
    for schedule in schedules(zeros, product.depth, product.rows):
        name, cycles = f"sparse matmul {schedule}", _panel_cycles(product, schedule, zeros)
        seconds = len(product.offsets) * sum(map(sum, cycles)) / CYCLES_PER_SECOND
        made.append(SparseMatmulCandidate(name, problem, seconds, product, schedule, cycles))
    return made


def sparse_product(problem: MatmulProblem) -> tuple[Product, ZeroPattern] | None:
    """A product with a constant second operand, and the zeros of that; None where they are few."""
    problem.check()
    a, weight, *extras = problem.inputs
    if not isinstance(weight, ConstantOperand) or weight.zeros is None or len(weight.shape) != 2:
        return None
    if {a.dtype, weight.dtype, problem.outputs[0].dtype} != {"float32"}:
        return None
    if problem.epilogue is not None and not epilogue_supported(problem.epilogue, extras):
        return None
    product = product_of(problem)
    if product is None or product.b != 1 or problem.outputs[0].size == 0:
        return None
    return product, weight.zeros


def _panel_cycles(
    product: Product, schedule: Schedule, zeros: ZeroPattern
) -> tuple[tuple[float, float], ...]:
    """Cycles of each panel, roughly: to copy it, and of all its tasks."""
    copy = schedule.width * product.depth * _TRANSPOSE_CYCLES
    tasks = product_cycles(schedule, zeros, product.columns, product.depth)
    tasks += schedule.width * product.columns * _TRANSPOSE_CYCLES
    return panels_of((copy, tasks), schedule, product.rows)


def _lines(schedule: Schedule, epilogue: Epilogue) -> list[str]:
    """The kernel's body."""
    starts = [
        f"e{index} = extra{index} + own_e{index} + start * e{index}_row"
        + (f" + {extra.width} * first_column" if extra.along else "")
        for index, extra in enumerate(epilogue.extras)
    ]
    sizes = {
        "ROWS": schedule.rows,
        "WIDTH": schedule.width,
        "STEP": schedule.row_bytes,
        "TAIL_ROW": schedule.tail_step,
        "SUMS": schedule.sums_step,
    }
    parts = {
        "prologue": epilogue.prologue(),
        "share": share_lines("panels"),
        "offsets": offset_lines(epilogue),
        "pack_tail": fill(_PACK_TAIL, {}, sizes) if schedule.tail else [],
        "product": product_lines(
            schedule,
            [wait_line(schedule, tail=False)],
            finish_tail=[wait_line(schedule, tail=True)],
        ),
        "epilogue": [*starts, *epilogue.lines()],
    }
    return fill(_BODY, parts, sizes)


_PACK_TAIL = """
has_tail = rows > WIDTH * LANES
if has_tail:
    pack_columns(
        tail, unliteral(TAIL_ROW),
        a + own_a + (start + WIDTH * LANES) * a_row + first_step * a_step, a_step, a_row,
        min(depth - first_step, block_depth), rows - WIDTH * LANES,
    )
"""

_BODY = """
<prologue>
panel = scratch + thread * thread_scratch
tail = panel + tail_start
all_sums = panel + panel_bytes
step = STEP
tail_step = TAIL_ROW
<share>
while task < stop:
    place = task // parts
    matrix = place // panels
    first_part = task % parts
    last_part = min(parts, first_part + stop - task)
    <offsets>
    panel_number = place - matrix * panels
    start = panel_number * WIDTH * LANES
    rows = height - start if panel_number + 1 == panels else WIDTH * LANES
    block = 0
    while block < blocks:
        first_step = block * block_depth
        first_block = block == 0
        pack_columns(
            panel, unliteral(STEP), a + own_a + start * a_row + first_step * a_step, a_step, a_row,
            min(depth - first_step, block_depth), min(rows, WIDTH * LANES),
        )
        <pack_tail>
        part = first_part
        while part < last_part:
            p = words + read(starts + 8 * (block * parts + part), INT64)
            <product>
            part += 1
        block += 1
    first_column = first_part * row_groups // parts * ROWS
    last_column = min(last_part * row_groups // parts * ROWS, width)
    columns = last_column - first_column
    c = y + own_y + start * c_row + 4 * first_column
    row = 0
    while row < rows:
        column = 0
        while column < columns:
            transpose_corner(
                all_sums + (first_column + column) * SUMS + 4 * row, SUMS,
                c + row * c_row + 4 * column, c_row,
                min(columns - column, LANES), min(rows - row, LANES), FLOAT32,
            )
            column += LANES
        row += LANES
    <epilogue>
    task += last_part - first_part
"""
