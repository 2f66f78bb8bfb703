"""Memory limits of containers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from outrider.model.memory import memory_bytes, resident_bytes

MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
MIB = 1 << 20


def limits(root: Path, groups: str, files: dict[str, str]) -> Path:
    """Make a machine's files."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        file = root / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


@pytest.mark.parametrize(
    ("groups", "files", "wanted"),
    [
        ("0::/\n", {"memory.max": f"{64 * MIB}\n"}, 64 * MIB),
        ("0::/\n", {"memory.max": "max\n"}, MACHINE),
        ("0::/\n", {}, MACHINE),
        # A pod's limit above the container's own, and the other way round.
        ("0::/pod/one\n", {"pod/one/memory.max": "max", "pod/memory.max": str(32 * MIB)}, 32 * MIB),
        (
            "0::/pod/one\n",
            {"pod/one/memory.max": str(16 * MIB), "pod/memory.max": str(32 * MIB)},
            16 * MIB,
        ),
        # The host's path, seen from inside a container without a namespace of its own.
        ("0::/kubepods/burstable/x\n", {"memory.max": str(48 * MIB)}, 48 * MIB),
        ("0::/../../x\n", {"memory.max": str(48 * MIB)}, 48 * MIB),
        # cgroup v1, and both at once.
        (
            "5:cpu,cpuacct:/a\n4:memory:/a\n0::/\n",
            {"memory/a/memory.limit_in_bytes": str(24 * MIB)},
            24 * MIB,
        ),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712"}, MACHINE),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": "nonsense"}, MACHINE),
        ("0::/\n", {"memory.max": "0"}, MACHINE),
    ],
)
def test_the_least_limit_counts(
    tmp_path: Path, groups: str, files: dict[str, str], wanted: int
) -> None:
    assert memory_bytes(limits(tmp_path, groups, files)) == wanted


def test_a_machine_without_control_groups(tmp_path: Path) -> None:
    assert memory_bytes(tmp_path) == MACHINE


def test_this_process_holds_something() -> None:
    assert MIB < resident_bytes() < MACHINE
