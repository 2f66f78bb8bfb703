"""A whole fleet as it is run: a process for each service, real Redis, signals, logs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from outrider.client import Client, Delta, Finished
from outrider.errors import ConfigError, Unavailable
from outrider.local import LocalConfig, LocalFleet
from tests.support.cases import SAMPLED, request
from tests.support.fleet import DRAFT, TARGET
from tests.support.reference import Case, Tally, expect

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="looks at processes through /proc"),
]

CASES = [
    Case(tuple(b"The quick brown fox jumps over the lazy dog."), 96, ignore_eos=True),
    Case(tuple(b"A different story"), 96, ignore_eos=True, seed=3, **SAMPLED),
]


def local_config(folder: Path, *, model: str = TARGET, port: int | None = None) -> LocalConfig:
    return LocalConfig(
        model=model,
        dtype="float32",
        device="cpu",
        verifiers=1,
        drafters=2,
        draft_model=DRAFT,
        redis_url=None,
        log_dir=folder / "logs",
        cache_dir=folder / "cache",
        port=port,
    )


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step time that leaves a middle of the stream, no guesses but drafters'."""
    monkeypatch.setenv("OUTRIDER_VERIFIER_STEP_DELAY_S", "0.01")
    monkeypatch.setenv("OUTRIDER_VERIFIER_WARM_UP", "0")
    # What is accepted here is to be the drafters'.
    monkeypatch.setenv("OUTRIDER_VERIFIER_OWN_GUESSES", "0")
    monkeypatch.delenv("REDIS_URL", raising=False)


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"never happened: {what}"
        time.sleep(0.02)


def stat_of(pid: int) -> tuple[str, int] | None:
    """State and parent of a process; None if there is none, or only its remains."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if words[0] in "ZX" else (words[0], int(words[1]))


def children_of(parent: int) -> set[int]:
    """Processes started by another, ended ones not counted."""
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return {pid for pid in pids if (stat := stat_of(pid)) is not None and stat[1] == parent}


def assert_gone(pids: set[int]) -> None:
    assert len(pids) >= 5  # four services and Redis
    try:
        wait_until(lambda: not any(stat_of(pid) for pid in pids), "the processes have ended", 15)
    finally:
        for pid in pids:
            if stat_of(pid):  # a test that fails must not leave them behind either
                os.kill(pid, signal.SIGKILL)


def check(case: Case, ids: list[int]) -> None:
    tally = Tally()
    tally.check(TARGET, case, expect(TARGET, case), ids)
    assert not tally.faults


def log_texts(fleet: LocalFleet) -> dict[str, str]:
    return {path.stem: path.read_text() for path in fleet.log_dir.glob("*.log")}


def test_a_fleet_of_processes(tmp_path):
    before = children_of(os.getpid())
    with (
        LocalFleet(local_config(tmp_path), Console(quiet=True)) as fleet,
        Client(fleet.endpoint) as client,
    ):
        pids = children_of(os.getpid()) - before
        assert set(fleet.pids) == {"verifier-1", "drafter-1", "drafter-2", "orchestrator"}
        assert set(fleet.pids.values()) < pids  # and Redis
        assert sorted(worker.role for worker in client.workers()) == [
            "drafter",
            "drafter",
            "verifier",
        ]
        for case in CASES:
            found = client.complete(request(case))
            check(case, list(found.token_ids))
            assert found.finished.speculation.accepted_draft_tokens > 0
        _kill_a_drafter_half_way(fleet, client)
        found = client.complete(request(CASES[0]))
        check(CASES[0], list(found.token_ids))
        with pytest.raises(Unavailable, match="drafter-1 ended with exit code -9"):
            fleet.check()
    assert_gone(pids)
    logs = log_texts(fleet)
    assert set(logs) >= {"verifier-1", "drafter-1", "drafter-2", "orchestrator"}
    assert not [name for name, text in logs.items() if "Traceback" in text]
    for name in ("verifier-1", "drafter-2", "orchestrator"):
        assert "worker_main: stopped" in logs[name] or "app: stopped" in logs[name], (
            f"{name} did not stop in order"
        )


def _kill_a_drafter_half_way(fleet: LocalFleet, client: Client) -> None:
    case, ids, sources = CASES[0], [], []
    killed_at = 0
    for event in client.generate(request(case)):
        match event:
            case Delta():
                ids += event.token_ids
                sources += event.sources
                # Not before a drafter has helped, which on a busy machine may take a while.
                if len(ids) >= 8 and any(sources) and not killed_at:
                    killed_at = len(ids)
                    os.kill(fleet.pids["drafter-1"], signal.SIGKILL)
            case Finished():
                assert event.usage.completion_tokens == len(ids)
    assert 0 < killed_at < 60, "no drafter helped"
    check(case, ids)


def test_a_service_that_dies_at_start_is_reported(tmp_path):
    before = children_of(os.getpid())
    config = local_config(tmp_path, model="random:tiny?layers=none")
    with pytest.raises(Unavailable) as caught, LocalFleet(config, Console(quiet=True)):
        raise AssertionError("it cannot be ready")
    text = str(caught.value)
    assert text.startswith("verifier-1 ended with exit code 2; the end of ")
    assert "error: cannot load model 'random:tiny?layers=none'" in text
    assert "Traceback" not in text
    assert children_of(os.getpid()) == before


def test_a_port_that_is_taken_is_reported_before_anything_starts(tmp_path):
    """Above all by another fleet, whose orchestrator would answer in ours' place."""
    before = children_of(os.getpid())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        fleet = LocalFleet(local_config(tmp_path, port=port), Console(quiet=True))
        with pytest.raises(ConfigError, match=f"port {port} .*in use"), fleet:
            raise AssertionError("it cannot be ready")
    assert children_of(os.getpid()) == before


def test_a_model_that_cannot_be_used_is_reported_before_anything_starts(tmp_path, capfd):
    before = children_of(os.getpid())
    config = local_config(tmp_path, model="/no/such/model")
    with (
        pytest.raises(ConfigError, match="/no/such/model"),
        LocalFleet(config, Console(quiet=True)),
    ):
        raise AssertionError("it cannot be ready")
    said = capfd.readouterr().err
    assert "no such folder" in said
    assert "Traceback" not in said
    assert children_of(os.getpid()) == before


@contextlib.contextmanager
def local_command(folder: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    """`outrider local` as a user runs it."""
    arguments = ["local", "--model", TARGET, "--draft-model", DRAFT, "--drafters", "2"]
    arguments += ["--port", str(port), "--http-port", str(free_port())]
    arguments += ["--log-dir", str(folder / "logs"), "--json"]
    arguments += ["--cache-dir", str(folder / "cache")]
    with (folder / "output").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "outrider", *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_the_command_stops_cleanly_when_asked(tmp_path):
    port = free_port()
    with local_command(tmp_path, port) as process, Client(f"127.0.0.1:{port}") as client:

        def ready() -> bool:
            output = (tmp_path / "output").read_text()
            assert process.poll() is None, output
            return f"try: outrider chat --endpoint 127.0.0.1:{port}" in output

        wait_until(ready, "the fleet says that it is ready")
        pids = children_of(process.pid)
        lines = (tmp_path / "output").read_text().splitlines()
        (said,) = [json.loads(line) for line in lines if line.startswith("{")]
        assert said["grpc"] == f"127.0.0.1:{port}"
        assert set(said["pids"].values()) <= pids
        events = client.generate(request(CASES[0]))
        next(events)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        with contextlib.suppress(Unavailable):
            for _ in events:  # ends, finished or with the reason
                pass
        assert_gone(pids)
    assert "Traceback" not in (tmp_path / "output").read_text()


def test_a_fleet_does_not_outlive_its_parent(tmp_path):
    with local_command(tmp_path, free_port()) as process:

        def started() -> bool:
            assert process.poll() is None, (tmp_path / "output").read_text()
            return len(children_of(process.pid)) >= 5

        wait_until(started, "all processes are started")
        pids = children_of(process.pid)
        process.kill()
        process.wait()
        assert_gone(pids)


@pytest.mark.parametrize(
    "arguments",
    [
        ["verifier_service", "--model", "/no/such/dir"],
        ["drafter_service", "--proposer", "language-model", "--model", "/no/such/dir"],
    ],
    ids=["verifier", "drafter"],
)
def test_a_model_path_that_does_not_exist(arguments, tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", *arguments, "--cache-dir", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 2
    assert "Traceback" not in result.stderr + result.stdout
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: cannot load model '")
    assert arguments[-1] in line
