"""Which faults happen when: drawn from a seed, carried out one after the other."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from outrider.errors import OutriderError
from tests.chaos.cluster import Cluster, Node
from tests.chaos.load import Load
from tests.chaos.probe import HitProbe

ROLES = ("verifier", "drafter", "orchestrator", "redis")
DEEDS = ("kill", "stop")
LINK_DEEDS = ("cut", "delay")
REDIS_DEEDS = ("flush", "restart", "fill")
MINUTE = "stop for long"
DELAY_S = 0.1
"""One way: whoever is asked through a delayed link answers 200 ms later."""
SETTLING_S = 3.0
"""From the end of a fault of Redis to one of an orchestrator, and the other way round: journals are
complete again, and generations have been resumed."""
HITS_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Fault:
    """What is done to which role."""

    role: str
    deed: str

    def __str__(self) -> str:
        return f"{self.deed} {self.role}"


@dataclass(frozen=True, slots=True)
class Pauses:
    """How long faults last."""

    least_s: float = 0.3
    most_s: float = 4.0
    long_s: float = 60.0


@dataclass(slots=True)
class Done:
    """What was done so far."""

    counts: Counter[str] = field(default_factory=Counter)
    in_flight: Counter[str] = field(default_factory=Counter)
    """Of them, those that struck an incarnation with generations in flight."""
    died: Counter[str] = field(default_factory=Counter)
    """Incarnations that were killed with generations in flight, by role."""
    verifier_deaths_s: list[float] = field(default_factory=list)
    """When verifiers were killed."""
    hits_back_s: list[float] = field(default_factory=list)
    """From the end of a fault of Redis until what it had known was known again."""
    hits_lost: list[str] = field(default_factory=list)
    """Faults of Redis after which it never was."""


def plan(each: int, seed: int, *, long_stops: int = 0, redis_deeds: bool = True) -> list[Fault]:
    """Every deed to every role, `each` times or a share of it, in an order drawn from the seed."""
    faults = [Fault(role, deed) for role in ROLES for deed in DEEDS] * each
    linked = ("verifier", "drafter", "redis")
    faults += [Fault(role, deed) for role in linked for deed in LINK_DEEDS] * -(-each // 4)
    if redis_deeds:
        faults += [Fault("redis", deed) for deed in REDIS_DEEDS] * -(-each // 4)
    faults += [Fault("redis", MINUTE)] * long_stops
    random.Random(seed).shuffle(faults)
    return faults


class Havoc:
    """Carries faults out, with recoveries in between, so that one thing is broken at a time.

    A verifier may be lost while another one is; but Redis and an orchestrator are not lost
    together, which is one fault more than a journal survives.
    """

    def __init__(
        self,
        cluster: Cluster,
        load: Load,
        probe: HitProbe,
        seed: int,
        pauses: Pauses,
        say: Callable[[str], None],
    ) -> None:
        """`say` is told of everything that is done."""
        self._cluster, self._load, self._probe = cluster, load, probe
        self._chance = random.Random(seed + 1)
        self._pauses = pauses
        self._say = say
        self._ended_s: dict[str, float] = {}
        self.done = Done()

    async def carry_out(self, faults: Sequence[Fault]) -> Done:
        """Do all of it."""
        for number, fault in enumerate(faults, start=1):
            await asyncio.sleep(self._chance.uniform(0.1, 0.8))
            await self._settle(fault.role)
            node = self._chance.choice(self._cluster.of(fault.role))
            started_s = time.monotonic()
            said = await self._one(fault, node)
            self._ended_s[fault.role] = time.monotonic()
            took_s = self._ended_s[fault.role] - started_s
            self._say(f"{number}/{len(faults)} {fault.deed} {node.name}: {said}; {took_s:.1f} s")
        return self.done

    async def _settle(self, role: str) -> None:
        opposite = {"redis": "orchestrator", "orchestrator": "redis"}.get(role)
        if opposite is not None:
            settled_s = self._ended_s.get(opposite, 0.0) + SETTLING_S
            await asyncio.sleep(max(0.0, settled_s - time.monotonic()))

    async def _one(self, fault: Fault, node: Node) -> str:
        cluster, done = self._cluster, self.done
        if fault.role == "redis" and not await self._planted():
            done.hits_lost.append(f"before {fault}")
        sessions = await asyncio.to_thread(cluster.sessions_of, node)
        if fault.role == "redis":
            sessions = self._load.under_way
        done.counts[str(fault)] += 1
        done.in_flight[str(fault)] += sessions > 0
        if fault.deed in ("kill", "restart"):
            done.died[fault.role] += sessions > 0
        if str(fault) == "kill verifier":
            done.verifier_deaths_s.append(time.monotonic())
        await asyncio.to_thread(begin, cluster, fault, node.name)
        await asyncio.sleep(self._duration_s(fault))
        await asyncio.to_thread(mend, cluster, fault, node.name)
        if fault.role == "redis":
            return f"{sessions} generations; {await self._hits(fault)}"
        return f"{sessions} generations on it"

    async def _planted(self) -> bool:
        try:
            return await self._probe.plant()
        except OutriderError:
            return False

    async def _hits(self, fault: Fault) -> str:
        mended_s = time.monotonic()
        if await self._probe.recovered(HITS_TIMEOUT_S):
            back_s = time.monotonic() - mended_s
            self.done.hits_back_s.append(back_s)
            return f"hits were back after {back_s:.1f} s"
        self.done.hits_lost.append(str(fault))
        return "hits never came back"

    def _duration_s(self, fault: Fault) -> float:
        if fault.deed == MINUTE:
            return self._pauses.long_s
        if fault.deed in ("flush", "restart"):
            return 0.0
        return self._chance.uniform(self._pauses.least_s, self._pauses.most_s)


def begin(cluster: Cluster, fault: Fault, name: str) -> None:
    """Break something."""
    match fault.deed:
        case "kill":
            cluster.kill(name)
        case "stop" | "stop for long":
            cluster.signal(name, signal.SIGSTOP)
        case "cut":
            cluster.cut(name, True)
        case "delay":
            cluster.delay(name, DELAY_S)
        case "flush":
            cluster.tell_redis("FLUSHALL")
        case "restart":
            cluster.terminate(name, 10.0)
        case "fill":
            cluster.tell_redis("CONFIG SET maxmemory-policy noeviction")
            cluster.tell_redis("CONFIG SET maxmemory 1")
        case _:
            raise AssertionError(f"unknown deed {fault.deed}")


def mend(cluster: Cluster, fault: Fault, name: str) -> None:
    """Make it whole again."""
    match fault.deed:
        case "kill" | "restart":
            cluster.start(name)
        case "stop" | "stop for long":
            cluster.signal(name, signal.SIGCONT)
        case "cut":
            cluster.cut(name, False)
        case "delay":
            cluster.delay(name, 0.0)
        case "fill":
            cluster.tell_redis("CONFIG SET maxmemory 0")
    if fault.role != "redis":
        cluster.wait_ready()
