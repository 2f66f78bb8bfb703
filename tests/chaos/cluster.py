"""A fleet of real processes on fixed ports that can be killed, stopped, woken and started again."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from redis import Redis

from bench.children import Child
from bench.links import LinkProxy, LinkShape
from outrider import redis_server
from outrider.client import Client
from outrider.errors import OutriderError
from tests.support.fleet import DRAFT, TARGET

START_TIMEOUT_S = 60.0
_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """What to start."""

    folder: Path
    verifiers: int = 2
    drafters: int = 2
    orchestrators: int = 2
    step_delay_s: float = 0.02
    model: str = TARGET
    sessions_max: int = 64
    """Of a verifier."""
    drain_s: float = 10.0
    """Time for what is under way after SIGTERM."""
    orchestrator_options: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Node:
    """One process of the fleet, under whatever process id."""

    name: str
    argv: list[str]
    address: str
    """Where it listens."""
    advertised: str = ""
    """Where others find it: the near end of its link."""
    pid: int = 0
    started: int = 0
    stopped: bool = False

    @property
    def role(self) -> str:
        """The name without its number."""
        return self.name.rpartition("-")[0]


class Cluster:
    """Context manager: ready inside, everything ended outside.

    Workers and Redis are reached through links that can be shaped or cut, one proxy for each.
    """

    def __init__(self, config: ClusterConfig) -> None:
        self.config = config
        self.nodes: dict[str, Node] = {}
        self._stack = contextlib.ExitStack()
        one_thread = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        environment = {**os.environ, **one_thread}
        spawner = Child("tests.chaos.spawner", environment=environment)
        self._spawner = self._stack.enter_context(spawner)
        self.links: dict[str, LinkProxy] = {}
        self.log_dir = config.folder / "logs"
        self._redis_url = ""
        self._count: Counter[str] = Counter()
        """Workers that were ever defined, by role."""

    def __enter__(self) -> Self:
        try:
            self._define()
            for node in self.nodes.values():
                self.start(node.name)
            self.wait_ready()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close()

    @property
    def endpoints(self) -> list[str]:
        """Addresses of the orchestrators."""
        return [node.address for node in self.of("orchestrator")]

    def of(self, role: str) -> list[Node]:
        """All nodes of a role."""
        return [node for node in self.nodes.values() if node.role == role]

    def start(self, name: str) -> None:
        """Start a node that is not running."""
        node = self.nodes[name]
        environment = {
            **os.environ,
            "REDIS_URL": self._redis_url,
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "passive",
            "OUTRIDER_VERIFIER_STEP_DELAY_S": str(self.config.step_delay_s),
            "OUTRIDER_VERIFIER_WARM_UP": "0",
            **self.config.environment,
        }
        log = str(self.log_dir / f"{name}.log")
        command = {"start": node.argv, "log": log, "environment": environment}
        node.pid = self._spawner.ask(command)["pid"]
        node.started += 1
        node.stopped = False

    def signal(self, name: str, number: signal.Signals) -> None:
        """Send a signal to a node."""
        node = self.nodes[name]
        os.kill(node.pid, number)
        node.stopped = number is signal.SIGSTOP

    def kill(self, name: str) -> None:
        """End a node without a word."""
        self.signal(name, signal.SIGKILL)
        self._ended(name)

    def terminate(self, name: str, grace_s: float) -> int:
        """Ask a node to end; returns its exit code. Raises `AssertionError` if it does not."""
        self.signal(name, signal.SIGTERM)
        return self._ended(name, grace_s)

    def _ended(self, name: str, timeout_s: float = START_TIMEOUT_S) -> int:
        codes: list[int] = []

        def ended() -> bool:
            code = self._poll(self.nodes[name])
            if code is not None:
                codes.append(code)
            return code is not None

        self.wait(ended, f"{name} has ended", timeout_s)
        return codes[0]

    def _poll(self, node: Node) -> int | None:
        code = self._spawner.ask({"poll": node.pid})["code"]
        return None if code is None else int(code)

    def pids(self, *roles: str) -> list[int]:
        """Process ids of all nodes of these roles."""
        return [node.pid for role in roles for node in self.of(role)]

    def sessions_of(self, node: Node) -> int:
        """Sessions under way on a node, as the orchestrators see it; not for Redis."""
        total = 0
        for one in self.of("orchestrator"):
            if node.role == "orchestrator" and one is not node:
                continue
            with contextlib.suppress(OutriderError), Client(one.address) as client:
                total += sum(
                    worker.sessions
                    for worker in client.workers()
                    if worker.address == node.advertised
                    or (node.role == "orchestrator" and worker.role == "verifier")
                )
        return total

    def tell_redis(self, *commands: str) -> None:
        """Have Redis carry out commands, whatever its link does."""
        host, _, port = self.nodes["redis-1"].address.rpartition(":")
        with contextlib.closing(Redis(host=host, port=int(port))) as client:
            for command in commands:
                client.execute_command(*command.split())

    def second(self, name: str) -> str:
        """Start a worker that is to take the place of another one; returns its name.

        Its link is in the same process: none is started where gRPC's threads run.
        """
        role = self.nodes[name].role
        self._count[role] += 1
        new = f"{role}-{self._count[role]}"
        self.links[new] = self.links[name]
        (self._define_verifier if role == "verifier" else self._define_drafter)(new)
        self.start(new)
        return new

    def retire(self, name: str, grace_s: float) -> int:
        """Ask a node to end for good; returns its exit code. Raises `AssertionError`."""
        code = self.terminate(name, grace_s)
        del self.nodes[name]
        return code

    def cut(self, name: str, cut: bool) -> None:
        """Stop all that flows to a node, or let it flow again: nothing is lost on the way."""
        os.kill(self.links[name].pid, signal.SIGSTOP if cut else signal.SIGCONT)

    def delay(self, name: str, delay_s: float) -> None:
        """Delay what flows to and from a node."""
        self.links[name].shape(name, LinkShape(delay_s=delay_s))

    def wait_ready(self) -> None:
        """Wait until every orchestrator has every worker ready."""
        wanted = len(self.of("verifier")) + len(self.of("drafter"))
        for endpoint in self.endpoints:
            with Client(endpoint) as client:
                self.wait(lambda client=client: self._ready(client) >= wanted, "all are ready")

    def wait(
        self, condition: Callable[[], bool], what: str, timeout_s: float = START_TIMEOUT_S
    ) -> None:
        """Poll until something is so. Raises `AssertionError`."""
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline_s, f"never happened: {what}; see {self.log_dir}"
            time.sleep(_POLL_S)

    @staticmethod
    def _ready(client: Client) -> int:
        try:
            return sum(worker.state == "ready" for worker in client.workers())
        except OutriderError:
            return 0

    def _define(self) -> None:
        config = self.config
        binary = next(redis_server._binaries())[1]
        redis = self._add("redis-1", "", link=True)
        port = redis.address.rpartition(":")[2]
        options = ["--port", port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        redis.argv = [binary, *options]
        self._redis_url = f"redis://{self._linked('redis-1')}/0"
        self._count = Counter(verifier=config.verifiers, drafter=config.drafters)
        for number in range(1, config.verifiers + 1):
            self._define_verifier(f"verifier-{number}")
        for number in range(1, config.drafters + 1):
            self._define_drafter(f"drafter-{number}")
        for number in range(1, config.orchestrators + 1):
            # Several on one machine: without the door, which has one default address.
            # A dozen processes may share two cores here: a Redis that waits for a processor is not
            # away, and what was said without it is lost with its orchestrator.
            given = ("--http-address", "off", "--journal-deadline", "1")
            options = (*given, *config.orchestrator_options)
            self._add(f"orchestrator-{number}", "orchestrator", options=options)

    def _define_verifier(self, name: str) -> None:
        config = self.config
        options = ["--model", config.model, "--threads", "1"]
        options += ["--sessions-max", str(config.sessions_max)]
        options += ["--cache-dir", str(config.folder / "cache")]
        # What it commits is among what it logs then.
        options += ["--log-level", "debug"]
        self._add_worker(name, "verifier_service", options)

    def _define_drafter(self, name: str) -> None:
        config = self.config
        options = ["--proposer", "lookup"]
        # Odd ones have a model.
        if int(name.rpartition("-")[2]) % 2 and config.model == TARGET:
            options = ["--proposer", "language-model", "--model", DRAFT, "--threads", "1"]
            options += ["--cache-dir", str(config.folder / "cache")]
        self._add_worker(name, "drafter_service", options)

    def _add_worker(self, name: str, module: str, options: list[str]) -> None:
        node = self._add(name, module, link=True)
        node.argv += ["--advertise", self._linked(name), "--worker-id", name, *options]

    def _linked(self, name: str) -> str:
        node = self.nodes[name]
        node.advertised = self.links[name].open(name, node.address)
        return node.advertised

    def _add(
        self, name: str, module: str, *, link: bool = False, options: tuple[str, ...] = ()
    ) -> Node:
        port = _free_port()
        argv = [sys.executable, "-m", module, "--port", str(port)]
        argv += ["--drain", str(self.config.drain_s), *options]
        node = self.nodes[name] = Node(name, argv, f"127.0.0.1:{port}")
        if link and name not in self.links:
            self.links[name] = self._stack.enter_context(LinkProxy())
        return node

    def _close(self) -> None:
        for name in self.links:
            with contextlib.suppress(OSError):
                self.cut(name, False)
        for node in reversed(self.nodes.values()):
            if node.pid and self._poll(node) is None:
                self.kill(node.name)
        self._stack.close()


def _free_port() -> int:
    # Outside of the range from which the kernel takes ports for outgoing connections: a node that
    # is down must find its port free when it comes back.
    for port in range(20_000 + os.getpid() % 10_000, 32_000):
        if port in _taken:
            continue
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            _taken.add(port)
            return port
    raise AssertionError("no free port")


_taken: set[int] = set()
