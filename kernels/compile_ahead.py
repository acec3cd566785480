"""Compiles many kernels at once, in processes of their own.

Numba compiles one function at a time in a process. What another process compiles is found on disk,
so that a network's kernels can be shared out among the processors.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from graphopt.kernels import source
from graphopt.kernels.source import Source

_log = logging.getLogger("graphopt")

LEAST = 4
"""Kernels from which another process, which needs a second to start, is worth it."""

_WORKER = """
import importlib.util, pickle, sys, types
package = pickle.load(sys.stdin.buffer)
sys.modules["graphopt"] = parent = types.ModuleType("graphopt")
parent.__path__ = []
spec = importlib.util.spec_from_file_location(
    "graphopt.kernels", package + "/__init__.py", submodule_search_locations=[package]
)
sys.modules["graphopt.kernels"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from graphopt.kernels import source
while True:
    sys.stdout.buffer.write(b"+")
    sys.stdout.buffer.flush()
    try:
        name, text = pickle.load(sys.stdin.buffer)
    except EOFError:
        break
    source.build(name, text)
"""
"""Has the kernels without the compiler above them, and so without torch."""


def compile_ahead(wanted: Mapping[str, Source], processes: int) -> None:
    """Compile what is not compiled yet, so that `source.build` finds it.

    Args:
        wanted: sources by key, from `source.collecting`.
        processes: how many may compile at the same time, this one included.

    What another process fails to compile is compiled, or refused, by this one when it is built.
    """
    missing = [one for key, one in wanted.items() if not source.is_compiled(key)]
    if len(missing) < LEAST or processes < 2 or not sys.executable:
        return
    # Whoever has time takes the next, the largest first: nobody is left with one at the end.
    queue = deque(sorted(missing, key=lambda one: one.size, reverse=True))
    workers: list[_Worker] = []
    try:
        for _ in range(min(processes, len(missing) // 2) - 1):
            workers.append(_Worker(queue))
        while (one := _next(queue)) is not None:
            source.build(one.name, one.text)
        for worker in workers:
            worker.finish()
    except OSError as error:
        _log.warning("no process that compiles kernels can be started: %s", error)
    finally:
        for worker in workers:
            worker.end()


def _next(queue: deque[Source]) -> Source | None:
    try:
        return queue.popleft()
    except IndexError:
        return None


class _Worker:
    """A process that compiles what it is given, and the thread that gives it the next."""

    def __init__(self, queue: deque[Source]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ,
        )
        self._thread = threading.Thread(target=self._feed, args=(queue,), daemon=True)
        self._thread.start()

    def _feed(self, queue: deque[Source]) -> None:
        given, ready = self._process.stdin, self._process.stdout
        assert given is not None
        assert ready is not None
        with contextlib.suppress(BrokenPipeError), given:  # its end says why
            given.write(pickle.dumps(str(Path(__file__).parent)))
            given.flush()
            while ready.read(1) and (one := _next(queue)) is not None:
                given.write(pickle.dumps((one.name, one.text)))
                given.flush()

    def finish(self) -> None:
        """Wait for what it has been given."""
        self._thread.join()
        if self._process.wait() != 0:
            _log.warning("a process that compiles kernels ended with %d", self._process.returncode)

    def end(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.wait()
        self._thread.join()
        assert self._process.stdout is not None
        self._process.stdout.close()
