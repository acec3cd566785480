"""What a layer multiplies its weight with: its input as columns, one per result."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor

from graphopt.ir import Node
from graphopt.passes.layers import LINEAR, is_transposed, per_dimension
from graphopt.passes.neighbourhoods import neighbourhoods, zeros_around

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
    stride, dilation = per_dimension(node["stride"], rank), per_dimension(node["dilation"], rank)
    padding = zeros_around(node["padding"], kernel, dilation)
    transposed = is_transposed(node)
    if transposed:  # an ordinary convolution of the input with zeros between its elements
        spread = x.new_zeros(
            (*x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)))
        )
        elements: Any = (..., *(slice(None, None, s) for s in stride))
        spread[elements] = x
        x, stride = spread, [1] * rank
        reach = [gap * (size - 1) for size, gap in zip(kernel, dilation, strict=True)]
        more = per_dimension(node["output_padding"], rank)
        padding = tuple(
            (r - before, r - after + m)
            for r, (before, after), m in zip(reach, padding, more, strict=True)
        )
    windows = neighbourhoods(x, kernel, stride, padding, dilation)
    if transposed:
        windows = windows.flip(tuple(range(-rank, 0)))
    batch, channels, places = x.shape[0], x.shape[1], windows.shape[1 : 1 + rank]
    grouped = windows.reshape(batch, *places, groups, channels // groups, *kernel)
    taps_first = (1 + rank, *range(3 + rank, 3 + 2 * rank), 2 + rank, *range(1 + rank))
    arranged = grouped.permute(taps_first)
    return arranged.reshape(groups, prod(kernel) * (channels // groups), batch * prod(places))


def as_matrix(taps: Tensor) -> Tensor:
    """[groups, output channels, input channels, taps] as [groups, output channels, taps * input
    channels], the channels running fastest."""
    return taps.transpose(2, 3).flatten(2)


def from_matrix(matrix: Tensor, taps_shape: torch.Size) -> Tensor:
    """The inverse of `as_matrix`."""
    groups, outputs, inputs, positions = taps_shape
    return matrix.reshape(groups, outputs, positions, inputs).transpose(2, 3)
