"""The caches of the processor, by which kernels cut their work."""

from __future__ import annotations

from pathlib import Path

_USEFUL = 2**20
"""Bytes of a second cache; more were not measured to be of use."""
_COMMON = 2**15
"""Bytes that a first cache for data has at least on the processors that run kernels."""
_UNITS = {"K": 2**10, "M": 2**20}
_SYSTEM = Path("/sys/devices/system/cpu/cpu0/cache")


def first_cache_bytes(system: Path = _SYSTEM) -> int:
    """Bytes of a processor's first cache for data; 32 KiB where Linux does not tell more."""
    return max(_bytes("1", system) or 0, _COMMON)


def second_cache_bytes(system: Path = _SYSTEM) -> int:
    """Bytes of a processor's second cache, at most a MiB; that where Linux does not tell it."""
    return min(_bytes("2", system) or _USEFUL, _USEFUL)


def _bytes(level: str, system: Path) -> int | None:
    """Bytes of the cache of a level that has data; None where the system does not tell."""
    for index in sorted(system.glob("index*")):
        try:
            found, kind, size = (
                (index / name).read_text().strip() for name in ("level", "type", "size")
            )
        except OSError:
            continue
        known = size[-1:] in _UNITS and size[:-1].isdigit()
        if found == level and kind != "Instruction" and known:
            return int(size[:-1]) * _UNITS[size[-1]]
    return None


FIRST_CACHE = first_cache_bytes()
SECOND_CACHE = second_cache_bytes()
