"""A fleet of real services over real sockets, whose models are synthetic and whose links are ours.

Verifiers share a process, drafters another; orchestrator and link proxy have their own.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench.children import Child
from bench.links import LinkProxy
from bench.pipeline_setting import Setting
from bench.round_trips import CALLS, set_round_trip, total_round_trip_s
from bench.worker_shaping import Step
from outrider.client import Client
from outrider.errors import OutriderError, Unavailable
from outrider.processes import spawn, stop

_READY_MAX_S = 60.0
_POLL_S = 0.05
_CALLS_MIN = 30


class SyntheticFleet:
    """Started and ready inside the context. `setting` says which workers there are.

    Without `links`, services are connected directly, which costs no proxy's time.
    """

    def __init__(
        self,
        setting: Setting,
        *,
        links: bool = True,
        orchestrator: Sequence[str] = (),
        log_dir: Path | None = None,
    ) -> None:
        """`orchestrator` has further arguments for it."""
        self.log_dir = log_dir or Path(tempfile.mkdtemp(prefix="outrider-bench-"))
        self.address = f"127.0.0.1:{_free_port()}"
        self._setting = setting
        self._orchestrator = list(orchestrator)
        self._proxy = LinkProxy() if links else None
        self._verifiers = _workers(
            self.log_dir, ["--verifier", setting.target_spec] * setting.verifiers, "verifier"
        )
        draft = ["--drafter", str(setting.leaves), setting.draft_spec]
        self._drafters = _workers(self.log_dir, draft * setting.drafters, "drafter")
        self._process: subprocess.Popen[bytes] | None = None
        self._links: dict[str, dict[str, str]] = {}

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all processes; may be repeated."""
        if self._process is not None:
            stop(self._process)
        for child in (self._drafters, self._verifiers, self._proxy):
            if child is not None:
                child.close()

    def set_round_trip(self, wanted_s: float | None, calls: int | None = None) -> float:
        """Give all links equal delays; returns the round trip as measured, of an idle fleet.

        None: as it is. Of long round trips fewer `calls` are measured, unless it is said how many.
        """
        if calls is None:
            calls = CALLS if wanted_s is None else max(_CALLS_MIN, min(CALLS, int(1 / wanted_s)))
        verifiers, drafters = self._links["verifier"], self._links["drafter"]
        if self._proxy is None or wanted_s is None:
            first = next(iter(verifiers.values())), next(iter(drafters.values()))
            return total_round_trip_s(*first, calls)
        return set_round_trip(self._proxy, verifiers, drafters, wanted_s, calls)

    def sessions_of_drafters(self) -> int:
        """Attachments of sessions to drafters at this moment. Raises `OutriderError`."""
        with Client(self.address) as client:
            return sum(worker.sessions for worker in client.workers() if worker.role == "drafter")

    def change(self, **command: Any) -> None:
        """Change the drafters, see `bench.synthetic_workers`."""
        self._drafters.ask(command)

    def reset_steps(self) -> None:
        """Forget the steps that were recorded."""
        self._verifiers.ask({"reset": True})
        self._drafters.ask({"reset": True})

    def verify_steps(self) -> list[list[Step]]:
        """Steps since the last reset, verifier by verifier."""
        steps: list[list[Step]] = self._verifiers.ask({"steps": True})["verifiers"]
        return steps

    def draft_steps(self) -> list[tuple[int, float]]:
        """Number of steps since the last reset, and seconds in them, drafter by drafter."""
        return [
            (count, busy_s) for count, busy_s in self._drafters.ask({"steps": True})["drafters"]
        ]

    def _start(self) -> None:
        for role, child in (("verifier", self._verifiers), ("drafter", self._drafters)):
            addresses = {f"{role}-{i}": a for i, a in enumerate(child.ready[f"{role}s"], start=1)}
            if self._proxy is not None:
                addresses = {name: self._proxy.open(name, a) for name, a in addresses.items()}
            self._links[role] = addresses
        host, port = self.address.rsplit(":", 1)
        arguments = ["--host", host, "--port", port, "--http-address", "off", *self._orchestrator]
        for role, addresses in self._links.items():
            arguments += [word for address in addresses.values() for word in (f"--{role}", address)]
        command = [sys.executable, "-m", "orchestrator", *arguments]
        self._process = spawn(command, self.log_dir / "orchestrator.log", _environment())
        self._wait_ready()

    def _wait_ready(self) -> None:
        wanted = self._setting.verifiers + self._setting.drafters
        deadline_s = time.monotonic() + _READY_MAX_S
        with Client(self.address) as client:
            while True:
                try:
                    states = [worker.state for worker in client.workers()]
                except OutriderError:
                    states = []
                if states.count("ready") >= wanted:
                    return
                if time.monotonic() > deadline_s:
                    raise Unavailable(f"the fleet is not ready; logs in {self.log_dir}")
                time.sleep(_POLL_S)


def _workers(log_dir: Path, arguments: Sequence[str], role: str) -> Child:
    return Child(
        "bench.synthetic_workers",
        arguments,
        log_path=log_dir / f"{role}s.log",
        environment=_environment(),
    )


def _environment() -> dict[str, str]:
    """Ours, less what would lead to other fleets."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OUTRIDER_")}
    environment.pop("REDIS_URL", None)
    return {**environment, "OMP_NUM_THREADS": "1"}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
