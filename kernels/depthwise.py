"""Depthwise convolutions in float32: every output channel sees one input channel.

They solve the `ConvolutionProblem` whose groups have one input channel each. Output pixels are in
the lanes of vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.kernels.convolution import Image, image_of
from graphopt.kernels.problem import ConvolutionProblem
from graphopt.kernels.registry import Candidate, Input, Step, register
from graphopt.kernels.tile import CYCLES_PER_SECOND, WORTH_SHARING
from graphopt.kernels.window import Extras, WindowBody, Windows

_STRIPS = (4, 8)
"""Output rows made at once."""


@dataclass(frozen=True)
class DepthwiseCandidate(Candidate):
    """Windows in strips of so many rows."""

    problem: ConvolutionProblem
    image: Image
    windows: Windows

    def pack(self, constants: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        return [self.windows.offsets()]

    def scratch_bytes(self, threads: int) -> int:
        return threads * self.windows.scratch_bytes

    def build(self, threads: int) -> tuple[Step, ...]:
        if self.problem.outputs[0].size == 0:
            return ()
        body = WindowBody(
            outside="0.0",
            each_result=["own_weight = weight + 4 * taps * channel"],
            each_tap=["factor = broadcast(read(own_weight + 4 * tap, FLOAT32), FLOAT32)"],
            combine="fma({0}, factor, {1})",
        )
        extras = Extras.of(self.problem.epilogue, self.problem.inputs, self.image.extras, first=2)
        arguments = {"x": Input(0), "weight": Input(1)}
        parallel = threads > 1 and self.estimate > WORTH_SHARING
        return (self.windows.step("depthwise", arguments, body, extras, parallel),)


@register(ConvolutionProblem)
def candidates(problem: ConvolutionProblem) -> list[Candidate]:
    """Strips of a few heights, where every group has one input channel."""
    problem.check()
    image = image_of(problem)
    if image is None or image.channels != 1:
        return []
    found: list[Candidate] = []
    for strip in _STRIPS if image.out_size[0] > 1 else (1,):
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
            strip,
        )
        seconds = windows.cycles / CYCLES_PER_SECOND
        found.append(
            DepthwiseCandidate(f"depthwise {strip} rows", problem, seconds, image, windows)
        )
    return found
