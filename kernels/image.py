"""Images of two spatial dimensions, as the kernels of convolutions see them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from graphopt.kernels.epilogue import Epilogue, ExtraOperand, epilogue_supported, image_strides
from graphopt.kernels.loops import Arguments
from graphopt.kernels.operand import ConstantOperand, Layout, Operand
from graphopt.kernels.padded_rows import PaddedRows
from graphopt.kernels.problem import ConvolutionProblem
from graphopt.kernels.registry import Input


@dataclass(frozen=True)
class Image:
    """A convolution of two spatial dimensions, as its kernel sees it.

    ``extras`` are the strides of the epilogue's further inputs by (image, channel, pixel).
    ``plane`` and ``out_plane`` are elements from channel to channel. Where an image, or the output,
    is in halves, the lower half lies ``gap``, or ``out_gap``, elements further than if it were not,
    else it is 0.
    """

    batch: int
    groups: int
    channels: int
    outputs: int
    size: tuple[int, int]
    out_size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    start: tuple[int, int]
    extras: tuple[tuple[int, int, int], ...]
    plane: int
    out_plane: int
    gap: int
    out_gap: int

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    @property
    def pixels(self) -> int:
        return math.prod(self.out_size)

    @property
    def bands(self) -> int:
        """Bands in which the output is computed: no panel has pixels of several."""
        return 2 if self.out_gap or (self.gap and self.is_pointwise) else 1

    @property
    def rows(self) -> PaddedRows:
        """How rows lie that are copied with their padding."""
        return PaddedRows(self.out_size[1], self.kernel, self.stride, self.dilation)

    @property
    def is_pointwise(self) -> bool:
        """Whether what lies under the kernel is the image itself."""
        whole = self.start == (0, 0) and self.size == self.out_size
        return whole and self.kernel == self.stride == (1, 1)


def image_of(
    problem: ConvolutionProblem, padded: bool = False, halved: bool = False
) -> Image | None:
    """The problem in two spatial dimensions, or None where this family cannot solve it.

    ``padded`` says whether it can where the planes of images are padded, ``halved`` whether it can
    where they are in halves.
    """
    x, weight, *extras = problem.inputs
    (y,) = problem.outputs
    rank = len(x.shape) - 2
    if rank not in (1, 2) or not isinstance(weight, ConstantOperand):
        return None
    if weight.size == 0 or 0 in y.shape[1:]:
        return None
    plain = Layout.plain("float32", rank + 2)
    layouts = [x.layout, weight.layout, y.layout]
    if halved:
        layouts = [replace(layout, halves=False) for layout in layouts]
    if padded:
        layouts = [replace(layout, plane=0) for layout in layouts]
    if any(layout != plain for layout in layouts):
        return None
    if problem.epilogue is not None and not epilogue_supported(problem.epilogue, extras):
        return None
    strides = [_extra_strides(extra, y) for extra in extras]
    if None in strides:
        return None

    def pair(values: Sequence[int], missing: int) -> tuple[int, int]:
        return (values[-2] if rank == 2 else missing, values[-1])

    start = pair([before for before, _ in problem.padding], 0)
    image = Image(
        x.shape[0],
        problem.groups,
        weight.shape[1],
        weight.shape[0] // problem.groups,
        pair(x.shape, 1),
        pair(y.shape, 1),
        pair(weight.shape, 1),
        pair(problem.stride, 1),
        pair(problem.dilation, 1),
        start,
        tuple(entry for entry in strides if entry is not None),
        x.layout.plane or math.prod(x.shape[2:]),
        y.layout.plane or math.prod(y.shape[2:]),
        *(_gap(operand) for operand in (x, y)),
    )
    # Without gaps and padding the pixels of an image are one long row.
    if image.is_pointwise:
        row = (1, image.pixels)
        image = replace(image, size=row, out_size=row)
    return image


def _extra_strides(extra: Operand, y: Operand) -> tuple[int, int, int] | None:
    """`image_strides`, also where the output is in halves: those of the upper one."""
    upper = replace(y, layout=replace(y.layout, halves=False))
    if extra.layout.halves:
        return image_strides(upper, upper) if extra == y else None
    strides = image_strides(extra, upper)
    # What is there for all pixels of a channel has no halves.
    return None if strides is not None and strides[2] and y.layout.halves else strides


def _gap(image: Operand) -> int:
    """Elements between the halves of an image's first plane."""
    if not image.layout.halves:
        return 0
    return image.shape[1] * image.layout.plane - math.prod(image.shape[2:]) // 2


def image_epilogue(problem: ConvolutionProblem, image: Image, block: Arguments) -> Epilogue:
    """The epilogue of a kernel whose arguments are in ``block``, which gets those of the epilogue.

    `epilogue_starts` are the lines that use them.
    """
    extras = []
    for index, (operand, strides) in enumerate(zip(problem.inputs[2:], image.extras, strict=True)):
        extra = ExtraOperand(operand.dtype, along=strides[2] != 0)
        extras.append(extra)
        block.add(f"extra{index}", Input(2 + index))
        block.add(f"extra{index}_image", strides[0] * extra.width)
        block.add(f"e{index}_row", strides[1] * extra.width)
    return Epilogue(problem.epilogue, extras, len(block.names))


def epilogue_starts(epilogue: Epilogue) -> list[str]:
    """Lines that find what belongs to pixel ``start`` of a ``channel`` of an ``image``."""
    return [
        f"e{index} = extra{index} + image * extra{index}_image + channel * e{index}_row"
        + (f" + {extra.width} * start" if extra.along else "")
        for index, extra in enumerate(epilogue.extras)
    ]
