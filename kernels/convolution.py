"""Dense convolutions of one or two spatial dimensions in float32, any groups.

A convolution is a matrix product of the weights (output channels by depth, that is input channels
times kernel positions) and the pixels under the kernel (depth by output pixels). Pixels are in the
lanes of vectors, weights are broadcast. What a few vectors of output pixels need is copied into a
panel that stays in the caches while all output channels are computed from it (implicit im2col:
K. Chellapilla, S. Puri and P. Simard, "High performance convolutional neural networks for document
processing", 2006), which makes every stride, dilation and padding the same dense product. Weights
are arranged beforehand as [group][block of depth][tile][depth][row of the tile], in which order
they are read.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.kernels import matmul, panel, source
from graphopt.kernels.caches import SECOND_CACHE
from graphopt.kernels.epilogue import Epilogue
from graphopt.kernels.image import Image, epilogue_starts, image_epilogue, image_of
from graphopt.kernels.loops import Arguments, kernel_text
from graphopt.kernels.operand import ConstantOperand, Layout, Operand
from graphopt.kernels.problem import ConvolutionProblem, MatmulProblem
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
from graphopt.kernels.shares import panel_shares, share_lines
from graphopt.kernels.simd import LANES
from graphopt.kernels.tile import (
    CYCLES_PER_SECOND,
    DEPTH,
    PANEL,
    PARTS,
    TILES,
    VOCABULARY,
    WORTH_SHARING,
    TileShape,
    fill,
    multiply_lines,
)

_PANEL_BYTES = SECOND_CACHE // 4
"""Bytes of panels that are kept while the output channels pass by."""
_PACK_CYCLES = 2.5
_PACK_STRIDED_CYCLES = 4.5
"""Cycles to copy one piece of a vector of a panel, of columns side by side and apart."""
_WEIGHT_BYTES_PER_CYCLE = 32
"""Of weights, which come from far for each block of pixels, mostly while others are multiplied."""


@dataclass(frozen=True)
class _Blocking:
    """How the loops are cut: panels of pixels, tiles of channels, blocks of depth, and tasks.

    A task is one block of pixels by one of the parts of the output channels of one group of one
    image; a thread copies the panels of a block once for all parts that are its share. The first
    ``columns`` panels have one pixel more than their vectors hold.
    """

    vectors: int
    columns: int
    panels: int
    tiles: int
    depth_channels: int
    pixel_blocks: int

    @property
    def panels_per_block(self) -> int:
        return math.ceil(self.panels / self.pixel_blocks)

    @property
    def parts(self) -> int:
        return min(self.tiles, PARTS)


@dataclass(frozen=True)
class ConvolutionCandidate(Candidate):
    """One shape of register tile."""

    problem: ConvolutionProblem
    image: Image
    tile: TileShape

    def packing(self) -> tuple[TileShape]:
        return (self.tile,)

    def pack(self, constants: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        weight = constants[1]
        assert weight is not None
        image, height = self.image, self.tile.height
        tiles = math.ceil(image.outputs / height)
        step = _depth_channels(image)
        packed = aligned_empty(
            (image.groups, image.channels * image.taps * tiles * height), np.float32
        )
        rows = np.zeros((image.groups, tiles * height, image.channels, image.taps), np.float32)
        rows[:, : image.outputs] = weight.reshape(image.groups, image.outputs, image.channels, -1)
        rows = rows.reshape(image.groups, tiles, height, image.channels, image.taps)
        for first in range(0, image.channels, step):
            block = rows[:, :, :, first : first + step].transpose(0, 1, 4, 3, 2)
            start = first * image.taps * tiles * height
            block = block.reshape(image.groups, -1)
            packed[:, start : start + block.shape[1]] = block
        return [packed]

    def scratch_bytes(self, threads: int) -> int:
        team = self._team(threads)
        return team * self._thread_scratch(_blocking(self.image, self.tile, team))

    def _thread_scratch(self, blocking: _Blocking) -> int:
        return blocking.panels_per_block * _panel_bytes(self.image, self.tile)

    def _team(self, threads: int) -> int:
        """How many of the threads are worth calling."""
        return threads if self.estimate > WORTH_SHARING else 1

    def build(self, threads: int) -> tuple[Step, ...]:
        if self.problem.outputs[0].size == 0:
            return ()
        team = self._team(threads)
        block, epilogue = self._arguments(_blocking(self.image, self.tile, team))
        name = f"convolution_{self.tile.height}x{self.tile.width}"
        text = kernel_text(
            block,
            _lines(self.tile, epilogue),
            (*VOCABULARY, "shares"),
            epilogue.functions(),
        )
        entry = source.build(name, text)
        return (Step(entry, (*block.values, *epilogue.immediates), team > 1, block.tasks),)

    def _arguments(self, blocking: _Blocking) -> tuple[Arguments, Epilogue]:
        image, block = self.image, Arguments()
        scratch = self._thread_scratch(blocking)
        values: dict[str, Argument] = {
            "x": Input(0), "weight": Packed(0), "y": Output(0), "scratch": Scratch(),
            "pack": source.shared(panel.pack_taps).address,
            "thread_scratch": scratch, "panel_bytes": scratch // blocking.panels_per_block,
            "groups": image.groups, "channels": image.channels, "outputs": image.outputs,
            "height": image.size[0], "width": image.size[1],
            "plane": 4 * image.plane, "out_plane": 4 * image.out_plane,
            "out_width": image.out_size[1], "pixels": image.pixels,
            "kernel_height": image.kernel[0], "kernel_width": image.kernel[1],
            "stride_height": image.stride[0], "stride_width": image.stride[1],
            "dilation_height": image.dilation[0], "dilation_width": image.dilation[1],
            "top": image.start[0], "left": image.start[1],
            "vectors": blocking.vectors, "panels": blocking.panels,
            "extra_columns": blocking.columns,
            "shares": panel_shares(_blocks_cycles(image, self.tile, blocking)),
            "places": image.batch * image.groups,
            "tiles": blocking.tiles, "depth_channels": blocking.depth_channels,
            "pixel_blocks": blocking.pixel_blocks, "parts": blocking.parts,
            "tasks": image.batch * image.groups * blocking.pixel_blocks * blocking.parts,
        }  # fmt: skip
        block.add_all(values)
        return block, image_epilogue(self.problem, image, block)


@dataclass(frozen=True)
class ProductCandidate(Candidate):
    """The convolution of images as large as the kernel, which is a linear layer."""

    product: Candidate

    def pack(self, constants: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        _, weight, *others = constants
        assert weight is not None
        return self.product.pack([None, weight.reshape(weight.shape[0], -1), *others])

    def scratch_bytes(self, threads: int) -> int:
        return self.product.scratch_bytes(threads)

    def build(self, threads: int) -> tuple[Step, ...]:
        return self.product.build(threads)


@register(ConvolutionProblem)
def candidates(problem: ConvolutionProblem) -> list[Candidate]:
    """Register tiles of a few shapes, for float32 in dense or padded planes."""
    problem.check()
    image = image_of(problem, padded=True)
    if image is None:
        return []
    found: list[Candidate] = []
    for tile in TILES:
        cycles = _cycles(image, tile, _blocking(image, tile, 1), 1)
        name = f"convolution {tile}"
        found.append(ConvolutionCandidate(name, problem, cycles / CYCLES_PER_SECOND, image, tile))
    whole = image.size == image.kernel and image.start == (0, 0) and image.dilation == (1, 1)
    if whole and image.pixels == image.groups == 1 and image_of(problem) is not None:
        linear = _linear(problem, image)
        for product in matmul.candidates(linear):
            name = f"convolution as {product.kernel}"
            found.append(ProductCandidate(name, problem, product.estimate, product))
    return found


def _linear(problem: ConvolutionProblem, image: Image) -> MatmulProblem:
    """The convolution of images as large as the kernel."""
    depth = image.channels * image.taps
    rank = len(problem.outputs[0].shape)
    extras = []
    for extra in problem.inputs[2:]:
        aligned = (1,) * (rank - len(extra.shape)) + extra.shape
        shape = extra.shape if len(extra.shape) == 1 else aligned[:2]
        extras.append(Operand.plain(extra.dtype, shape))
    weight = ConstantOperand((image.outputs, depth), Layout.plain("float32", 2))
    x, y = (Operand.plain("float32", (image.batch, columns)) for columns in (depth, image.outputs))
    return MatmulProblem((x, weight, *extras), (y,), (False, True), problem.epilogue)


def _depth_channels(image: Image) -> int:
    """Input channels of one block of depth."""
    blocks = math.ceil(image.channels * image.taps / DEPTH)
    return math.ceil(image.channels / min(blocks, image.channels))


@functools.cache
def _blocking(image: Image, tile: TileShape, threads: int) -> _Blocking:
    """The cut with the shortest time for the thread that has most to do."""
    return min(_cuts(image, tile, threads), key=lambda cut: _cycles(image, tile, cut, threads))


def _panel_bytes(image: Image, tile: TileShape) -> int:
    """Scratch memory of one panel: its vectors, and one column more, stored in whole vectors."""
    depth = _depth_channels(image) * image.taps
    column = math.ceil((depth + LANES) / LANES) if tile.takes_column else 0
    return 4 * LANES * (depth * tile.width + column)


def _cuts(image: Image, tile: TileShape, threads: int) -> Iterator[_Blocking]:
    panel_pixels = tile.width * LANES
    panels, columns = divmod(image.pixels, panel_pixels)
    # A few pixels beyond whole panels are cheaper as columns of their own than as vectors.
    if not tile.takes_column or columns > min(panels, tile.height - 1):
        panels, columns = math.ceil(image.pixels / panel_pixels), 0
    vectors = math.ceil((image.pixels - columns) / LANES)
    tiles = math.ceil(image.outputs / tile.height)
    least = math.ceil(panels / max(_PANEL_BYTES // _panel_bytes(image, tile), 1))
    for pixel_blocks in {least, math.ceil(least / threads) * threads, 2 * least}:
        yield _Blocking(
            vectors, columns, panels, tiles, _depth_channels(image), min(pixel_blocks, panels)
        )


def _cycles(image: Image, tile: TileShape, cut: _Blocking, threads: int) -> float:
    """Cycles of the thread that has most to do, roughly."""
    blocks = image.batch * image.groups * cut.pixel_blocks
    tasks = math.ceil(blocks * cut.parts / threads)
    share = cut.panels_per_block / cut.panels
    vectors = math.ceil(cut.vectors * share)
    copy, product = _block_cycles(image, tile, cut.tiles, vectors, cut.columns * share)
    return math.ceil(tasks / cut.parts) * copy + tasks / cut.parts * product


def _blocks_cycles(image: Image, tile: TileShape, cut: _Blocking) -> Iterator[tuple[float, float]]:
    """`_block_cycles` of each block of pixels."""
    for number in range(cut.pixel_blocks):
        first, last = (block * cut.panels // cut.pixel_blocks for block in (number, number + 1))
        vectors = last * cut.vectors // cut.panels - first * cut.vectors // cut.panels
        columns = min(last, cut.columns) - min(first, cut.columns)
        yield _block_cycles(image, tile, cut.tiles, vectors, columns)


def _block_cycles(
    image: Image, tile: TileShape, tiles: int, vectors: int, columns: float
) -> tuple[float, float]:
    """Cycles of a block of pixels, roughly: to copy it, and of all its tasks."""
    depth = image.channels * image.taps
    copy = vectors * depth * pack_cycles(image) + 200
    steps = vectors * tile.cycles / tile.width + columns / 2
    read = 4 * tile.height * depth / _WEIGHT_BYTES_PER_CYCLE
    return copy, tiles * (steps * depth + read + 3 * tile.height * vectors)


def pack_cycles(image: Image) -> float:
    """Cycles to copy one vector of a panel: rows of the image that end in it are pieces, if they
    are not as long as those of the output."""
    if image.stride == (1, 1) and image.size[1] == image.out_size[1]:
        return _PACK_CYCLES
    piece = _PACK_CYCLES if image.stride[1] == 1 else _PACK_STRIDED_CYCLES
    return piece * (1 + min(LANES, image.pixels) / image.out_size[1])


def _lines(tile: TileShape, epilogue: Epilogue) -> list[str]:
    """The kernel's body."""
    column = "column" if tile.takes_column else ""
    multiply = multiply_lines(tile, "4", f"{4 * tile.height}", padded=True, column=column)
    parts = {
        "prologue": epilogue.prologue(),
        "share": share_lines("pixel_blocks"),
        "vectors": PANEL,
        "multiply": multiply,
        "epilogue": [*epilogue_starts(epilogue), *epilogue.lines()],
    }
    return fill(_BODY, parts, {"HEIGHT": tile.height, "WIDTH": tile.width})


_BODY = """
<prologue>
taps = kernel_height * kernel_width
c_row = out_plane
b_step = 4 * WIDTH * LANES
own_scratch = scratch + thread * thread_scratch
<share>
while task < stop:
    first_part = task % parts
    last_part = min(parts, first_part + stop - task)
    place = task // parts // pixel_blocks
    pixel_block = task // parts - place * pixel_blocks
    image = place // groups
    group = place - image * groups
    first_panel = pixel_block * panels // pixel_blocks
    last_panel = (pixel_block + 1) * panels // pixel_blocks
    first_tile = first_part * tiles // parts
    last_tile = last_part * tiles // parts
    first_channel = 0
    while first_channel < channels:
        block_channels = min(channels - first_channel, depth_channels)
        depth = block_channels * taps
        source = x + (place * channels + first_channel) * plane
        block_weight = weight + 4 * HEIGHT * taps * tiles * (group * channels + first_channel)
        b = own_scratch
        panel = first_panel
        while panel < last_panel:
            <vectors>
            start = start * LANES + min(panel, extra_columns)
            call_kernel(pack, (
                b, b_step, source, plane, block_channels, height, width, out_width, pixels,
                start, filled, kernel_height, kernel_width, stride_height, stride_width,
                dilation_height, dilation_width, top, left, height, 0,
            ))
            if panel < extra_columns:
                start += filled * LANES
                call_kernel(pack, (
                    b + depth * b_step, 4, source, plane, block_channels, height, width,
                    out_width, start + 1, start, 1, kernel_height, kernel_width,
                    stride_height, stride_width, dilation_height, dilation_width, top, left,
                    height, 0,
                ))
            b += panel_bytes
            panel += 1
        tile = first_tile
        while tile < last_tile:
            channel = group * outputs + tile * HEIGHT
            rows = min(outputs - tile * HEIGHT, HEIGHT)
            a = block_weight + 4 * HEIGHT * depth * tile
            b = own_scratch
            panel = first_panel
            while panel < last_panel:
                <vectors>
                start = start * LANES + min(panel, extra_columns)
                column = b + depth * b_step if panel < extra_columns else 0
                columns = min(pixels - start, filled * LANES + (1 if column != 0 else 0))
                c = y + (image * groups * outputs + channel) * out_plane + 4 * start
                accumulate = first_channel > 0
                <multiply>
                if first_channel + depth_channels >= channels:
                    <epilogue>
                b += panel_bytes
                panel += 1
            tile += 1
        first_channel += depth_channels
    task += last_part - first_part
"""
