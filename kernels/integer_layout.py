"""Between float32 images and bytes whose channels are grouped, and bytes of another scale.

Sixteen pixels of four channels are a vector of words: quantizing reads four rows of floats for it,
dequantizing writes four.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.kernels import source
from graphopt.kernels.integer_problems import (
    DequantizeProblem,
    IntegerSumProblem,
    QuantizeProblem,
)
from graphopt.kernels.loops import SHARE, Arguments, indent, kernel_text
from graphopt.kernels.operand import GROUP, Layout, Operand
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
from graphopt.kernels.words import ROUNDING_BITS

VOCABULARY = ("simd", "words")


def _floats(values: Sequence[float]) -> np.ndarray:
    packed = aligned_empty((16,), np.float32)
    packed[...] = 0
    packed[: len(values)] = values
    return packed


def _offset(zero_point: int) -> int:
    """What turns the sum of four rounded numbers, shifted by a byte each, into their word."""
    return sum((zero_point - ROUNDING_BITS) << (8 * byte) for byte in range(GROUP)) % 2**32


@dataclass(frozen=True)
class ImageCandidate(Candidate):
    """Quantizes or dequantizes an image."""

    problem: QuantizeProblem | DequantizeProblem

    @property
    def _quantizes(self) -> bool:
        return isinstance(self.problem, QuantizeProblem)

    def packing(self) -> tuple[()]:
        return ()

    def pack(self, constants: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        parameters = constants[1]
        assert parameters is not None
        values = parameters.tolist()
        if not self._quantizes:
            return [_floats(values)]
        scale, zero_point, low, high = values
        packed = _floats([scale, low - zero_point, high - zero_point])
        packed.view(np.uint32)[3] = _offset(int(zero_point))
        return [packed]

    def build(self, threads: int) -> tuple[Step, ...]:
        x, y = self.problem.inputs[0], self.problem.outputs[0]
        words = (y if self._quantizes else x).memory
        pixels = math.prod(x.shape[2:])
        values: dict[str, Argument] = {
            "x": Input(0), "parameters": Packed(0), "y": Output(0),
            "channels": x.shape[1], "words": words[1], "pixels": pixels,
            "plane": GROUP * words[2], "tasks": x.shape[0] * words[1],
        }  # fmt: skip
        block = Arguments()
        block.add_all(values)
        name = "quantize_image" if self._quantizes else "dequantize_image"
        parts = {"share": SHARE}
        if self._quantizes:
            parts["word"] = [line for byte in range(GROUP) for line in _quantize_lines(byte)]
        else:
            parts["rows"] = [line for byte in range(GROUP) for line in _dequantize_lines(byte)]
        body = fill(_QUANTIZE if self._quantizes else _DEQUANTIZE, parts, {})
        entry = source.build(name, kernel_text(block, body, VOCABULARY))
        return (Step(entry, tuple(block.values), threads > 1 and self.estimate > WORTH_SHARING),)


def _quantize_lines(byte: int) -> list[str]:
    return [
        f"t = load_masked(origin + {byte} * step{byte} + 4 * start, FLOAT32, mask) / scale",
        # NaN becomes a number here, so that it does not spread to the other bytes of its word.
        "bits = rounded_bits(at_most(at_least(select(t == t, t, low), low), high))",
        f"word += bits * {256**byte}" if byte else "word = bits + offset",
    ]


def _dequantize_lines(byte: int) -> list[str]:
    lines = [
        f"value = (convert(unsigned_byte(word, {byte}), FLOAT32) - zero) * scale",
        f"store_first(origin + {byte} * row + 4 * start, value, mask)",
    ]
    return [f"if present > {byte}:", *indent(1, lines)] if byte else lines


_QUANTIZE = """
scale = broadcast(read(parameters, FLOAT32), FLOAT32)
low = broadcast(read(parameters + 4, FLOAT32), FLOAT32)
high = broadcast(read(parameters + 8, FLOAT32), FLOAT32)
offset = broadcast(read(parameters + 12, INT32), INT32)
row = 4 * pixels
<share>
while task < stop:
    image = task // words
    channel = 4 * (task - image * words)
    present = channels - channel
    origin = x + (image * channels + channel) * row
    # Channels that fill the last word up repeat its first one.
    step1 = row if present > 1 else 0
    step2 = row if present > 2 else 0
    step3 = row if present > 3 else 0
    step0 = 0
    target = y + task * plane
    start = 0
    while start < pixels:
        mask = mask_first(pixels - start, FLOAT32)
        <word>
        store_first(target + 4 * start, word, mask)
        start += LANES
    task += 1
"""

_DEQUANTIZE = """
scale = broadcast(read(parameters, FLOAT32), FLOAT32)
zero = broadcast(read(parameters + 4, FLOAT32), FLOAT32)
row = 4 * pixels
<share>
while task < stop:
    image = task // words
    channel = 4 * (task - image * words)
    present = channels - channel
    origin = y + (image * channels + channel) * row
    place = x + task * plane
    start = 0
    while start < pixels:
        mask = mask_first(pixels - start, FLOAT32)
        word = load_masked(place + 4 * start, INT32, mask)
        <rows>
        start += LANES
    task += 1
"""


@register(QuantizeProblem)
def quantize_candidates(problem: QuantizeProblem) -> list[Candidate]:
    """For any image."""
    return _image(problem, "quantize image", problem.inputs[0], problem.outputs[0], 20)


@register(DequantizeProblem)
def dequantize_candidates(problem: DequantizeProblem) -> list[Candidate]:
    """For any image."""
    return _image(problem, "dequantize image", problem.outputs[0], problem.inputs[0], 6)


def _image(
    problem: QuantizeProblem | DequantizeProblem,
    name: str,
    floats: Operand,
    words: Operand,
    cycles: float,
) -> list[Candidate]:
    rank = len(floats.shape)
    grouped = words.layout == Layout.grouped("uint8", rank)
    if rank < 2 or not grouped or floats.layout != Layout.plain("float32", rank):
        raise ValueError(f"{name}: the operands are {floats} and {words}")
    if 0 in floats.shape:
        return []
    seconds = cycles * math.ceil(floats.size / LANES) / CYCLES_PER_SECOND
    return [ImageCandidate(name, problem, seconds)]


@dataclass(frozen=True)
class SumCandidate(Candidate):
    """Adds images, or puts them side by side, word by word."""

    problem: IntegerSumProblem

    def packing(self) -> tuple[bool]:
        return (self.problem.concatenates,)

    def pack(self, constants: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        parameters = constants[-1]
        assert parameters is not None
        zero_point, low, high, *own = parameters.tolist()
        packed = []
        images = [own[i : i + 2] for i in range(0, len(own), 2)]
        for part in images if self.problem.concatenates else [own]:
            array = _floats([0, low - zero_point, high - zero_point, 0, *part])
            array.view(np.uint32)[3] = _offset(int(zero_point))
            packed.append(array)
        return packed

    def build(self, threads: int) -> tuple[Step, ...]:
        (y,) = self.problem.outputs
        parallel = threads > 1 and self.estimate > WORTH_SHARING
        numbers = range(len(self.problem.images))
        parts = [(index,) for index in numbers] if self.problem.concatenates else [tuple(numbers)]
        steps, done = [], 0
        for place, part in enumerate(parts):
            first = self.problem.images[part[0]]
            size = first.bytes // first.shape[0]
            values: dict[str, Argument] = {
                **{f"x{k}": Input(index) for k, index in enumerate(part)},
                "parameters": Packed(place), "y": Output(0), "start": done,
                "size": size, "y_image": y.bytes // y.shape[0], "images": y.shape[0],
                "tasks": math.ceil(size / (4 * LANES)) * y.shape[0],
            }  # fmt: skip
            block = Arguments()
            block.add_all(values)
            text = kernel_text(block, _sum_lines(len(part)), VOCABULARY)
            entry = source.build(f"integer_sum_{len(part)}", text)
            steps.append(Step(entry, tuple(block.values), parallel))
            done += size
        return tuple(steps)


def _sum_lines(count: int) -> list[str]:
    words = [f"word{k} = load_masked(x{k} + source, INT32, mask)" for k in range(count)]
    for byte in range(GROUP):
        for k in range(count):
            term = f"(convert(unsigned_byte(word{k}, {byte}), FLOAT32) - zero{k}) * scale{k}"
            words.append(f"t = t + {term}" if k else f"t = {term}")
        words.append("bits = rounded_bits(at_most(at_least(t, low), high))")
        words.append(f"word += bits * {256**byte}" if byte else "word = bits + offset")
    parameters = []
    for k in range(count):
        for place, name in enumerate((f"zero{k}", f"scale{k}")):
            address = f"parameters + {16 + 8 * k + 4 * place}"
            parameters.append(f"{name} = broadcast(read({address}, FLOAT32), FLOAT32)")
    return fill(_SUM, {"parameters": parameters, "share": SHARE, "word": words}, {})


_SUM = """
low = broadcast(read(parameters + 4, FLOAT32), FLOAT32)
high = broadcast(read(parameters + 8, FLOAT32), FLOAT32)
offset = broadcast(read(parameters + 12, INT32), INT32)
<parameters>
vectors = (size + 4 * LANES - 1) // (4 * LANES)
<share>
while task < stop:
    image = task // vectors
    place = (task - image * vectors) * 4 * LANES
    source = image * size + place
    target = y + image * y_image + start + place
    mask = mask_first((size - place) // 4, INT32)
    <word>
    store_first(target, word, mask)
    task += 1
"""


@register(IntegerSumProblem)
def sum_candidates(problem: IntegerSumProblem) -> list[Candidate]:
    """For any images."""
    problem.check()
    if 0 in problem.outputs[0].shape:
        return []
    vectors = problem.outputs[0].bytes / (4 * LANES)
    count = 1 if problem.concatenates else len(problem.images)
    seconds = vectors * 12 * (1 + count) / CYCLES_PER_SECOND
    name = "integer concatenation" if problem.concatenates else "integer sum"
    return [SumCandidate(name, problem, seconds)]
