"""Matrix products in float32: linear layers, products of two tensors, broadcast over batches.

Columns of the product are in the lanes of vectors, numbers of a are broadcast straight from where
they lie. b is read from panels of a few vectors of columns, [panel][depth][columns of the panel]:
a constant is arranged so beforehand, anything else by each task for itself. Where only one side of
the product is wide, that side is put into the lanes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import as_strided

from graphopt.kernels import source
from graphopt.kernels.epilogue import Epilogue, ExtraOperand, epilogue_supported
from graphopt.kernels.loops import SHARE, Arguments, broadcast_strides, collapse, kernel_text
from graphopt.kernels.memory import LINE
from graphopt.kernels.operand import ITEM_BYTES, ConstantOperand, Operand
from graphopt.kernels.problem import MatmulProblem
from graphopt.kernels.register import AMD
from graphopt.kernels.registry import (
    Argument,
    Candidate,
    Input,
    Output,
    Packed,
    Scratch,
    Step,
    aligned_empty,
    register,
)
from graphopt.kernels.simd import LANES
from graphopt.kernels.tile import (
    CYCLES_PER_SECOND,
    DEPTH,
    PANEL,
    TILES,
    VOCABULARY,
    WORTH_SHARING,
    TileShape,
    fill,
    multiply_lines,
)

_FLAT = (TileShape(1, 6), TileShape(4, 4)) if LANES == 16 else (TileShape(1, 6), TileShape(2, 4))
"""Tiles for products of few rows."""
_BYTES_PER_CYCLE = 16
"""Of constants, which mostly come from the last cache."""
_FEW_TILES = 12
"""With at most so many tiles of rows, what comes next of a constant is fetched, a line per step,
while they use what is there; more are not held up by it. On AMD's CPUs that was not measured."""
_PACK_CYCLES = 3
"""Cycles to arrange one vector of b."""


@dataclass(frozen=True)
class Product:
    """A batch of products of plain matrices, in elements.

    ``a`` and ``b`` are numbers of inputs. Strides are by (row, step) for a, (step, column) for b,
    and by (row, column) for the output and the epilogue's further inputs. ``offsets[i]`` are where
    a, b, the output and the further inputs start in product i of the batch.
    """

    rows: int
    columns: int
    depth: int
    a: int
    b: int
    a_strides: tuple[int, int]
    b_strides: tuple[int, int]
    row_stride: int
    extras: tuple[tuple[int, int], ...]
    offsets: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class MatmulCandidate(Candidate):
    """One shape of register tile."""

    problem: MatmulProblem
    product: Product
    tile: TileShape

    @property
    def _packed(self) -> bool:
        """Whether b is arranged beforehand."""
        operand = self.problem.inputs[self.product.b]
        shared = len({offsets[1] for offsets in self.product.offsets}) == 1
        return isinstance(operand, ConstantOperand) and shared

    @property
    def _panels(self) -> int:
        return math.ceil(math.ceil(self.product.columns / LANES) / self.tile.width)

    @property
    def _depth_block(self) -> int:
        """Steps of depth after which a panel is renewed."""
        product = self.product
        if self._packed and product.rows <= self.tile.height:
            return product.depth
        return math.ceil(product.depth / max(math.ceil(product.depth / DEPTH), 1))

    def packing(self) -> tuple[object, ...]:
        return (self.tile, self.product.offsets, self.product.b, self._panels)

    def pack(self, constants: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        offsets = product_offsets(self.problem, self.product)
        b = constants[self.product.b]
        if not self._packed or b is None:
            return [offsets]
        return [offsets, self._panels_of(b)]

    def _panels_of(self, b: np.ndarray) -> np.ndarray:
        product, width = self.product, self.tile.width * LANES
        flat = np.ascontiguousarray(b).reshape(-1)[product.offsets[0][1] :]
        strides = [b.itemsize * stride for stride in product.b_strides]
        matrix = as_strided(flat, (product.depth, product.columns), strides, writeable=False)
        vectors = math.ceil(product.columns / LANES)
        packed = aligned_empty((self._panels, product.depth, width), np.float32)
        packed[...] = 0
        bounds = [panel * vectors // self._panels * LANES for panel in range(self._panels + 1)]
        for panel, (first, last) in enumerate(itertools.pairwise(bounds)):
            part = matrix[:, first : min(last, product.columns)]
            packed[panel, :, : part.shape[1]] = part
        return packed

    def scratch_bytes(self, threads: int) -> int:
        return 0 if self._packed else threads * self._panel_bytes

    @property
    def _panel_bytes(self) -> int:
        return self._depth_block * self.tile.width * LANES * 4

    def build(self, threads: int) -> tuple[Step, ...]:
        if self.problem.outputs[0].size == 0:
            return ()
        parallel = threads > 1 and self.estimate > WORTH_SHARING
        block, epilogue = self._arguments(threads if parallel else 1)
        once = self._packed and self.product.rows <= self.tile.height
        few = self.product.rows <= _FEW_TILES * self.tile.height
        ahead = self._packed and few and not once and not AMD
        body = _lines(self.tile, epilogue, self._packed, once, ahead)
        text = kernel_text(block, body, VOCABULARY, epilogue.functions())
        entry = source.build(f"matmul_{self.tile.height}x{self.tile.width}", text)
        return (Step(entry, (*block.values, *epilogue.immediates), parallel, block.tasks),)

    def _arguments(self, threads: int) -> tuple[Arguments, Epilogue]:
        product, block = self.product, Arguments()
        matrices = len(product.offsets)
        row_blocks = math.ceil(4 * threads / (matrices * self._panels)) if threads > 1 else 1
        row_blocks = min(row_blocks, math.ceil(product.rows / self.tile.height))
        b: Argument = Packed(1) if self._packed else Input(product.b)
        values: dict[str, Argument] = {
            "a_start": Input(product.a), "b_start": b, "y": Output(0), "offsets": Packed(0),
            "scratch": Scratch() if self.scratch_bytes(threads) else 0,
            "panel_bytes": self._panel_bytes,
            "height": product.rows, "width": product.columns, "depth_size": product.depth,
            "depth_block": self._depth_block,
            "a_row": 4 * product.a_strides[0], "a_step": 4 * product.a_strides[1],
            "b_row": 4 * product.b_strides[0], "b_column": 4 * product.b_strides[1],
            "c_row": 4 * product.row_stride,
            "vectors": math.ceil(product.columns / LANES), "panels": self._panels,
            "row_blocks": row_blocks, "tasks": matrices * self._panels * row_blocks,
        }  # fmt: skip
        block.add_all(values)
        return block, product_epilogue(self.problem, product, block)


@register(MatmulProblem)
def candidates(problem: MatmulProblem) -> list[MatmulCandidate]:
    """Register tiles of a few shapes; none where the operands are not float32."""
    problem.check()
    a, b, *extras = problem.inputs
    (y,) = problem.outputs
    if {a.dtype, b.dtype, y.dtype} != {"float32"}:
        return []
    if problem.epilogue is not None and not epilogue_supported(problem.epilogue, extras):
        return []
    product = product_of(problem)
    if product is None:
        return []
    constant = isinstance(problem.inputs[product.b], ConstantOperand)
    tiles = (*TILES, *(_FLAT if product.rows < TILES[0].height else ()))
    # Of higher ones, half of the rows or more would not exist.
    tiles = tuple(tile for tile in tiles if tile.height == 1 or tile.height < 2 * product.rows)
    return [
        MatmulCandidate(f"matmul {tile}", problem, _seconds(product, tile, constant), product, tile)
        for tile in tiles
    ]


def _seconds(product: Product, tile: TileShape, constant: bool) -> float:
    vectors = math.ceil(product.columns / LANES)
    tiles = math.ceil(product.rows / tile.height) * vectors / tile.width
    compute = tiles * product.depth * tile.cycles + 3 * vectors * product.rows
    read = 4 * LANES / _BYTES_PER_CYCLE if constant else _PACK_CYCLES
    cycles = compute + vectors * product.depth * read
    return len(product.offsets) * cycles / CYCLES_PER_SECOND


def product_of(problem: MatmulProblem) -> Product | None:
    """The problem as a batch of matrix products; None for layouts that the kernel cannot walk."""
    a, b, *extras = problem.inputs
    (y,) = problem.outputs
    *batch, rows, columns = y.shape
    *a_batch, a_row, a_step = _matrix_strides(a, problem.transposed[0], batch)
    *b_batch, b_step, b_column = _matrix_strides(b, problem.transposed[1], batch)
    others = [broadcast_strides(extra.shape, extra.strides, y.shape) for extra in extras]
    # Rows of products that share b are rows of one product.
    walks = [(*a_batch, a_row), (*b_batch, 0), y.strides[:-1], *(other[:-1] for other in others)]
    nest = collapse((*batch, rows), walks)
    sizes, strides = nest.sizes, nest.strides
    if math.prod((*batch, rows)) == 1:
        strides = tuple((0,) for _ in walks)
    if strides[1][-1] != 0:
        sizes, strides = (*sizes, 1), tuple((*walk, 0) for walk in strides)
    offsets = [
        tuple(sum(i * step for i, step in zip(index, walk, strict=False)) for walk in strides)
        for index in itertools.product(*map(range, sizes[:-1]))
    ]
    column_strides = [other[-1] if columns > 1 else 0 for other in others]
    row_strides = [walk[-1] for walk in strides]
    product = Product(
        sizes[-1],
        columns,
        problem.depth,
        0,
        1,
        (row_strides[0], a_step),
        (b_step, b_column),
        row_strides[2],
        tuple(zip(row_strides[3:], column_strides, strict=True)),
        tuple(offsets),
    )
    y_column = y.strides[-1] if columns > 1 else 1
    if row_strides[2] == 1 and (y_column != 1 or columns < min(LANES, sizes[-1])):
        product, y_column = _swapped(product, y_column), 1
    contiguous = y_column == 1 and all(extra[1] in (0, 1) for extra in product.extras)
    return product if contiguous else None


def _matrix_strides(operand: Operand, transposed: bool, batch: Sequence[int]) -> tuple[int, ...]:
    """Strides along the output's batch dimensions, then along rows and columns."""
    *outer, rows, columns = operand.strides
    walk = broadcast_strides(operand.shape[:-2], outer, batch)
    return (*walk, columns, rows) if transposed else (*walk, rows, columns)


def _swapped(product: Product, y_column: int) -> Product:
    """The transposed product, whose columns are this one's rows."""
    return Product(
        product.columns,
        product.rows,
        product.depth,
        product.b,
        product.a,
        (product.b_strides[1], product.b_strides[0]),
        (product.a_strides[1], product.a_strides[0]),
        y_column,
        tuple((column, row) for row, column in product.extras),
        tuple((b, a, *rest) for a, b, *rest in product.offsets),
    )


def product_offsets(problem: MatmulProblem, product: Product) -> np.ndarray:
    """Where a, b, the output and the further inputs start in each product, in bytes (int64)."""
    offsets = aligned_empty((len(product.offsets), 3 + len(product.extras)), np.int64)
    offsets[...] = np.reshape(product.offsets, offsets.shape)
    operands = [problem.inputs[product.a], problem.inputs[product.b]]
    operands += [problem.outputs[0], *problem.inputs[2:]]
    offsets *= [ITEM_BYTES[operand.dtype] for operand in operands]
    return offsets


def offset_lines(epilogue: Epilogue) -> list[str]:
    """Lines that read the offsets of product ``matrix`` from a table of `product_offsets`."""
    names = ["a", "b", "y", *(f"e{index}" for index in range(len(epilogue.extras)))]
    return [
        f"own_{name} = read(offsets + 8 * ({len(names)} * matrix + {place}), INT64)"
        for place, name in enumerate(names)
    ]


def product_epilogue(problem: MatmulProblem, product: Product, block: Arguments) -> Epilogue:
    """The epilogue of a kernel whose arguments are in ``block``, which gets the epilogue's own."""
    extras = []
    for index, strides in enumerate(product.extras):
        extra = ExtraOperand(problem.inputs[2 + index].dtype, along=strides[1] != 0)
        extras.append(extra)
        block.add(f"extra{index}", Input(2 + index))
        block.add(f"e{index}_row", strides[0] * extra.width)
    return Epilogue(problem.epilogue, extras, len(block.names))


def _lines(tile: TileShape, epilogue: Epilogue, packed: bool, once: bool, ahead: bool) -> list[str]:
    """The kernel's body; ``packed`` b may be read ``once``, for a single tile of rows, or fetched
    ``ahead``."""
    sizes = {"HEIGHT": tile.height, "WIDTH": tile.width}
    starts = [
        f"e{index} = extra{index} + own_e{index} + row * e{index}_row"
        + (f" + {extra.width} * start" if extra.along else "")
        for index, extra in enumerate(epilogue.extras)
    ]
    arrange = [
        "b = scratch + thread * panel_bytes",
        "origin = b_start + own_b + first_step * b_row + start * b_column",
        "pack_columns(b, b_step, origin, b_row, b_column, depth, columns)",
    ]
    find = ["b = b_start + (panel * depth_size + first_step) * b_step"]
    parts = {
        "prologue": epilogue.prologue(),
        "share": SHARE,
        "offsets": offset_lines(epilogue),
        "panel": find if packed else arrange,
        "ahead": fill(_AHEAD, {}, sizes) if ahead else [],
        "vectors": PANEL,
        "multiply": multiply_lines(
            tile, "a_row", "a_step", padded=False, once=once, ahead="ahead" if ahead else "0"
        ),
        "epilogue": [*starts, *epilogue.lines()],
    }
    return fill(_BODY, parts, sizes)


_AHEAD = f"ahead = depth * b_step + {LINE} * min((row - first_row) // HEIGHT, b_step // {LINE})"

_BODY = """
<prologue>
b_step = 4 * WIDTH * LANES
tiles = (height + HEIGHT - 1) // HEIGHT
<share>
while task < stop:
    rest = task // row_blocks
    row_block = task - rest * row_blocks
    matrix = rest // panels
    panel = rest - matrix * panels
    <offsets>
    <vectors>
    start *= LANES
    columns = min(width - start, filled * LANES)
    first_row = row_block * tiles // row_blocks * HEIGHT
    last_row = min((row_block + 1) * tiles // row_blocks * HEIGHT, height)
    first_step = 0
    while first_step < depth_size or first_step == 0:
        depth = min(depth_size - first_step, depth_block)
        accumulate = first_step > 0
        <panel>
        row = first_row
        while row < last_row:
            rows = min(last_row - row, HEIGHT)
            a = a_start + own_a + row * a_row + first_step * a_step
            c = y + own_y + row * c_row + 4 * start
            <ahead>
            <multiply>
            if first_step + depth_block >= depth_size:
                <epilogue>
            row += HEIGHT
        first_step += max(depth_block, 1)
    task += 1
"""
