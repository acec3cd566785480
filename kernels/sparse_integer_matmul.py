"""Linear layers of uint8 rows with int8 weights of which many words are zero.

As in convolutions that skip zeros (`sparse_integer_convolution`), words of four inputs are
multiplied where any of their weights is not zero. What is in the lanes of vectors are rows: their
words are gathered into a panel for a few vectors of rows. Results of four features are words,
which are scattered to the rows; those in float32 are transposed, a square of them at a time.
"""

from __future__ import annotations

import math

from graphopt.kernels import source
from graphopt.kernels.integer_convolution import IntegerImage
from graphopt.kernels.integer_problems import IntegerMatmulProblem
from graphopt.kernels.loops import SHARE, Arguments, kernel_text
from graphopt.kernels.operand import GROUP, ConstantOperand
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
from graphopt.kernels.requantization import Requantization
from graphopt.kernels.simd import LANES
from graphopt.kernels.sparse_integer_convolution import (
    Schedule,
    SparseIntegerCandidate,
    best_schedule,
    cycles,
    sum_lines,
)
from graphopt.kernels.tile import CYCLES_PER_SECOND, fill

VOCABULARY = ("simd", "words")
_TASKS = 16
"""Tasks of which threads get equal shares."""
_MOVE, _TURN = 1.5, 0.6
"""Cycles in which a lane is gathered or scattered, and transposed."""
_MOST_DEPTH = 2**31 // (255 * 128)


class SparseIntegerMatmulCandidate(SparseIntegerCandidate):
    """With a pixel for each row."""

    problem: IntegerMatmulProblem

    @property
    def _floating(self) -> bool:
        return self.problem.outputs[0].dtype == "float32"

    @property
    def thread_scratch(self) -> int:
        """Bytes of a panel, and of a square for each of its vectors."""
        words = self.image.depth + (LANES if self._floating else 0)
        return 4 * LANES * self.schedule.width * words

    def build(self, threads: int) -> tuple[Step, ...]:
        image, floating = self.image, self._floating
        # The same for every number of threads, so that few panels are shared evenly.
        parts = min(math.ceil(_TASKS / self.panels), self.tiles)
        values: dict[str, Argument] = {
            "x": Input(0), "words_of_weight": Packed(0), "starts": Packed(1),
            "finish": Packed(2), "numbers": Packed(3), "y": Output(0),
            "scratch": Scratch(), "thread_scratch": self.thread_scratch,
            "b_step": 4 * LANES * self.schedule.width, "rows": image.pixels,
            "depth": image.channels, "outputs": image.outputs,
            "c_row": (4 if floating else 1) * image.outputs, "vectors": image.vectors,
            "tiles": self.tiles, "parts": parts, "tasks": self.panels * parts,
        }  # fmt: skip
        block = Arguments()
        block.add_all(values)
        text = kernel_text(block, _lines(self.schedule, floating), VOCABULARY)
        kind = "_floating" if floating else ""
        name = f"sparse_integer_matmul_{self.schedule.rows}x{self.schedule.width}{kind}"
        entry = source.build(name, text)
        return (Step(entry, tuple(block.values), self.is_parallel(threads), block.tasks),)


@register(IntegerMatmulProblem)
def candidates(problem: IntegerMatmulProblem) -> list[Candidate]:
    """The schedule that suits the zeros best; none where the weight has few."""
    problem.check()
    weight, (y,) = problem.inputs[1], problem.outputs
    if not isinstance(weight, ConstantOperand) or weight.zeros is None:
        return []
    outputs, depth = weight.shape
    rows, floating = math.prod(y.shape[:-1]), y.dtype == "float32"
    # Words that are rows' own, and results that are words.
    if not rows or depth % GROUP or depth >= _MOST_DEPTH or (outputs % GROUP and not floating):
        return []
    one, size = (1, 1), (1, rows)
    image = IntegerImage(1, 1, 1, depth, outputs, size, size, one, one, one, (0, 0))
    schedule = best_schedule(image, weight.zeros)
    lanes = LANES * math.ceil(image.vectors / schedule.width) * schedule.width
    moved = _MOVE * image.depth + (_TURN * outputs if floating else _MOVE * outputs / GROUP)
    seconds = (cycles(image, schedule, weight.zeros) + lanes * moved) / CYCLES_PER_SECOND
    name = f"sparse integer matmul {schedule.rows}x{schedule.width}"
    return [SparseIntegerMatmulCandidate(name, problem, seconds, image, schedule)]


def _lines(schedule: Schedule, floating: bool) -> list[str]:
    """The kernel's body."""
    finish = Requantization(floating=floating)
    pack = [
        f"store(target + {4 * LANES * column}, gather(source + {LANES * column} * depth, depth,"
        f" INT32, mask_first(rows - row - {LANES * column}, INT32)))"
        for column in range(schedule.width)
    ]
    end = [
        f"m{feature} = broadcast(read(own + {4 * (GROUP + feature)}, FLOAT32), FLOAT32)"
        for feature in range(GROUP)
    ]
    end += _square_lines(schedule.width) if floating else _word_lines(schedule.width, finish)
    parts = {
        "prologue": finish.prologue(),
        "share": SHARE,
        "pack": pack,
        "sums": sum_lines(schedule),
        "end": end,
    }
    return fill(_BODY, parts, {"WIDTH": schedule.width})


def _word_lines(width: int, finish: Requantization) -> list[str]:
    """Lines that make words of the sums of four features, and put them where the rows have them."""
    lines = ["c = y + row * c_row + 4 * tile"]
    for column in range(width):
        lines += finish.word_lines([f"s{feature}_{column}" for feature in range(GROUP)])
        mask = f"mask_first(rows - row - {LANES * column}, INT32)"
        lines.append(f"scatter(c + {LANES * column} * c_row, c_row, word, {mask})")
    return lines


def _square_lines(width: int) -> list[str]:
    """Lines that finish the sums of four features, and move squares that are full to the rows."""
    lines = ["place = squares + filled * b_step"]
    for feature in range(GROUP):
        for column in range(width):
            value = f"convert(s{feature}_{column}, FLOAT32) * m{feature}"
            lines.append(f"store(place + {4 * LANES * column}, {value})")
        lines.append("place += b_step")
    return [*lines, *fill(_SQUARES, {}, {"WIDTH": width})]


_SQUARES = """
filled += 4
if filled == LANES or tile + 1 == last_tile:
    feature = 4 * tile + 4 - filled
    down = min(filled, outputs - feature)
    c = y + row * c_row + 4 * feature
    for column in range(WIDTH):
        place = squares + 4 * LANES * column
        across = min(rows - row - LANES * column, LANES)
        if down == LANES and across == LANES:
            transpose_tile(place, b_step, c, c_row, FLOAT32)
        else:
            transpose_corner(place, b_step, c, c_row, down, across, FLOAT32)
        c += LANES * c_row
    filled = 0
"""


_BODY = """
<prologue>
b = scratch + thread * thread_scratch
squares = b + depth // 4 * b_step
filled = 0
packed_panel = -1
<share>
while task < stop:
    panel = task // parts
    part = task - panel * parts
    # The last panel ends with the rows, so that all are whole.
    vector = min(panel * WIDTH, vectors - WIDTH)
    row = vector * LANES
    if packed_panel != panel:
        target = b
        source = x + row * depth
        end_of_row = source + depth
        while source < end_of_row:
            <pack>
            source += 4
            target += b_step
        packed_panel = panel
    tile = part * tiles // parts
    last_tile = (part + 1) * tiles // parts
    while tile < last_tile:
        a = words_of_weight + read(starts + 8 * tile, INT64)
        own = finish + 32 * tile
        <sums>
        <end>
        tile += 1
    task += 1
"""
