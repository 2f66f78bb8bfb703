"""A verifier whose model is split over two processes, started as it is in a pod: by torchrun."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from orchestrator.config import DriverConfig
from tests.support.cases import answers, cases, totals, truth_of
from tests.support.fleet import TARGET, orchestrator
from tests.support.hostile import oracle, scripted_drafter
from tests.support.reference import Tally, expect

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

START_TIMEOUT_S = 150.0
STOP_TIMEOUT_S = 40.0


@dataclass(frozen=True, slots=True)
class Ranks:
    """torchrun and the two verifier processes that it has started."""

    launcher: psutil.Popen
    log: Path

    @property
    def address(self) -> str:
        """Where rank 0 listens."""
        found = re.search(r"listening on (\S+)", self.log.read_text())
        assert found is not None
        return found[1]

    def rank(self, number: int) -> psutil.Process:
        """One of the two, found by what torchrun has told it."""
        return next(
            child
            for child in self.launcher.children()
            if child.environ().get("RANK") == str(number)
        )


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"never happened: {what}"
        time.sleep(0.05)


@contextlib.contextmanager
def ranks(folder: Path, model: str, ready: str = "listening on") -> Iterator[Ranks]:
    """Start them and wait for a log line; afterwards nothing may be left."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "verifier_service", "--model", model]
    command += ["--device", "cpu", "--threads", "1", "--no-warm-up", "--step-delay", "0.01"]
    log = folder / "log"
    # Where the tests import from, the processes must, too.
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    environment.pop("REDIS_URL", None)
    with log.open("wb") as output:
        launcher = psutil.Popen(command, stdout=output, stderr=output, env=environment)
    started = [launcher]
    try:
        wait_until(
            lambda: ready in log.read_text() or launcher.poll() is not None,
            ready,
            START_TIMEOUT_S,
        )
        assert ready in log.read_text(), log.read_text()
        if launcher.poll() is None:
            started += launcher.children(recursive=True)
        yield Ranks(launcher, log)
        _, alive = psutil.wait_procs(started, STOP_TIMEOUT_S)
        assert not alive, log.read_text()
    finally:
        for process in started:  # a test that fails must not leave them behind either
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.mark.parametrize("model", [TARGET, f"{TARGET}&arch=qwen3"])
async def test_the_ids_are_those_of_one_process(tmp_path, model):
    wanted = cases(24)[:24]
    expected = [expect(model, case) for case in wanted]
    truth = truth_of(wanted, expected)
    with ranks(tmp_path, model) as started:
        async with contextlib.AsyncExitStack() as stack:
            drafters = [
                await stack.enter_async_context(scripted_drafter(oracle(truth, right=0.7), seed=n))
                for n in (1, 2)
            ]
            running = await stack.enter_async_context(
                orchestrator(
                    [started.address],
                    [drafter.address for drafter in drafters],
                    config=DriverConfig(drafters_per_session=2),
                )
            )
            found = await answers(running.client, wanted)
        # What Kubernetes sends to the pod's first process, or a person to rank 0.
        leader = started.rank(0)
        target = leader if model == TARGET else started.launcher
        target.send_signal(signal.SIGTERM)
        if model == TARGET:
            assert started.launcher.wait(STOP_TIMEOUT_S) == 0, started.log.read_text()
    tally = Tally()
    for case, reference, completion in zip(wanted, expected, found, strict=True):
        tally.check(model, case, reference, completion.token_ids)
    tally.assert_identical()
    counted = totals(found)
    assert counted.accepted_draft_tokens > 50
    assert counted.verified_draft_tokens > counted.accepted_draft_tokens
    text = started.log.read_text()
    assert "rank 1 of 2 follows" in text
    assert text.count(": stopped") == 2, text  # each rank says so


async def test_a_follower_that_dies_ends_the_verifier(tmp_path):
    with ranks(tmp_path, TARGET) as started:
        started.rank(1).kill()
        assert started.launcher.wait(STOP_TIMEOUT_S) != 0
    assert "a rank of the model is lost, so this verifier ends" in started.log.read_text()


async def test_a_leader_that_dies_ends_the_followers(tmp_path):
    with ranks(tmp_path, TARGET) as started:
        started.rank(0).kill()
        assert started.launcher.wait(STOP_TIMEOUT_S) != 0
    assert "rank 1 ends" in started.log.read_text()


async def test_heads_that_cannot_be_split_are_refused(tmp_path):
    with ranks(tmp_path, f"{TARGET}&kv_heads=1", "cannot be split evenly over 2") as started:
        assert started.launcher.wait(STOP_TIMEOUT_S) != 0
    assert "its 1 key-value heads cannot be split evenly over 2" in started.log.read_text()
