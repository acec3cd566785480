"""What the kernels of minimal filtering share (A. Lavin and S. Gray, "Fast algorithms for
convolutional neural networks", 2016): tiles of two columns of results, with tiles of the image in
the lanes of vectors, and buffers of the thread's own between the transformations."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from graphopt.kernels import source
from graphopt.kernels.caches import SECOND_CACHE
from graphopt.kernels.epilogue import Epilogue
from graphopt.kernels.image import Image, epilogue_starts
from graphopt.kernels.loops import Arguments, indent, kernel_text
from graphopt.kernels.problem import ConvolutionProblem
from graphopt.kernels.registry import Candidate, Step
from graphopt.kernels.tile import VOCABULARY, WORTH_SHARING

KEPT_BYTES = SECOND_CACHE * 2 // 3
"""Bytes of pixels and products that the second cache holds beside what passes through it."""


@dataclass(frozen=True)
class FilteringCandidate(Candidate):
    """The one schedule of a kernel, whose work is cut for the team that does it.

    ``_name`` is that of its compiled code.
    """

    _name: ClassVar[str]
    problem: ConvolutionProblem
    image: Image

    def packing(self) -> tuple[()]:
        return ()

    def scratch_bytes(self, threads: int) -> int:
        team = self._team(threads)
        return team * sum(self._buffers(team))

    def build(self, threads: int) -> tuple[Step, ...]:
        team = self._team(threads)
        block, epilogue = self._arguments(team)
        text = kernel_text(block, self._lines(epilogue), VOCABULARY, epilogue.functions())
        entry = source.build(self._name, text)
        return (Step(entry, (*block.values, *epilogue.immediates), team > 1, block.tasks),)

    def _team(self, threads: int) -> int:
        return threads if self.estimate > WORTH_SHARING else 1

    @abstractmethod
    def _buffers(self, team: int) -> tuple[int, ...]:
        """Bytes of each buffer of a thread."""

    @abstractmethod
    def _arguments(self, team: int) -> tuple[Arguments, Epilogue]:
        """What the kernel reads."""

    @abstractmethod
    def _lines(self, epilogue: Epilogue) -> list[str]:
        """The kernel's body."""


def result_lines(results: Sequence[tuple[str, str]], epilogue: Epilogue) -> list[str]:
    """Lines that finish and store the results of a vector of tiles.

    They expect the variables ``row`` and ``column`` of the first tile, and the address ``result``
    of the output channel.

    Args:
        results: for each row of a tile, the expressions of its two results.
        epilogue: what finishes them.
    """
    lines = ["present = out_width - 2 * column"]
    for y, (even, odd) in enumerate(results):
        values = [
            f"even = {even}",
            f"odd = {odd}",
            "low = interleave_low(even, odd)",
            "high = interleave_high(even, odd)",
            f"start = ({len(results)} * row + {y}) * out_width + 2 * column",
            "c = result + 4 * start",
            *epilogue_starts(epilogue),
            *epilogue.row_lines(),
        ]
        for half, name in enumerate(("low", "high")):
            mask = f"mask_first(present - {half} * LANES, FLOAT32)"
            values += epilogue.register_lines(name, half, mask)
        inside = f"if {len(results)} * row + {y} < out_height:"
        lines += [inside, *indent(1, values)] if y else values
    return lines
