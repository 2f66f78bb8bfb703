"""Journals what generations say before their clients hear it: group commit over all of them.

What sessions commit is noted at once, without an await, and sent by one task: one batch is on its
way to Redis at a time, and what comes meanwhile leaves with the next one. Output is delivered when
its batch is journaled. So a delivery waits for the batch on its way and for its own, and no more.

If Redis does not answer within the deadline, output goes on without it (`degraded`): then a
generation cannot be resumed until Redis is back and has been told all that it missed. If Redis
says that somebody else holds a generation, its run here ends and says nothing more. The deadline
is one of time awake: an orchestrator that was stopped in between asks again before it speaks, and
gives a generation up if it cannot find out for a while who holds it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable
from typing import Generic, TypeVar

from orchestrator.config import JournalConfig
from orchestrator.wakefulness import Wakefulness
from outrider.domain import FinishReason, TokenLogprobs
from outrider.errors import OutriderError, RegistryUnavailable, StaleEpoch, Unavailable
from outrider.journal import Entry, LeaseStore, Outcome, Write

BATCH_TOKENS_MAX = 1 << 20
"""Tokens in one batch, about: a Redis that comes back is not told everything at once."""

_log = logging.getLogger(__name__)

T = TypeVar("T")


class Record(Generic[T]):
    """One generation's journal and the output that waits for it; made by `JournalWriter`."""

    def __init__(
        self,
        writer: JournalWriter,
        generation: str,
        request: bytes,
        *,
        holder: bytes,
        deliver: Callable[[T], None],
        lost: Callable[[OutriderError], None],
    ) -> None:
        self.generation = generation
        self.holder = holder
        self.request = request
        self.entries: list[Entry] = []
        """Of all choices, in order."""
        self.journaled = 0
        """Entries that are in Redis for sure."""
        self.taken = 0
        """Entries up to which the batch on its way goes."""
        self.exists = False
        """Redis has the lease."""
        self.anew = False
        """Redis has lost something: all is to be written again."""
        self.doubtful_s: float | None = None
        """When this process was found to have slept: somebody may have taken over, so nothing is
        said before Redis was asked."""
        self.lost = lost
        self._writer = writer
        self._deliver = deliver
        self._lengths: dict[int, int] = {}
        self._waiting: list[T] = []
        self._on_its_way: list[T] = []

    def note(
        self,
        choice: int,
        epoch: int,
        tokens: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprobs, ...] = (),
        finish: FinishReason | None = None,
    ) -> None:
        """Note what was decided of a choice."""
        start = self._lengths.get(choice, 0)
        self._lengths[choice] = start + len(tokens)
        self.entries.append(Entry(choice, epoch, start, tokens, logprobs, finish))

    def restore(self, entries: tuple[Entry, ...]) -> None:
        """Begin with what another run has journaled."""
        for entry in entries:
            self._lengths[entry.choice] = entry.start + len(entry.tokens)
        self.entries += entries
        self.journaled = len(self.entries)
        self.exists = True

    def say(self, output: T) -> None:
        """Deliver output once all that was noted is journaled."""
        if self._writer.passes(self):
            self._deliver(output)
        else:
            self._waiting.append(output)
        self._writer.mark(self)

    def end(self) -> None:
        """Nothing more is to be said."""
        self._waiting.clear()
        self._on_its_way.clear()
        self._writer.forget(self)

    def take(self) -> Write:
        """Return what Redis has not been told."""
        self.taken = len(self.entries)
        self._on_its_way += self._waiting
        self._waiting.clear()
        first = 0 if self.anew else self.journaled
        request = b"" if self.exists and not self.anew else self.request
        entries = self.entries[first:]
        return Write(self.generation, self.holder, request, entries, self.anew)

    def written(self) -> None:
        """The batch on its way has arrived: deliver what waited for it."""
        self.journaled, self.exists, self.anew, self.doubtful_s = self.taken, True, False, None
        outputs, self._on_its_way = self._on_its_way, []
        for output in outputs:
            self._deliver(output)

    def release(self) -> None:
        """Deliver all that waits, journaled or not."""
        outputs, self._on_its_way, self._waiting = self._on_its_way + self._waiting, [], []
        for output in outputs:
            self._deliver(output)


class JournalWriter:
    """The one task that writes the journals of this orchestrator."""

    def __init__(self, store: LeaseStore, config: JournalConfig) -> None:
        self._store = store
        self._config = config
        self.degraded = False
        """Redis does not keep up: output does not wait for it."""
        self._records: dict[str, Record[object]] = {}
        self._unsent: dict[str, Record[object]] = {}
        self._wake = asyncio.Event()
        self._wakefulness = Wakefulness(config.stall_s)
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to write."""
        self._tasks = [asyncio.create_task(self._run()), asyncio.create_task(self._watch())]

    async def close(self) -> None:
        """Stop writing, when what is under way has been sent."""
        if self._unsent and not self.degraded:
            await self._flush()
        for task in self._tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    def record(
        self,
        generation: str,
        request: bytes,
        *,
        deliver: Callable[[T], None],
        lost: Callable[[OutriderError], None],
        holder: bytes | None = None,
    ) -> Record[T]:
        """Begin a generation's journal. `lost` is told when somebody else has taken it over."""
        record = Record(
            self,
            generation,
            request,
            holder=holder or new_holder(),
            deliver=deliver,
            lost=lost,
        )
        self._records[generation] = record  # type: ignore[assignment]  # what is said stays inside
        self.mark(record)
        return record

    def mark(self, record: Record[T]) -> None:
        """Have a record sent."""
        if self._records.get(record.generation) is record:
            self._unsent[record.generation] = record  # type: ignore[assignment]
            self._wake.set()

    def forget(self, record: Record[T]) -> None:
        """Send nothing more of a record."""
        if self._records.get(record.generation) is record:
            del self._records[record.generation]
            self._unsent.pop(record.generation, None)

    def passes(self, record: Record[T]) -> bool:
        """Whether output need not wait."""
        self._look_awake()
        return self.degraded and record.doubtful_s is None

    def _look_awake(self) -> None:
        """Doubt everything after a sleep."""
        slept_s = self._wakefulness.slept_s()
        if slept_s:
            _log.warning("this process stood still for %.1f s: asking who holds what", slept_s)
            self.degraded = False
            for record in self._records.values():
                record.doubtful_s = self._wakefulness.woke_s
            self._unsent.update(self._records)
            self._wake.set()

    def _slept_since(self, since_s: float) -> bool:
        self._look_awake()
        woke_s = self._wakefulness.woke_s
        return woke_s is not None and woke_s >= since_s

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._config.stall_s / 8)
            self._look_awake()
            self._wakefulness.refresh()

    async def _run(self) -> None:
        config = self._config
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._unsent:
                try:
                    await self._flush()
                except Exception:
                    # A defect. The task must live, and so must what waits for it.
                    _log.exception("journaling failed")
                    self._degrade("internal error")
                # In a degraded state nothing waits.
                await asyncio.sleep(config.retry_s if self.degraded else config.interval_s)

    async def _flush(self) -> None:
        """Send one batch and act on what becomes of it."""
        config, batch, writes, tokens = self._config, list[Record[object]](), list[Write](), 0
        for record in self._unsent.values():
            batch.append(record)
            writes.append(record.take())
            tokens += len(record.request) // 4 if writes[-1].request else 0
            tokens += sum(len(entry.tokens) for entry in writes[-1].entries)
            if tokens > BATCH_TOKENS_MAX:
                break
        for record in batch:
            del self._unsent[record.generation]
        sent_s = self._wakefulness.now_s()
        bound_s = config.call_timeout_s if self.degraded else config.deadline_s
        try:
            outcomes = await self._store.append(writes, bound_s)
        except RegistryUnavailable as error:
            # Of a deadline that passed during a sleep nothing follows.
            slept = self._slept_since(sent_s)
            self._unsent.update((record.generation, record) for record in self._still(batch))
            if not slept:
                self._degrade(str(error))
            return
        took_s = self._wakefulness.now_s() - sent_s
        if self._slept_since(sent_s):  # Redis answered, but that may be long ago: ask again.
            self._unsent.update((record.generation, record) for record in self._still(batch))
            return
        if self.degraded and took_s <= config.deadline_s:
            _log.info("Redis keeps up again: output waits for its journal")
            self.degraded = False
        outcome_of = dict(zip([write.generation for write in writes], outcomes, strict=True))
        for record in self._still(batch):
            self._settle(record, outcome_of[record.generation])

    def _still(self, batch: list[Record[object]]) -> list[Record[object]]:
        """Those of a batch that have not been ended meanwhile."""
        return [record for record in batch if self._records.get(record.generation) is record]

    def _settle(self, record: Record[object], outcome: Outcome) -> None:
        match outcome:
            case Outcome.WRITTEN:
                record.written()
            case Outcome.LOST if record.doubtful_s is None:
                record.anew = True
                self.mark(record)
            case Outcome.LOST | Outcome.REFUSED:
                _log.warning("generation %s was taken over; ended here", record.generation)
                text = "another orchestrator has taken the generation over"
                record.lost(StaleEpoch(text, 0))

    def _degrade(self, reason: str) -> None:
        if not self.degraded:
            _log.warning("going on without journals: %s", reason)
        self.degraded = True
        now_s = self._wakefulness.now_s()
        for record in list(self._records.values()):
            if record.doubtful_s is None:
                record.release()
            elif now_s - record.doubtful_s > self._config.doubt_s:
                text = "the orchestrator slept and cannot find out who holds the generation"
                record.lost(Unavailable(text))


def new_holder() -> bytes:
    """Name a run of a generation: no other run has the name."""
    return secrets.token_bytes(16)
