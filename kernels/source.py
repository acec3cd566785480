"""Kernel sources: Python text compiled by Numba once per machine.

Numba can keep what it compiles only for functions that are in a file, so each source is written
into the cache directory under a key that names everything the machine code depends on, and is
imported and compiled from there. The next process loads the object code in milliseconds.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import importlib.util
import inspect
import itertools
import pickle
import platform
import shutil
import sys
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba import cfunc, types
from numba.core.registry import cpu_target

from graphopt.kernels import cache
from graphopt.kernels.registry import Entry

SIGNATURE = types.void(types.CPointer(types.int64), types.int64, types.int64, types.int64)

_HELPERS = (
    "register.py",
    "memory.py",
    "calls.py",
    "transposition.py",
    "simd.py",
    "stream.py",
    "elementary.py",
    "finish.py",
    "panel.py",
    "shares.py",
    "strip_panel.py",
    "tile.py",
    "words.py",
)
"""The modules whose content becomes part of every kernel."""


@dataclass(frozen=True)
class Source:
    """What `build` is given; ``size`` are characters of all that it compiles, roughly."""

    name: str
    text: str
    size: int


_wanted: ContextVar[dict[str, Source] | None] = ContextVar("wanted", default=None)
_entries: dict[str, Entry] = {}
_lock = threading.RLock()
_compilations = itertools.count()


def build(name: str, text: str, size: int = 0) -> Entry:
    """Compile ``text``, a module that defines ``kernel(arguments, thread, begin, end)``.

    ``name`` is for people (profilers show it) and must be an identifier, ``size`` the length of
    what it calls. The result is remembered in this process and on disk; safe to call from several
    threads and processes at once.
    """
    key = _key(name, text)
    wanted = _wanted.get()
    if wanted is not None:
        wanted[key] = Source(name, text, len(text) + size)
        return Entry(0, name)
    with _lock:
        entry = _entries.get(key)
        if entry is None:
            entry = _entries[key] = _compile(name, text, key)
    return entry


def shared(function: Any) -> Entry:
    """An entry that calls a function of the vocabulary, all whose arguments are integers.

    Kernels that use `calls.call_kernel` on its address do not contain the function, which then is
    compiled once instead of with each of them.
    """
    return build(*_call_of(function))


@functools.cache
def _call_of(function: Any) -> tuple[str, str, int]:
    """What `build` is given for a kernel that calls a function."""
    name = function.__name__
    count = len(inspect.signature(function.py_func).parameters)
    values = ", ".join(f"arguments[{place}]" for place in range(count))
    text = (
        f"from {function.__module__} import {name}\n\n\n"
        f"def kernel(arguments, thread, begin, end):\n    {name}({values})\n"
    )
    return name, text, len(inspect.getsource(sys.modules[function.__module__]))


@contextlib.contextmanager
def collecting() -> Iterator[dict[str, Source]]:
    """Meanwhile `build` compiles nothing, but notes by key what it is asked for; its entries must
    not be called."""
    wanted: dict[str, Source] = {}
    token = _wanted.set(wanted)
    try:
        yield wanted
    finally:
        _wanted.reset(token)


def is_compiled(key: str) -> bool:
    """Whether machine code for a key of `collecting` is in this process or on disk."""
    folder = cache.path("kernels", key, "__pycache__")
    return key in _entries or any(folder.glob("*.nbc"))


def _key(name: str, text: str) -> str:
    return hashlib.sha256("\0".join((name, text, _environment())).encode()).hexdigest()[:32]


@functools.cache
def _environment() -> str:
    """Everything beside its own text that a kernel's machine code depends on."""
    here = Path(__file__).parent
    helpers = hashlib.sha256(b"".join((here / name).read_bytes() for name in _HELPERS))
    versions = (numba.__version__, llvmlite.__version__, platform.python_version())
    return repr((versions, cpu_target.target_context.codegen().magic_tuple(), helpers.hexdigest()))


def _compile(name: str, text: str, key: str) -> Entry:
    with _without_collection():
        return _compiled(name, text, key)


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """No search for garbage meanwhile: Numba makes so many objects that it would look often, each
    time through all that the program has, which takes a sixth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _compiled(name: str, text: str, key: str) -> Entry:
    place = cache.path("kernels", key, f"{name}.py")
    try:
        compiled = _load(_written(place, text), name, key)
    except (EOFError, OSError, pickle.UnpicklingError):
        # A power failure leaves files without content; another process may trim the cache.
        shutil.rmtree(place.parent, ignore_errors=True)
        compiled = _load(_written(place, text), name, key)
    if compiled.cache_hits == 0 and next(_compilations) % 16 == 0:
        cache.trim()
    cache.touch(place.parent)
    return Entry(compiled.address, name, compiled)


def _written(place: Path, text: str) -> Path:
    # An unchanged file keeps its time, by which Numba recognises it.
    content = text.encode()
    if not place.exists() or place.read_bytes() != content:
        cache.write(place, content)
    return place


def _load(place: Path, name: str, key: str) -> Any:
    specification = importlib.util.spec_from_file_location(f"graphopt_kernel_{key}", place)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    # Cached machine code finds its module there by name when it is loaded again.
    sys.modules[module.__name__] = module
    specification.loader.exec_module(module)
    module.kernel.__name__ = module.kernel.__qualname__ = name
    return cfunc(SIGNATURE, cache=True, error_model="numpy")(module.kernel)
