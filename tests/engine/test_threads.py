"""Thread counts from made-up machines."""

from __future__ import annotations

from pathlib import Path

import pytest

from graphopt.engine import threads
from graphopt.engine.threads import default_threads


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four cores of two hardware threads each, all allowed."""
    monkeypatch.setattr(threads, "_allowed_processors", lambda: set(range(8)))
    for cpu in range(8):
        siblings = f"{cpu % 4},{cpu % 4 + 4}"
        topology = f"sys/devices/system/cpu/cpu{cpu}/topology"
        write(tmp_path, {f"{topology}/thread_siblings_list": siblings})
    return tmp_path


def test_hardware_threads_of_a_core_count_once(machine: Path) -> None:
    assert default_threads(machine) == 4


def test_affinity_restricts(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_allowed_processors", lambda: {1, 5, 2})
    assert default_threads(machine) == 2


def test_unknown_topology_counts_processors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "_allowed_processors", lambda: {0, 1, 2})
    assert default_threads(tmp_path) == 3


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("max 100000", 4), ("250000 100000", 2), ("50000 100000", 1), ("900000 100000", 4)],
)
def test_quota_of_version_2(machine: Path, quota: str, expected: int) -> None:
    write(machine, {"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": quota})
    assert default_threads(machine) == expected


def test_tightest_parent_counts(machine: Path) -> None:
    write(
        machine,
        {
            "proc/self/cgroup": "0::/a/b",
            "sys/fs/cgroup/a/b/cpu.max": "300000 100000",
            "sys/fs/cgroup/a/cpu.max": "100000 100000",
        },
    )
    assert default_threads(machine) == 1


def test_container_sees_its_limit_at_the_mount(machine: Path) -> None:
    write(machine, {"proc/self/cgroup": "0::/../x", "sys/fs/cgroup/cpu.max": "200000 100000"})
    assert default_threads(machine) == 2


@pytest.mark.parametrize(("quota", "expected"), [("-1", 4), ("300000", 3)])
def test_quota_of_version_1(machine: Path, quota: str, expected: int) -> None:
    group = "sys/fs/cgroup/cpu,cpuacct/pod"
    write(
        machine,
        {
            "proc/self/cgroup": "5:memory:/pod\n4:cpu,cpuacct:/pod",
            f"{group}/cpu.cfs_quota_us": quota,
            f"{group}/cpu.cfs_period_us": "100000",
        },
    )
    assert default_threads(machine) == expected


def test_this_machine() -> None:
    assert 1 <= default_threads() <= len(threads._allowed_processors())
