"""The team of threads that walks tapes together, one team per process.

Workers are daemon threads that live in compiled code (`walker.serve`) without the interpreter's
lock: they spin briefly between calls and then sleep in a semaphore of the system. They are started
by the first call that wants them, which itself runs alone. A caller that finds the team at work
for another runs on its own thread alone.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.engine import walker
from graphopt.engine.threads import default_threads

MAXIMUM_THREADS = 512

_SPIN_AT_BARRIER = 20e-6
"""Seconds that a thread spins at a barrier before it offers its processor to others."""

_PATIENCE = 60e-6
"""Seconds that a caller waits for sleeping workers before it begins alone."""

_LINGER = 100e-6
"""Seconds that a worker spins after a call before it sleeps; the next call may be near."""


@dataclass(frozen=True)
class _System:
    """Addresses of three functions of the system, and a way to make a semaphore.

    ``wait(semaphore, -1)`` waits for ever and ``post(semaphore, 1, 0)`` wakes one waiter: with
    these arguments, of which each system takes the first few, the calls fit all of them.
    """

    wait: int
    post: int
    give_way: int
    create_semaphore: Callable[[], int]


class Team:
    """Workers and the block of memory through which compiled code commands them.

    Attributes:
        address: of the block; valid for the life of the process, and in forked children.
    """

    def __init__(self) -> None:
        size = walker.FIRST_THREAD + MAXIMUM_THREADS * walker.THREAD_BYTES
        self._memory = np.zeros(size // 8 + walker.LINE // 8, dtype=np.int64)
        skip = -self._memory.ctypes.data % walker.LINE // 8
        self._words = self._memory[skip : skip + size // 8]
        self.address = self._words.ctypes.data
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._usable = True

    def start(self, threads: int) -> None:
        """Start workers until the team has `threads` threads, the caller's own included.

        Where the system has no thread to give, a warning says so once and calls go on alone.
        """
        with self._lock:
            if not self._usable:
                return
            try:
                if not self._threads:
                    self._prepare()
                while len(self._threads) < threads - 1:
                    self._start_worker(len(self._threads) + 1)
            except (OSError, RuntimeError, AttributeError) as error:
                self._usable = False
                warnings.warn(
                    f"no team of {threads} threads ({error}); programs run on one thread",
                    RuntimeWarning,
                    stacklevel=2,
                )
            # The semaphores are written before this word, and threads were started since then.
            self._words[walker.WORKERS // 8] = len(self._threads)

    def stop(self) -> None:
        """Let all workers end, and wait for them; later calls run alone. For the process's end."""
        with self._lock:
            self._usable = False
            # A call that never returns keeps the workers; the process then ends over their heads.
            deadline = time.monotonic() + 1.0
            while not walker.seize(self.address, MAXIMUM_THREADS):
                if time.monotonic() > deadline:
                    return
                time.sleep(0.001)
            walker.command(self.address, len(self._threads), walker.STOP)
            for thread in self._threads:
                if thread.is_alive():
                    thread.join(1.0)

    def reset(self) -> None:
        """Forget workers that a fork left in the parent process. The address stays the same."""
        self._lock = threading.Lock()
        self._threads = []
        self._words[:] = 0

    def _prepare(self) -> None:
        system = _system()
        pause = _seconds_per_pause()
        for place, value in (
            (walker.SYSTEM_WAIT, system.wait),
            (walker.SYSTEM_POST, system.post),
            (walker.SYSTEM_YIELD, system.give_way),
            (walker.PROCESSORS, default_threads()),
            (walker.SPINS_AT_BARRIER, int(_SPIN_AT_BARRIER / pause)),
            (walker.SPINS_OF_OWNER, int(_PATIENCE / pause)),
            (walker.SPINS_OF_WORKER, int(_LINGER / pause)),
        ):
            self._words[place // 8] = value
        speeds = self._words[(walker.FIRST_THREAD + walker.SPEED) // 8 :: walker.THREAD_BYTES // 8]
        speeds[...] = walker.UNIT_SPEED

    def _start_worker(self, thread: int) -> None:
        worker = (walker.FIRST_THREAD + thread * walker.THREAD_BYTES) // 8
        self._words[worker + walker.SEMAPHORE // 8] = _system().create_semaphore()
        self._words[worker + walker.STATUS // 8] = walker.WAKING
        started = threading.Thread(
            target=walker.serve, args=(self.address, thread), name=f"graphopt-{thread}", daemon=True
        )
        # Counted before it starts: were the start interrupted, a second worker with this number
        # must not follow.
        self._threads.append(started)
        try:
            started.start()
        except RuntimeError:
            self._threads.pop()
            raise


@functools.cache
def _system() -> _System:
    if sys.platform == "win32":
        kernel = ctypes.WinDLL("kernel32")
        kernel.CreateSemaphoreW.restype = ctypes.c_void_p
        return _System(
            _address(kernel.WaitForSingleObject),
            _address(kernel.ReleaseSemaphore),
            _address(kernel.SwitchToThread),
            lambda: _made(kernel.CreateSemaphoreW(None, 0, 0x7FFFFFFF, None)),
        )
    library = ctypes.CDLL(None)
    if sys.platform == "darwin":
        library.dispatch_semaphore_create.restype = ctypes.c_void_p
        return _System(
            _address(library.dispatch_semaphore_wait),
            _address(library.dispatch_semaphore_signal),
            _address(library.sched_yield),
            lambda: _made(library.dispatch_semaphore_create(ctypes.c_long(0))),
        )
    return _System(
        _address(library.sem_wait),
        _address(library.sem_post),
        _address(library.sched_yield),
        lambda: _posix_semaphore(library),
    )


def _address(function: Any) -> int:
    return _made(ctypes.cast(function, ctypes.c_void_p).value)


def _made(handle: int | None) -> int:
    if not handle:
        raise OSError("the system gives no semaphore")
    return handle


# sem_t has 32 bytes at most on the systems served. A worker may sleep in one while the process
# ends, so they are never freed.
_posix_semaphores: list[ctypes.Array[ctypes.c_char]] = []


def _posix_semaphore(library: ctypes.CDLL) -> int:
    memory = ctypes.create_string_buffer(128)
    if library.sem_init(memory, 0, 0) != 0:
        raise OSError("the system gives no semaphore")
    _posix_semaphores.append(memory)
    return ctypes.addressof(memory)


def _seconds_per_pause() -> float:
    """How long one pause takes here: between 10 and 150 cycles, depending on the processor."""
    count = 2000
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        walker.spin(count)
        best = min(best, time.perf_counter() - begin)
    return max(best / count, 1e-10)


team = Team()
"""The team of this process."""

atexit.register(team.stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=team.reset)
