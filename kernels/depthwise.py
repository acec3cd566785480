"""Depthwise convolutions in float32: every output channel sees one input channel.

They solve the `ConvolutionProblem` whose groups have one input channel each. Output pixels are in
the lanes of vectors. A strip of output rows is computed straight from the image: each input row is
loaded once per horizontal position of the kernel, with masks for what lies outside, and multiplied
into all output rows that it belongs to. The last vector of a row ends with it, and overlaps the one
before, so that all are stored whole where the output is not narrower than a vector. Large strides
and dilations are left to the sliding windows of `window`, which copy the image with its padding
first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.kernels import source
from graphopt.kernels.epilogue import Epilogue
from graphopt.kernels.image import Image, image_of
from graphopt.kernels.loops import SHARE, Arguments, indent, kernel_text
from graphopt.kernels.problem import ConvolutionProblem
from graphopt.kernels.register import VECTORS_PER_CYCLE
from graphopt.kernels.registry import Argument, Candidate, Input, Output, Step, register
from graphopt.kernels.simd import LANES
from graphopt.kernels.tile import (
    CYCLES_PER_SECOND,
    VOCABULARY,
    WORTH_SHARING,
    fill,
)
from graphopt.kernels.window import Extras, Windows, bands_of

_STRIPS = (1, 4, 7)
"""Output rows made at once; the images of most networks are a multiple of 7 high."""
_WINDOW_STRIPS = (4, 8)
_MOST_TAPS = 49
"""Positions of a kernel for which code is written out."""


@dataclass(frozen=True)
class StripCandidate(Candidate):
    """Strips of so many output rows, for strides of 1 or 2 and no dilation."""

    problem: ConvolutionProblem
    image: Image
    strip: int

    def packing(self) -> tuple[object, ...]:
        return ()

    @property
    def _planes(self) -> int:
        return self.image.batch * self.image.groups * self.image.outputs

    @property
    def _strips(self) -> int:
        return math.ceil(self.image.out_size[0] / self.strip)

    def build(self, threads: int) -> tuple[Step, ...]:
        image, block = self.image, Arguments()
        extras = Extras.of(self.problem.epilogue, self.problem.inputs, image.extras, first=2)
        bands = bands_of(self._planes, self._strips)
        values: dict[str, Argument] = {
            "x": Input(0), "weight": Input(1), "y": Output(0),
            "height": image.size[0], "width": image.size[1],
            "out_height": image.out_size[0], "out_width": image.out_size[1],
            "top": image.start[0], "left": image.start[1],
            "plane": 4 * image.plane, "out_plane": 4 * image.out_plane,
            "channels": image.groups * image.outputs,
            "strips": self._strips, "bands": bands, "tasks": self._planes * bands,
        }  # fmt: skip
        for key, argument in (values | extras.arguments(image.out_size[1])).items():
            block.add(key, argument)
        epilogue = Epilogue(extras.expression, extras.operands, len(block.names))
        kernel = "x".join(map(str, image.kernel))
        name = f"depthwise_{kernel}_{image.stride[0]}{image.stride[1]}_{self.strip}"
        lines = _strip_lines(image, self.strip, extras, epilogue)
        text = kernel_text(block, lines, VOCABULARY, epilogue.functions())
        parallel = threads > 1 and self.estimate > WORTH_SHARING
        arguments = (*block.values, *epilogue.immediates)
        return (Step(source.build(name, text), arguments, parallel, block.tasks),)


def _strip_cycles(image: Image, strip: int) -> float:
    """Cycles of all tasks together, roughly."""
    strips = math.ceil(image.out_size[0] / strip)
    vectors = math.ceil(image.out_size[1] / LANES)
    loads = image.rows.needed(strip) * image.kernel[1] * (1 if image.stride[1] == 1 else 3)
    work = (loads + strip * (image.taps + 4)) / VECTORS_PER_CYCLE + 20
    return image.batch * image.groups * image.outputs * (strips * vectors * work + 30)


def _strip_lines(image: Image, strip: int, extras: Extras, epilogue: Epilogue) -> list[str]:
    """The kernel's body."""
    taps = range(image.taps)
    whole = image.out_size[1] >= LANES
    finish = []
    for row in range(strip):
        step = [
            f"c += {4} * out_width",
            *(f"e{i} += e{i}_row" for i in range(len(extras.operands))),
        ]
        stored = epilogue.register_lines(f"s{row}", 0, "" if whole else "present")
        inner = [*(step if row else []), *stored]
        finish += [f"if rows > {row}:", *indent(1, inner)] if row else inner
    parts = {
        "prologue": epilogue.prologue(),
        "share": SHARE,
        "weights": [f"w{t} = broadcast(read(own + {4 * t}, FLOAT32), FLOAT32)" for t in taps],
        "masks": [line for read in _reads(image) for line in _mask_lines(image, *read)],
        "place": _place_lines(whole),
        "zero": [f"s{row} = broadcast(0.0, FLOAT32)" for row in range(strip)],
        "rows": [line for r in range(image.rows.needed(strip)) for line in _row(image, strip, r)],
        "starts": [
            f"e{i} = extra{i} + image * extra{i}_image + channel * extra{i}_channel"
            + (f" + row * e{i}_row + {extra.width} * place" if extra.along else "")
            for i, extra in enumerate(extras.operands)
        ],
        "constants": epilogue.row_lines(),
        "finish": finish,
    }
    sizes = {
        "STRIP": strip,
        "TAPS": image.taps,
        "DOWN": image.stride[0],
        "ACROSS": image.stride[1],
        "RESULTS": image.outputs,
    }
    return fill(_BODY, parts, sizes)


def _place_lines(whole: bool) -> list[str]:
    """Lines that say which columns of the output a vector has. If all vectors are ``whole``, the
    last ends with the row: some pixels are computed twice."""
    if whole:
        return ["place = min(column, out_width - LANES)"]
    return ["place = column", "present = mask_first(out_width - column, FLOAT32)"]


def _reads(image: Image) -> list[tuple[int, int]]:
    """The positions of a kernel's row that are read together: the first, and how many."""
    width = image.kernel[1]
    whole = width // 3 * 3 if image.stride[1] == 2 else 0
    return [*((x, 3) for x in range(0, whole, 3)), *((x, 1) for x in range(whole, width))]


def _mask_lines(image: Image, x: int, count: int) -> list[str]:
    """Lines that make the masks of what is read for ``count`` positions from ``x`` on."""
    names = "m" if image.stride[1] == 1 else "mh" if count == 1 else "mhl"
    return [
        f"{name}{x} = mask_between(first + {x} + {vector} * LANES, 1, width, FLOAT32)"
        for vector, name in enumerate(names)
    ]


def _row(image: Image, strip: int, number: int) -> list[str]:
    """Lines that multiply an input row, ``number`` rows below the strip's first."""
    # The next vector's columns are wanted after all rows: too far apart for the CPU to foresee.
    ahead = f"prefetch(line + {4 * LANES * image.stride[1]})"
    lines = [f"line = start + {4 * number} * width", ahead]
    for first, count in _reads(image):
        operands = f"line + {4 * first}, FLOAT32, m{first}"
        if image.stride[1] == 1:
            lines.append(f"pixels{first} = load_masked({operands})")
        elif count == 1:
            lines.append(f"pixels{first} = load_even({operands}, h{first})")
        else:
            values = ", ".join(f"pixels{first + more}" for more in range(count))
            lines.append(f"{values} = load_three({operands}, h{first}, l{first})")
        for x in range(first, first + count):
            for row in range(strip):
                y = number - row * image.stride[0]
                if 0 <= y < image.kernel[0]:
                    lines.append(f"s{row} = fma(pixels{x}, w{y * image.kernel[1] + x}, s{row})")
    return [f"if 0 <= top_row + {number} < height:", *indent(1, lines)]


_BODY = """
<prologue>
<share>
image_and_band = task // channels
channel = task - image_and_band * channels
while task < stop:
    image = image_and_band // bands
    band = image_and_band - image * bands
    first_row = band * strips // bands * STRIP
    last_row = min((band + 1) * strips // bands * STRIP, out_height)
    last_channel = min(channels, channel + stop - task)
    task += last_channel - channel
    while channel < last_channel:
        number = image * channels + channel
        origin = x + number // RESULTS * plane
        own = weight + 4 * TAPS * channel
        <weights>
        column = 0
        while column < out_width:
            <place>
            first = place * ACROSS - left
            <masks>
            row = first_row
            while row < last_row:
                rows = min(last_row - row, STRIP)
                top_row = row * DOWN - top
                start = origin + 4 * (top_row * width + first)
                <zero>
                <rows>
                c = y + number * out_plane + 4 * (row * out_width + place)
                <starts>
                <constants>
                <finish>
                row += STRIP
            column += LANES
        channel += 1
    channel = 0
    image_and_band += 1
"""


@dataclass(frozen=True)
class WindowCandidate(Candidate):
    """Windows in strips of so many rows."""

    problem: ConvolutionProblem
    image: Image
    windows: Windows

    def pack(self, constants: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        return [self.windows.offsets()]

    def scratch_bytes(self, threads: int) -> int:
        return threads * self.windows.scratch_bytes

    def build(self, threads: int) -> tuple[Step, ...]:
        extras = Extras.of(self.problem.epilogue, self.problem.inputs, self.image.extras, first=2)
        parallel = threads > 1 and self.estimate > WORTH_SHARING
        return (self.windows.step(extras, parallel),)


@register(ConvolutionProblem)
def candidates(problem: ConvolutionProblem) -> list[Candidate]:
    """Strips straight from the image, else windows, where every group has one input channel."""
    problem.check()
    image = image_of(problem, padded=True)
    if image is None or image.channels != 1 or problem.outputs[0].size == 0:
        return []
    if max(image.stride) <= 2 and image.dilation == (1, 1) and image.taps <= _MOST_TAPS:
        strip = min(_STRIPS, key=lambda rows: _strip_cycles(image, rows))
        seconds = _strip_cycles(image, strip) / CYCLES_PER_SECOND
        return [StripCandidate(f"depthwise {strip} rows", problem, seconds, image, strip)]
    if image_of(problem) is None:
        return []  # windows know of no padded planes
    found: list[Candidate] = []
    for rows in _WINDOW_STRIPS if image.out_size[0] > 1 else (1,):
        windows = Windows(
            image.batch,
            image.groups,
            image.outputs,
            image.size,
            image.out_size,
            image.kernel,
            image.stride,
            image.dilation,
            image.start,
            rows,
        )
        seconds = windows.cycles / CYCLES_PER_SECOND
        name = f"depthwise window, {rows} rows"
        found.append(WindowCandidate(name, problem, seconds, image, windows))
    return found
