"""A fleet on this machine: one verifier, and orchestrators that differ in drafters.

All orchestrators share the verifier, so that methods are compared over one and the same target.
Its own guesses from the text are for the one that has all drafters; each drafter alone is a method.
Each is given its drafters by static address; the verifier is found through Redis.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from outrider.client import Client
from outrider.errors import ConfigError, OutriderError, Unavailable
from outrider.local import READY_TIMEOUT_S, LocalConfig, LocalFleet
from outrider.processes import spawn, stop
from outrider.redis_server import start_redis

OURS = "outrider"
"""The contender that has all drafters."""
_DATASTORE = "datastore"
_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class DrafterSpec:
    """What a drafter runs: a proposer, and its model (or datastore) if it has one."""

    proposer: str
    model: str | None = None

    @property
    def label(self) -> str:
        """Its name in tables and files."""
        return self.proposer.replace(":", "-").replace(",", "-")

    @property
    def arguments(self) -> list[str]:
        """Options of the service."""
        if self.model is None:
            return ["--proposer", self.proposer]
        kind = "--datastore" if self.proposer == _DATASTORE else "--model"
        return ["--proposer", self.proposer, kind, self.model]

    @property
    def computes(self) -> bool:
        """It runs a model."""
        return self.model is not None and self.proposer != _DATASTORE

    @staticmethod
    def parse(text: str) -> DrafterSpec:
        """Read "lookup" or "language-model=NAME". Raises `ConfigError`."""
        proposer, _, model = text.partition("=")
        if not proposer or ("=" in text and not model):
            raise ConfigError(f"drafter: {text!r} is neither PROPOSER nor PROPOSER=MODEL")
        return DrafterSpec(proposer, model or None)


@dataclass(frozen=True, slots=True)
class FleetConfig:
    """What to start."""

    model: str
    dtype: str
    device: str
    drafters: tuple[DrafterSpec, ...]
    each: bool
    """Also an orchestrator for each drafter alone, where there are several."""
    cache_dir: Path
    log_dir: Path
    compiled: bool = False
    """The verifier compiles its steps first."""

    @property
    def methods(self) -> dict[str, tuple[int, ...]]:
        """Contenders by name, each with the numbers of its drafters."""
        methods = {OURS: tuple(range(len(self.drafters)))}
        if self.each and len(self.drafters) > 1:
            for number, drafter in enumerate(self.drafters):
                alone = f"{OURS}-{drafter.label}"
                methods[f"{alone}-{number + 1}" if alone in methods else alone] = (number,)
        return methods


@contextlib.contextmanager
def spec_fleet(config: FleetConfig, console: Console) -> Iterator[Mapping[str, str]]:
    """Start everything; yields endpoints by contender. Raises `OutriderError`."""
    config.log_dir.mkdir(parents=True, exist_ok=True)
    local = LocalConfig(
        model=config.model,
        dtype=config.dtype,
        device=config.device,
        verifiers=1,
        drafters=0,
        draft_model=None,
        redis_url=None,
        log_dir=config.log_dir,
        cache_dir=config.cache_dir,
        port=None,
        shared_cores=any(drafter.computes for drafter in config.drafters),
        compiled=config.compiled,
    )
    with contextlib.ExitStack() as stack:
        redis = stack.enter_context(start_redis(None, config.log_dir / "redis.log"))
        fleet = LocalFleet(replace(local, redis_url=redis.url), console)
        stack.enter_context(fleet)
        alone = {name: value for name, value in os.environ.items() if name != "REDIS_URL"}
        if local.shared_cores:
            alone.setdefault("OMP_WAIT_POLICY", "passive")
        services = _Services(stack, config.log_dir)
        addresses = [
            services.start(f"drafter-{number}", _drafter_command(config, drafter), alone)
            for number, drafter in enumerate(config.drafters, 1)
        ]
        endpoints = {}
        for name, numbers in config.methods.items():
            command = orchestrator_command(name, [addresses[number] for number in numbers])
            found = {**os.environ, "REDIS_URL": redis.url}
            endpoints[name] = services.start(f"orchestrator-{name}", command, found)
        with console.status("waiting for the drafters"):
            for name, numbers in config.methods.items():
                _wait_ready(services, endpoints[name], 1 + len(numbers))
        yield endpoints


class _Services:
    """Processes that end with the stack that they were started on."""

    def __init__(self, stack: contextlib.ExitStack, log_dir: Path) -> None:
        self._stack = stack
        self._log_dir = log_dir
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> str:
        """Start `python -m COMMAND` on a free port; returns its address."""
        port = _free_port()
        module, *arguments = command
        argv = [sys.executable, "-m", module, *arguments, "--port", str(port)]
        process = spawn(argv, self._log_dir / f"{name}.log", environment)
        self._running[name] = process
        self._stack.callback(stop, process)
        return f"127.0.0.1:{port}"

    def check(self) -> None:
        """Raise `Unavailable` if one has ended by itself."""
        for name, process in self._running.items():
            code = process.poll()
            if code is not None:
                log = self._log_dir / f"{name}.log"
                words = log.read_text(errors="replace").strip().splitlines()[-5:]
                raise Unavailable(f"{name} ended with exit code {code}:\n" + "\n".join(words))


def _drafter_command(config: FleetConfig, drafter: DrafterSpec) -> list[str]:
    command = ["drafter_service", *drafter.arguments, "--threads", "1"]
    if drafter.computes:
        command += ["--dtype", config.dtype, "--device", config.device]
        command += ["--cache-dir", str(config.cache_dir)]
    return command


def orchestrator_command(contender: str, drafters: Sequence[str]) -> list[str]:
    """Return the command of a contender's orchestrator, given its drafters' addresses."""
    command = ["orchestrator", "--http-address", "off"]
    if contender != OURS:
        # What a method is worth by itself.
        command.append("--no-own-guesses")
    return [*command, *(word for address in drafters for word in ("--drafter", address))]


def _wait_ready(services: _Services, endpoint: str, wanted: int) -> None:
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    with Client(endpoint) as client:
        while True:
            services.check()
            try:
                workers = client.workers()
            except OutriderError:
                workers = ()
            refused = [worker for worker in workers if worker.state == "refused"]
            if refused:
                raise ConfigError(f"{refused[0].role} is refused: {refused[0].reason}")
            ready = sum(worker.state == "ready" for worker in workers)
            if ready >= wanted:
                return
            if time.monotonic() > deadline_s:
                raise Unavailable(f"{ready} of {wanted} workers ready at {endpoint}")
            time.sleep(_POLL_S)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
