"""Small kernels for the tests of the engine's frame."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import cfunc, extending, types

from graphopt.kernels.registry import WHOLE, Entry, Input, Output, Scratch, Step
from graphopt.kernels.source import SIGNATURE

intrinsic: Any = extending.intrinsic


@intrinsic
def floats(typing_context: Any, address: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], ir.FloatType().as_pointer())

    return types.CPointer(types.float32)(types.int64), codegen


@intrinsic
def bits(typing_context: Any, word: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.trunc(args[0], ir.IntType(32)), ir.FloatType())

    return types.float32(types.int64), codegen


@cfunc(SIGNATURE, cache=True)
def _affine(arguments: Any, thread: int, begin: int, end: int) -> None:
    source, target, count = floats(arguments[0]), floats(arguments[1]), arguments[2]
    scale, shift = bits(arguments[3]), bits(arguments[4])
    for i in range(count * begin // WHOLE, count * end // WHOLE):
        target[i] = scale * source[i] + shift


@cfunc(SIGNATURE, cache=True)
def _add(arguments: Any, thread: int, begin: int, end: int) -> None:
    left, right, target = floats(arguments[0]), floats(arguments[1]), floats(arguments[2])
    count = arguments[3]
    for i in range(count * begin // WHOLE, count * end // WHOLE):
        target[i] = left[i] + right[i]


@cfunc(SIGNATURE, cache=True)
def _rotate(arguments: Any, thread: int, begin: int, end: int) -> None:
    """target[i] = source[i + shift] + 1, cyclic: reads what other threads wrote."""
    source, target = floats(arguments[0]), floats(arguments[1])
    count, shift = arguments[2], arguments[3]
    for i in range(count * begin // WHOLE, count * end // WHOLE):
        target[i] = source[(i + shift) % count] + np.float32(1)


@cfunc(SIGNATURE, cache=True)
def _late_increment(arguments: Any, thread: int, begin: int, end: int) -> None:
    """target = source + 1, with threads after the first long behind it."""
    source, target, count = floats(arguments[0]), floats(arguments[1]), arguments[2]
    delay = 1
    for i in range(arguments[3] * thread):
        delay = (delay * 3 + i) % 1000003
    for i in range(count * begin // WHOLE, count * end // WHOLE):
        target[i] = source[i] + (np.float32(1) if delay >= 0 else np.float32(2))


@cfunc(SIGNATURE, cache=True)
def _partial_maxima(arguments: Any, thread: int, begin: int, end: int) -> None:
    """scratch = [threads, maximum of each thread's part ...]."""
    source, scratch, count = floats(arguments[0]), floats(arguments[1]), arguments[2]
    if end == WHOLE:
        scratch[0] = np.float32(thread + 1)
    scratch[1 + thread] = -np.float32(np.inf)
    for i in range(count * begin // WHOLE, count * end // WHOLE):
        scratch[1 + thread] = max(scratch[1 + thread], source[i])


@cfunc(SIGNATURE, cache=True)
def _minus_maximum(arguments: Any, thread: int, begin: int, end: int) -> None:
    source, scratch, target = floats(arguments[0]), floats(arguments[1]), floats(arguments[2])
    maximum = scratch[1]
    for i in range(1, int(scratch[0])):
        maximum = max(maximum, scratch[1 + i])
    for i in range(arguments[3]):
        target[i] = source[i] - maximum


@cfunc(SIGNATURE, cache=True)
def _shares(arguments: Any, thread: int, begin: int, end: int) -> None:
    floats(arguments[0])[thread] = np.float32(end - begin) / np.float32(WHOLE)


def _entry(function: Any) -> Entry:
    return Entry(function.address, function.__name__, function)


def affine(count: int, scale: float = 1.0, shift: float = 1.0, parallel: bool = True) -> list[Step]:
    """output = scale * input + shift."""
    arguments = (Input(0), Output(0), count, float(scale), float(shift))
    return [Step(_entry(_affine), arguments, parallel)]


def add(count: int) -> list[Step]:
    """output = input 0 + input 1."""
    return [Step(_entry(_add), (Input(0), Input(1), Output(0), count))]


def rotate(count: int, shift: int, parallel: bool = True) -> list[Step]:
    """output[i] = input[(i + shift) % count] + 1."""
    return [Step(_entry(_rotate), (Input(0), Output(0), count, shift), parallel)]


def late_increment(count: int, turns: int) -> list[Step]:
    """output = input + 1; threads after the first turn a loop so many times before they start."""
    return [Step(_entry(_late_increment), (Input(0), Output(0), count, turns))]


def minus_maximum(count: int, threads: int) -> tuple[list[Step], int]:
    """output = input - max(input), in two steps, and the bytes of scratch memory they need."""
    return [
        Step(_entry(_partial_maxima), (Input(0), Scratch(), count)),
        Step(_entry(_minus_maximum), (Input(0), Scratch(0), Output(0), count), parallel=False),
    ], 4 * (threads + 1)


def shares() -> list[Step]:
    """output[thread] = its part of the work."""
    return [Step(_entry(_shares), (Output(0),))]
