"""How much memory a process may use: the machine's, or its container's if that is less."""

from __future__ import annotations

import os
from pathlib import Path

_UNLIMITED = 1 << 60
"""cgroup v1 says so with a number that no machine has."""


def memory_bytes(root: Path = Path("/")) -> int:
    """Return the least of the machine's memory and the limits of the control groups it is in.

    `root` is where /proc and /sys are. What cannot be read is no limit.
    """
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *_limits(root)])


def resident_bytes() -> int:
    """Return what this process holds in memory now; 0 where that is not told."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _limits(root: Path) -> list[int]:
    """Limits of the groups that this process is in, and of those that they are in."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found: list[int] = []
    for line in lines:
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if not controllers:
            found += _along(root / "sys/fs/cgroup", path, "memory.max")
        elif "memory" in controllers.split(","):
            found += _along(root / "sys/fs/cgroup/memory", path, "memory.limit_in_bytes")
    return found


def _along(base: Path, path: str, name: str) -> list[int]:
    """Limits from a group up to the base.

    In a container the group's path may be the host's, which is not there; the base is its own.
    """
    group = base / path.lstrip("/")
    if ".." in group.parts:
        group = base
    groups = [group, *(each for each in group.parents if each.is_relative_to(base))]
    limits = [_limit(each / name) for each in groups]
    return [limit for limit in limits if limit is not None]


def _limit(file: Path) -> int | None:
    try:
        limit = int(file.read_text())
    except (OSError, ValueError):
        # "max" is no number, and no limit.
        return None
    return limit if 0 < limit < _UNLIMITED else None
