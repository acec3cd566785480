"""Builds a program out of buffers, kernels and call-backs, which are named by opaque keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphopt.engine import walker
from graphopt.engine.plan import ALIGNMENT
from graphopt.engine.program import CallBack, Code, Program, Segment, TensorSpec
from graphopt.engine.storage import Buffer, Function, Kernel, Key, Operation, Storage
from graphopt.engine.tape import Fixed, InArena, Operands, Tape, TapeWriter
from graphopt.engine.team import MAXIMUM_THREADS
from graphopt.kernels.registry import Step


class ProgramBuilder:
    """Collects what a program consists of, in the order in which it is to run.

    A key names a buffer; it may be anything hashable. Every key is declared (`add_input`,
    `add_constant`, `add_buffer`, `add_alias`) before it is used. A buffer's shape is that of its
    memory, so a blocked or padded layout is one more dimension or a longer one. Memory that is
    aligned to less than 64 bytes comes only from the caller, from call-backs and from aliases at
    an odd offset.

    All methods raise ValueError where the program would make no sense.
    """

    def __init__(self) -> None:
        self._buffers: dict[Key, Buffer] = {}
        self._inputs: list[Key] = []
        self._constants: dict[Key, Tensor] = {}
        self._outputs: list[Key] = []
        self._checks: dict[Key, Callable[[Tensor], None]] = {}
        self._operations: list[Operation] = []

    def add_input(self, key: Key, shape: Sequence[int], dtype: torch.dtype) -> None:
        """The next argument of a call."""
        self._declare(key, key, 0, shape, dtype)
        self._inputs.append(key)

    def add_constant(self, key: Key, value: Tensor | np.ndarray) -> None:
        """A constant, not copied where it is contiguous and starts on a 64-byte line."""
        tensor = torch.from_numpy(value) if isinstance(value, np.ndarray) else value.detach()
        self._constants[key] = _aligned(tensor)
        self._declare(key, key, 0, tensor.shape, tensor.dtype)

    def add_buffer(self, key: Key, shape: Sequence[int], dtype: torch.dtype) -> None:
        """Memory that lives from its first writer to its last reader, or as an output."""
        self._declare(key, key, 0, shape, dtype)

    def add_alias(
        self, key: Key, of: Key, shape: Sequence[int], dtype: torch.dtype, offset: int = 0
    ) -> None:
        """Another name for memory of `of`, from `offset` bytes on: a view that costs nothing.

        To write to aliases of a buffer is to write parts of it.
        """
        base = self._buffer(of)
        spec = TensorSpec(tuple(shape), dtype)
        if offset < 0 or offset % dtype.itemsize or offset + spec.nbytes > base.spec.nbytes:
            raise ValueError(f"{key!r} ({spec} at byte {offset}) does not lie in {of!r}")
        self._declare(key, base.root, base.offset + offset, shape, dtype)

    def add_kernel(
        self,
        steps: Sequence[Step],
        inputs: Sequence[Key],
        outputs: Sequence[Key],
        *,
        packed: Sequence[np.ndarray] = (),
        scratch_bytes: int = 0,
        label: str,
        estimate: float,
        overwrites: Sequence[int] = (),
    ) -> None:
        """Run a kernel's steps.

        Args:
            steps: of `Candidate.build(threads)`. They are called with `threads` or with 1, the
                same for all parallel steps of one call; those not parallel always with 1.
            inputs: what `Input(i)` of the steps stands for.
            outputs: what `Output(i)` stands for.
            packed: what `Packed(i)` stands for; `Candidate.pack` made it.
            scratch_bytes: of `Candidate.scratch_bytes(threads)`.
            label: for profiles and reports.
            estimate: seconds on one thread.
            overwrites: of `Candidate.overwrites()`.

        A kernel whose outputs all are empty is left out.
        """
        self._check_uses(inputs, outputs)
        if any(self._buffer(key).spec.nbytes for key in outputs):
            self._operations.append(
                Kernel(
                    tuple(steps),
                    tuple(inputs),
                    tuple(outputs),
                    tuple(packed),
                    scratch_bytes,
                    label,
                    estimate,
                    tuple(overwrites),
                )
            )

    def add_call_back(
        self,
        function: Callable[..., Any],
        inputs: Sequence[Key],
        outputs: Sequence[Key | None],
        *,
        label: str,
    ) -> None:
        """Let torch do a step.

        Args:
            function: takes the inputs as tensors, which it must not change or keep; returns a
                tensor, or as many tensors as there are outputs.
            inputs: keys of its arguments.
            outputs: keys of its results, None for one that nobody needs.
            label: for profiles and reports.
        """
        self._check_uses(inputs, [key for key in outputs if key is not None])
        self._operations.append(Function(function, tuple(inputs), tuple(outputs), label))

    def add_output(self, key: Key) -> None:
        """The next result of a call; the same key may be an output several times."""
        self._buffer(key)
        self._outputs.append(key)

    def add_check(self, key: Key, check: Callable[[Tensor], None]) -> None:
        """Call ``check`` with a buffer at the end of each call; it may raise."""
        self._buffer(key)
        self._checks[key] = check

    def build(self, threads: int, *, alone_below: float = 0.0, gives_way: bool = False) -> Program:
        """The program.

        Args:
            threads: size of the team.
            alone_below: seconds; kernels between two call-backs whose estimates sum up to less
                run on the caller's thread alone.
            gives_way: whether a call that was slower with the team than it would have been on the
                caller's thread alone, as where other programs keep the processors busy, lets those
                that follow run alone for a while.
        """
        if not 1 <= threads <= MAXIMUM_THREADS:
            raise ValueError(f"threads must be in [1, {MAXIMUM_THREADS}], got {threads}")
        storage = Storage(
            self._buffers,
            self._inputs,
            {key: value.data_ptr() for key, value in self._constants.items()},
            [*self._outputs, *self._checks],
            self._operations,
        )
        results = len(self._outputs)
        noted = [result.view for result in storage.results[results:]]
        tape, segments, stages = _write(storage, self._operations, threads, alone_below)
        code = Code(
            tape=tape,
            segments=segments,
            stages=stages,
            inputs=tuple(self._buffers[key].spec for key in self._inputs),
            allocated=storage.allocated,
            externals=storage.externals,
            arena_views=storage.arena_views,
            constants=tuple(self._constants.values()),
            results=storage.results[:results],
            checks=tuple(zip(noted, self._checks.values(), strict=True)),
            arena_bytes=storage.plan.size,
            arena_lower_bound=storage.plan.lower_bound,
            gives_way=gives_way,
            keep_alive=tuple(self._operations),
        )
        return Program(code, threads)

    def _declare(
        self, key: Key, root: Key, offset: int, shape: Sequence[int], dtype: torch.dtype
    ) -> None:
        if key in self._buffers:
            raise ValueError(f"{key!r} is declared twice")
        self._buffers[key] = Buffer(root, offset, TensorSpec(tuple(shape), dtype))

    def _buffer(self, key: Key) -> Buffer:
        if key not in self._buffers:
            raise ValueError(f"{key!r} is not declared")
        return self._buffers[key]

    def _check_uses(self, inputs: Sequence[Key], outputs: Sequence[Key]) -> None:
        for key in inputs:
            self._buffer(key)
        for key in outputs:
            root = self._buffer(key).root
            if root in self._constants or root in self._inputs:
                raise ValueError(f"{key!r} is an input or a constant and cannot be written")


def _aligned(tensor: Tensor) -> Tensor:
    """A constant that is contiguous and starts on a line of the cache; itself if it does."""
    tensor = tensor.contiguous().resolve_conj().resolve_neg()
    if tensor.data_ptr() % ALIGNMENT == 0:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor)


def _write(
    storage: Storage, operations: Sequence[Operation], threads: int, alone_below: float
) -> tuple[Tape, np.ndarray, tuple[Segment | CallBack, ...]]:
    """The tape, the table of segments (see `Segment`), and the stages."""
    writer = TapeWriter()
    stages: list[Segment | CallBack] = []
    rows: list[list[int]] = []
    single_rows: list[list[int]] = []
    groups = [list(group) for _, group in groupby(enumerate(operations), _stage_key)]
    segments = sum(isinstance(group[0][1], Kernel) for group in groups)
    for group in groups:
        releases = storage.releases(group[0][0], group[-1][0])
        if isinstance(group[0][1], Function):
            stages.append(_call_back(group[0][1], storage, releases))
            continue
        kernels = [operation for _, operation in group if isinstance(operation, Kernel)]
        team = threads if sum(kernel.estimate for kernel in kernels) >= alone_below else 1
        begin, labels = writer.position, []
        for (number, _), kernel in zip(group, kernels, strict=True):
            alone = writer.position
            _write_kernel(writer, storage, number, kernel)
            labels.append((kernel.label, segments + len(single_rows)))
            single_rows.append(_row(alone, writer.position, team, stay=True))
        stay = group is groups[-1]
        stages.append(Segment(len(rows), tuple(labels), releases))
        rows.append(_row(begin, writer.position, team, stay))
    nothing = _row(writer.position, writer.position, 1, stay=True)
    table = np.array([*rows, *single_rows, nothing], dtype=np.int64)
    return writer.finish(), table, tuple(stages)


def _stage_key(numbered: tuple[int, Operation]) -> int:
    """Equal for consecutive kernels, and different for each call-back."""
    number, operation = numbered
    return number if isinstance(operation, Function) else -1


def _row(begin: tuple[int, int], end: tuple[int, int], threads: int, stay: bool) -> list[int]:
    row = [0] * (walker.SEGMENT_BYTES // 8)
    row[walker.SEGMENT_FIRST // 8], row[walker.SEGMENT_RELOCATION_FIRST // 8] = begin
    row[walker.SEGMENT_LAST // 8], row[walker.SEGMENT_RELOCATION_LAST // 8] = end
    row[walker.SEGMENT_THREADS // 8] = threads
    row[walker.SEGMENT_STAY // 8] = int(stay)
    return row


def _write_kernel(writer: TapeWriter, storage: Storage, number: int, kernel: Kernel) -> None:
    scratch = storage.scratch.get(number)
    operands = Operands(
        inputs=[storage.location(key) for key in kernel.inputs],
        outputs=[storage.location(key) for key in kernel.outputs],
        packed=[Fixed(array.ctypes.data) for array in kernel.packed],
        scratch=None if scratch is None else InArena(scratch),
    )
    writer.write(kernel.steps, operands)


def _call_back(function: Function, storage: Storage, releases: tuple[int, ...]) -> CallBack:
    return CallBack(
        label=function.label,
        function=function.function,
        inputs=tuple(storage.view(key) for key in function.inputs),
        outputs=tuple(
            None if key is None else storage.place_of_result(key) for key in function.outputs
        ),
        specs=tuple(None if key is None else storage.view(key).spec for key in function.outputs),
        releases=releases,
    )
