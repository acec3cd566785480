"""The caches of the processor, by which kernels cut their work."""

from __future__ import annotations

from pathlib import Path

_USEFUL = 2**20
"""Bytes of a second cache; more were not measured to be of use."""
_UNITS = {"K": 2**10, "M": 2**20}
_SYSTEM = Path("/sys/devices/system/cpu/cpu0/cache")


def second_cache_bytes(system: Path = _SYSTEM) -> int:
    """Bytes of a processor's second cache, at most a MiB; that where Linux does not tell it."""
    for index in sorted(system.glob("index*")):
        try:
            level = (index / "level").read_text().strip()
            size = (index / "size").read_text().strip()
        except OSError:
            continue
        if level == "2" and size[-1:] in _UNITS and size[:-1].isdigit():
            return min(int(size[:-1]) * _UNITS[size[-1]], _USEFUL)
    return _USEFUL


SECOND_CACHE = second_cache_bytes()
