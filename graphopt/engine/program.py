"""A program: what a network has become, ready to be called by any number of threads at once.

A `Program` is immutable. Everything that a call writes is in its `Context`, of which a bounded
number is kept for later calls.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphopt.engine import walker
from graphopt.engine.plan import ALIGNMENT
from graphopt.engine.tape import Tape
from graphopt.engine.team import team
from graphopt.engine.threads import default_threads
from graphopt.errors import GraphError, TraceError

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a contiguous tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


@dataclass(frozen=True)
class View:
    """A tensor as one of a call's memories: `offset` bytes into the memory, read as `spec`.

    Attributes:
        memory: index into the call's list of memories (tensors).
        whole: the memory already is the tensor that is meant.
    """

    memory: int
    offset: int
    spec: TensorSpec
    whole: bool

    def of(self, memories: Sequence[Tensor | None]) -> Tensor:
        """The tensor; it shares the memory."""
        memory = memories[self.memory]
        assert memory is not None
        return memory if self.whole else reinterpret(memory, self.offset, self.spec)


def reinterpret(memory: Tensor, offset: int, spec: TensorSpec) -> Tensor:
    """The bytes of a contiguous tensor from `offset` on, read as another tensor, not copied."""
    if offset == 0 and memory.dtype == spec.dtype and memory.nbytes == spec.nbytes:
        return memory.view(spec.shape)
    raw = memory.view(-1).view(torch.uint8)[offset : offset + spec.nbytes]
    return raw.view(spec.dtype).view(spec.shape)


@dataclass(frozen=True)
class Segment:
    """Steps that compiled code runs in one go.

    Attributes:
        index: row of the program's table of segments.
        kernels: the label of each kernel, and the row of the segment that is this kernel alone.
        releases: externals that nothing needs afterwards.
    """

    index: int
    kernels: tuple[tuple[str, int], ...]
    releases: tuple[int, ...]


@dataclass(frozen=True)
class CallBack:
    """A step that torch does.

    Attributes:
        function: takes the inputs as tensors, returns a tensor or a sequence of tensors.
        outputs: for each result an external that it becomes, or a view that it is copied into, or
            None where nobody needs it.
        specs: of the results; None where nobody needs it.
        releases: externals that nothing needs afterwards.
    """

    label: str
    function: Callable[..., Any]
    inputs: tuple[View, ...]
    outputs: tuple[int | View | None, ...]
    specs: tuple[TensorSpec | None, ...]
    releases: tuple[int, ...]


@dataclass(frozen=True)
class Result:
    """An output: the tensor that a call's memory already is, or a copy of it."""

    view: View
    copied: bool


@dataclass(frozen=True)
class Code:
    """All that a program consists of; externals are inputs, allocated outputs, then call-backs'.

    Attributes:
        tape: of all segments.
        segments: (n, 6), see `walker.SEGMENT_*`.
        stages: segments and call-backs in order.
        inputs: specs of externals 0, 1, ...
        allocated: specs of the externals after these, which are made anew for each call.
        externals: how many there are.
        arena_views: offset and spec of the arena's tensors that call-backs and results see; these
            are memories `externals`, `externals` + 1, ...
        constants: the memories after these.
        results: the outputs.
        checks: what is called with a part of memory before a call returns.
        arena_bytes: size of the arena.
        arena_lower_bound: bytes that no arena can do without, see `plan.MemoryPlan`.
        gives_way: whether callers go alone for a while where that is faster.
        keep_alive: whatever else the addresses in the tape depend on.
    """

    tape: Tape
    segments: np.ndarray
    stages: tuple[Segment | CallBack, ...]
    inputs: tuple[TensorSpec, ...]
    allocated: tuple[TensorSpec, ...]
    externals: int
    arena_views: tuple[tuple[int, TensorSpec], ...]
    constants: tuple[Tensor, ...]
    results: tuple[Result, ...]
    checks: tuple[tuple[View, Callable[[Tensor], None]], ...]
    arena_bytes: int
    arena_lower_bound: int
    gives_way: bool
    keep_alive: Any


class Context:
    """What one call writes: the arena, the argument blocks and the addresses of externals."""

    __slots__ = ("address", "arena", "arguments", "block", "externals", "memories")

    def __init__(self, code: Code) -> None:
        # NumPy asks for huge pages, which spare kernels that walk through many rows at once most
        # of their address translations; torch does not.
        arena = np.empty(code.arena_bytes + ALIGNMENT, dtype=np.uint8)
        # A tensor made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            self.arena = torch.from_numpy(arena[-arena.ctypes.data % ALIGNMENT :])
        self.arena = self.arena[: code.arena_bytes]
        self.arguments = code.tape.arguments.copy()
        self.arguments[code.tape.arena_words] += self.arena.data_ptr()
        self.externals = np.zeros(max(2, code.externals), dtype=np.int64)
        self.memories: list[Tensor | None] = [None] * code.externals
        self.memories += [reinterpret(self.arena, *view) for view in code.arena_views]
        self.memories += code.constants
        self.block = np.zeros(walker.CONTEXT_BYTES // 8, dtype=np.int64)
        for place, value in (
            (walker.CONTEXT_TEAM, team.address),
            (walker.CONTEXT_TAPE, code.tape.steps.ctypes.data),
            (walker.CONTEXT_SEGMENTS, code.segments.ctypes.data),
            (walker.CONTEXT_RELOCATIONS, code.tape.relocations.ctypes.data),
            (walker.CONTEXT_ARGUMENTS, self.arguments.ctypes.data),
            (walker.CONTEXT_EXTERNALS, self.externals.ctypes.data),
        ):
            self.block[place // 8] = value
        self.insist(not code.gives_way)
        self.address = self.block.ctypes.data

    def insist(self, on_team: bool) -> None:
        """Whether calls wait for the team though they were faster alone."""
        self.block[walker.CONTEXT_GIVES_WAY // 8] = not on_team
        self.block[walker.CONTEXT_ALONE_UNTIL // 8] = 0


class Program:
    """A network's tape, constants and call-backs. Made by `builder.ProgramBuilder`.

    Attributes:
        threads: size of the team that calls ask for.
        inputs: what calls must be given.
        outputs: what calls return.
        arena_bytes: memory of one call beside its outputs.
        arena_lower_bound: bytes that no arena can do without.
    """

    def __init__(self, code: Code, threads: int) -> None:
        self.threads = threads
        self.inputs = code.inputs
        self.outputs = tuple(result.view.spec for result in code.results)
        self.arena_bytes = code.arena_bytes
        self.arena_lower_bound = code.arena_lower_bound
        self._code = code
        self._has_call_backs = any(isinstance(stage, CallBack) for stage in code.stages)
        # Bounded: what does not fit falls out at the other end.
        self._contexts: deque[Context] = deque(maxlen=max(2, 2 * default_threads()))
        self._single = self._is_single()

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the program. Safe to call from any number of threads.

        Args:
            inputs: CPU tensors with the shapes and dtypes of `Program.inputs`, strides as they
                like.

        Returns:
            tensors that own their memory and carry no gradient.

        Raises:
            TraceError: an input is not what the program was made for.
            GraphError: torch returns something else than the graph says in a call-back. What torch
                itself raises in a call-back passes through, with a note that names the call-back.
            IndexError: an index is outside of its table.
        """
        return self._run_single(*inputs) if self._single else self._run_any(*inputs)

    def profile(self, inputs: Sequence[Tensor], repeats: int = 5) -> list[tuple[str, float]]:
        """Label and median time in seconds of each kernel and call-back, in order of execution.

        The program runs `repeats` times as a whole, each kernel entered on its own; the cost of an
        entry is measured and subtracted.
        """
        runs = []
        context = self._acquire()
        # Kernels are timed with the team, however slow it was.
        context.insist(True)
        try:
            with self._torch_modes():
                for _ in range(repeats + 1):
                    memories = self._begin(context, inputs)
                    parts = (self._timed(x, context, memories) for x in self._code.stages)
                    runs.append([part for stage in parts for part in stage])
        finally:
            context.insist(not self._code.gives_way)
            self._contexts.append(context)
        # The first run warms up.
        return [
            (label, median(run[part][1] for run in runs[1:]))
            for part, (label, _) in enumerate(runs[0])
        ]

    def _is_single(self) -> bool:
        code = self._code
        return (
            len(code.inputs) == 1
            and len(code.allocated) == 1
            and len(code.results) == 1
            and not code.results[0].copied
            and not code.checks
            and len(code.stages) == 1
            and not self._has_call_backs
        )

    def _run_single(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """One tensor in, one out, no call-back: the same as `_run_any`, with less ado."""
        spec = self.inputs[0]
        if len(inputs) != 1:
            raise TraceError(f"the program takes 1 input, got {len(inputs)}")
        source = inputs[0]
        if (
            type(source) is not Tensor
            or source.dtype is not spec.dtype
            or source.shape != spec.shape
            or not source.is_contiguous()
            or not source.is_cpu
            or source.is_neg()
            or source.is_conj()
        ):
            source = _admit(source, 0, spec)
        address = source.data_ptr()
        if address % spec.dtype.itemsize:
            source = _admit(source, 0, spec)
            address = source.data_ptr()
        made = self.outputs[0]
        result = torch.empty(made.shape, dtype=made.dtype, device=_CPU)
        try:
            context = self._contexts.pop()
        except IndexError:
            context = Context(self._code)
        missing = walker.run_single(context.address, address, result.data_ptr())
        self._contexts.append(context)
        if missing:
            team.start(self.threads)
        return (result,)

    def _run_any(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        context = self._acquire()
        try:
            with self._torch_modes():
                memories = self._begin(context, inputs)
                for stage in self._code.stages:
                    if isinstance(stage, Segment):
                        self._run_segment(stage.index, context)
                    else:
                        _call_back(stage, context, memories)
                    for index in stage.releases:
                        memories[index] = None
                return self._results(memories)
        finally:
            self._contexts.append(context)

    def _acquire(self) -> Context:
        try:
            return self._contexts.pop()
        except IndexError:
            return Context(self._code)

    def _torch_modes(self) -> AbstractContextManager[None]:
        return _plain_torch() if self._has_call_backs else nullcontext()

    def _begin(self, context: Context, inputs: Sequence[Tensor]) -> list[Tensor | None]:
        """The memories of a call, inputs and new outputs among them, their addresses noted."""
        code = self._code
        check_count(inputs, code.inputs)
        memories = context.memories.copy()
        externals = [_admit(x, i, code.inputs[i]) for i, x in enumerate(inputs)]
        for spec in code.allocated:
            externals.append(torch.empty(spec.shape, dtype=spec.dtype, device=_CPU))
        for index, tensor in enumerate(externals):
            memories[index] = tensor
            context.externals[index] = tensor.data_ptr()
        return memories

    def _run_segment(self, index: int, context: Context) -> None:
        if walker.run_segment(context.address, index):
            team.start(self.threads)

    def _results(self, memories: list[Tensor | None]) -> tuple[Tensor, ...]:
        for view, check in self._code.checks:
            check(view.of(memories))
        results = []
        for result in self._code.results:
            tensor = result.view.of(memories)
            if result.copied:
                _tame_torch_after_fork()
                tensor = tensor.detach().clone()
            results.append(tensor)
        return tuple(results)

    def _timed(
        self, stage: Segment | CallBack, context: Context, memories: list[Tensor | None]
    ) -> list[tuple[str, float]]:
        if isinstance(stage, CallBack):
            begin = time.perf_counter()
            _call_back(stage, context, memories)
            return [(stage.label, time.perf_counter() - begin)]
        # The table's last row is a segment without steps.
        nothing = len(self._code.segments) - 1
        times = []
        for label, index in stage.kernels:
            begin = time.perf_counter()
            self._run_segment(nothing, context)
            middle = time.perf_counter()
            self._run_segment(index, context)
            end = time.perf_counter()
            times.append((label, max(0.0, (end - middle) - (middle - begin))))
        return times


def check_count(inputs: Sequence[Any], specs: Sequence[TensorSpec]) -> None:
    """Raise TraceError unless there are as many inputs as specs."""
    if len(inputs) != len(specs):
        raise TraceError(f"the program takes {len(specs)} inputs, got {len(inputs)}")


def check_input(tensor: Any, index: int, spec: TensorSpec) -> None:
    """Raise TraceError unless an input is a tensor of the spec's shape and dtype."""
    if not isinstance(tensor, Tensor):
        raise TraceError(f"input {index} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype != spec.dtype or tensor.shape != spec.shape:
        found = TensorSpec(tuple(tensor.shape), tensor.dtype)
        raise TraceError(f"input {index} is {found}, but the program was made for {spec}")


def _admit(tensor: Any, index: int, spec: TensorSpec) -> Tensor:
    """An input as kernels want it: contiguous and aligned to its elements."""
    check_input(tensor, index, spec)
    if not tensor.is_cpu or tensor.layout != torch.strided:
        raise TraceError(
            f"input {index} is a {tensor.layout} tensor on {tensor.device}; "
            "the program takes dense tensors on the CPU"
        )
    lazy = tensor.is_neg() or tensor.is_conj()
    if lazy or not tensor.is_contiguous() or tensor.data_ptr() % spec.dtype.itemsize:
        _tame_torch_after_fork()
        fresh = torch.empty(spec.shape, dtype=spec.dtype, device=_CPU)
        return fresh.copy_(tensor.detach())
    return tensor


def _call_back(stage: CallBack, context: Context, memories: list[Tensor | None]) -> None:
    """Run a call-back and put its results where they belong."""
    _tame_torch_after_fork()
    inputs = [view.of(memories) for view in stage.inputs]
    try:
        results = stage.function(*inputs)
    except Exception as error:
        error.add_note(f"in the call-back {stage.label}")
        raise
    if isinstance(results, Tensor):
        results = (results,)
    if len(results) != len(stage.outputs):
        raise GraphError(
            f"call-back {stage.label} returned {len(results)} results instead of "
            f"{len(stage.outputs)}"
        )
    # A result may alias an input, whose memory is used again, or another result.
    taken = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    for place, spec, result in zip(stage.outputs, stage.specs, results, strict=True):
        if place is None or spec is None:
            continue
        if result.dtype != spec.dtype or result.shape != spec.shape:
            found = TensorSpec(tuple(result.shape), result.dtype)
            raise GraphError(f"call-back {stage.label} returned {found} instead of {spec}")
        if isinstance(place, View):
            place.of(memories).copy_(result)
            continue
        lazy = result.is_neg() or result.is_conj()
        if lazy or not result.is_contiguous() or result.untyped_storage().data_ptr() in taken:
            fresh = torch.empty(spec.shape, dtype=spec.dtype, device=_CPU)
            result = fresh.copy_(result)
        taken.add(result.untyped_storage().data_ptr())
        memories[place] = result
        context.externals[place] = result.data_ptr()


@contextmanager
def _plain_torch() -> Iterator[None]:
    """No gradients and no autocast: call-backs compute what the graph says."""
    autocast = torch.is_autocast_enabled("cpu")
    with torch.no_grad():
        torch.set_autocast_enabled("cpu", False)
        try:
            yield
        finally:
            torch.set_autocast_enabled("cpu", autocast)


_torch_is_wild = False


def _after_fork() -> None:
    global _torch_is_wild
    _torch_is_wild = True


def _tame_torch_after_fork() -> None:
    """Restrict torch to one thread in a forked child, where its own threads are missing.

    A parallel loop of torch would wait for them for ever.
    """
    global _torch_is_wild
    if _torch_is_wild:
        _torch_is_wild = False
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
