"""What the system tells of the processor's caches."""

from __future__ import annotations

from pathlib import Path

import pytest

from graphopt.kernels.caches import first_cache_bytes, second_cache_bytes


def describe(system: Path, index: int, level: str, size: str, kind: str = "Unified") -> None:
    folder = system / f"index{index}"
    folder.mkdir()
    (folder / "level").write_text(level + "\n")
    (folder / "type").write_text(kind + "\n")
    (folder / "size").write_text(size + "\n")


@pytest.mark.parametrize(
    ("size", "expected"), [("32K", 2**15), ("48K", 3 * 2**14), ("8K", 2**15), ("many", 2**15)]
)
def test_the_first_cache_is_that_for_data(tmp_path: Path, size: str, expected: int) -> None:
    describe(tmp_path, 0, "1", "64K", "Instruction")
    describe(tmp_path, 1, "1", size, "Data")
    describe(tmp_path, 2, "2", "256K")
    assert first_cache_bytes(tmp_path) == expected


@pytest.mark.parametrize(
    ("size", "expected"),
    [("512K", 2**19), ("1024K", 2**20), ("1M", 2**20), ("2048K", 2**20), ("many", 2**20)],
)
def test_the_second_cache_is_that_of_level_two(tmp_path: Path, size: str, expected: int) -> None:
    describe(tmp_path, 0, "1", "32K", "Data")
    describe(tmp_path, 2, "2", size)
    describe(tmp_path, 3, "3", "256K")
    assert second_cache_bytes(tmp_path) == expected


def test_a_system_that_does_not_tell(tmp_path: Path) -> None:
    for folder in (tmp_path / "missing", tmp_path):
        assert first_cache_bytes(folder) == 2**15
        assert second_cache_bytes(folder) == 2**20
        (tmp_path / "index0").mkdir(exist_ok=True)
