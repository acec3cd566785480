"""Kernels compiled by other processes."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest

from graphopt.kernels import compile_ahead as ahead
from graphopt.kernels import source
from graphopt.kernels.compile_ahead import compile_ahead

COUNT = 5


def text(number: int) -> str:
    head = "from graphopt.kernels.simd import *\n\ndef kernel(arguments, thread, begin, end):\n"
    return f"{head}    write(arguments[0], {number}, INT64)\n"


@pytest.fixture
def wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, source.Source]:
    tmp_path.chmod(0o700)
    monkeypatch.setenv("GRAPHOPT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(source, "_entries", {})
    with source.collecting() as collected:
        for number in range(COUNT):
            assert source.build(f"number_{number}", text(number)).address == 0
    return collected


def compiled_here(monkeypatch: pytest.MonkeyPatch, seconds: float = 0.0) -> list[str]:
    """The names of what this process compiles from now on, each in so many seconds more."""
    names: list[str] = []
    load = source._load

    def noted(place: Path, name: str, key: str) -> object:
        loaded = load(place, name, key)
        if loaded.cache_hits == 0:
            names.append(name)
            time.sleep(seconds)
        return loaded

    monkeypatch.setattr(source, "_load", noted)
    return names


def test_collecting_compiles_nothing(wanted: dict[str, source.Source]) -> None:
    assert [one.name for one in wanted.values()] == [f"number_{n}" for n in range(COUNT)]
    assert not any(map(source.is_compiled, wanted))


@pytest.mark.slow
def test_the_work_is_shared(
    wanted: dict[str, source.Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = compiled_here(monkeypatch, seconds=2.0)
    compile_ahead(wanted, 2)
    assert 1 <= len(names) < COUNT
    assert all(map(source.is_compiled, wanted))
    for one in wanted.values():
        assert source.build(one.name, one.text).address != 0
    assert len(names) < COUNT
    compile_ahead(wanted, 2)


_TAKES_ONE = """
import pickle, sys
pickle.load(sys.stdin.buffer)
sys.stdout.buffer.write(b"+")
sys.stdout.buffer.flush()
pickle.load(sys.stdin.buffer)
"""


@pytest.mark.parametrize("before", ["", _TAKES_ONE])
def test_what_another_process_cannot_do_is_left_to_this_one(
    before: str,
    wanted: dict[str, source.Source],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(ahead, "_WORKER", f"{before}\nimport sys; sys.exit(3)")
    names = compiled_here(monkeypatch, seconds=0.5)
    with caplog.at_level(logging.WARNING, "graphopt"):
        compile_ahead(wanted, 2)
    assert "ended with 3" in caplog.text
    for one in wanted.values():
        source.build(one.name, one.text)
    assert len(names) == COUNT


@pytest.mark.parametrize("processes", [1, 8])
def test_few_kernels_or_one_processor_start_nothing(
    wanted: dict[str, source.Source], monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    monkeypatch.setattr(ahead, "_Worker", lambda queue: pytest.fail("a process was started"))
    few = wanted if processes == 1 else dict(list(wanted.items())[: ahead.LEAST - 1])
    compile_ahead(few, processes)
    assert not any(map(source.is_compiled, wanted))
