"""Dense convolutions of single pixels in float32 that read the image where it lies.

A register tile of output channels by pixels multiplies one input channel after another. What
`convolution` does for its panels, a large part of the work where channels are few, is saved; and
results are finished in registers. Where input channels are many, they are too far apart in memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.kernels import source
from graphopt.kernels.epilogue import Epilogue
from graphopt.kernels.image import Image, epilogue_starts, image_epilogue, image_of
from graphopt.kernels.loops import SHARE, Arguments, kernel_text
from graphopt.kernels.problem import ConvolutionProblem
from graphopt.kernels.register import VECTORS_PER_CYCLE
from graphopt.kernels.registry import (
    Argument,
    Candidate,
    Input,
    Output,
    Packed,
    Step,
    aligned_empty,
    like_output,
    register,
)
from graphopt.kernels.simd import LANES
from graphopt.kernels.tile import (
    CYCLES_PER_SECOND,
    PARTS,
    VOCABULARY,
    WORTH_SHARING,
    TileShape,
    fill,
)

TILES = (
    (TileShape(8, 3), TileShape(6, 4), TileShape(4, 7))
    if LANES == 16
    else (TileShape(4, 3), TileShape(6, 2))
)
"""Shapes that are finished in registers, of whole vectors only."""
_CANDIDATES = 2
_MOST_CHANNELS = 384


@dataclass(frozen=True)
class DirectCandidate(Candidate):
    """One shape of register tile."""

    problem: ConvolutionProblem
    image: Image
    tile: TileShape

    @property
    def _tiles(self) -> int:
        return math.ceil(self.image.outputs / self.tile.height)

    def packing(self) -> tuple[TileShape]:
        return (self.tile,)

    def pack(self, constants: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        weight = constants[1]
        assert weight is not None
        return [packed_tiles(weight, self.image, self.tile)]

    def overwrites(self) -> tuple[int, ...]:
        # Where the last panel overlaps the one before, some pixels are computed twice.
        if self.image.pixels % (self.tile.width * LANES):
            return ()
        return like_output(self.problem, range(2, len(self.problem.inputs)))

    def build(self, threads: int) -> tuple[Step, ...]:
        block, epilogue = self._arguments()
        text = kernel_text(block, _lines(self.tile, epilogue), VOCABULARY, epilogue.functions())
        entry = source.build(f"direct_convolution_{self.tile}", text)
        parallel = threads > 1 and self.estimate > WORTH_SHARING
        return (Step(entry, (*block.values, *epilogue.immediates), parallel, block.tasks),)

    def _arguments(self) -> tuple[Arguments, Epilogue]:
        image, block = self.image, Arguments()
        panels = math.ceil(image.pixels / (self.tile.width * LANES))
        parts = min(self._tiles, PARTS)
        values: dict[str, Argument] = {
            "x": Input(0), "weight": Packed(0), "y": Output(0),
            "groups": image.groups, "channels": image.channels, "outputs": image.outputs,
            "plane": 4 * image.plane, "out_plane": 4 * image.out_plane,
            "pixels": image.pixels, "tiles": self._tiles, "panels": panels, "parts": parts,
            "tasks": image.batch * image.groups * panels * parts,
        }  # fmt: skip
        block.add_all(values)
        return block, image_epilogue(self.problem, image, block)


@register(ConvolutionProblem)
def candidates(problem: ConvolutionProblem) -> list[Candidate]:
    """The tiles that fit the image best, for single pixels of few channels."""
    problem.check()
    image = image_of(problem, padded=True)
    if image is None or image.taps != 1 or image.size != image.out_size or image.size[0] != 1:
        return []
    if image.stride != (1, 1):  # padding after the image can make up for it
        return []
    if problem.outputs[0].size == 0 or image.channels > _MOST_CHANNELS:
        return []
    # The last panel ends with the image, so that all are whole.
    fitting = [tile for tile in TILES if tile.width * LANES <= image.pixels]
    found: list[Candidate] = []
    for tile in sorted(fitting, key=lambda tile: _cycles(image, tile))[:_CANDIDATES]:
        seconds = _cycles(image, tile) / CYCLES_PER_SECOND
        found.append(DirectCandidate(f"direct convolution {tile}", problem, seconds, image, tile))
    return found


def _cycles(image: Image, tile: TileShape) -> float:
    """Cycles of all tasks together, roughly."""
    tiles = math.ceil(image.outputs / tile.height)
    panels = math.ceil(image.pixels / (tile.width * LANES))
    # Where rows do not start on the lines of the cache, most loads touch two of them.
    lines = 1 if image.plane % LANES == 0 else 2
    return image.batch * image.groups * panels * tiles * tile_cycles(tile, image.channels, lines)


def tile_cycles(tile: TileShape, depth: int, lines: int) -> float:
    """Cycles of a tile of so many steps whose loads touch so many lines of the cache, roughly."""
    loads = (lines * tile.width + tile.height / 2) / VECTORS_PER_CYCLE
    step = max(tile.height * tile.width / VECTORS_PER_CYCLE, loads) * 1.03
    finish = 4 * tile.height * tile.width / VECTORS_PER_CYCLE + 15
    return depth * step + finish


def packed_tiles(weight: np.ndarray, image: Image, tile: TileShape) -> np.ndarray:
    """The weight as tiles read it: [group][tile][step of depth][row of the tile]."""
    tiles, depth = math.ceil(image.outputs / tile.height), image.channels * image.taps
    rows = np.zeros((image.groups, tiles * tile.height, depth), np.float32)
    rows[:, : image.outputs] = weight.reshape(image.groups, image.outputs, depth)
    packed = aligned_empty((image.groups, tiles, depth, tile.height), np.float32)
    packed[...] = rows.reshape(image.groups, tiles, tile.height, depth).swapaxes(2, 3)
    return packed


def tile_parts(tile: TileShape, epilogue: Epilogue) -> dict[str, list[str]]:
    """What a kernel's body has beside the products of a tile, see `fill`: its sums are named as
    `product_lines` names them."""
    sums = [f"s{row}_{v}" for row in range(tile.height) for v in range(tile.width)]
    names, pixels = ", ".join(sums), tile.width * LANES
    return {
        "prologue": epilogue.prologue(),
        "share": SHARE,
        "zero": [f"{sum} = broadcast(0.0, FLOAT32)" for sum in sums],
        "starts": epilogue_starts(epilogue),
        "finish": [epilogue.tile_line(f"({names})", tile.width, tile.width, str(pixels))],
    }


def product_lines(tile: TileShape, weights: str, pixels: str) -> list[str]:
    """Lines that add the products of one step to the sums ``s{row}_{vector}`` of a tile.

    The addresses ``weights`` and ``pixels`` are those of a number per row and of vectors, side by
    side. The fewer of both are kept in registers while the others pass by: with all of them there,
    the registers would not suffice.
    """
    rows, columns = range(tile.height), range(tile.width)
    factors = [f"w{row} = broadcast(read({weights} + {4 * row}, FLOAT32), FLOAT32)" for row in rows]
    vectors = [f"x{v} = load({pixels} + {4 * LANES * v}, FLOAT32)" for v in columns]
    sums = [[f"s{row}_{v} = fma(x{v}, w{row}, s{row}_{v})" for v in columns] for row in rows]
    kept, passing = (vectors, factors) if tile.width < tile.height else (factors, vectors)
    turns = sums if passing is factors else list(zip(*sums, strict=True))
    lines = list(kept)
    for one, products in zip(passing, turns, strict=True):
        lines += [one, *products]
    return lines


def _lines(tile: TileShape, epilogue: Epilogue) -> list[str]:
    """The kernel's body."""
    parts = tile_parts(tile, epilogue) | {"products": product_lines(tile, "a", "place")}
    return fill(_BODY, parts, {"HEIGHT": tile.height, "WIDTH": tile.width})


_BODY = """
<prologue>
c_row = out_plane
<share>
while task < stop:
    first_part = task % parts
    last_part = min(parts, first_part + stop - task)
    number = task // parts // panels
    image = number // groups
    group = number - image * groups
    panel = task // parts - number * panels
    start = min(panel * WIDTH * LANES, pixels - WIDTH * LANES)
    tile = first_part * tiles // parts
    last_tile = last_part * tiles // parts
    a = weight + 4 * (group * tiles + tile) * channels * HEIGHT
    while tile < last_tile:
        <zero>
        place = x + number * channels * plane + 4 * start
        step = 0
        while step < channels:
            <products>
            a += 4 * HEIGHT
            place += plane
            step += 1
        channel = group * outputs + tile * HEIGHT
        rows = outputs - tile * HEIGHT
        c = y + (image * groups * outputs + channel) * out_plane + 4 * start
        <starts>
        <finish>
        tile += 1
    task += last_part - first_part
"""
