"""Neighbourhoods and settings of convolutions, against torch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graphopt.passes.neighbourhoods import neighbourhoods, zeros_around


@pytest.mark.parametrize(
    ("stride", "padding", "dilation"),
    [((1, 1), ((0, 0), (0, 0)), (1, 1)), ((2, 1), ((1, 1), (2, 0)), (1, 2))],
)
def test_neighbourhoods_are_what_a_convolution_sees(
    stride: tuple[int, int],
    padding: tuple[tuple[int, int], ...],
    dilation: tuple[int, int],
) -> None:
    x, kernel = torch.randn(2, 3, 8, 9).double(), torch.randn(5, 3, 3, 2).double()
    seen = neighbourhoods(x, (3, 2), stride, padding, dilation)
    padded = nn.functional.pad(x, [*padding[1], *padding[0]])
    expected = nn.functional.conv2d(padded, kernel, stride=stride, dilation=dilation)
    torch.testing.assert_close(torch.einsum("npqihw,oihw->nopq", seen, kernel), expected)


@pytest.mark.parametrize("padding", ["same", "valid", 1, [2, 0]])
def test_zeros_around_are_those_of_torch(padding: str | int | list[int]) -> None:
    x, kernel = torch.randn(1, 3, 8, 9).double(), torch.randn(5, 3, 3, 2).double()
    around = zeros_around(padding, (3, 2), (2, 3))
    padded = nn.functional.pad(x, [*around[1], *around[0]])
    expected = nn.functional.conv2d(x, kernel, padding=padding, dilation=(2, 3))
    assert torch.equal(nn.functional.conv2d(padded, kernel, dilation=(2, 3)), expected)
