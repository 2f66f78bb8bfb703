"""The history check finds what it is there for, also in a system whose fence is broken."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

import pytest

from outrider.journal import Outcome, Write
from outrider.redis_server import start_redis
from outrider.registry import Connection, Leases
from tests.chaos.history import Heard, faults_of
from tests.chaos.worker_history import Decided, decided_in, faults_of_workers, held_twice
from tests.support.cases import listen
from tests.support.fleet import TARGET, load, orchestrator, verifier
from tests.support.reference import Case, expect
from tests.system.test_resume import ENGINE, PATIENT, resume_request, resumed

CASE = Case(tuple(b"A different story"), 96, ignore_eos=True)


def heard(at_s: float, stream: int, start: int, *tokens: int) -> Heard:
    return Heard(at_s, "gen-1", stream, 0, start, tokens)


def test_one_stream_after_the_other_is_fine():
    history = [heard(0, 1, 0, 5, 6), heard(1, 1, 2, 7), heard(2, 2, 3, 8), heard(3, 2, 4, 9)]
    assert faults_of(history) == []


@pytest.mark.parametrize(
    ("history", "fault"),
    [
        ([heard(0, 1, 0, 5), heard(1, 1, 2, 7)], "goes on at 2"),
        ([heard(0, 1, 0, 5), heard(1, 1, 0, 5)], "goes on at 0"),
        ([heard(0, 1, 0, 5), heard(1, 2, 2, 7)], "tokens are missing"),
        ([heard(0, 1, 0, 5), heard(1, 2, 0, 6)], "two tokens at 0: 5 and 6"),
        ([heard(0, 1, 0, 5), heard(1, 2, 1, 6), heard(2, 1, 1, 6)], "spoke after stream 2"),
    ],
)
def test_what_cannot_be_is_found(history, fault):
    assert any(fault in found for found in faults_of(history))


def decided(epoch: int, base: int, length: int, digest: str = "", holder: str = "v-1/1") -> Decided:
    return Decided(holder, "s", epoch, base, length, digest or f"{length:x}")


def test_verifiers_that_follow_each_other_are_fine():
    history = [
        decided(1, 8, 10),
        decided(1, 10, 11),
        decided(1, 11, 14),  # goes on for nobody
        decided(2, 11, 12, holder="v-2/1"),
        decided(2, 12, 15, holder="v-2/1"),
    ]
    assert faults_of_workers(history) == []


def test_an_epoch_that_two_held_is_counted_and_both_must_have_said_the_same():
    history = [decided(1, 8, 10), decided(2, 10, 14), decided(2, 9, 12, holder="v-2/1")]
    history.append(decided(3, 14, 15))
    assert held_twice(history) == 1
    assert faults_of_workers(history) == []
    other = decided(2, 9, 14, "other", holder="v-2/1")
    assert any("two texts of 14" in fault for fault in faults_of_workers([*history, other]))


@pytest.mark.parametrize(
    ("history", "fault"),
    [
        ([decided(1, 8, 10), decided(1, 11, 12)], "11 follows 10"),
        ([decided(1, 8, 10), decided(1, 9, 12)], "9 follows 10"),
        ([decided(1, 8, 10), decided(2, 11, 12)], "began at 11, behind 10"),
        ([decided(1, 8, 10), decided(2, 9, 10, "other")], "two texts of 10"),
        ([decided(1, 8, 8)], "a commit of nothing"),
    ],
)
def test_what_verifiers_cannot_have_done_is_found(history, fault):
    assert any(fault in found for found in faults_of_workers(history))


def test_commits_are_read_from_a_log_of_several_incarnations():
    log = """\
2026-11-21 17:00:00,001 INFO    verifier outrider.serving: listening on 127.0.0.1:1
2026-11-21 17:00:00,002 DEBUG   verifier verifier_service.engine: committed session=0a epoch=1 \
base=8 length=10 digest=0f
something else
2026-11-21 17:00:01,001 INFO    verifier outrider.serving: listening on 127.0.0.1:1
2026-11-21 17:00:01,002 DEBUG   verifier verifier_service.engine: committed session=0b epoch=2 \
base=3 length=4 digest=0e
"""
    first, second = decided_in("v-1", log.splitlines())
    assert first == Decided("v-1/1", "0a", 1, 8, 10, "0f")
    assert (second.incarnation, second.session) == ("v-1/2", "0b")


class Slow(Leases):
    """Holds its writer up while it is told to."""

    open = asyncio.Event()
    obeyed = True

    async def append(self, writes: Sequence[Write], timeout_s: float = 2.0) -> list[Outcome]:
        await self.open.wait()
        outcomes = await super().append(writes, timeout_s)
        return outcomes if self.obeyed else [Outcome.WRITTEN for _ in outcomes]


@pytest.mark.parametrize("fenced", [True, False], ids=["fenced", "broken"])
async def test_a_broken_fence_is_caught(fenced, tmp_path):
    """A writer that takes refusals for consent speaks on after it was taken over."""
    history: list[Heard] = []
    loop = asyncio.get_running_loop()
    async with contextlib.AsyncExitStack() as stack:
        redis = stack.enter_context(start_redis(None, tmp_path / "redis.log"))
        targets = [
            await stack.enter_async_context(verifier(load(TARGET), config=ENGINE)) for _ in range(2)
        ]
        stores: list[Slow] = []
        fleets = []
        # Each has a verifier of its own: the verifiers' fences are not what is looked at.
        for target in targets:
            connection = Connection(redis.url)
            stack.push_async_callback(connection.close)
            store = Slow(connection)
            store.open = asyncio.Event()
            store.open.set()
            stores.append(store)
            fleets.append(
                await stack.enter_async_context(
                    orchestrator([target.address], store=store, journal=PATIENT)
                )
            )
        stores[0].obeyed = fenced
        listener = listen(fleets[0].client, CASE)
        await listener.until_ids(16)
        stores[0].open.clear()
        before = len(listener.ids)
        assert listener.started is not None
        name = listener.started.generation_id
        history.append(Heard(loop.time(), name, 1, 0, 0, tuple(listener.ids)))
        rest, _ = await resumed(fleets[1].address, resume_request(listener))
        history.append(Heard(loop.time(), name, 2, 0, before, tuple(rest)))
        stores[0].open.set()
        with contextlib.suppress(Exception):
            await listener.until_end()
        late = tuple(listener.ids[before:])
        if late:
            history.append(Heard(loop.time(), name, 1, 0, before, late))
    assert tuple(listener.ids[:before] + rest) == expect(TARGET, CASE).ids
    assert bool(faults_of(history)) is not fenced
