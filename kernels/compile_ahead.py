"""Compiles many kernels at once, in processes of their own.

Numba compiles one function at a time in a process. What another process compiles is found on disk,
so that a network's kernels can be shared out among the processors.
"""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from graphopt.kernels import source
from graphopt.kernels.source import Source

_log = logging.getLogger("graphopt")

LEAST = 4
"""Kernels from which another process, which needs a second to start, is worth it."""

_WORKER = """
import importlib.util, pickle, sys, types
package, sources = pickle.load(sys.stdin.buffer)
sys.modules["graphopt"] = parent = types.ModuleType("graphopt")
parent.__path__ = []
spec = importlib.util.spec_from_file_location(
    "graphopt.kernels", package + "/__init__.py", submodule_search_locations=[package]
)
sys.modules["graphopt.kernels"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from graphopt.kernels import source
for name, text in sources:
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
    missing.sort(key=lambda one: len(one.text), reverse=True)
    # Others begin later, so that this process takes one more.
    count = min(processes, len(missing) // 2)
    shares = [missing[place + 1 :: count] for place in range(count)]
    shares[-1].append(missing[0])
    workers: list[subprocess.Popen[bytes]] = []
    try:
        for share in shares[:-1]:
            workers.append(_started(share))
        for one in shares[-1]:
            source.build(one.name, one.text)
        for worker in workers:
            if worker.wait() != 0:
                _log.warning("a process that compiles kernels ended with %d", worker.returncode)
    except OSError as error:
        _log.warning("no process that compiles kernels can be started: %s", error)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def _started(share: list[Source]) -> subprocess.Popen[bytes]:
    """A process that compiles a share."""
    worker = subprocess.Popen(
        [sys.executable, "-c", _WORKER],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ,
    )
    assert worker.stdin is not None
    task = (str(Path(__file__).parent), [(one.name, one.text) for one in share])
    with worker.stdin as pipe:
        pipe.write(pickle.dumps(task))
    return worker
