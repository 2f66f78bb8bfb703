"""A whole fleet on this machine: Redis, verifiers, drafters and an orchestrator, each a process.

The services are started by module name, as they would be in a container; the kernel imports none
of them. They find each other through Redis, as they would on a cluster.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType

from rich.console import Console

from outrider.client import Client
from outrider.errors import ConfigError, OutriderError, Unavailable
from outrider.processes import spawn
from outrider.redis_server import RedisServer, start_redis

READY_TIMEOUT_S = 300.0
_COMPILED_READY_TIMEOUT_S = 1200.0
"""Compiling anew took five minutes of a core, and others may want that core as well."""
STOP_TIMEOUT_S = 20.0
_POLL_S = 0.1
_LOG_TAIL_LINES = 15


@dataclass(frozen=True, slots=True)
class LocalConfig:
    """What to start."""

    model: str
    dtype: str
    device: str
    verifiers: int
    drafters: int
    draft_model: str | None
    redis_url: str | None
    log_dir: Path | None
    cache_dir: Path
    port: int | None
    """Of the orchestrator; None picks a free one."""
    http_port: int | None = None
    """Likewise, for HTTP."""
    shared_cores: bool = False
    """Others than these services compute on the same cores."""
    compiled: bool = False
    """Verifiers compile their steps first."""


@dataclass(slots=True)
class _Service:
    name: str
    process: subprocess.Popen[bytes]
    log_path: Path


class LocalFleet:
    """Context manager: started and ready inside, stopped and reaped outside."""

    def __init__(self, config: LocalConfig, console: Console) -> None:
        self._config = config
        self._console = console
        self.log_dir = config.log_dir or Path(tempfile.mkdtemp(prefix="outrider-"))
        self.endpoint = f"127.0.0.1:{config.port or _free_port()}"
        self.http_url = f"http://127.0.0.1:{config.http_port or _free_port()}"
        self._services: list[_Service] = []
        self._redis: RedisServer | None = None

    def __enter__(self) -> LocalFleet:
        try:
            self._start()
            self._wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by service name, such as "drafter-1"."""
        return {service.name: service.process.pid for service in self._services}

    def check(self) -> None:
        """Raise `Unavailable` if a service has ended by itself, with the end of its log."""
        for service in self._services:
            code = service.process.poll()
            if code is not None:
                raise Unavailable(
                    f"{service.name} ended with exit code {code}; the end of "
                    f"{service.log_path}:\n{_tail(service.log_path)}"
                )

    def stop(self) -> None:
        """Stop everything in the order that lets work finish; no process is left behind."""
        # The orchestrator first: it ends its sessions, and workers have nothing left to drain.
        for service in reversed(self._services):
            if service.process.poll() is None:
                service.process.terminate()
        deadline_s = time.monotonic() + STOP_TIMEOUT_S
        for service in reversed(self._services):
            try:
                service.process.wait(max(0.0, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                service.process.kill()
                service.process.wait()
        self._services.clear()
        if self._redis is not None:
            self._redis.stop()
            self._redis = None

    def _start(self) -> None:
        config = self._config
        if config.port is not None:
            _require_free(config.port)
        if config.http_port is not None:
            _require_free(config.http_port)
        self.log_dir.mkdir(parents=True, exist_ok=True)
        for model in dict.fromkeys(m for m in (config.model, config.draft_model) if m):
            self._fetch(model)
        with self._console.status("starting services"):
            self._redis = start_redis(config.redis_url, self.log_dir / "redis.log")
        self._console.print(f"redis: {self._redis.description}", soft_wrap=True)
        for number in range(1, config.verifiers + 1):
            self._spawn(f"verifier-{number}", "verifier_service", self._verifier_arguments())
        for number in range(1, config.drafters + 1):
            self._spawn(f"drafter-{number}", "drafter_service", self._drafter_arguments(number))
        host, port = self.endpoint.rsplit(":", 1)
        arguments = ["--host", host, "--port", port]
        arguments += ["--http-address", self.http_url.removeprefix("http://")]
        self._spawn("orchestrator", "orchestrator", arguments)

    def _fetch(self, model: str) -> None:
        # A process of its own: this one stays small, without torch.
        command = [sys.executable, "-m", "outrider", "fetch", model]
        command += ["--cache-dir", str(self._config.cache_dir)]
        if subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode:
            raise ConfigError(f"model {model!r} cannot be used; see above")

    def _verifier_arguments(self) -> list[str]:
        config = self._config
        threads = max(1, (cores() - self._draft_models) // config.verifiers)
        arguments = [*_model_arguments(config, config.model), "--threads", str(threads)]
        return [*arguments, "--compile"] if config.compiled else arguments

    @property
    def _draft_models(self) -> int:
        """Drafters that run a model: the first, the third, ..."""
        config = self._config
        return 0 if config.draft_model is None else (config.drafters + 1) // 2

    def _drafter_arguments(self, number: int) -> list[str]:
        config = self._config
        if config.draft_model is None or number % 2 == 0:
            return ["--proposer", "lookup"]
        arguments = ["--proposer", "language-model", "--threads", "1"]
        return [*arguments, *_model_arguments(config, config.draft_model)]

    def _spawn(self, name: str, module: str, arguments: list[str]) -> None:
        assert self._redis is not None, "Redis is started first"
        log_path = self.log_dir / f"{name}.log"
        environment = {**os.environ, "REDIS_URL": self._redis.url}
        if self._config.verifiers + self._draft_models > 1 or self._config.shared_cores:
            # Several models on the same cores: threads that spin at OpenMP barriers keep the others
            # from arriving there, which costs a factor of twenty.
            environment.setdefault("OMP_WAIT_POLICY", "passive")
        process = spawn([sys.executable, "-m", module, *arguments], log_path, environment)
        self._services.append(_Service(name, process, log_path))

    def _wait_ready(self) -> None:
        wanted = self._config.verifiers + self._config.drafters
        timeout_s = _COMPILED_READY_TIMEOUT_S if self._config.compiled else READY_TIMEOUT_S
        deadline_s = time.monotonic() + timeout_s
        with (
            self._console.status("waiting for the workers") as status,
            Client(self.endpoint) as client,
        ):
            while True:
                self.check()
                try:
                    workers = client.workers()
                except OutriderError:
                    workers = ()
                ready = sum(worker.state == "ready" for worker in workers)
                refused = [worker for worker in workers if worker.state == "refused"]
                if refused:
                    raise ConfigError(f"{refused[0].role} is refused: {refused[0].reason}")
                if ready >= wanted:
                    return
                if time.monotonic() > deadline_s:
                    raise Unavailable(
                        f"{ready} of {wanted} workers ready after {timeout_s:g} s; "
                        f"logs in {self.log_dir}"
                    )
                status.update(f"waiting for the workers: {ready} of {wanted} ready")
                time.sleep(_POLL_S)


def wait_for_stop(fleet: LocalFleet) -> None:
    """Return at Ctrl-C or SIGTERM; raise if a service ends by itself."""
    asked = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        asked.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask)
    while not asked.wait(1.0):
        fleet.check()


def _model_arguments(config: LocalConfig, model: str) -> list[str]:
    return [
        *("--model", model),
        *("--dtype", config.dtype),
        *("--device", config.device),
        *("--cache-dir", str(config.cache_dir)),
    ]


def cores() -> int:
    """Return how many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _require_free(port: int) -> None:
    """Raise `ConfigError` if somebody listens there, such as another fleet.

    Its orchestrator would answer for ours, which cannot start.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ConfigError(f"port {port} cannot be used: {error.strerror}") from error


def _tail(path: Path) -> str:
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return "(no log)"
    return "\n".join(lines[-_LOG_TAIL_LINES:])
