"""Scaled dot-product attention as one kernel.

A task is a block of queries of one head: its scores against all keys are made in the thread's
scratch memory, normalised there, and multiplied with the values. Both products are made of register
tiles; keys and values are read from panels that the task arranges for itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from graphopt.kernels import source
from graphopt.kernels.emission import immediate
from graphopt.kernels.loops import (
    SHARE,
    Arguments,
    Odometer,
    broadcast_strides,
    collapse,
    kernel_text,
)
from graphopt.kernels.operand import ITEM_BYTES
from graphopt.kernels.problem import AttentionProblem
from graphopt.kernels.registry import (
    Argument,
    Candidate,
    Input,
    Output,
    Scratch,
    Step,
    register,
)
from graphopt.kernels.rows import accumulators, load, segments, store, vectors
from graphopt.kernels.simd import LANES
from graphopt.kernels.tile import (
    CYCLES_PER_SECOND,
    DEPTH,
    TILES,
    VOCABULARY,
    WORTH_SHARING,
    fill,
    multiply_lines,
)

_TILE = TILES[1]
_COLUMNS = _TILE.width * LANES
_PANEL_BYTES = 4 * DEPTH * _COLUMNS
_QUERIES = 96
"""Most queries of a block: the work between two arrangements of the same panel."""
_SCORES = 2**17
"""Scores of a block that stay in the second cache."""
_SOFTMAX_CYCLES = 20.0
_PACK_CYCLES = 3.0


@dataclass(frozen=True)
class AttentionCandidate(Candidate):
    """Threads share the blocks of queries of all heads."""

    problem: AttentionProblem

    @property
    def block(self) -> int:
        """Queries of a block."""
        length, size = self.problem.inputs[0].shape[-2], self.problem.inputs[1].shape[-2]
        most = max(_TILE.height, min(_QUERIES, _SCORES // size))
        even = math.ceil(length / max(math.ceil(length / most), 1))
        return max(math.ceil(even / _TILE.height), 1) * _TILE.height

    @property
    def pitch(self) -> int:
        """Bytes from one query's scores to the next one's."""
        size = self.problem.inputs[1].shape[-2]
        return 4 * LANES * (math.ceil(size / LANES) | 1)

    @property
    def thread_bytes(self) -> int:
        """Scratch memory of a thread: a panel, then the scores."""
        return math.ceil((_PANEL_BYTES + self.block * self.pitch) / 64) * 64

    def scratch_bytes(self, threads: int) -> int:
        return threads * self.thread_bytes

    def build(self, threads: int) -> tuple[Step, ...]:
        if self.problem.outputs[0].size == 0:
            return ()
        kernel = _Kernel(self)
        parallel = threads > 1 and kernel.tasks > 1 and self.estimate > WORTH_SHARING
        entry = source.build("attention", kernel.text())
        return (Step(entry, tuple(kernel.block.values), parallel),)


@register(AttentionProblem)
def candidates(problem: AttentionProblem) -> list[Candidate]:
    """One kernel, for float32 with at least one key."""
    problem.check()
    query, key, value, *masks = problem.inputs
    (y,) = problem.outputs
    if {operand.dtype for operand in (query, key, value, y)} != {"float32"}:
        return []
    length, inner = query.shape[-2:]
    size, outer = value.shape[-2:]
    if size == 0 or inner == 0 or (y.strides[-1] != 1 and outer > 1):
        return []
    for mask in masks:
        contiguous = mask.shape[-1] == size and (mask.strides[-1] == 1 or size == 1)
        if mask.dtype not in ("float32", "bool") or not contiguous:
            return []
    batch = math.prod(y.shape[:-2])
    products = size * math.ceil(outer / LANES) + inner * math.ceil(size / LANES)
    per_query = products * _TILE.cycles / _TILE.height / _TILE.width
    per_query += math.ceil(size / LANES) * _SOFTMAX_CYCLES
    blocks = math.ceil(length / _QUERIES)
    cycles = batch * (length * per_query + blocks * products * _PACK_CYCLES)
    return [AttentionCandidate("attention", problem, max(cycles / CYCLES_PER_SECOND, 1e-8))]


class _Kernel:
    """The kernel and its argument block."""

    def __init__(self, candidate: AttentionCandidate) -> None:
        problem = candidate.problem
        query, key, value, *masks = problem.inputs
        (y,) = problem.outputs
        self.causal = problem.causal
        self.mask = masks[0].dtype if masks else ""
        self.block = Arguments()
        operands = {"query": query, "key": key, "value": value, "y": y}
        starts: list[Argument] = [Input(0), Input(1), Input(2), Output(0)]
        for (name, operand), start in zip(operands.items(), starts, strict=True):
            self.block.add(name, start)
            self.block.add(f"{name}_row", 4 * operand.strides[-2])
            self.block.add(f"{name}_column", 4 * operand.strides[-1])
        if masks:
            row = masks[0].strides[-2] if len(masks[0].shape) > 1 and masks[0].shape[-2] > 1 else 0
            self.block.add("bias", Input(3))
            self.block.add("bias_row", row * ITEM_BYTES[self.mask])
            operands["bias"] = masks[0]
        batch = y.shape[:-2]
        walks = [broadcast_strides(o.shape[:-2], o.strides[:-2], batch) for o in operands.values()]
        nest = collapse(batch, walks)
        blocks = math.ceil(query.shape[-2] / candidate.block)
        self.tasks = math.prod(nest.sizes) * blocks
        numbers: dict[str, Argument] = {
            "length": query.shape[-2],
            "size": key.shape[-2],
            "inner": query.shape[-1],
            "outer": value.shape[-1],
            "block": candidate.block,
            "blocks": blocks,
            "tasks": self.tasks,
            "factor_bits": immediate(problem.scale, "float32"),
            "scratch": Scratch(),
            "thread_bytes": candidate.thread_bytes,
            "pitch": candidate.pitch,
        }
        for name, number in numbers.items():
            self.block.add(name, number)
        widths = [ITEM_BYTES[operand.dtype] for operand in operands.values()]
        steps = {
            name: [stride * width for stride in known]
            for name, width, known in zip(operands, widths, nest.strides, strict=True)
        }
        self.odometer = Odometer(self.block, nest.sizes, steps)

    def text(self) -> str:
        """The kernel's source."""
        parts = {
            "share": SHARE,
            "start": self.odometer.start("row"),
            "advance": self.odometer.advance(),
            "keys": ["keys = min(keys, first + queries)"] if self.causal else [],
            "multiply_keys": multiply_lines(_TILE, "query_row", "query_column", padded=False),
            "bias": ["row_bias = bias + (first + line) * bias_row"] if self.mask else [],
            "softmax": self._softmax(),
            "multiply_values": multiply_lines(_TILE, "pitch", "4", padded=False),
        }
        sizes = {
            "HEIGHT": _TILE.height,
            "COLUMNS": _COLUMNS,
            "PANEL_BYTES": _PANEL_BYTES,
            "DEPTH": DEPTH,
        }
        return kernel_text(self.block, fill(_BODY, parts, sizes), VOCABULARY)

    def _softmax(self) -> list[str]:
        """Lines that turn the scores of one query, at ``row_scores``, into weights."""

        def add(number: int, place: str, masked: bool) -> list[str]:
            address = f"row_scores + {place} * 4"
            return [
                f"e = exp({load(address, masked)} - peak)",
                store(address, "e", masked),
                f"c{number} += {'select(mask, e, zero)' if masked else 'e'}",
            ]

        def multiply(number: int, place: str, masked: bool) -> list[str]:
            address = f"row_scores + {place} * 4"
            return [store(address, f"{load(address, masked)} * quotient", masked)]

        collect = ["total += reduce_add((c0 + c1) + (c2 + c3))"]
        return [
            *accumulators("c", "least"),
            "i = 0",
            "limit = keys",
            *vectors(self._score),
            "highest = reduce_maximum(maximum(maximum(c0, c1), maximum(c2, c3)))",
            "if highest == -math.inf:",
            "    highest = 0.0",
            "peak = broadcast(highest, FLOAT32)",
            "total = 0.0",
            *segments("keys", accumulators("c", "zero"), add, collect),
            "if total == 0.0:",
            "    total = math.inf",
            "quotient = broadcast(1.0 / total, FLOAT32)",
            "i = 0",
            "limit = keys",
            *vectors(multiply),
        ]

    def _score(self, number: int, place: str, masked: bool) -> list[str]:
        """Lines that scale and mask one vector of scores."""
        address = f"row_scores + {place} * 4"
        lines = [f"x = {load(address, masked)} * factor"]
        if self.mask == "float32":
            lines.append(f"x += {load(f'row_bias + {place} * 4', masked)}")
        elif self.mask == "bool":
            seen = load(f"row_bias + {place}", masked, "bool")
            lines.append(f"x += select({seen}, zero, least)")
        if self.causal:
            seen = f"mask_first(first + line + 1 - {place}, FLOAT32)"
            lines.append(f"x = select({seen}, x, least)")
        inside = "select(mask, x, least)" if masked else "x"
        return [
            *lines,
            store(address, "x", masked),
            f"c{number} = maximum(c{number}, {inside})",
        ]


_BODY = """
zero = broadcast(0.0, FLOAT32)
least = broadcast(-math.inf, FLOAT32)
factor = broadcast(float32_from_bits(factor_bits), FLOAT32)
panel = scratch + thread * thread_bytes
scores = panel + PANEL_BYTES
b = panel
b_step = 4 * COLUMNS
<share>
row = task // blocks
part = task - row * blocks
<start>
while task < stop:
    first = part * block
    queries = min(length - first, block)
    keys = size
    <keys>
    c_row = pitch
    column = 0
    while column < keys:
        columns = min(keys - column, COLUMNS)
        filled = (columns + LANES - 1) // LANES
        step = 0
        while step < inner:
            depth = min(inner - step, DEPTH)
            accumulate = step > 0
            origin = key + column * key_row + step * key_column
            pack_columns(b, b_step, origin, key_column, key_row, depth, columns)
            line = 0
            while line < queries:
                rows = min(queries - line, HEIGHT)
                a = query + (first + line) * query_row + step * query_column
                c = scores + line * pitch + column * 4
                <multiply_keys>
                line += HEIGHT
            step += DEPTH
        column += COLUMNS
    line = 0
    while line < queries:
        row_scores = scores + line * pitch
        <bias>
        <softmax>
        line += 1
    c_row = y_row
    column = 0
    while column < outer:
        columns = min(outer - column, COLUMNS)
        filled = (columns + LANES - 1) // LANES
        step = 0
        while step < keys:
            depth = min(keys - step, DEPTH)
            accumulate = step > 0
            origin = value + step * value_row + column * value_column
            pack_columns(b, b_step, origin, value_row, value_column, depth, columns)
            line = 0
            while line < queries:
                rows = min(queries - line, HEIGHT)
                a = scores + line * pitch + step * 4
                c = y + (first + line) * y_row + column * 4
                <multiply_values>
                line += HEIGHT
            step += DEPTH
        column += COLUMNS
    task += 1
    part += 1
    if part == blocks:
        part = 0
        <advance>
"""
