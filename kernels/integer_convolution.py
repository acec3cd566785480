"""Convolutions of uint8 images with int8 weights, any groups.

Pixels are in the lanes of vectors, four channels of each in a word; weights are broadcast as words
of four input channels, and each instruction multiplies and adds four pairs per lane. A register
tile of output channels by vectors of pixels passes through the whole depth, so that sums never
leave the registers. Convolutions of single pixels read the image where it lies; what others need is
copied into a panel first, where padded pixels are the zero point, so that every stride, dilation
and padding is the same product. The zero point of the input is folded into the bias.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.kernels import source
from graphopt.kernels.integer_problems import NUMBERS, IntegerConvolutionProblem
from graphopt.kernels.loops import SHARE, Arguments, indent, kernel_text
from graphopt.kernels.operand import GROUP
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
from graphopt.kernels.requantization import Requantization, pack_numbers
from graphopt.kernels.simd import LANES
from graphopt.kernels.tile import CYCLES_PER_SECOND, PARTS, WORTH_SHARING, TileShape, fill

VOCABULARY = ("simd", "words")
TILE = TileShape(4, 4) if LANES == 16 else TileShape(4, 2)
"""Output channels by vectors of pixels that fit the registers. Larger ones gain nothing."""

_PANEL_BYTES = 2**18
"""Bytes of the panels of one task."""
_FIRST_CACHE = 24 * 1024
_MOST_DEPTH = 2**31 // (255 * 128)


@dataclass(frozen=True)
class IntegerImage:
    """A convolution as its kernels see it: groups that divide into words of channels.

    ``channels`` and ``outputs`` are those of one group. ``merged`` of the problem's groups are one
    group here, whose weight is zero between them.
    """

    batch: int
    groups: int
    merged: int
    channels: int
    outputs: int
    size: tuple[int, int]
    out_size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    start: tuple[int, int]

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    @property
    def words(self) -> int:
        """Words of input channels of one group."""
        return math.ceil(self.channels / GROUP)

    @property
    def depth(self) -> int:
        """Words that are multiplied for one result."""
        return self.words * self.taps

    @property
    def pixels(self) -> int:
        return math.prod(self.out_size)

    @property
    def vectors(self) -> int:
        """Vectors of output pixels, padded ones included."""
        return math.ceil(self.pixels / LANES)

    @property
    def is_direct(self) -> bool:
        """Whether the image can be read where it lies."""
        # Padding after the image can make up for a stride.
        unmoved = self.size == self.out_size and self.start == (0, 0) and self.stride == (1, 1)
        return self.taps == 1 and unmoved and self.pixels > 1

    def matrix(self, weight: np.ndarray) -> np.ndarray:
        """The weight as (groups, outputs, kernel position, words of channels, 4)."""
        outputs, channels = self.outputs // self.merged, weight.shape[1]
        shape = (self.groups, self.merged, outputs, self.merged, channels, self.taps)
        whole = np.zeros(shape, np.int8)
        own = weight.reshape(self.groups, self.merged, outputs, channels, self.taps)
        for part in range(self.merged):
            whole[:, part, :, part] = own[:, part]
        rows = whole.reshape(self.groups, self.outputs, self.channels, self.taps)
        padded = np.zeros((self.groups, self.outputs, self.taps, self.words * GROUP), np.int8)
        padded[..., : self.channels] = rows.swapaxes(2, 3)
        return padded.reshape(*padded.shape[:3], self.words, GROUP)


def integer_image(problem: IntegerConvolutionProblem) -> IntegerImage | None:
    """The problem for kernels, or None where no kernel solves it."""
    problem.check()
    x, weight, *_ = problem.inputs
    (y,) = problem.outputs
    if 0 in y.shape or 0 in weight.shape:
        return None
    channels, outputs = weight.shape[1], weight.shape[0] // problem.groups
    merged = problem.groups
    for count in (1, 2, 4):
        whole = (count * channels) % GROUP == 0 and (count * outputs) % GROUP == 0
        if problem.groups % count == 0 and (whole or problem.groups == 1):
            merged = count
            break
    image = IntegerImage(
        batch=x.shape[0],
        groups=problem.groups // merged,
        merged=merged,
        channels=channels * merged,
        outputs=outputs * merged,
        size=(x.shape[2], x.shape[3]),
        out_size=(y.shape[2], y.shape[3]),
        kernel=(weight.shape[2], weight.shape[3]),
        stride=problem.stride,
        dilation=problem.dilation,
        start=(problem.padding[0][0], problem.padding[1][0]),
    )
    return image if channels * image.taps < _MOST_DEPTH else None


def corrected_bias(weight: np.ndarray, bias: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """The bias less what the zero point of the input adds to every sum; int32, modulo 2**32."""
    zero_point = int(numbers[NUMBERS.index("x_zero_point")])
    sums = weight.reshape(len(weight), -1).sum(axis=1, dtype=np.int64)
    return (bias.astype(np.int64) - zero_point * sums).astype(np.int32)


def finishing(
    image: IntegerImage, height: int, constants: Sequence[np.ndarray | None]
) -> np.ndarray:
    """For tiles of ``height`` output channels: the biases of each, then its multipliers."""
    _, weight, multiplier, bias, numbers = constants[:5]
    assert weight is not None
    assert multiplier is not None
    assert bias is not None
    assert numbers is not None
    tiles = math.ceil(image.outputs / height)
    packed = aligned_empty((image.groups, tiles, 2, height), np.int32)
    for place, row in enumerate((corrected_bias(weight, bias, numbers), multiplier.view(np.int32))):
        whole = np.zeros((image.groups, tiles * height), np.int32)
        whole[:, : image.outputs] = row.reshape(image.groups, -1)
        packed[:, :, place] = whole.reshape(image.groups, tiles, height)
    return packed


def requantization(problem: IntegerConvolutionProblem) -> Requantization:
    """How the sums of a problem are finished."""
    (y,) = problem.outputs
    floating = y.dtype == "float32"
    return Requantization(problem.has_residual, floating, not floating and y.memory[2] == 1)


@dataclass(frozen=True)
class IntegerConvolutionCandidate(Candidate):
    """A shape of register tile.

    A task is one block of pixels by one of the parts of the tiles of one group of one image; a
    thread copies the panels of a block once for all parts that are its share.
    """

    problem: IntegerConvolutionProblem
    image: IntegerImage
    tile: TileShape

    @property
    def _tiles(self) -> int:
        return math.ceil(self.image.outputs / self.tile.height)

    def packing(self) -> tuple[TileShape]:
        return (self.tile,)

    def pack(self, constants: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        weight, numbers = constants[1], constants[4]
        assert weight is not None
        assert numbers is not None
        image, height = self.image, self.tile.height
        words = image.matrix(weight).view(np.int32).reshape(image.groups, image.outputs, -1)
        rows = np.zeros((image.groups, self._tiles * height, image.depth), np.int32)
        rows[:, : image.outputs] = words
        packed = aligned_empty((image.groups, self._tiles, image.depth, height), np.int32)
        packed[...] = rows.reshape(image.groups, self._tiles, height, -1).swapaxes(2, 3)
        return [packed, finishing(image, height, constants), pack_numbers(numbers)]

    def scratch_bytes(self, threads: int) -> int:
        team = self._team(threads)
        return team * self._thread_scratch(_pixel_blocks(self.image, self.tile, team))

    def _thread_scratch(self, pixel_blocks: int) -> int:
        if self.image.is_direct:
            return 0
        vectors = math.ceil(self.image.vectors / pixel_blocks)
        return math.ceil(vectors / self.tile.width) * _panel_bytes(self.image, self.tile)

    def _team(self, threads: int) -> int:
        return threads if self.estimate > WORTH_SHARING else 1

    def build(self, threads: int) -> tuple[Step, ...]:
        team = self._team(threads)
        finish = requantization(self.problem)
        block = self._arguments(_pixel_blocks(self.image, self.tile, team))
        text = kernel_text(block, _lines(self.tile, finish), VOCABULARY)
        entry = source.build(f"integer_convolution_{self.tile}{finish.name}", text)
        return (Step(entry, tuple(block.values), team > 1, block.tasks),)

    def _arguments(self, pixel_blocks: int) -> Arguments:
        image, tile, block = self.image, self.tile, Arguments()
        x, y = self.problem.inputs[0], self.problem.outputs[0]
        direct, floating = image.is_direct, y.dtype == "float32"
        plane, panel = GROUP * x.memory[2], _panel_bytes(image, tile)
        parts = min(self._tiles, PARTS)
        vector = 4 * LANES
        values: dict[str, Argument] = {
            "x": Input(0), "weight": Packed(0), "finish": Packed(1), "numbers": Packed(2),
            "y": Output(0), "residual": Input(5) if self.problem.has_residual else 0,
            "scratch": Scratch() if not direct else 0,
            "thread_scratch": self._thread_scratch(pixel_blocks),
            "direct": int(direct), "b_step": plane if direct else vector * tile.width,
            "b_panel": vector * tile.width if direct else panel,
            "groups": image.groups, "words": image.words, "outputs": image.outputs,
            "depth": image.depth, "plane": plane, "image_bytes": x.bytes // image.batch,
            "out_plane": 4 * image.pixels if floating else GROUP * y.memory[2],
            "out_image": y.bytes // image.batch,
            "height": image.size[0], "width": image.size[1], "out_width": image.out_size[1],
            "pixels": image.pixels, "vectors": image.vectors,
            "kernel_height": image.kernel[0], "kernel_width": image.kernel[1],
            "stride_height": image.stride[0], "stride_width": image.stride[1],
            "dilation_height": image.dilation[0], "dilation_width": image.dilation[1],
            "top": image.start[0], "left": image.start[1],
            "tiles": self._tiles, "parts": parts, "pixel_blocks": pixel_blocks,
            "tasks": image.batch * image.groups * pixel_blocks * parts,
        }  # fmt: skip
        block.add_all(values)
        return block


@register(IntegerConvolutionProblem)
def candidates(problem: IntegerConvolutionProblem) -> list[Candidate]:
    """A register tile."""
    image = integer_image(problem)
    if image is None:
        return []
    seconds = _cycles(image, TILE, _pixel_blocks(image, TILE, 1), 1) / CYCLES_PER_SECOND
    name = f"integer convolution {TILE}"
    return [IntegerConvolutionCandidate(name, problem, seconds, image, TILE)]


def _panel_bytes(image: IntegerImage, tile: TileShape) -> int:
    return 4 * LANES * tile.width * image.depth


@functools.cache
def _pixel_blocks(image: IntegerImage, tile: TileShape, threads: int) -> int:
    """The number with the shortest time for the thread that has most to do."""
    panels = math.ceil(image.vectors / tile.width)
    least = math.ceil(panels / max(_PANEL_BYTES // _panel_bytes(image, tile), 1))
    numbers = {least, min(math.ceil(least / threads) * threads, panels), panels}
    return min(numbers, key=lambda number: _cycles(image, tile, number, threads))


def _cycles(image: IntegerImage, tile: TileShape, pixel_blocks: int, threads: int) -> float:
    """Cycles of the thread that has most to do, roughly."""
    vectors = math.ceil(image.vectors / pixel_blocks)
    tiles = math.ceil(image.outputs / tile.height)
    parts = min(tiles, PARTS)
    tasks = math.ceil(image.batch * image.groups * pixel_blocks * parts / threads)
    whole, rest = divmod(vectors, tile.width)
    copy = 100.0
    if not image.is_direct:
        pieces = vectors * (1 + min(LANES, image.pixels) / image.out_size[1])
        copy += pieces * image.taps * (8 + 2 * image.words)
    panel = _panel_bytes(image, tile)
    # A panel that does not stay in the first cache is read at half a line per cycle.
    load = 1.0 if panel <= _FIRST_CACHE else 2.0
    step = max(tile.height * tile.width, load * tile.width + tile.height / 2)
    single = max(tile.height, load + tile.height / 2) * 1.1
    product = tiles * image.depth * (whole * step + rest * single)
    finish = tiles * (6 * tile.height * vectors + 12 * (whole + rest))
    # Weights that come from the second cache once for every block of pixels.
    weights = tiles * tile.height * 4 * image.depth / 32
    return math.ceil(tasks / parts) * copy + tasks / parts * (product + finish + weights)


def _lines(tile: TileShape, finish: Requantization) -> list[str]:
    """The kernel's body."""
    parts = {
        "prologue": finish.prologue(),
        "share": SHARE,
        "target": target_lines(finish),
        "whole": _tile_lines(tile.height, tile.width, finish),
        "single": _tile_lines(tile.height, 1, finish),
    }
    return fill(_BODY, parts, {"HEIGHT": tile.height, "WIDTH": tile.width})


def target_lines(finish: Requantization) -> list[str]:
    """Lines that find where the results of a tile go."""
    lines = ["columns = pixels - vector * LANES"]
    if finish.floating:
        return [
            *lines,
            "c = y + (image * groups * outputs + channel) * out_plane + 4 * LANES * vector",
        ]
    offset = f"image * out_image + channel // {GROUP} * out_plane + 4 * LANES * vector"
    lines.append(f"c = y + {offset}")
    return [*lines, f"e = residual + {offset}"] if finish.residual else lines


def _tile_lines(height: int, width: int, finish: Requantization) -> list[str]:
    """Lines that multiply the tile at ``a`` with the vectors at ``b``, and finish it."""
    rows, columns = range(height), range(width)
    products = [f"v{column} = load(place + {4 * LANES * column}, INT32)" for column in columns]
    for row in rows:
        products.append(f"w = broadcast(read(q + {4 * row}, INT32), INT32)")
        products += [f"s{row}_{column} = dot(v{column}, w, s{row}_{column})" for column in columns]
    bias = "broadcast(read(own + {}, INT32), INT32)"
    begin = [f"s{row}_{column} = {bias.format(4 * row)}" for row in rows for column in columns]
    parts = {"begin": begin, "products": products, "end": finish_lines(height, width, finish)}
    return fill(_TILE, parts, {"HEIGHT": height})


def finish_lines(height: int, width: int, finish: Requantization) -> list[str]:
    """Lines that finish the sums of a tile, in the variables ``s{row}_{vector}``.

    ``own`` is where its biases and multipliers are; they follow `target_lines`.
    """
    end: list[str] = []
    for first in range(0, height, GROUP):
        lines = [
            f"m{row} = broadcast(read(own + {4 * (height + first + row)}, FLOAT32), FLOAT32)"
            for row in range(GROUP)
        ]
        sums = [[f"s{first + row}_{column}" for row in range(GROUP)] for column in range(width)]
        lines += finish.tile_lines(sums, first)
        if first:
            step = [f"c += {GROUP} * out_plane"] if finish.floating else ["c += out_plane"]
            more = ["e += out_plane"] if finish.residual else []
            lines = [f"if rows > {first}:", *indent(1, [*step, *more, *lines])]
        end += lines
    return end


_TILE = """
q = a
place = b
<begin>
stop_step = a + depth * 4 * HEIGHT
while q < stop_step:
    prefetch(q + 4096)
    <products>
    q += 4 * HEIGHT
    place += b_step
<end>
"""

_BODY = """
<prologue>
own_scratch = scratch + thread * thread_scratch
<share>
while task < stop:
    first_part = task % parts
    last_part = min(parts, first_part + stop - task)
    number = task // parts // pixel_blocks
    pixel_block = task // parts - number * pixel_blocks
    image = number // groups
    group = number - image * groups
    first_vector = pixel_block * vectors // pixel_blocks
    last_vector = (pixel_block + 1) * vectors // pixel_blocks
    first_tile = first_part * tiles // parts
    last_tile = last_part * tiles // parts
    origin = x + image * image_bytes + group * words * plane
    start = origin + 4 * LANES * first_vector
    if direct == 0:
        start = own_scratch
        b = own_scratch
        vector = first_vector
        while vector < last_vector:
            pack_words(
                b, b_step, origin, plane, words, height, width, out_width, pixels,
                vector * LANES, min(last_vector - vector, WIDTH), kernel_height, kernel_width,
                stride_height, stride_width, dilation_height, dilation_width, top, left, outside,
            )
            b += b_panel
            vector += WIDTH
    tile = first_tile
    while tile < last_tile:
        a = weight + 4 * HEIGHT * depth * (group * tiles + tile)
        own = finish + 8 * HEIGHT * (group * tiles + tile)
        channel = group * outputs + tile * HEIGHT
        rows = outputs - tile * HEIGHT
        b = start
        vector = first_vector
        while vector < last_vector:
            <target>
            if last_vector - vector >= WIDTH:
                <whole>
                b += b_panel
                vector += WIDTH
            else:
                <single>
                b += 4 * LANES
                vector += 1
        tile += 1
    task += last_part - first_part
"""
