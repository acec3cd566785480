"""Runs kernels on buffers between inaccessible pages, so that any stray access is fatal."""

from __future__ import annotations

import ctypes
import mmap
import struct
from collections.abc import Callable, Sequence

import numpy as np

from graphopt import kernels
from graphopt.kernels.operand import ConstantOperand, Operand
from graphopt.kernels.problem import Problem
from graphopt.kernels.registry import (
    WHOLE,
    Argument,
    Candidate,
    Entry,
    Input,
    Output,
    Packed,
    Scratch,
    Step,
    Table,
    candidates,
)

_libc = ctypes.CDLL(None, use_errno=True)
_PROT_NONE = 0
_ENTRY = ctypes.CFUNCTYPE(None, ctypes.c_void_p, *[ctypes.c_int64] * 3)


ALONE = f"""
import importlib.util, sys, types
sys.modules["graphopt"] = parent = types.ModuleType("graphopt")
parent.__path__ = []
spec = importlib.util.spec_from_file_location(
    "graphopt.kernels", {kernels.__file__!r}, submodule_search_locations={kernels.__path__!r}
)
sys.modules["graphopt.kernels"] = package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
"""
"""The beginning of a script that has the kernels without the compiler above them."""


class GuardedBuffer:
    """``size`` bytes that end at an inaccessible page, or begin after one.

    ``offset`` moves the bytes away from that page, to try starts that are not aligned.
    """

    def __init__(self, size: int, at_end: bool = True, offset: int = 0) -> None:
        page = mmap.PAGESIZE
        inside = max(-(-(size + offset) // page), 1) * page
        self._map = mmap.mmap(-1, inside + 2 * page)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        for guard in (base, base + page + inside):
            if _libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), _PROT_NONE) != 0:
                raise OSError(ctypes.get_errno(), "mprotect failed")
        self.size = size
        self.address = base + page + (inside - size - offset if at_end else offset)
        whole = (ctypes.c_uint8 * size).from_address(self.address)
        self.bytes = np.frombuffer(whole, np.uint8) if size else np.empty(0, np.uint8)

    def array(self, operand: Operand) -> np.ndarray:
        """The buffer as the operand lies in it; one in groups as its memory is, one in halves with
        a dimension for these."""
        dtype = np.dtype(operand.dtype)
        if self.size == 0:
            return np.empty(operand.shape, dtype)
        if operand.layout.group > 1:
            return self.bytes.view(dtype).reshape(operand.memory)
        if operand.layout.halves:
            _, channels, rows, columns = operand.shape
            planes = self.bytes.view(dtype).reshape(operand.memory)
            inside = planes[..., : rows // 2 * columns]
            return inside.reshape(1, 2, channels, rows // 2, columns, copy=False).swapaxes(1, 2)
        strides = [stride * dtype.itemsize for stride in operand.strides]
        flat = self.bytes.view(dtype)
        return np.lib.stride_tricks.as_strided(flat, operand.shape, strides)


def guarded(array: np.ndarray, at_end: bool = True) -> tuple[GuardedBuffer, np.ndarray]:
    """A buffer that holds a copy of an array, and the copy."""
    operand = Operand.plain(str(array.dtype), array.shape)
    buffer = GuardedBuffer(operand.bytes, at_end)
    inside = buffer.array(operand)
    inside[...] = array
    return buffer, inside


def solve(
    problem: Problem,
    inputs: Sequence[np.ndarray],
    threads: int = 1,
    at_end: bool = True,
    offset: int = 0,
    choose: Callable[[list[Candidate]], Candidate] = lambda found: found[0],
) -> list[np.ndarray]:
    """The outputs of one candidate for ``problem``, the first unless told otherwise."""
    found = candidates(problem)
    assert found, f"no candidate for {problem.key()}"
    return execute(choose(found), inputs, threads, at_end, offset)


def execute(
    candidate: Candidate,
    inputs: Sequence[np.ndarray],
    threads: int = 1,
    at_end: bool = True,
    offset: int = 0,
    overwritten: int | None = None,
) -> list[np.ndarray]:
    """The outputs of a candidate, run for each thread of the team in turn.

    Every operand lies between guard pages; bytes of an output that its layout does not use, and
    the inputs, must stay as they were, but for the input ``overwritten``, where the first output
    is to lie.
    """
    problem = candidate.problem
    sources = [
        _filled(operand, array, at_end, offset)
        for operand, array in zip(problem.inputs, inputs, strict=True)
    ]
    before = [buffer.bytes.copy() for buffer in sources]
    targets = [GuardedBuffer(operand.bytes, at_end, offset) for operand in problem.outputs]
    for buffer in targets:
        buffer.bytes[...] = 0xA5
    if overwritten is not None:
        assert overwritten in candidate.overwrites()
        targets[0] = sources.pop(overwritten)
        sources.insert(overwritten, targets[0])
        before[overwritten] = targets[0].bytes
    constants = [
        np.ascontiguousarray(array) if isinstance(operand, ConstantOperand) else None
        for operand, array in zip(problem.inputs, inputs, strict=True)
    ]
    packed = candidate.pack(constants)
    assert all(array.size == 0 or array.ctypes.data % 64 == 0 for array in packed)
    needed = candidate.scratch_bytes(threads)
    scratch = GuardedBuffer(-(-needed // 64) * 64)
    scratch.bytes[...] = 0xFF
    tables: list[np.ndarray] = []

    def address(argument: Argument) -> int:
        match argument:
            case Input(index, start):
                return sources[index].address + start
            case Output(index, start):
                return targets[index].address + start
            case Packed(index):
                return int(packed[index].ctypes.data)
            case Table(numbers):
                tables.append(np.array(numbers, np.int64))
                return int(tables[-1].ctypes.data)
            case Scratch(start):
                assert needed, "the kernel asked for no scratch memory"
                return scratch.address + start
            case float():
                return int(struct.unpack("<i", struct.pack("<f", argument))[0])
            case _:
                return argument

    for step in candidate.build(threads):
        _run(step, [address(argument) for argument in step.arguments], threads)
    for buffer, bytes_before in zip(sources, before, strict=True):
        np.testing.assert_array_equal(buffer.bytes, bytes_before, "an input was written to")
    for buffer, operand in zip(targets, problem.outputs, strict=True):
        _check_gaps(buffer, operand)
    return [
        buffer.array(operand).reshape(_shape(operand), copy=True)
        for buffer, operand in zip(targets, problem.outputs, strict=True)
    ]


def _shape(operand: Operand) -> tuple[int, ...]:
    return operand.memory if operand.layout.group > 1 else operand.shape


def _filled(operand: Operand, array: np.ndarray, at_end: bool, offset: int) -> GuardedBuffer:
    assert array.shape == _shape(operand)
    assert array.dtype == np.dtype(operand.dtype)
    buffer = GuardedBuffer(operand.bytes, at_end, offset)
    buffer.bytes[...] = 0xFF
    inside = buffer.array(operand)
    inside[...] = array.reshape(inside.shape)
    return buffer


def _run(step: Step, block: list[int], threads: int) -> None:
    team = threads if step.parallel else 1
    # Later threads get more, so that no kernel relies on equal shares.
    bounds = [WHOLE * thread * (thread + 1) // (team * (team + 1)) for thread in range(team + 1)]
    for thread in reversed(range(team)):
        call(step.entry, block, thread, bounds[thread], bounds[thread + 1])


def call(entry: Entry, block: list[int], thread: int = 0, begin: int = 0, end: int = WHOLE) -> None:
    """Call a kernel with an argument block."""
    arguments = np.array(block, np.int64)
    _ENTRY(entry.address)(arguments.ctypes.data, thread, begin, end)


def _check_gaps(buffer: GuardedBuffer, operand: Operand) -> None:
    used = GuardedBuffer(operand.bytes)
    used.array(operand).view(f"V{np.dtype(operand.dtype).itemsize}")[...] = np.void(
        b"\1" * np.dtype(operand.dtype).itemsize
    )
    gaps = used.bytes == 0
    assert (buffer.bytes[gaps] == 0xA5).all(), "bytes between an output's elements were written"
