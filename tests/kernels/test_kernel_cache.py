"""The cache directory: where it is, when it is refused, what is evicted."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support import ALONE

from graphopt.kernels import cache


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "cache"
    monkeypatch.setenv("GRAPHOPT_CACHE_DIR", str(place))
    return place


def test_it_is_private(folder: Path) -> None:
    assert cache.directory() == folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert cache.path("timing", "table.json") == folder / "timing" / "table.json"
    assert stat.S_IMODE((folder / "timing").stat().st_mode) == 0o700


def test_it_follows_the_platforms_convention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GRAPHOPT_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache.directory() == tmp_path / "xdg" / "graphopt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.directory() == tmp_path / ".cache" / "graphopt"


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_directory_that_others_may_write_is_refused(folder: Path, mode: int) -> None:
    folder.mkdir()
    folder.chmod(mode)
    with pytest.warns(RuntimeWarning, match="other users may write"):
        private = cache.directory()
    assert private != folder
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert cache.directory() == private


def test_another_users_directory_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    with pytest.warns(RuntimeWarning, match="another user"):
        assert cache.directory() != folder


def test_a_home_that_cannot_be_written_falls_back(folder: Path) -> None:
    folder.write_text("a file where the directory should be")
    with pytest.warns(RuntimeWarning, match="GRAPHOPT_CACHE_DIR"):
        private = cache.directory()
    cache.write(private / "x", b"1")
    assert (private / "x").read_bytes() == b"1"


def test_the_temporary_directory_goes_with_the_process(folder: Path) -> None:
    folder.write_text("")
    script = ALONE + "from graphopt.kernels import cache; print(cache.directory())"
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "graphopt-" in done.stdout
    assert not Path(done.stdout.strip()).exists()


def test_writing_is_atomic(folder: Path) -> None:
    place = cache.path("table")
    contents = [bytes([65 + index]) * 100_000 for index in range(4)]
    cache.write(place, contents[0])
    torn = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            if place.read_bytes() not in contents:
                torn.append(True)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(50):
        for content in contents:
            cache.write(place, content)
    done.set()
    reader.join()
    assert not torn
    assert os.listdir(folder) == ["table"]


def test_a_failed_write_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = cache.path("table")
    cache.write(place, b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        cache.write(place, b"new")
    assert place.read_bytes() == b"old"
    assert os.listdir(folder) == ["table"]


def test_the_least_recently_used_kernels_are_evicted(folder: Path) -> None:
    for age, name in enumerate(["newest", "middle", "oldest"]):
        entry = cache.path("kernels", name, "kernel.py")
        cache.write(entry, b"x" * 1000)
        os.utime(entry.parent, (1e9 - age, 1e9 - age))
    cache.write(cache.path("timing"), b"x" * 5000)
    assert cache.trim(3000) == 0
    cache.touch(folder / "kernels" / "oldest")
    assert cache.trim(2000) == 1
    assert sorted(os.listdir(folder / "kernels")) == ["newest", "oldest"]
    assert (folder / "timing").exists()


def test_clear(folder: Path) -> None:
    cache.write(cache.path("kernels", "a", "kernel.py"), b"x")
    cache.write(cache.path("timing"), b"x")
    cache.clear()
    assert set(os.listdir(folder)) <= {"lock"}


def test_the_lock_excludes_other_processes(folder: Path) -> None:
    script = (
        "import fcntl, sys\n"
        "with open(sys.argv[1]) as file:\n"
        "    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
    )
    with cache.lock():
        held = subprocess.run(
            [sys.executable, "-c", script, str(folder / "lock")], capture_output=True, text=True
        )
    assert "BlockingIOError" in held.stderr
    subprocess.run([sys.executable, "-c", script, str(folder / "lock")], check=True)
