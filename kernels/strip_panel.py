"""Strips: panels whose steps share memory, as their vectors lie one below the other in the image.

Functions here are called from the kernels of `sparse_strips`. Addresses, strides and pitches are in
bytes, as in `panel`.
"""

from __future__ import annotations

from typing import Any

from graphopt.kernels import memory, simd
from graphopt.kernels.calls import inlined
from graphopt.kernels.panel import lines_inside, pack_pixels, row_start
from graphopt.kernels.register import FLOAT32, LANES

# A type checker sees the first parameter of an intrinsic, which its callers do not give.
load_masked: Any = memory.load_masked
load_over: Any = memory.load_over
load_three: Any = memory.load_three
mask_between: Any = simd.mask_between
mask_first: Any = simd.mask_first
store: Any = memory.store

broadcast: Any = simd.broadcast


@inlined
def pack_strips(
    panel: int,
    pitch: int,
    image: int,
    plane: int,
    channels: int,
    height: int,
    width: int,
    row: int,
    column: int,
    lanes: int,
    piece: int,
    lines: int,
    phase_step: int,
    kernel_width: int,
    stride_height: int,
    stride_width: int,
    dilation_width: int,
    top: int,
    left: int,
    half: int,
    gap: int,
) -> None:
    """What a convolution multiplies for a tile of output pixels, each vector one below the other.

    A vector holds ``LANES // lanes`` pieces of rows, ``piece`` rows apart; ``row`` and ``column``
    are the tile's first. For every column of the kernel the panel has, of each channel, ``lines``
    vectors for the rows of the image 0, ``stride_height``, 2 ``stride_height``, ... first, then
    those from ``phase_step`` on, and so forth; what lies under another row of the kernel begins
    some vectors further. Pixels outside the image are zero, lanes beyond the output anything.
    Channels of ``image`` are ``plane`` bytes apart, those of the panel ``pitch``; ``gap`` pixels
    are in front of the image's row ``half``.
    """
    phases = (stride_height + phase_step - 1) // phase_step
    near = stride_width == 1 or (stride_width == 2 and dilation_width == 1)
    if lanes == LANES and kernel_width == 3 and near and phases <= 2:
        pack_three_columns(
            panel,
            pitch,
            image,
            plane,
            channels,
            height,
            width,
            row * stride_height - top,
            column * stride_width - left,
            lines,
            phases,
            phase_step,
            stride_height,
            stride_width,
            dilation_width,
            half,
            gap,
        )
        return
    for phase in range(phases):
        for line in range(lines):
            source_row = (row + line) * stride_height + phase * phase_step - top
            # Column by column, what was read for one is in the nearest cache for the next.
            for x in range(kernel_width):
                source_column = column * stride_width + x * dilation_width - left
                target = panel + 4 * LANES * ((x * phases + phase) * lines + line)
                if lanes < LANES and stride_width == 1:
                    pack_pieces(
                        target,
                        pitch,
                        image,
                        plane,
                        channels,
                        height,
                        width,
                        source_row,
                        source_column,
                        lanes,
                        piece * stride_height,
                        half,
                        gap,
                    )
                    continue
                lane = 0
                piece_row = source_row
                while lane < LANES:
                    start = source_column - lane * stride_width
                    pack_pixels(
                        target,
                        pitch,
                        image + 4 * start,
                        plane,
                        channels,
                        piece_row,
                        height,
                        1,
                        0,
                        0,
                        start,
                        stride_width,
                        width,
                        lane,
                        1,
                        half,
                        gap,
                    )
                    lane += lanes
                    piece_row += piece * stride_height


@inlined
def pack_three_columns(
    panel: int,
    pitch: int,
    image: int,
    plane: int,
    channels: int,
    height: int,
    width: int,
    row: int,
    column: int,
    lines: int,
    phases: int,
    phase_step: int,
    stride_height: int,
    stride_width: int,
    dilation: int,
    half: int,
    gap: int,
) -> None:
    """`pack_strips` of kernels with three columns, at most two phases, and tiles of whole vectors.

    Channels are copied one after the other, as they lie in memory. ``row`` and ``column`` are the
    image's first; columns are one or two apart, the latter without ``dilation``.
    """
    first, last = lines_inside(row, stride_height, height, lines)
    second_first, second_last = lines_inside(row + phase_step, stride_height, height, lines)
    _, upper = lines_inside(row, stride_height, half, lines)
    _, second_upper = lines_inside(row + phase_step, stride_height, half, lines)
    middle = LANES if stride_width == 2 else dilation
    apart = 4 * LANES * lines * phases
    along = 4 * width * stride_height
    low = mask_between(column, 1, width, FLOAT32)
    high = mask_between(column + middle, 1, width, FLOAT32)
    behind = mask_between(column + 2 * middle, 1, width, FLOAT32)
    source = image + 4 * (row * width + column)
    for _ in range(channels):
        place = panel
        for phase in range(phases):
            begin, end = (second_first, second_last) if phase else (first, last)
            stop = second_upper if phase else upper
            origin = source + phase * phase_step * 4 * width + begin * along
            place = clear_three(place, apart, begin)
            # The lines of the upper half, then those of the lower one.
            for _ in range(2):
                if stride_width == 2:
                    for _ in range(begin, stop):
                        one, two, three = load_three(origin, FLOAT32, low, high, behind)
                        store_three(place, apart, one, two, three)
                        origin += along
                        place += 4 * LANES
                else:
                    for _ in range(begin, stop):
                        one = load_masked(origin, FLOAT32, low)
                        two = load_masked(origin + 4 * dilation, FLOAT32, high)
                        three = load_masked(origin + 8 * dilation, FLOAT32, behind)
                        store_three(place, apart, one, two, three)
                        origin += along
                        place += 4 * LANES
                begin, stop = stop, end
                origin += 4 * gap
            place = clear_three(place, apart, lines - end)
        source += plane
        panel += pitch


@inlined
def clear_three(place: int, apart: int, lines: int) -> int:
    """Zeros in so many vectors of three columns; the address behind the first column's."""
    outside = broadcast(0.0, FLOAT32)
    for _ in range(lines):
        store_three(place, apart, outside, outside, outside)
        place += 4 * LANES
    return place


@inlined
def store_three(place: int, apart: int, one: Any, two: Any, three: Any) -> None:
    """Store a vector of each of three columns."""
    store(place, one)
    store(place + apart, two)
    store(place + 2 * apart, three)


@inlined
def pack_pieces(
    target: int,
    pitch: int,
    image: int,
    plane: int,
    channels: int,
    height: int,
    width: int,
    row: int,
    column: int,
    lanes: int,
    piece: int,
    half: int,
    gap: int,
) -> None:
    """A vector of two or four pieces of rows, of every channel.

    The first begins at ``row`` and ``column`` of the image, each other ``piece`` rows below the one
    before it. Pixels outside are zero.
    """
    first = piece_mask(row, column, height, width, 0, lanes)
    second = piece_mask(row + piece, column, height, width, lanes, lanes)
    start = row_start(row, width, half, gap)
    source = image + 4 * (start + column)
    below = 4 * (row_start(row + piece, width, half, gap) - start - lanes)
    if 2 * lanes == LANES:
        for _ in range(channels):
            value = load_masked(source, FLOAT32, first)
            store(target, load_over(source + below, value, second))
            source += plane
            target += pitch
    else:
        third = piece_mask(row + 2 * piece, column, height, width, 2 * lanes, lanes)
        fourth = piece_mask(row + 3 * piece, column, height, width, 3 * lanes, lanes)
        further = 4 * (row_start(row + 2 * piece, width, half, gap) - start - 2 * lanes)
        last = 4 * (row_start(row + 3 * piece, width, half, gap) - start - 3 * lanes)
        for _ in range(channels):
            value = load_masked(source, FLOAT32, first)
            value = load_over(source + below, value, second)
            value = load_over(source + further, value, third)
            store(target, load_over(source + last, value, fourth))
            source += plane
            target += pitch


@inlined
def piece_mask(row: int, column: int, height: int, width: int, lane: int, lanes: int) -> Any:
    """The lanes from ``lane`` on that hold ``lanes`` pixels of a row from ``column`` on, inside."""
    inside = mask_between(column - lane, 1, width if 0 <= row < height else 0, FLOAT32)
    return inside & mask_first(lane + lanes, FLOAT32) & ~mask_first(lane, FLOAT32)
