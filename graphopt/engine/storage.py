"""Where each buffer of a program is: in a constant, in an external, or in the arena.

An output that kernels write is an external that is made for each call, so that the caller gets it
without a copy. The result of a call-back is an external, as torch made it. The rest is in the
arena.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.engine.plan import Lifetime, MemoryPlan, plan_memory
from graphopt.engine.program import Result, TensorSpec, View
from graphopt.engine.tape import Fixed, InArena, InExternal, Location
from graphopt.kernels.registry import Step

Key = Hashable


@dataclass(frozen=True)
class Buffer:
    """What a key means: `spec`, `offset` bytes into the memory of `root`."""

    root: Key
    offset: int
    spec: TensorSpec


@dataclass(frozen=True)
class Kernel:
    """An operation of compiled steps, see `ProgramBuilder.add_kernel`."""

    steps: tuple[Step, ...]
    inputs: tuple[Key, ...]
    outputs: tuple[Key, ...]
    packed: tuple[np.ndarray, ...]
    scratch_bytes: int
    label: str
    estimate: float
    overwrites: tuple[int, ...] = ()


@dataclass(frozen=True)
class Function:
    """An operation that torch does, see `ProgramBuilder.add_call_back`."""

    function: Callable[..., Any]
    inputs: tuple[Key, ...]
    outputs: tuple[Key | None, ...]
    label: str


Operation = Kernel | Function


class Storage:
    """Decides for every buffer of a program, and answers where it is.

    Operations are known by their number in the program's order, constants by their addresses.

    Attributes:
        allocated: specs of the externals made for each call; they come after the inputs.
        externals: how many externals there are in all.
        plan: of the arena.
        scratch: offsets in the arena of kernels' scratch memory, by operation.
        arena_views: offset and spec of what is seen of the arena as a tensor.
        results: the outputs.

    Raises:
        ValueError: a buffer is read or returned before anything has written it.
    """

    def __init__(
        self,
        buffers: Mapping[Key, Buffer],
        inputs: Sequence[Key],
        constants: Mapping[Key, int],
        outputs: Sequence[Key],
        operations: Sequence[Operation],
    ) -> None:
        self._buffers = buffers
        self._operations = operations
        self._outputs = outputs
        self._addresses = constants
        self._constants = {key: index for index, key in enumerate(constants)}
        self._given = {*inputs, *constants}
        self._reads, self._writes = self._uses()
        self._check_written()

        made = self._made_by_call_backs()
        allocated = self._allocated_for_results(made)
        given = {key: buffers[key].spec for key in inputs}
        self._external_specs = given | allocated | {key: buffers[key].spec for key in made}
        self._externals = {key: index for index, key in enumerate(self._external_specs)}
        self.allocated = tuple(allocated.values())
        self.externals = len(self._externals)

        self._copies = self._choose_copies({*made, *allocated})
        self.plan, self._offsets, self.scratch = self._plan()
        self._arena_keys = self._keys_seen_in_arena()
        self.arena_views = tuple(
            (self._arena_offset(key), buffers[key].spec) for key in self._arena_keys
        )
        self.results = tuple(
            Result(self.view(key), copied)
            for key, copied in zip(outputs, self._copies, strict=True)
        )

    def location(self, key: Key) -> Location:
        """Where kernels find a buffer."""
        buffer = self._buffers[key]
        if buffer.root in self._constants:
            return Fixed(self._addresses[buffer.root] + buffer.offset)
        if buffer.root in self._externals:
            return InExternal(self._externals[buffer.root], buffer.offset)
        return InArena(self._arena_offset(key))

    def view(self, key: Key) -> View:
        """How call-backs and callers find a buffer that they see as a tensor."""
        buffer = self._buffers[key]
        if buffer.root in self._constants:
            index = self.externals + len(self._arena_keys) + self._constants[buffer.root]
            memory = self._buffers[buffer.root].spec
        elif buffer.root in self._externals:
            index = self._externals[buffer.root]
            memory = self._external_specs[buffer.root]
        else:
            index = self.externals + self._arena_keys[key]
            memory = buffer.spec
            return View(index, 0, memory, whole=True)
        whole = buffer.offset == 0 and memory == buffer.spec
        return View(index, buffer.offset, buffer.spec, whole)

    def place_of_result(self, key: Key) -> int | View:
        """Where a call-back's result goes: it becomes an external, or is copied into a view."""
        if self._is_made(key):
            return self._externals[key]
        return self.view(key)

    def releases(self, first: int, last: int) -> tuple[int, ...]:
        """Externals last touched in operations [first, last], outputs apart."""
        kept = {self._buffers[key].root for key in self._outputs}
        return tuple(
            index
            for root, index in self._externals.items()
            if root not in kept and first <= max(self._touches(root), default=-1) <= last
        )

    def _uses(self) -> tuple[dict[Key, list[int]], dict[Key, list[int]]]:
        """The operations that read and that write each root."""
        reads: dict[Key, list[int]] = {}
        writes: dict[Key, list[int]] = {}
        for number, operation in enumerate(self._operations):
            for key in operation.inputs:
                reads.setdefault(self._buffers[key].root, []).append(number)
            for key in operation.outputs:
                if key is not None:
                    writes.setdefault(self._buffers[key].root, []).append(number)
        return reads, writes

    def _touches(self, root: Key) -> list[int]:
        return self._reads.get(root, []) + self._writes.get(root, [])

    def _check_written(self) -> None:
        end = len(self._operations)
        wanted = {root: numbers[0] for root, numbers in self._reads.items()}
        for key in self._outputs:
            wanted.setdefault(self._buffers[key].root, end)
        for root, number in wanted.items():
            written = self._writes.get(root, [end])[0] < number
            if not written and root not in self._given and self._buffers[root].spec.nbytes:
                reader = (
                    "returned" if number == end else f"read by {self._operations[number].label}"
                )
                raise ValueError(f"{root!r} is {reader} before anything has written it")

    def _made_by_call_backs(self) -> list[Key]:
        return [root for root in self._writes if self._is_made(root)]

    def _is_made(self, key: Key) -> bool:
        """Whether a buffer is a call-back's result as a whole, and nothing else writes to it."""
        writers = self._writes.get(key, [])
        if len(writers) != 1:
            return False
        operation = self._operations[writers[0]]
        return isinstance(operation, Function) and key in operation.outputs

    def _allocated_for_results(self, made: Sequence[Key]) -> dict[Key, TensorSpec]:
        """Roots that are outputs as a whole and must be made for each call, as which spec."""
        allocated: dict[Key, TensorSpec] = {}
        for key in self._outputs:
            root = self._buffers[key].root
            if root not in self._given and root not in made and self._is_whole(key):
                allocated.setdefault(root, self._buffers[key].spec)
        return allocated

    def _is_whole(self, key: Key) -> bool:
        buffer = self._buffers[key]
        return buffer.spec.nbytes == self._buffers[buffer.root].spec.nbytes

    def _choose_copies(self, owned: set[Key]) -> list[bool]:
        """For each output whether it must be copied: the first to want a whole root gets it."""
        copies = []
        for key in self._outputs:
            root = self._buffers[key].root
            copies.append(root not in owned or not self._is_whole(key))
            if not copies[-1]:
                owned = owned - {root}
        return copies

    def _plan(self) -> tuple[MemoryPlan, dict[Key, int], dict[int, int]]:
        """The arena's plan, and the offsets of roots and of scratch memory in it."""
        end = len(self._operations)
        returned = {self._buffers[key].root for key in self._outputs}
        lifetimes: dict[Key, Lifetime] = {}
        for root in dict.fromkeys([*self._writes, *self._reads, *returned]):
            if root in self._given or root in self._externals:
                continue
            touches = self._touches(root) + ([end] if root in returned else [])
            size = self._buffers[root].spec.nbytes
            lifetimes[root] = Lifetime(size, min(touches), max(touches))
        hosts = self._share(lifetimes)
        scratch = {
            number: Lifetime(operation.scratch_bytes, number, number)
            for number, operation in enumerate(self._operations)
            if isinstance(operation, Kernel) and operation.scratch_bytes > 0
        }
        plan = plan_memory([*lifetimes.values(), *scratch.values()])
        offsets = dict(zip(lifetimes, plan.offsets, strict=False))
        offsets |= {root: offsets[host] for root, host in hosts.items()}
        in_scratch = dict(zip(scratch, plan.offsets[len(lifetimes) :], strict=True))
        return plan, offsets, in_scratch

    def _share(self, lifetimes: dict[Key, Lifetime]) -> dict[Key, Key]:
        """Roots that take the place of another, and that other, which lives for both.

        An output takes the place of an input that its kernel may overwrite and nothing needs
        afterwards: less memory passes through the caches.
        """
        hosts: dict[Key, Key] = {}
        for number, operation in enumerate(self._operations):
            for index in operation.overwrites if isinstance(operation, Kernel) else ():
                root, output = operation.inputs[index], operation.outputs[0]
                host = hosts.get(root, root)
                reads = [self._buffers[key].root for key in operation.inputs]
                if host not in lifetimes or output not in lifetimes or reads.count(root) != 1:
                    continue
                old, new = lifetimes[host], lifetimes[output]
                if old.last == new.first == number and old.size == new.size:
                    hosts[output] = host
                    del lifetimes[output]
                    lifetimes[host] = Lifetime(old.size, old.first, new.last)
                    break
        return hosts

    def _arena_offset(self, key: Key) -> int:
        buffer = self._buffers[key]
        return self._offsets[buffer.root] + buffer.offset

    def _keys_seen_in_arena(self) -> dict[Key, int]:
        """What call-backs or callers see of the arena, numbered."""
        seen: list[Key] = list(self._outputs)
        for operation in self._operations:
            if isinstance(operation, Function):
                seen += [key for key in (*operation.inputs, *operation.outputs) if key is not None]
        in_arena = (key for key in seen if self._buffers[key].root in self._offsets)
        return {key: index for index, key in enumerate(dict.fromkeys(in_arena))}
