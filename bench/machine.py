"""What a result was measured on: for files and pages."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import outrider

_PACKAGES = ("torch", "transformers", "grpcio", "numpy")
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


@dataclass(frozen=True, slots=True)
class Origin:
    """When, where and by which command something was measured."""

    time: str
    command: str
    processor: str
    cores: str
    """Those that could be used."""
    platform: str
    versions: dict[str, str]
    environment: dict[str, str]
    """Settings of services that came as environment variables."""


def origin(command: Sequence[str]) -> Origin:
    """Describe this moment on this machine; `command` repeats the measurement."""
    versions = {"outrider": outrider.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            # Without the build's label, which says where a wheel came from.
            versions[package] = importlib.metadata.version(package).split("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    return Origin(
        time.strftime("%Y-%m-%d %H:%M %z"),
        shlex.join(command),
        processor(),
        f"{len(usable_cores())} of {os.cpu_count()}",
        platform.platform(),
        versions,
        {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(
                ("OUTRIDER_VERIFIER_", "OUTRIDER_DRAFTER_", "OUTRIDER_ORCHESTRATOR_")
            )
        },
    )


def command_line() -> list[str]:
    """How this program was called; files without folders, which are of this machine only."""
    return ["outrider", "bench", *(_shortened(word) for word in sys.argv[1:] if word != "bench")]


def _shortened(word: str) -> str:
    option, equals, value = word.partition("=")
    return (
        option + equals + Path(value).name
        if equals and "/" in value
        else (Path(word).name if word.startswith("/") else word)
    )


def usable_cores() -> list[int]:
    """Processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def processor() -> str:
    """Name of the processor, with the instructions that matter here."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    entries = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {name.strip(): value.strip() for name, value in entries.items()}
    flags = set(fields.get("flags", "").split())
    return f"{fields.get('model name', platform.machine())} ({_instructions(flags)})"


def _instructions(flags: set[str]) -> str:
    found = [flag for flag in _FLAGS if flag in flags]
    return ", ".join(found) or "no wide vectors"
