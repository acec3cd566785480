"""How many threads this process may use with profit."""

from __future__ import annotations

import os
from pathlib import Path


def default_threads(root: Path = Path("/")) -> int:
    """Cores that the process's affinity allows, at most as many as its control groups pay for.

    Two hardware threads of a core count once: they share the units that kernels keep busy.
    A quota is rounded down, since a team that is throttled waits for its last thread.

    Args:
        root: where `sys` and `proc` are mounted; for tests.
    """
    cores = _cores(_allowed_processors(), root)
    quota = _control_group_quota(root)
    return max(1, min(cores, int(quota)) if quota is not None else cores)


def _allowed_processors() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _cores(processors: set[int], root: Path) -> int:
    """Number of distinct cores; each processor is one where the system does not tell."""
    siblings = set()
    for processor in processors:
        topology = root / f"sys/devices/system/cpu/cpu{processor}/topology"
        siblings.add(_read(topology / "thread_siblings_list") or str(processor))
    return len(siblings)


def _control_group_quota(root: Path) -> float | None:
    """Processors that the tightest control group of this process pays for; None: no limit."""
    quotas = []
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, group = line.split(":", 2)
        relative = group.lstrip("/")
        if controllers == "":
            mount, read = root / "sys/fs/cgroup", _quota_of_version_2
        elif "cpu" in controllers.split(","):
            mount, read = root / "sys/fs/cgroup" / controllers, _quota_of_version_1
        else:
            continue
        # Inside a container the path may be the host's; the limit is then found at the mount.
        folder = mount / relative
        while True:
            quota = read(folder)
            if quota is not None:
                quotas.append(quota)
            if folder == mount or mount not in folder.parents:
                break
            folder = folder.parent
    return min(quotas, default=None)


def _quota_of_version_2(folder: Path) -> float | None:
    quota, _, period = (_read(folder / "cpu.max") or "max").partition(" ")
    return None if quota == "max" else int(quota) / int(period)


def _quota_of_version_1(folder: Path) -> float | None:
    quota = int(_read(folder / "cpu.cfs_quota_us") or -1)
    period = int(_read(folder / "cpu.cfs_period_us") or 0)
    return quota / period if quota > 0 and period > 0 else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
