"""Fuzz a verifier's stream: `python -m tests.fuzz.verifier_stream --messages 100000 --seed 1`.

One real verifier, its engine on its own thread, a tiny random model and a KV budget that is always
short. Some connections hand real bytes to the edge, others come over sockets. What must hold is in
`tests.fuzz.ledger`; at every rest nothing may be left of what has been. With `--sockets 0` a run
repeats to the last step: the engine goes once round its loop for each round of messages.
"""

from __future__ import annotations

import argparse
import asyncio
import enum
import gc
import logging
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from unittest.mock import patch

import grpc
from google.protobuf.message import DecodeError

from outrider.draft_tree import DraftTree, Node
from outrider.model.kv_cache import SessionCache
from outrider.v1 import verifier_pb2
from tests.fuzz.connections import Connection, Direct, PacedInbox, Pacer, Socket
from tests.fuzz.ledger import Ledger, content_of
from tests.fuzz.openings import opening, random_case
from tests.fuzz.speaker import Speaker
from tests.support.fleet import TARGET, RunningVerifier, load, verifier
from tests.support.reference import expect
from verifier_service.calibration import SessionCalibration
from verifier_service.config import EngineConfig
from verifier_service.deciding import Decider
from verifier_service.grammar import GrammarState
from verifier_service.planning import Seat
from verifier_service.session import Session

CONFIG = EngineConfig(
    sessions_max=12,
    kv_tokens_max=192,
    kv_overcommit=100.0,
    prefill_tokens_max=24,
    drafts_queued_max=256,
    own_guesses=True,
    warm_up=False,
)
PASSES_MAX = 3_000
"""Times round the engine's loop within which every session ends: more than all seats' work."""
_ANSWER_TIMEOUT_S = 20.0
_RESTS = 5
_ENDED_MAX = 1_024
_SOURCES_MAX = 1_024
_BLOCKS_SLACK = 40_000
_RESIDENT_MB_SLACK = 64.0
_OF_SESSIONS = frozenset(
    {Session, Seat, Decider, GrammarState, DraftTree, Node, SessionCache, SessionCalibration}
)
"""Nothing of this kind is left when there are no sessions."""


@dataclass(slots=True)
class Result:
    """What a run has found."""

    messages: int = 0
    crashes: int = 0
    """Errors in the log, and an engine that does not run any more."""
    stuck: int = 0
    leaked_tokens: int = 0
    faults: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    blocks: list[int] = field(default_factory=list)
    """Allocated blocks of the interpreter at each rest, without what the engine remembers."""
    resident_mb: list[float] = field(default_factory=list)
    preemptions: int = 0
    seconds: float = 0.0

    @property
    def blocks_growth(self) -> int:
        """Blocks more at the last rest than at the first."""
        return self.blocks[-1] - self.blocks[0] if self.blocks else 0

    @property
    def resident_growth_mb(self) -> float:
        """Memory more at the last rest than at the first."""
        return self.resident_mb[-1] - self.resident_mb[0] if self.resident_mb else 0.0

    @property
    def clean(self) -> bool:
        """True if nothing was found."""
        return not (self.crashes or self.stuck or self.leaked_tokens or self.faults)

    def check_growth(self) -> None:
        """Count growth as a fault."""
        if not self.blocks:
            return
        if self.blocks_growth > _BLOCKS_SLACK:
            self.faults.append(f"{self.blocks_growth} blocks of memory more than at first")
        if self.resident_growth_mb > _RESIDENT_MB_SLACK:
            self.faults.append(f"{self.resident_growth_mb:.0f} MB more in use at the end")


class _StuckError(Exception):
    """What must end or be answered does not."""


class _Errors(logging.Handler):
    """Collects what is logged as an error; asyncio reports exceptions nobody caught there too."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if len(self.found) < 20:
            formatter = logging.Formatter("%(name)s: %(message)s")
            self.found.append(formatter.format(record))


class Fuzz:
    """One run."""

    def __init__(self, messages: int, seed: int, sockets: int, cases: int) -> None:
        self.result = Result()
        self._messages = messages
        self._sockets = sockets
        self._draw = random.Random(seed)
        shared = self._draw.randbytes(64)
        self._cases = [random_case(self._draw, shared) for _ in range(cases)]
        self._expected = [expect(TARGET, case) for case in self._cases]
        self._ledger = Ledger(self._cases, self._expected)
        for at, (case, expected) in enumerate(zip(self._cases, self._expected, strict=True)):
            message = opening(self._draw, case, expected, 0, 0)
            self._ledger.contents[content_of(message)] = at
        self._speaker = Speaker(
            self._draw, self._ledger, self._cases, self._expected, CONFIG.sessions_max
        )
        self._connections: list[Connection] = []
        self._connections_made = 0
        self._unreadable: set[int] = set()
        """Connections that were sent what is no message."""
        self._seated: dict[int, tuple[Seat, int]] = {}
        self._before = _census()

    async def run(self, progress: Callable[[Result], None]) -> Result:
        """Send all messages, rest a few times, and look at what is left."""
        errors, started = _Errors(), time.monotonic()
        log = logging.getLogger()
        # A record kept somewhere, for each of thousands of sessions, would be taken for a leak.
        level_before = log.level
        log.setLevel(logging.WARNING)
        log.addHandler(errors)
        try:
            with patch("verifier_service.engine.Inbox", PacedInbox):
                async with verifier(load(TARGET), config=CONFIG) as target:
                    await self._run(target, progress)
        except _StuckError:
            pass  # counted; a fleet that hangs tells nothing more
        except AssertionError as error:
            self.result.crashes += 1
            self._fault(str(error))
        finally:
            log.removeHandler(errors)
            log.setLevel(level_before)
        self.result.crashes += len(errors.found)
        self.result.faults += [*errors.found, *self._ledger.faults, *self._ledger.tally.faults]
        self.result.check_growth()
        self.result.seconds = time.monotonic() - started
        return self.result

    async def _run(self, target: RunningVerifier, progress: Callable[[Result], None]) -> None:
        self._target, self._pacer = target, Pacer(target.engine)
        self._connections = [self._connect(at < self._sockets) for at in range(4 + self._sockets)]
        for rest in range(1, _RESTS + 1):
            while self.result.messages < self._messages * rest // _RESTS:
                await self._round()
            await self._rest()
            self.result.preemptions = target.engine.preemptions
            self.result.counts = self._ledger.counts
            progress(self.result)
        await self._serves()
        for connection in self._connections:
            await self._leave(connection, "end")
        await self._pacer.one_pass()
        self._check(target.engine.load == 0, "sessions outlive their connections")
        self._check(not target.service._mailboxes, "mailboxes outlive their connections")
        if not self._pacer.alive:
            self.result.crashes += 1

    # --- a round: some messages, then one pass of the engine ---

    async def _round(self) -> None:
        for _ in range(self._draw.randint(1, 10)):
            at = self._draw.randrange(len(self._connections))
            connection = self._connections[at]
            # After what could not be read, nothing more is; it is to be noticed before all ends.
            unreadable = connection.key in self._unreadable
            if unreadable or connection.ended or self._draw.random() < 0.002:
                how = "end" if unreadable else self._draw.choice(("end", "cancel"))
                await self._leave(connection, how)
                connection = self._connections[at] = self._connect(isinstance(connection, Socket))
            await self._say(connection)
        await self._pacer.one_pass()
        self._check_owners()
        if self._pacer.passes % 64 == 0:
            self._check_seats()

    async def _say(self, connection: Connection) -> None:
        data = self._speaker.message(connection.key)
        try:
            request = verifier_pb2.VerifyRequest.FromString(data)
        except DecodeError:
            # The stream cannot survive that; its sessions go with it.
            self._ledger.left(connection.key)
            self._ledger.counts["unreadable"] += 1
            self._unreadable.add(connection.key)
        else:
            self._ledger.sent(connection.key, request)
        await connection.send(data)
        self.result.messages += 1
        self._ledger.counts["over sockets"] += not connection.strict

    def _connect(self, socket: bool) -> Connection:
        self._connections_made += 1
        key = self._connections_made
        if socket:
            return Socket(key, self._target.address, self._heard_late)
        return Direct(key, self._target.service, self._heard)

    def _heard(self, key: int, response: verifier_pb2.VerifyResponse) -> None:
        self._ledger.heard(key, True, response)

    def _heard_late(self, key: int, response: verifier_pb2.VerifyResponse) -> None:
        self._ledger.heard(key, False, response)

    async def _leave(self, connection: Connection, how: str) -> None:
        self._ledger.left(connection.key)
        await connection.close(how)
        if isinstance(connection, Direct) and connection.status is not None:
            unreadable = connection.key in self._unreadable
            known = connection.status[0] is grpc.StatusCode.INVALID_ARGUMENT and unreadable
            self._check(known, f"a stream was ended with {connection.status}")

    # --- what must hold ---

    async def _rest(self) -> None:
        """Let everything end, and look at what is left."""
        engine, service = self._target.engine, self._target.service
        begun, deadline_s = self._pacer.passes, time.monotonic() + _ANSWER_TIMEOUT_S
        while engine.load or self._ledger.open_questions:
            await self._pacer.one_pass()
            if engine.load and self._pacer.passes - begun > PASSES_MAX:
                break
            if not engine.load:
                if time.monotonic() > deadline_s:
                    break
                await asyncio.sleep(0.001)  # something is on its way over a socket
        questions = self._ledger.open_questions
        self.result.stuck += max(engine.load, len(questions))
        self.result.faults += questions[:5]
        if self.result.stuck:
            raise _StuckError
        self.result.leaked_tokens += engine.pool.tokens_used
        self._check(not any(engine.pool.blocks._references), "blocks of KV are still referenced")
        self._check(len(engine._ended) <= _ENDED_MAX, "too many ended sessions are remembered")
        known = len(engine._calibrations._sources)
        self._check(known <= _SOURCES_MAX, "too many sources are remembered")
        self._check(not getattr(service, "_held", None), "sessions are held back for ever")
        boxes, streams = len(service._mailboxes), sum(not one.ended for one in self._connections)
        self._check(boxes <= len(self._connections), f"{boxes} mailboxes, {streams} streams")
        self._ledger.forget()
        self._seated.clear()
        gc.collect()
        for kind, count in (_census() - self._before).items():
            self._fault(f"{count} objects of {kind} are left although there are no sessions")
        self.result.blocks.append(sys.getallocatedblocks() - _objects_of(engine._ended))
        self.result.resident_mb.append(_resident_mb())

    def _check_owners(self) -> None:
        """Nobody decodes for a connection that is gone."""
        if len(self._pacer.inbox):
            return
        streams = self._target.service._mailboxes
        for seat in self._target.engine._seats.values():
            known = seat.session.connection in streams
            self._check(known, f"session {seat.session.spec.session} outlives its connection")

    def _check_seats(self) -> None:
        """Every session ends within a bounded number of passes."""
        now = self._pacer.passes
        seats = list(self._target.engine._seats.values())
        self._seated = {id(seat): self._seated.get(id(seat), (seat, now)) for seat in seats}
        for seat, since in self._seated.values():
            if now - since > PASSES_MAX:
                self.result.stuck += 1
                self._fault(f"session {seat.session.spec.session} does not end")
                raise _StuckError

    async def _serves(self) -> None:
        """After all that, new sessions get exactly what they should."""
        connection = self._connect(socket=False)
        self._connections.append(connection)
        before = self._ledger.counts.copy()
        for number in range(CONFIG.sessions_max // 2):
            case, expected = self._cases[number], self._expected[number]
            message = opening(self._draw, case, expected, 2**62 + number, 1)
            request = verifier_pb2.VerifyRequest(opens=[message])
            self._ledger.sent(connection.key, request)
            await connection.send(request.SerializeToString())
        await self._rest()
        what = self._ledger.counts - before
        served = what["finished"] == what["sound"] == CONFIG.sessions_max // 2
        self._check(served, f"what became of fresh sessions: {dict(what)}")

    def _check(self, held: bool, text: str) -> None:
        if not held:
            self._fault(text)

    def _fault(self, text: str) -> None:
        self.result.faults.append(text)


def _census() -> Counter[str]:
    """How many objects of sessions there are."""
    kinds = (type(one) for one in gc.get_objects())
    return Counter(kind.__name__ for kind in kinds if kind in _OF_SESSIONS)


def _objects_of(root: object) -> int:
    """How many objects hang below one, classes and what is theirs left out."""
    seen, stack = {id(root)}, [root]
    while stack:
        for one in gc.get_referents(stack.pop()):
            if id(one) not in seen and not isinstance(one, (type, enum.Enum)):
                seen.add(id(one))
                stack.append(one)
    return len(seen)


def _resident_mb() -> float:
    """Resident set, where the system tells; else 0."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096 / 2**20
    except OSError:
        return 0.0


def main() -> None:
    """Run and report; the exit status says whether anything was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sockets", type=int, default=1, help="connections over sockets")
    parser.add_argument("--cases", type=int, default=160, help="different sound requests")
    options = parser.parse_args()
    fuzz = Fuzz(options.messages, options.seed, options.sockets, options.cases)

    def progress(result: Result) -> None:
        print(f"{result.messages} messages: {dict(sorted(result.counts.items()))}", flush=True)

    result = asyncio.run(fuzz.run(progress))
    for fault in result.faults:
        print(f"fault: {fault}")
    print(
        f"result: fuzz messages={result.messages} crashes={result.crashes} stuck={result.stuck}"
        f" leaked_tokens={result.leaked_tokens} faults={len(result.faults)}"
        f" preemptions={result.preemptions} blocks_growth={result.blocks_growth}"
        f" resident_growth_mb={result.resident_growth_mb:.0f} seed={options.seed}"
        f" seconds={result.seconds:.0f}"
    )
    sys.exit(0 if result.clean else 1)


if __name__ == "__main__":
    main()
