"""Processes of `bench.relay` and the cores that they run on."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench.relaying.control import Child

VERIFIERS = 1
"""One, so that its messages are equally large whatever the number of sessions."""
DRAFTERS = 2


@dataclass(frozen=True, slots=True)
class Usage:
    """Processor seconds of a process so far."""

    at_ns: int
    all_s: float
    main_s: float
    kernel_s: float

    @classmethod
    def of(cls, process: psutil.Process) -> Usage:
        threads = process.threads()
        times = process.cpu_times()
        main = next(thread for thread in threads if thread.id == process.pid)
        return cls(
            time.monotonic_ns(),
            times.user + times.system,
            main.user_time + main.system_time,
            times.system,
        )


@contextlib.contextmanager
def relay_fleet(
    sessions: int,
    *,
    rows: int,
    channels: int,
    profile: Path | None = None,
    http_port: int | None = None,
    log_path: Path | None = None,
) -> Iterator[tuple[Child, Child, psutil.Process]]:
    """Workers, clients and an orchestrator between them, each on its cores.

    With `profile` the orchestrator is one that writes its profile there, with `http_port` it
    serves HTTP, too. With `log_path` it logs there what it logs by default, else warnings only.
    """
    workers = Child(
        "bench.relaying.workers",
        *("--verifiers", str(VERIFIERS), "--drafters", str(DRAFTERS)),
        *("--rows", str(rows)),
    )
    addresses = workers.ask("where")
    port = free_port()
    module = ["-m", "orchestrator"]
    if profile is not None:
        module = ["-m", "bench.relaying.profiled", str(profile), "--"]
    with contextlib.ExitStack() as stack:
        log = None if log_path is None else stack.enter_context(log_path.open("wb"))
        process = subprocess.Popen(
            [
                *(sys.executable, *module, "--port", str(port)),
                *("--log-level", "warning" if log is None else "info"),
                *(f"--verifier={address}" for address in addresses["verifiers"]),
                *(f"--drafter={address}" for address in addresses["drafters"]),
                *("--sessions-max", str(sessions), "--drain", "0"),
                *("--http-address", f"127.0.0.1:{http_port}" if http_port else "off"),
                *("--drafters-per-session", str(DRAFTERS)),
            ],
            stderr=log,
        )
    clients = Child(
        "bench.relaying.clients",
        *("--address", f"127.0.0.1:{port}", "--channels", str(channels)),
        *("--probe", addresses["probes"][0]),
    )
    try:
        _pin([process.pid], [workers.pid, clients.pid])
        clients.ask("wait", workers=VERIFIERS + DRAFTERS)
        yield workers, clients, psutil.Process(process.pid)
    finally:
        clients.close()
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        workers.close()


def free_port() -> int:
    """Return a port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _pin(alone: Sequence[int], others: Sequence[int]) -> None:
    """Give some processes a core and others the remaining ones, where the machine can."""
    if not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        return
    for pid in alone:
        _pin_threads(pid, {cores[0]})
    for pid in others:
        _pin_threads(pid, set(cores[1:]))


def _pin_threads(pid: int, cores: set[int]) -> None:
    # Threads started before this do not follow their process.
    for thread in psutil.Process(pid).threads():
        os.sched_setaffinity(thread.id, cores)
