"""The directory on disk where compiled kernels and measured times are remembered.

It is ``$GRAPHOPT_CACHE_DIR``, or ``graphopt`` in the user's cache directory. It holds code that
will be executed, so it must belong to this user and be writable by nobody else; where that cannot
be had, a private temporary directory serves until the process ends, and a warning says so.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import shutil
import stat
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

if sys.platform != "win32":
    import fcntl

SIZE_LIMIT = 512 * 2**20
"""Bytes that `trim` leaves at most, unless it is told otherwise."""

_TEMPORARY_PREFIX = ".writing-"


def _configured() -> Path:
    """Where the cache should be, whether or not it can be there."""
    explicit = os.environ.get("GRAPHOPT_CACHE_DIR")
    if explicit:
        return Path(explicit).expanduser().absolute()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or os.path.expanduser("~\\AppData\\Local")
    elif sys.platform == "darwin":
        base = os.path.expanduser("~/Library/Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base).absolute() / "graphopt"


def directory() -> Path:
    """The cache directory, made (mode 0700) and found safe; follows the environment's changes."""
    return _usable(_configured())


def path(*parts: str) -> Path:
    """A place in the cache, ``path("kernels", key)``; its parent directory exists."""
    place = directory().joinpath(*parts)
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return place


def write(place: Path, content: bytes) -> None:
    """Write a file of the cache so that no reader ever sees a part of it."""
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=_TEMPORARY_PREFIX, dir=place.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.replace(temporary, place)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def lock() -> Iterator[None]:
    """Keep other processes out of `clear`, `trim` and whatever else is done under this lock.

    On Windows it keeps nobody out: entries are replaced atomically, so no harm is done.
    """
    if sys.platform == "win32":
        yield
        return
    with open(path("lock"), "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def touch(place: Path) -> None:
    """Note that an entry was used, so that `trim` keeps it longer."""
    with contextlib.suppress(OSError):  # trimmed by another process, or a read-only medium
        os.utime(place)


def trim(limit: int = SIZE_LIMIT) -> int:
    """Remove the least recently used kernels until the cache has at most ``limit`` bytes.

    Entries are the directories and files directly under ``kernels``; returns how many went.
    """
    with lock():
        sizes = {entry: _size(entry) for entry in _entries()}
        total = sum(sizes.values())
        removed = 0
        for entry in sorted(sizes, key=_last_use):
            if total <= limit:
                break
            _remove(entry)
            total -= sizes[entry]
            removed += 1
    return removed


def clear() -> None:
    """Remove everything in the cache. Running programs keep working: their code is in memory."""
    with lock():
        for entry in directory().iterdir():
            if entry.name != "lock":
                _remove(entry)


@functools.cache
def _usable(wanted: Path) -> Path:
    try:
        wanted.mkdir(mode=0o700, parents=True, exist_ok=True)
        fault = _fault(wanted)
    except OSError as error:
        fault = error.strerror or str(error)
    if fault is None:
        return wanted
    private = Path(tempfile.mkdtemp(prefix="graphopt-"))
    atexit.register(_remove_in_process, private, os.getpid())
    warnings.warn(
        f"kernel cache {wanted} cannot be used ({fault}); kernels are compiled anew for each "
        "process. Set GRAPHOPT_CACHE_DIR to a directory of your own.",
        RuntimeWarning,
        stacklevel=3,
    )
    return private


def _fault(place: Path) -> str | None:
    """Why code must not be loaded from, or cannot be written to, an existing directory."""
    status = place.stat()
    if not stat.S_ISDIR(status.st_mode):
        return "not a directory"
    if hasattr(os, "geteuid"):
        if status.st_uid != os.geteuid():
            return "it belongs to another user"
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return "other users may write to it"
    if not os.access(place, os.R_OK | os.W_OK | os.X_OK):
        return "it is not writable"
    return None


def _remove_in_process(place: Path, process: int) -> None:
    if os.getpid() == process:  # not in a forked child
        shutil.rmtree(place, ignore_errors=True)


def _entries() -> list[Path]:
    kernels = directory() / "kernels"
    return list(kernels.iterdir()) if kernels.is_dir() else []


def _size(entry: Path) -> int:
    files = [entry] if entry.is_file() else [file for file in entry.rglob("*") if file.is_file()]
    total = 0
    for file in files:
        with contextlib.suppress(FileNotFoundError):
            total += file.stat().st_size
    return total


def _last_use(entry: Path) -> float:
    try:
        return entry.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        entry.unlink(missing_ok=True)
