"""Who may speak when: journaled, without Redis, and after a sleep."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager

import pytest

from orchestrator.config import JournalConfig
from orchestrator.journaling import JournalWriter, Record
from orchestrator.wakefulness import Wakefulness
from outrider.errors import OutriderError, RegistryUnavailable, StaleEpoch, Unavailable
from outrider.journal import Journaled, Outcome, Write

CONFIG = JournalConfig(retry_s=0.01, doubt_s=0.2)


class Store:
    """A Redis that answers when and what it is told to."""

    def __init__(self) -> None:
        self.answer: Callable[[], Outcome] = lambda: Outcome.WRITTEN
        self.asked = asyncio.Event()
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.writes = 0

    async def append(self, writes: Sequence[Write], timeout_s: float) -> list[Outcome]:
        self.writes += 1
        self.asked.set()
        await self.may_answer.wait()
        return [self.answer() for _ in writes]

    async def read(self, generation: str) -> Journaled | None:
        raise NotImplementedError

    async def take_over(self, known: Journaled, holder: bytes) -> Journaled:
        raise NotImplementedError


def away() -> Outcome:
    raise RegistryUnavailable("Redis did not answer")


class Rig:
    """One generation, with a clock of its own for sleeps."""

    def __init__(self) -> None:
        self.store = Store()
        self.writer = JournalWriter(self.store, CONFIG)
        self.ahead_s = 0.0
        """Of the true time: what was slept."""
        self.writer._wakefulness = Wakefulness(
            CONFIG.stall_s, now_s=lambda: time.monotonic() + self.ahead_s
        )
        self.said: list[str] = []
        self.lost: list[OutriderError] = []
        self.record: Record[str] = self.writer.record(
            "g", b"request", deliver=self.said.append, lost=self._lose
        )

    def _lose(self, error: OutriderError) -> None:
        self.lost.append(error)
        self.record.end()

    def say(self, word: str) -> None:
        self.record.note(0, 1, (1,))
        self.record.say(word)

    async def until(self, done: Callable[[], bool]) -> None:
        async with asyncio.timeout(5.0):
            while not done():  # noqa: ASYNC110  # what is waited for tells nobody
                await asyncio.sleep(0.002)


@asynccontextmanager
async def rig() -> AsyncGenerator[Rig]:
    made = Rig()
    made.writer.start()
    yield made
    await made.writer.close()


async def test_output_waits_for_its_journal_and_not_for_a_redis_that_is_away() -> None:
    async with rig() as at:
        at.store.may_answer.clear()
        at.say("a")
        await at.store.asked.wait()
        assert at.said == []
        at.store.may_answer.set()
        await at.until(lambda: at.said == ["a"])
        at.store.answer = away
        at.say("b")
        await at.until(lambda: at.said == ["a", "b"])
        assert at.writer.degraded
        at.say("c")
        assert at.said[-1] == "c", "nothing waits any more"


@pytest.mark.parametrize("degraded", [False, True])
async def test_who_slept_asks_before_it_speaks(degraded: bool) -> None:
    async with rig() as at:
        at.say("a")
        await at.until(lambda: at.said == ["a"])
        if degraded:
            at.store.answer = away
            at.say("b")
            await at.until(lambda: at.said == ["a", "b"])
        said = list(at.said)
        at.ahead_s += 0.6
        at.store.answer = lambda: Outcome.REFUSED
        at.say("after the sleep")
        await at.until(lambda: bool(at.lost))
        assert at.said == said
        assert isinstance(at.lost[0], StaleEpoch)


@pytest.mark.parametrize("first", [away, lambda: Outcome.WRITTEN], ids=["deadline", "answer"])
async def test_what_comes_of_a_batch_in_a_sleep_is_asked_for_again(
    first: Callable[[], Outcome],
) -> None:
    """Neither a deadline that passed in it nor an answer from before lets output go."""
    async with rig() as at:
        at.store.may_answer.clear()
        at.say("a")
        await at.store.asked.wait()
        at.ahead_s += 0.6
        answers = iter([first])
        at.store.answer = lambda: next(answers, lambda: Outcome.REFUSED)()
        at.store.may_answer.set()
        await at.until(lambda: bool(at.lost))
        assert at.said == []


async def test_who_cannot_find_out_is_silent_and_gives_up_in_the_end() -> None:
    async with rig() as at:
        at.say("a")
        await at.until(lambda: at.said == ["a"])
        at.store.answer = away
        at.ahead_s += 0.6
        at.say("b")
        await at.until(lambda: at.writer.degraded)
        at.say("c")
        assert (at.said, at.lost) == (["a"], [])
        await at.until(lambda: bool(at.lost))
        assert at.said == ["a"]
        assert isinstance(at.lost[0], Unavailable)


async def test_who_finds_out_in_time_goes_on() -> None:
    async with rig() as at:
        at.say("a")
        await at.until(lambda: at.said == ["a"])
        at.store.answer = away
        at.ahead_s += 0.6
        at.say("b")
        await asyncio.sleep(CONFIG.doubt_s / 4)
        at.store.answer = lambda: Outcome.WRITTEN
        await at.until(lambda: at.said == ["a", "b"])
        assert at.lost == []
