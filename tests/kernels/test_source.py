"""Compiled sources: remembered in the process and on disk, shared safely."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from support import ALONE, GuardedBuffer, call, guarded

from graphopt import kernels
from graphopt.kernels import panel, source
from graphopt.kernels.registry import Candidate, candidates, register
from graphopt.kernels.simd import LANES

TEXT = """from graphopt.kernels.simd import *


def kernel(arguments, thread, begin, end):
    write(arguments[0], arguments[1] + {}, INT64)
"""

SCRIPT = (
    ALONE
    + """
from graphopt import kernels
from graphopt.kernels import source
text = open(sys.argv[1]).read()
entries = [source.build("plus", text.format(number)) for number in (1, 2)]
print(sum(entry.keep_alive.cache_hits == 0 for entry in entries))
"""
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "cache"
    monkeypatch.setenv("GRAPHOPT_CACHE_DIR", str(place))
    monkeypatch.setattr(source, "_entries", {})
    return place


def value(entry: source.Entry, number: int) -> int:
    buffer = GuardedBuffer(8)
    call(entry, [buffer.address, number])
    return int(buffer.bytes.view("int64")[0])


def test_a_source_is_compiled_once_per_process(folder: Path) -> None:
    first = source.build("plus", TEXT.format(1))
    assert value(first, 41) == 42
    assert source.build("plus", TEXT.format(1)) is first
    assert value(source.build("plus", TEXT.format(5)), 41) == 46
    assert len(os.listdir(folder / "kernels")) == 2


def test_kernels_call_what_they_share(folder: Path) -> None:
    text = """from graphopt.kernels.panel import *


def kernel(arguments, thread, begin, end):
    call_kernel(arguments[0], (arguments[1], 4 * LANES, arguments[2], 4 * LANES, 4, 3, LANES))
"""
    shared = source.shared(panel.pack_columns)
    assert source.shared(panel.pack_columns) is shared
    matrix = np.arange(3 * LANES, dtype=np.float32)
    numbers, _ = guarded(matrix)
    target, copied = guarded(np.zeros_like(matrix))
    call(source.build("caller", text), [shared.address, target.address, numbers.address])
    np.testing.assert_array_equal(copied, matrix)


def test_the_next_process_loads_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, script = tmp_path / "text", tmp_path / "script.py"
    text.write_text(TEXT)
    script.write_text(SCRIPT)

    def compilations() -> int:
        command = [sys.executable, str(script), str(text)]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert compilations() == 2
    assert compilations() == 0
    monkeypatch.setenv("NUMBA_CPU_NAME", "generic")
    assert compilations() == 2, "machine code for another CPU was taken"


@pytest.mark.parametrize(
    ("files", "kept"), [("*.nbi", 0), ("*.nbi", 60), ("*.nbc", 0), ("*.nbc", 900)]
)
def test_a_damaged_entry_is_compiled_anew(
    folder: Path, monkeypatch: pytest.MonkeyPatch, files: str, kept: int
) -> None:
    source.build("plus", TEXT.format(1))
    (damaged,) = folder.rglob(files)
    damaged.write_bytes(damaged.read_bytes()[:kept])
    monkeypatch.setattr(source, "_entries", {})
    assert value(source.build("plus", TEXT.format(1)), 1) == 2


def test_a_changed_file_is_written_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source.build("plus", TEXT.format(1))
    (file,) = folder.rglob("plus.py")
    file.write_text("raise AssertionError")
    monkeypatch.setattr(source, "_entries", {})
    assert value(source.build("plus", TEXT.format(1)), 1) == 2


def test_what_kernels_are_made_of_is_part_of_their_key() -> None:
    made_of = {
        path.name
        for path in Path(source.__file__).parent.glob("*.py")
        if re.search("^@(inlined|intrinsic|operation)", path.read_text(), re.MULTILINE)
    }
    assert made_of <= set(source._HELPERS)


def test_many_threads_get_one_kernel(folder: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        entries = list(pool.map(lambda _: source.build("plus", TEXT.format(3)), range(16)))
    assert len({entry.address for entry in entries}) == 1


def test_several_processes_at_once(folder: Path, tmp_path: Path) -> None:
    text, script = tmp_path / "text", tmp_path / "script.py"
    text.write_text(TEXT)
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(text)]
    processes = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert not list(folder.rglob(".writing-*"))


def test_kernels_need_nothing_of_the_compiler(folder: Path) -> None:
    script = ALONE + "print('torch' in sys.modules, *package.__all__)"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["False", *kernels.__all__]


def test_a_family_imported_under_a_second_name_is_refused() -> None:
    class Nothing:
        pass

    def family(problem: Nothing) -> list[Candidate]:
        return []

    family.__module__ = "kernels.nothing"
    with pytest.raises(ImportError, match=r"its name is graphopt\.kernels\.nothing"):
        register(Nothing)(family)
    assert candidates(Nothing()) == []
