"""Compiled code that walks a tape: atomics, the barrier, the workers' loop, the entry of a call.

All addresses and words are int64. Nothing here allocates, raises or needs the interpreter's lock.
It is one file because Numba's cache is keyed by the file of the function that is compiled, and
does not notice a change in a helper that lives elsewhere.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import extending, njit, types

_WORD = ir.IntType(64)

# Numba's own annotations describe an intrinsic as it is before decoration.
intrinsic: Any = extending.intrinsic

# Two cache lines: the prefetcher of x86 fetches lines in pairs.
LINE = 128

# Words of the team's block, by byte offset. Written before any worker starts, then only read:
WORKERS = 0
SYSTEM_WAIT = 8
SYSTEM_POST = 16
SYSTEM_YIELD = 24
PROCESSORS = 32
SPINS_AT_BARRIER = 40
SPINS_OF_OWNER = 48
SPINS_OF_WORKER = 56
# 0, or how many threads the caller wants that has the team now:
OWNER = LINE
# The job, written by the owner while all workers are idle:
JOB_TAPE = 2 * LINE
JOB_ARGUMENTS = JOB_TAPE + 8
JOB_FIRST = JOB_TAPE + 16
JOB_LAST = JOB_TAPE + 24
JOB_THREADS = JOB_TAPE + 32
JOB_SPINS_AT_BARRIER = JOB_TAPE + 40
JOB_SPINS_OF_WORKER = JOB_TAPE + 48
JOB_GENERATION = JOB_TAPE + 56
# Arrivals at the barrier since the job began:
ARRIVALS = 3 * LINE
# Three lines per thread, the owner (thread 0) included: what the owner tells it, what it is doing,
# and its share of the work. A share is a part of WHOLE, from BEGIN to END; SPEED, which the owner
# keeps between jobs, is relative to UNIT_SPEED. WHOLE is that of graphopt.kernels.registry, which
# Numba's cache would not notice to change.
FIRST_THREAD = 4 * LINE
COMMAND = 0
SEMAPHORE = 8
STATUS = LINE
SHARE = 2 * LINE
BEGIN = SHARE
END = SHARE + 8
TICKS = SHARE + 16
SPEED = SHARE + 24
THREAD_BYTES = 3 * LINE
WHOLE = 2**20
UNIT_SPEED = 2**20

STOP = -1
SPINNING, PARKED, WAKING = 0, 1, 2

_LEAST_TICKS = 10_000
_ALIKE = UNIT_SPEED // 20
"""Speeds that differ by less count as equal: equal tasks take unequally long as well, where the
memory of some is farther away."""

# One row of a tape: three words.
STEP_ENTRY = 0
STEP_ARGUMENTS = 8
STEP_FLAGS = 16
STEP_BYTES = 24
PARALLEL, BARRIER, BEGINS_KERNEL, FINE = 1, 2, 4, 8

# One row of the relocations: which word of the arguments, which external, plus how many bytes.
RELOCATION_WORD = 0
RELOCATION_EXTERNAL = 8
RELOCATION_OFFSET = 16
RELOCATION_BYTES = 24

# Words of a segment.
SEGMENT_FIRST = 0
SEGMENT_LAST = 8
SEGMENT_RELOCATION_FIRST = 16
SEGMENT_RELOCATION_LAST = 24
SEGMENT_THREADS = 32
SEGMENT_STAY = 40
SEGMENT_BYTES = 48

# Words of an execution context.
CONTEXT_TEAM = 0
CONTEXT_TAPE = 8
CONTEXT_SEGMENTS = 16
CONTEXT_RELOCATIONS = 24
CONTEXT_ARGUMENTS = 32
CONTEXT_EXTERNALS = 40
# 0 if the caller always waits for the team, and until when, in ticks, it goes alone.
CONTEXT_GIVES_WAY = 48
CONTEXT_ALONE_UNTIL = 56
CONTEXT_BYTES = 64

_AVOIDANCE = 10
"""For so many times the time that was lost with the team, its caller goes alone."""
_MOST_LOST = 100
"""How many times as long as alone may count as lost: a machine may have slept meanwhile."""


def _pointer(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return builder.inttoptr(address, _WORD.as_pointer())


@intrinsic
def load(typing_context: Any, address: Any) -> Any:
    """The word at an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_pointer(builder, args[0]))

    return types.int64(types.int64), codegen


@intrinsic
def store(typing_context: Any, address: Any, value: Any) -> Any:
    """Write a word."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[1], _pointer(builder, args[0]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def atomic_load(typing_context: Any, address: Any) -> Any:
    """The word at an address, sequentially consistent."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_pointer(builder, args[0]), "seq_cst", 8)

    return types.int64(types.int64), codegen


def _read_modify_write(operation: str) -> Callable[..., Any]:
    def typer(typing_context: Any, address: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.atomic_rmw(operation, _pointer(builder, args[0]), args[1], "seq_cst")

        return types.int64(types.int64, types.int64), codegen

    return typer


atomic_exchange = intrinsic(_read_modify_write("xchg"))
atomic_add = intrinsic(_read_modify_write("add"))


@intrinsic
def compare_exchange(typing_context: Any, address: Any, expected: Any, value: Any) -> Any:
    """Write `value` where the word is `expected`; returns the word found."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pair = builder.cmpxchg(_pointer(builder, args[0]), args[1], args[2], "seq_cst")
        return builder.extract_value(pair, 0)

    return types.int64(types.int64, types.int64, types.int64), codegen


@intrinsic
def pause(typing_context: Any) -> Any:
    """Tell the core that this is a loop that waits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        machine = platform.machine().lower()
        if machine in ("x86_64", "amd64"):
            function = builder.module.declare_intrinsic(
                "llvm.x86.sse2.pause", (), ir.FunctionType(ir.VoidType(), [])
            )
            builder.call(function, [])
        elif machine in ("aarch64", "arm64"):
            yield_hint = ir.FunctionType(ir.VoidType(), [ir.IntType(32)])
            function = builder.module.declare_intrinsic("llvm.aarch64.hint", (), yield_hint)
            builder.call(function, [ir.Constant(ir.IntType(32), 1)])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def ticks(typing_context: Any) -> Any:
    """A clock of this core that costs next to nothing to read; always 0 where there is none."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        machine = platform.machine().lower()
        if machine in ("x86_64", "amd64"):
            name = "llvm.readcyclecounter"
        elif machine in ("aarch64", "arm64"):
            # The counter of cycles is not for programs there.
            name = "llvm.readsteadycounter"
        else:
            return ir.Constant(_WORD, 0)
        counter = builder.module.declare_intrinsic(name, (), ir.FunctionType(_WORD, []))
        return builder.call(counter, [])

    return types.int64(), codegen


@intrinsic
def call_entry(
    typing_context: Any, address: Any, arguments: Any, thread: Any, begin: Any, end: Any
) -> Any:
    """Call a kernel's entry, see graphopt.kernels."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        function = ir.FunctionType(ir.VoidType(), [_WORD] * 4)
        builder.call(builder.inttoptr(args[0], function.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


@intrinsic
def call_system(typing_context: Any, address: Any, a: Any, b: Any, c: Any) -> Any:
    """Call a function of the system.

    It gets three integers, of which it takes as many as it wants: all conventions used pass them
    in registers.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        function = ir.FunctionType(_WORD, [_WORD] * 3)
        return builder.call(builder.inttoptr(args[0], function.as_pointer()), args[1:])

    return types.int64(*[types.int64] * 4), codegen


def _entry(signature: str) -> Callable[[Callable[..., Any]], Any]:
    """Compile at once for one signature, or load what an earlier process compiled."""

    def compile_now(function: Callable[..., Any]) -> Any:
        # Numba finds no place for its cache where neither this file's folder nor the user's
        # home can be written.
        try:
            return njit(signature, nogil=True, cache=True)(function)
        except RuntimeError as error:
            if "no locator available" not in str(error):
                raise
            return njit(signature, nogil=True)(function)

    return compile_now


@_entry("void(int64)")
def spin(count: int) -> None:
    """Wait for `count` pauses."""
    for _ in range(count):
        pause()


@njit
def await_arrivals(team: int, target: int) -> int:
    """Wait until `target` arrivals were counted; the ticks that it took.

    The counter only grows, so a thread that is late still sees its own target passed. After some
    spinning the processor is offered to others: the thread that is missing may need it.
    """
    start = ticks()
    spins = load(team + JOB_SPINS_AT_BARRIER)
    while atomic_load(team + ARRIVALS) < target:
        if spins > 0:
            spins -= 1
            pause()
        else:
            call_system(load(team + SYSTEM_YIELD), 0, 0, 0)
    return ticks() - start


@njit
def walk_alone(tape: int, arguments: int, first: int, last: int) -> None:
    """Run steps [first, last) on this thread."""
    for index in range(first, last):
        step = tape + index * STEP_BYTES
        call_entry(load(step + STEP_ENTRY), arguments + load(step + STEP_ARGUMENTS), 0, 0, WHOLE)


@njit
def speed_of(thread: int) -> int:
    """The speed by which the thread with this address gets its share."""
    speed = load(thread + SPEED)
    return UNIT_SPEED if abs(speed - UNIT_SPEED) < _ALIKE else speed


@njit
def divide(team: int, threads: int) -> None:
    """Give each thread a share of the work that is as large as the thread is fast."""
    total = 0
    for thread in range(threads):
        total += speed_of(team + FIRST_THREAD + thread * THREAD_BYTES)
    before = 0
    for thread in range(threads):
        own = team + FIRST_THREAD + thread * THREAD_BYTES
        store(own + BEGIN, before * WHOLE // total)
        before += speed_of(own)
        store(own + END, before * WHOLE // total)


@njit
def compare_speeds(team: int, threads: int) -> None:
    """Learn from a job how fast its threads are: processors differ, and so do their other tasks.

    Only steps with many tasks were timed, whose shares are about as large as they should be.
    """
    total = 0
    for thread in range(threads):
        own = team + FIRST_THREAD + thread * THREAD_BYTES
        if load(own + TICKS) < _LEAST_TICKS:
            return
        total += ((load(own + END) - load(own + BEGIN)) << 32) // load(own + TICKS)
    for thread in range(threads):
        own = team + FIRST_THREAD + thread * THREAD_BYTES
        speed = ((load(own + END) - load(own + BEGIN)) << 32) // load(own + TICKS)
        speed = min(max(UNIT_SPEED * threads * speed // total, UNIT_SPEED // 4), 4 * UNIT_SPEED)
        known = load(own + SPEED)
        # One job may have been disturbed.
        store(own + SPEED, known + (speed - known) // 4)


@njit
def walk_together(team: int, thread: int) -> int:
    """One thread's part of the team's job; the owner (thread 0) returns after all others.

    Returns the ticks for which this thread waited for others.
    """
    tape, arguments = load(team + JOB_TAPE), load(team + JOB_ARGUMENTS)
    threads = load(team + JOB_THREADS)
    own = team + FIRST_THREAD + thread * THREAD_BYTES
    begin, end = load(own + BEGIN), load(own + END)
    busy = 0
    waited = 0
    target = 0
    for index in range(load(team + JOB_FIRST), load(team + JOB_LAST)):
        step = tape + index * STEP_BYTES
        flags = load(step + STEP_FLAGS)
        entry, block = load(step + STEP_ENTRY), arguments + load(step + STEP_ARGUMENTS)
        if flags & PARALLEL != 0:
            start = ticks()
            call_entry(entry, block, thread, begin, end)
            if flags & FINE != 0:
                busy += ticks() - start
        elif thread == 0:
            call_entry(entry, block, 0, 0, WHOLE)
        if flags & BARRIER != 0:
            target += threads
            atomic_add(team + ARRIVALS, 1)
            waited += await_arrivals(team, target)
    store(own + TICKS, busy)
    if thread == 0:
        waited += await_arrivals(team, target + threads - 1)
    else:
        # The last word that a worker says: from here on the owner may change the job.
        atomic_add(team + ARRIVALS, 1)
    return waited


@njit
def patch(context: int, first: int, last: int) -> None:
    """Apply the relocations [first, last) of a context."""
    relocations = load(context + CONTEXT_RELOCATIONS)
    arguments, externals = load(context + CONTEXT_ARGUMENTS), load(context + CONTEXT_EXTERNALS)
    for index in range(first, last):
        row = relocations + index * RELOCATION_BYTES
        address = load(externals + 8 * load(row + RELOCATION_EXTERNAL))
        target = arguments + 8 * load(row + RELOCATION_WORD)
        store(target, address + load(row + RELOCATION_OFFSET))


@njit
def summon(team: int, workers: int) -> bool:
    """Wake those of the first `workers` workers that sleep; whether all of them are awake."""
    awake = True
    for index in range(workers):
        worker = team + FIRST_THREAD + (1 + index) * THREAD_BYTES
        if atomic_load(worker + STATUS) != SPINNING:
            awake = False
            if compare_exchange(worker + STATUS, PARKED, WAKING) == PARKED:
                call_system(load(team + SYSTEM_POST), load(worker + SEMAPHORE), 1, 0)
    return awake


@_entry("boolean(int64, int64)")
def seize(team: int, threads: int) -> bool:
    """Become the team's owner, unless it has one."""
    return compare_exchange(team + OWNER, 0, threads) == 0


@_entry("void(int64, int64, int64)")
def command(team: int, workers: int, value: int) -> None:
    """Give the first `workers` workers a command, and wake those that sleep."""
    for index in range(workers):
        atomic_exchange(team + FIRST_THREAD + (1 + index) * THREAD_BYTES + COMMAND, value)
    summon(team, workers)


@_entry("void(int64, int64)")
def serve(team: int, thread: int) -> None:
    """A worker's life: await a command, walk, linger, park; returns when told to stop."""
    worker = team + FIRST_THREAD + thread * THREAD_BYTES
    seen = 0
    linger = load(team + SPINS_OF_WORKER)
    atomic_exchange(worker + STATUS, SPINNING)
    while True:
        spins = linger
        order = atomic_load(worker + COMMAND)
        while order == seen:
            if spins > 0:
                spins -= 1
                pause()
            elif atomic_load(team + OWNER) > thread:
                # An owner that wants this worker is at work alone, and looks after each step.
                call_system(load(team + SYSTEM_YIELD), 0, 0, 0)
            else:
                # Announce, then look again, then sleep: the owner writes the command first and
                # looks for sleepers afterwards, so one of the two sees the other. A token left in
                # the semaphore by a near miss costs one needless round, no more.
                atomic_exchange(worker + STATUS, PARKED)
                if atomic_load(worker + COMMAND) == seen:
                    call_system(load(team + SYSTEM_WAIT), load(worker + SEMAPHORE), -1, 0)
                atomic_exchange(worker + STATUS, SPINNING)
                spins = load(team + SPINS_OF_WORKER)
            order = atomic_load(worker + COMMAND)
        if order == STOP:
            return
        seen = order
        linger = load(team + JOB_SPINS_OF_WORKER)
        walk_together(team, thread)


@njit
def next_kernel(tape: int, first: int, last: int) -> int:
    """The first step after `first` that begins a kernel, or `last`."""
    first += 1
    while first < last and load(tape + first * STEP_BYTES + STEP_FLAGS) & BEGINS_KERNEL == 0:
        first += 1
    return first


@njit
def run_steps(context: int, first: int, last: int, threads: int, stay: int) -> int:
    """Run steps [first, last) of a context, together with the team if it is there and free.

    Where other programs want the processors too, every barrier may wait for a thread that has lost
    its own. A caller that would have been faster alone goes alone for a while, then tries again.

    With `stay` 0 the workers sleep at once afterwards, else they spin for a while first.
    Returns 1 where the team lacks workers (the steps have then run on this thread alone), else 0.
    """
    tape, arguments = load(context + CONTEXT_TAPE), load(context + CONTEXT_ARGUMENTS)
    team = load(context + CONTEXT_TEAM)
    workers = threads - 1
    missing = atomic_load(team + WORKERS) < workers
    avoided = ticks() < load(context + CONTEXT_ALONE_UNTIL)
    if workers == 0 or missing or avoided or not seize(team, threads):
        walk_alone(tape, arguments, first, last)
        return 1 if missing else 0
    # Workers that sleep take tens of microseconds to come. They are given that time once; those
    # that are later still find this thread at work, and join it between two kernels.
    patience = load(team + SPINS_OF_OWNER)
    while first < last and not summon(team, workers):
        if patience > 0:
            patience -= 1
            pause()
        else:
            following = next_kernel(tape, first, last)
            walk_alone(tape, arguments, first, following)
            first = following
    if first < last:
        store(team + JOB_TAPE, tape)
        store(team + JOB_ARGUMENTS, arguments)
        store(team + JOB_FIRST, first)
        store(team + JOB_LAST, last)
        store(team + JOB_THREADS, threads)
        # More threads than processors: whoever spins keeps another from its work.
        crowded = threads > load(team + PROCESSORS)
        store(team + JOB_SPINS_AT_BARRIER, 0 if crowded else load(team + SPINS_AT_BARRIER))
        store(team + JOB_SPINS_OF_WORKER, 0 if stay == 0 else load(team + SPINS_OF_WORKER))
        generation = load(team + JOB_GENERATION) + 1
        store(team + JOB_GENERATION, generation)
        divide(team, threads)
        atomic_exchange(team + ARRIVALS, 0)
        start = ticks()
        command(team, workers, generation)
        waited = walk_together(team, 0)
        end = ticks()
        compare_speeds(team, threads)
        alone = threads * (end - start - waited)
        lost = min(end - start - alone, _MOST_LOST * alone)
        if lost > 0 and load(context + CONTEXT_GIVES_WAY) != 0:
            store(context + CONTEXT_ALONE_UNTIL, end + _AVOIDANCE * lost)
    atomic_exchange(team + OWNER, 0)
    return 0


@_entry("int64(int64, int64)")
def run_segment(context: int, index: int) -> int:
    """Write the addresses of the externals where a segment's steps want them, and run the steps.

    Returns what `run_steps` returns.
    """
    segment = load(context + CONTEXT_SEGMENTS) + index * SEGMENT_BYTES
    patch(
        context, load(segment + SEGMENT_RELOCATION_FIRST), load(segment + SEGMENT_RELOCATION_LAST)
    )
    return run_steps(
        context,
        load(segment + SEGMENT_FIRST),
        load(segment + SEGMENT_LAST),
        load(segment + SEGMENT_THREADS),
        load(segment + SEGMENT_STAY),
    )


@_entry("int64(int64, int64, int64)")
def run_single(context: int, source: int, result: int) -> int:
    """`run_segment` of segment 0, whose only externals are one input and one output."""
    externals = load(context + CONTEXT_EXTERNALS)
    store(externals, source)
    store(externals + 8, result)
    return run_segment(context, 0)
