"""What a convolution sees at every position of its input."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

from graphopt.passes.layers import per_dimension


def neighbourhoods(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
) -> Tensor:
    """What a convolution sees at every position, as a view where it can be one.

    Args:
        x: [batch, channels, *sizes].
        kernel, stride, dilation: of the convolution, per spatial dimension.
        padding: zeros before and after, per spatial dimension; fewer than none cut off.

    Returns:
        [batch, *positions, channels, *kernel].
    """
    spatial = len(kernel)
    flat = [amount for pair in reversed(padding) for amount in pair]
    if any(flat):
        x = functional.pad(x, flat)
    for d in range(spatial):
        extent = dilation[d] * (kernel[d] - 1) + 1
        x = x.unfold(2 + d, extent, stride[d])[..., :: dilation[d]]
    return x.movedim(1, 1 + spatial)


def zeros_around(
    padding: int | Sequence[int] | str, kernel: Sequence[int], dilation: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """Zeros before and after each dimension, from a convolution's setting, which may be "same" or
    "valid"."""
    if padding == "same":
        totals = [gap * (size - 1) for gap, size in zip(dilation, kernel, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    amounts = [0] * len(kernel) if padding == "valid" else per_dimension(padding, len(kernel))
    return tuple((amount, amount) for amount in amounts)
