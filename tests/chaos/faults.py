"""Which faults happen when: drawn from a seed, carried out one after the other."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.chaos.cluster import Cluster
from tests.chaos.load import Load

ROLES = ("verifier", "drafter", "orchestrator", "redis")
DEEDS = ("kill", "stop")
LINK_DEEDS = ("cut", "delay")
SETTLING_S = 3.0
"""From the end of a fault of Redis to one of an orchestrator, and the other way round: journals are
complete again, and generations have been resumed."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What is done to which role."""

    role: str
    deed: str

    def __str__(self) -> str:
        return f"{self.deed} {self.role}"


@dataclass(slots=True)
class Done:
    """What was done so far."""

    counts: Counter[str] = field(default_factory=Counter)
    with_work: int = 0
    """Faults that struck while generations were under way."""
    verifier_deaths_s: list[float] = field(default_factory=list)
    """When verifiers were killed."""


def plan(each: int, seed: int) -> list[Fault]:
    """Every deed to every role, `each` times, in an order drawn from the seed."""
    faults = [Fault(role, deed) for role in ROLES for deed in DEEDS] * each
    linked = ("verifier", "drafter", "redis")
    faults += [Fault(role, deed) for role in linked for deed in LINK_DEEDS] * -(-each // 4)
    random.Random(seed).shuffle(faults)
    return faults


async def carry_out(
    cluster: Cluster, load: Load, faults: Sequence[Fault], seed: int, *, pause_max_s: float
) -> Done:
    """Do all of it, with recoveries in between, so that one thing is broken at a time.

    A verifier may be lost while another one is; but Redis and an orchestrator are not lost
    together, which is one fault more than a journal survives.
    """
    chance = random.Random(seed + 1)
    done = Done()
    opposite = {"redis": "orchestrator", "orchestrator": "redis"}
    ended_s: dict[str, float] = {}
    for fault in faults:
        await asyncio.sleep(chance.uniform(0.1, 0.8))
        if fault.role in opposite:
            settled_s = ended_s.get(opposite[fault.role], 0.0) + SETTLING_S
            await asyncio.sleep(max(0.0, settled_s - time.monotonic()))
        node = chance.choice(cluster.of(fault.role))
        done.counts[str(fault)] += 1
        done.with_work += load.under_way > 0
        if str(fault) == "kill verifier":
            done.verifier_deaths_s.append(time.monotonic())
        await asyncio.to_thread(_begin, cluster, fault, node.name)
        await asyncio.sleep(chance.uniform(0.3, pause_max_s))
        await asyncio.to_thread(_mend, cluster, fault, node.name)
        ended_s[fault.role] = time.monotonic()
    return done


def _begin(cluster: Cluster, fault: Fault, name: str) -> None:
    match fault.deed:
        case "kill":
            cluster.kill(name)
        case "stop":
            cluster.signal(name, signal.SIGSTOP)
        case "cut":
            cluster.cut(name, True)
        case _:
            cluster.delay(name, 0.2)


def _mend(cluster: Cluster, fault: Fault, name: str) -> None:
    match fault.deed:
        case "kill":
            cluster.start(name)
        case "stop":
            cluster.signal(name, signal.SIGCONT)
        case "cut":
            cluster.cut(name, False)
        case _:
            cluster.delay(name, 0.0)
    if fault.role != "redis":
        cluster.wait_ready()
