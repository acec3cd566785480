"""What a layer multiplies its weight with: its input as columns, one per result."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from graphopt.ir import Node
from graphopt.passes.layers import LINEAR, TRANSPOSED_CONVOLUTIONS

CHUNK_BYTES = 64 * 2**20


def columns(node: Node, x: Tensor, kernel: tuple[int, ...]) -> Iterator[Tensor]:
    """The input of a layer as the operand of a matrix product, in chunks of bounded size.

    Args:
        node: a linear layer, or a convolution of any rank, transposed or not.
        x: its input, with any batch size.
        kernel: sizes of the kernel's dimensions; empty for a linear layer.

    Yields:
        [groups, taps * input channels, results]: the result [groups, output channels, results] of
        the layer is its weight [groups, output channels, taps * input channels], the channels
        running fastest, times this. The bias is left out.
    """
    if node.op == LINEAR:
        rows = x.reshape(-1, x.shape[-1])
        size = max(1, CHUNK_BYTES // max(1, rows.shape[1] * rows.element_size()))
        for first in range(0, len(rows), size):
            yield rows[first : first + size].T.unsqueeze(0)
        return
    if x.dim() == len(kernel) + 1:
        x = x.unsqueeze(0)
    per_sample = prod(kernel) * max(1, prod(node.output.shape[-len(kernel) :])) * x.shape[1]
    size = max(1, CHUNK_BYTES // max(1, per_sample * x.element_size()))
    for first in range(0, len(x), size):
        yield _convolution_columns(node, x[first : first + size], kernel)


def _convolution_columns(node: Node, x: Tensor, kernel: tuple[int, ...]) -> Tensor:
    rank, groups = len(kernel), node["groups"]
    stride, dilation = _each(node["stride"], rank), _each(node["dilation"], rank)
    before, after = _padding(node, kernel, dilation, stride)
    transposed = node.op in TRANSPOSED_CONVOLUTIONS or (
        node.op == "aten.convolution" and node["transposed"]
    )
    if transposed:  # an ordinary convolution of the input with zeros between its elements
        spread = x.new_zeros(
            (*x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)))
        )
        elements: Any = (..., *(slice(None, None, s) for s in stride))
        spread[elements] = x
        x, stride = spread, [1] * rank
    sides = [side for pair in zip(before[::-1], after[::-1], strict=True) for side in pair]
    windows = functional.pad(x, sides)
    for dimension, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True)):
        windows = windows.unfold(2 + dimension, (size - 1) * gap + 1, step)[..., ::gap]
    if transposed:
        windows = windows.flip(tuple(range(-rank, 0)))
    batch, channels, places = x.shape[0], x.shape[1], windows.shape[2 : 2 + rank]
    grouped = windows.reshape(batch, groups, channels // groups, *places, *kernel)
    taps_first = (1, *range(3 + rank, 3 + 2 * rank), 2, 0, *range(3, 3 + rank))
    arranged = grouped.permute(taps_first)
    return arranged.reshape(groups, prod(kernel) * (channels // groups), batch * prod(places))


def _padding(
    node: Node, kernel: tuple[int, ...], dilation: list[int], stride: list[int]
) -> tuple[list[int], list[int]]:
    """How much an ordinary convolution adds before and after each dimension."""
    given, rank = node["padding"], len(kernel)
    reach = [gap * (size - 1) for size, gap in zip(kernel, dilation, strict=True)]
    if given == "same":
        return [r // 2 for r in reach], [r - r // 2 for r in reach]
    padding = [0] * rank if given == "valid" else _each(given, rank)
    is_general = node.op == "aten.convolution"
    if node.op in TRANSPOSED_CONVOLUTIONS or (is_general and node["transposed"]):
        extra = _each(node["output_padding"], rank)
        before = [r - p for r, p in zip(reach, padding, strict=True)]
        return before, [b + e for b, e in zip(before, extra, strict=True)]
    return padding, padding


def _each(setting: int | list[int], rank: int) -> list[int]:
    """A setting per dimension; one for all is repeated."""
    items = [setting] if isinstance(setting, int) else list(setting)
    return items * rank if len(items) == 1 else items


def as_matrix(taps: Tensor) -> Tensor:
    """[groups, output channels, input channels, taps] as [groups, output channels, taps * input
    channels], the channels running fastest."""
    return taps.transpose(2, 3).flatten(2)


def from_matrix(matrix: Tensor, taps_shape: torch.Size) -> Tensor:
    """The inverse of `as_matrix`."""
    groups, outputs, inputs, positions = taps_shape
    return matrix.reshape(groups, outputs, positions, inputs).transpose(2, 3)
