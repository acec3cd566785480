"""Panels: the columns of a matrix product, copied to where a register tile reads them in order.

Functions here are called from generated kernels. Addresses, strides and pitches are in bytes. A
panel has one row per step of the depth; rows are ``pitch`` apart and start with the vectors of one
step.
"""

from __future__ import annotations

from typing import Any

from graphopt.kernels import calls, memory, simd, transposition
from graphopt.kernels.calls import inlined
from graphopt.kernels.register import FLOAT32, INT32, LANES

# A type checker sees the first parameter of an intrinsic, which its callers do not give.
call_kernel: Any = calls.call_kernel
gather: Any = memory.gather
load: Any = memory.load
load_even: Any = memory.load_even
load_masked: Any = memory.load_masked
load_three: Any = memory.load_three
lane_index: Any = simd.lane_index
mask_between: Any = simd.mask_between
mask_first: Any = simd.mask_first
store: Any = memory.store
store_over: Any = memory.store_over
transpose_corner: Any = transposition.transpose_corner

read: Any = memory.read
select: Any = simd.select
broadcast: Any = simd.broadcast


@inlined
def pack_taps(
    panel: int,
    pitch: int,
    image: int,
    plane: int,
    channels: int,
    height: int,
    width: int,
    out_width: int,
    pixels: int,
    first: int,
    vectors: int,
    kernel_height: int,
    kernel_width: int,
    stride_height: int,
    stride_width: int,
    dilation_height: int,
    dilation_width: int,
    top: int,
    left: int,
    half: int,
    gap: int,
) -> None:
    """What a convolution multiplies for ``vectors`` vectors of output pixels from ``first`` on.

    The panel's rows are ordered by kernel position, then channel. Pixels outside the image are
    zero, columns from ``pixels`` on anything. ``top`` and ``left`` are the padding. Channels of
    ``image`` are ``plane`` bytes apart and dense inside, but for ``gap`` pixels in front of the row
    ``half``.
    """
    whole = top == 0 and left == 0 and out_width == width and pixels == height * width
    if whole and kernel_height * kernel_width * stride_height * stride_width == 1:
        pack_rows(panel, pitch, image + 4 * first, plane, channels, pixels - first, vectors)
        return
    if stride_height == 1 and stride_width == 1 and out_width == width and gap == 0:
        pack_shifted(
            panel,
            pitch,
            image,
            plane,
            channels,
            height,
            width,
            first,
            vectors,
            kernel_height,
            kernel_width,
            dilation_height,
            dilation_width,
            top,
            left,
        )
        return
    # Of rows that are shorter than a vector, each is spoilt by the one before it. Else all rows of
    # the kernel are taken column by column, with one mask for each.
    apart = pitch >= 4 * LANES
    lines = kernel_height if apart else 1
    together = apart and kernel_width == 3 and stride_width == 2 and dilation_width == 1
    columns = 3 if together else 1
    for vector in range(vectors):
        start = first + vector * LANES
        count = min(pixels - start, LANES)
        row = start // out_width
        column = start - row * out_width
        lane = 0
        while lane < count:
            # One piece of an output row; the next overwrites what follows it in the vector.
            target = panel + 4 * vector * LANES
            for y in range(0, kernel_height, lines):
                source_row = row * stride_height + y * dilation_height - top
                source_column = (column - lane) * stride_width - left
                source = image + 4 * source_column
                for _ in range(0, kernel_width, columns):
                    pack_pixels(
                        target,
                        pitch,
                        source,
                        plane,
                        channels,
                        source_row,
                        height,
                        lines,
                        dilation_height,
                        kernel_width * channels * pitch,
                        source_column,
                        stride_width,
                        width,
                        lane,
                        columns,
                        half,
                        gap,
                    )
                    source_column += dilation_width
                    source += 4 * dilation_width
                    target += channels * pitch
            lane += out_width - column
            column = 0
            row += 1


@inlined
def row_start(row: int, width: int, half: int, gap: int) -> int:
    """Pixels from an image's first to a row, with ``gap`` in front of the row ``half``."""
    return row * width + (gap if row >= half else 0)


@inlined
def pack_rows(
    panel: int, pitch: int, source: int, plane: int, channels: int, pixels: int, vectors: int
) -> None:
    """`pack_taps` where what lies under the kernel is the image itself, channel by channel."""
    whole = min(pixels // LANES, vectors)
    for _ in range(channels):
        for vector in range(whole):
            store(panel + 4 * LANES * vector, load(source + 4 * LANES * vector, FLOAT32))
        for vector in range(whole, vectors):
            rest = mask_first(pixels - vector * LANES, FLOAT32)
            value = load_masked(source + 4 * LANES * vector, FLOAT32, rest)
            store(panel + 4 * LANES * vector, value)
        source += plane
        panel += pitch


@inlined
def pack_shifted(
    panel: int,
    pitch: int,
    image: int,
    plane: int,
    channels: int,
    height: int,
    width: int,
    first: int,
    vectors: int,
    kernel_height: int,
    kernel_width: int,
    dilation_height: int,
    dilation_width: int,
    top: int,
    left: int,
) -> None:
    """`pack_taps` where rows of the output are as long as those of the image, without strides.

    What lies under a kernel position is then the image itself, shifted: one load per vector, of
    the lanes whose pixels are inside.
    """
    for vector in range(vectors):
        start = first + vector * LANES
        row = start // width
        columns = lane_index(INT32) + (start - row * width)
        rows = broadcast(row, INT32)
        end = start - row * width + LANES
        while end > width:
            beyond = columns >= width
            columns = select(beyond, columns - width, columns)
            rows = select(beyond, rows + 1, rows)
            end -= width
        target = panel + 4 * vector * LANES
        for y in range(kernel_height):
            down = y * dilation_height - top
            in_rows = (rows >= -down) & (rows < height - down)
            for x in range(kernel_width):
                right = x * dilation_width - left
                inside = in_rows & (columns >= -right) & (columns < width - right)
                source = image + 4 * (start + down * width + right)
                for _ in range(channels):
                    store(target, load_masked(source, FLOAT32, inside))
                    source += plane
                    target += pitch


@inlined
def pack_pixels(
    target: int,
    pitch: int,
    source: int,
    plane: int,
    channels: int,
    row: int,
    height: int,
    rows: int,
    row_step: int,
    target_step: int,
    start: int,
    stride: int,
    width: int,
    lane: int,
    columns: int,
    half: int,
    gap: int,
) -> None:
    """A vector of the columns from ``start`` on in steps of ``stride``, of every channel.

    It is taken from each of ``rows`` rows of the image, the first of which is ``row``, the others
    each ``row_step`` further, and goes ``target_step`` further. ``source`` is where the first
    column is in the image's first row; ``gap`` pixels are in front of the row ``half``. Lanes
    before ``lane`` are kept, pixels outside of the image are zero. The masks are those of all rows
    and channels.

    ``columns`` is 1, or 3 for as many neighbouring columns of a kernel in steps of two: most of
    their pixels are under two of them. What is under one goes behind that under the one before.
    """
    written = ~mask_first(lane, FLOAT32)
    # In steps of two, whole vectors are read.
    low = mask_between(start, 1 if stride == 2 else stride, width, FLOAT32)
    high = mask_between(start + LANES, 1, width, FLOAT32)
    last = mask_between(start + 2 * LANES, 1, width, FLOAT32)
    step = channels * pitch
    for _ in range(rows):
        place, origin = target, source + 4 * row_start(row, width, half, gap)
        if row < 0 or row >= height:
            for _ in range(columns * channels):
                put(place, broadcast(0.0, FLOAT32), lane, written)
                place += pitch
        elif columns == 3:
            for _ in range(channels):
                first, second, third = load_three(origin, FLOAT32, low, high, last)
                put(place, first, lane, written)
                put(place + step, second, lane, written)
                put(place + 2 * step, third, lane, written)
                origin += plane
                place += pitch
        elif stride == 1:
            for _ in range(channels):
                put(place, load_masked(origin, FLOAT32, low), lane, written)
                origin += plane
                place += pitch
        elif stride == 2:
            for _ in range(channels):
                put(place, load_even(origin, FLOAT32, low, high), lane, written)
                origin += plane
                place += pitch
        else:
            for _ in range(channels):
                put(place, gather(origin, 4 * stride, FLOAT32, low), lane, written)
                origin += plane
                place += pitch
        row += row_step
        target += target_step


@inlined
def put(target: int, value: Any, lane: int, written: Any) -> None:
    """Store a vector, but for the lanes before ``lane``; ``written`` is the mask of the others.

    Whole vectors are stored faster.
    """
    if lane == 0:
        store(target, value)
    else:
        store_over(target, value, written)


@inlined
def pack_columns(
    target: int, pitch: int, source: int, step: int, column: int, depth: int, columns: int
) -> None:
    """A strided matrix: element (k, n) is at ``source + k * step + n * column``.

    Lanes of the panel beyond ``columns`` keep what they have, or become anything.
    """
    first = 0
    while first < columns:
        count = min(columns - first, LANES)
        place = target + 4 * first
        origin = source + first * column
        if step == 4 and column != 4:
            for k in range(0, depth, LANES):
                transpose_corner(
                    origin + 4 * k,
                    column,
                    place + k * pitch,
                    pitch,
                    count,
                    min(depth - k, LANES),
                    FLOAT32,
                )
        else:
            mask = mask_first(count, FLOAT32)
            if column == 4:
                for _ in range(depth):
                    store(place, load_masked(origin, FLOAT32, mask))
                    origin += step
                    place += pitch
            else:
                for _ in range(depth):
                    store(place, gather(origin, column, FLOAT32, mask))
                    origin += step
                    place += pitch
        first += LANES


@inlined
def lines_inside(row: int, stride: int, height: int, lines: int) -> tuple[int, int]:
    """Which of ``lines`` rows, from ``row`` on and ``stride`` apart, are inside: from, to."""
    first = min((max(-row, 0) + stride - 1) // stride, lines)
    return first, max(min((height - row + stride - 1) // stride, lines), first)


@inlined
def pad_rows(
    target: int,
    pitch: int,
    rows: int,
    phase_pitch: int,
    source: int,
    height: int,
    width: int,
    top: int,
    left: int,
    stride: int,
) -> None:
    """``rows`` rows of an image with ``top`` rows and ``left`` columns of zeros around it.

    A row holds the columns 0, ``stride``, 2 ``stride``, ... first, ``phase_pitch`` bytes further
    those from 1 on, and so forth, so that windows ``stride`` apart are neighbours. ``top`` may be
    negative: the rows start inside the image.
    """
    first, last = lines_inside(-top, 1, height, rows)
    outside = broadcast(0.0, FLOAT32)
    for phase in range(stride):
        for column in range(0, phase_pitch // 4, LANES):
            start = column * stride + phase - left
            place = target + phase * phase_pitch + 4 * column
            for _ in range(first):
                store(place, outside)
                place += pitch
            origin = source + 4 * ((first - top) * width + start)
            inside = mask_between(start, stride, width, FLOAT32)
            if stride == 1:
                for _ in range(first, last):
                    store(place, load_masked(origin, FLOAT32, inside))
                    origin += 4 * width
                    place += pitch
            elif stride == 2:
                low = mask_between(start, 1, width, FLOAT32)
                high = mask_between(start + LANES, 1, width, FLOAT32)
                for _ in range(first, last):
                    store(place, load_even(origin, FLOAT32, low, high))
                    origin += 4 * width
                    place += pitch
            else:
                for _ in range(first, last):
                    store(place, gather(origin, 4 * stride, FLOAT32, inside))
                    origin += 4 * width
                    place += pitch
            for _ in range(last, rows):
                store(place, outside)
                place += pitch
