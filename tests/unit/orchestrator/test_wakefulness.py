"""A process that stood still, and one that was only slow."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from orchestrator.wakefulness import Wakefulness

CHILD = """
import sys, time
from orchestrator.wakefulness import Wakefulness
watch = Wakefulness(0.5)
print("ready", flush=True)
if sys.argv[1] == "busy":
    until_s = time.monotonic() + 1.0
    while time.monotonic() < until_s:
        pass
    print(watch.slept_s())
else:
    slept_s = 0.0
    until_s = time.monotonic() + 2.0
    while not slept_s and time.monotonic() < until_s:
        time.sleep(0.05)
        slept_s = watch.slept_s()
        watch.refresh()
    print(slept_s)
"""


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0
        self.used_s = 7.0

    def watch(self) -> Wakefulness:
        return Wakefulness(0.5, now_s=lambda: self.now_s, used_s=lambda: self.used_s)


def test_what_passes_without_anything_being_done_was_a_sleep() -> None:
    clock = Clock()
    watch = clock.watch()
    clock.now_s += 0.4
    assert watch.slept_s() == 0.0
    clock.now_s += 2.0
    clock.used_s += 0.25
    assert watch.slept_s() == pytest.approx(1.75)
    assert watch.woke_s == clock.now_s
    assert watch.slept_s() == 0.0, "it is told once"


def test_who_works_is_awake() -> None:
    clock = Clock()
    watch = clock.watch()
    clock.now_s += 2.0
    clock.used_s += 1.6
    assert watch.slept_s() == 0.0
    assert watch.woke_s is None
    # What was used before is not counted against a later sleep.
    clock.now_s += 0.1
    clock.used_s += 0.1
    watch.refresh()
    clock.now_s += 0.7
    assert watch.slept_s() == pytest.approx(0.7)


@pytest.mark.parametrize("kind", ["stopped", "busy"])
def test_a_real_process(kind: str) -> None:
    command = [sys.executable, "-c", CHILD, kind]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        if kind == "stopped":
            os.kill(child.pid, signal.SIGSTOP)
            time.sleep(1.0)
            os.kill(child.pid, signal.SIGCONT)
        slept_s = float(child.stdout.read())
    if kind == "stopped":
        assert 0.5 < slept_s < 1.5
    else:
        assert slept_s == 0.0
