"""What the system tells of the processor's caches."""

from __future__ import annotations

from pathlib import Path

import pytest

from graphopt.kernels.caches import second_cache_bytes


def describe(system: Path, index: int, level: str, size: str) -> None:
    folder = system / f"index{index}"
    folder.mkdir()
    (folder / "level").write_text(level + "\n")
    (folder / "size").write_text(size + "\n")


@pytest.mark.parametrize(
    ("size", "expected"),
    [("512K", 2**19), ("1024K", 2**20), ("1M", 2**20), ("2048K", 2**20), ("many", 2**20)],
)
def test_the_second_cache_is_that_of_level_two(tmp_path: Path, size: str, expected: int) -> None:
    describe(tmp_path, 0, "1", "32K")
    describe(tmp_path, 2, "2", size)
    describe(tmp_path, 3, "3", "256K")
    assert second_cache_bytes(tmp_path) == expected


def test_a_system_that_does_not_tell(tmp_path: Path) -> None:
    assert second_cache_bytes(tmp_path / "missing") == 2**20
    (tmp_path / "index0").mkdir()
    assert second_cache_bytes(tmp_path) == 2**20
