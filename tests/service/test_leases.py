"""Leases and journals against a real server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from outrider.domain import FinishReason, TokenLogprobs
from outrider.errors import RegistryUnavailable, StaleEpoch
from outrider.journal import Entry, Journaled, Outcome, Write, continuation_of
from outrider.redis_server import RedisServer, start_redis
from outrider.registry import Connection, Leases

SCORED = (TokenLogprobs(7, -0.5, ((7, -0.5), (1, -2.0))), TokenLogprobs(8, -1.25))
FIRST = Entry(0, 1, 0, (7, 8), SCORED)
SECOND = Entry(0, 1, 2, (9,), (TokenLogprobs(9, 0.0),))
OTHER = Entry(1, 1, 0, (4_000_000_000,))
END = Entry(0, 1, 3, (), finish=FinishReason.LENGTH)


A, B, C = (bytes([number]) * 16 for number in range(3))


def at(epoch: int, *entries: Entry) -> tuple[Entry, ...]:
    return tuple(entry._replace(epoch=epoch) for entry in entries)


def write(*entries: Entry, epoch: int = 1, holder: bytes = A, request: bytes = b"asked") -> Write:
    return Write("gen-1", holder, request, at(epoch, *entries))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with start_redis(None, tmp_path_factory.mktemp("redis") / "log") as running:
        yield running


@pytest.fixture
async def leases(server: RedisServer) -> AsyncIterator[Leases]:
    connection = Connection(server.url)
    await connection.redis.flushall()
    try:
        yield Leases(connection, retention_s=60.0)
    finally:
        await connection.close()


async def appended(leases: Leases, *writes: Write) -> list[Outcome]:
    return await leases.append(writes, 2.0)


async def read(leases: Leases) -> Journaled:
    journaled = await leases.read("gen-1")
    assert journaled is not None
    return journaled


async def test_what_is_appended_is_read(leases):
    assert await appended(leases, write(FIRST, OTHER)) == [Outcome.WRITTEN]
    assert await appended(leases, write(SECOND, END, epoch=3, request=b"")) == [Outcome.WRITTEN]
    journaled = await read(leases)
    assert journaled.request == b"asked"
    assert journaled.epochs == {0: 3, 1: 1}
    assert journaled.entries == (FIRST, OTHER, *at(3, SECOND, END))
    whole = continuation_of(journaled.entries, 0)
    assert whole.tokens == (7, 8, 9)
    assert whole.finish is FinishReason.LENGTH
    assert len(whole.logprobs) == 3
    assert await leases.read("gen-2") is None


async def test_writing_the_same_again_changes_nothing(leases):
    for _ in range(2):
        assert await appended(leases, write(FIRST, SECOND)) == [Outcome.WRITTEN]
    assert (await read(leases)).entries == (FIRST, SECOND)


async def test_a_batch_serves_many_and_a_refusal_is_one_generations_own(leases):
    await appended(leases, write(FIRST))
    writes = [
        write(SECOND, holder=B),
        write(FIRST)._replace(generation="gen-2"),
        write(SECOND)._replace(generation="gen-3", request=b""),
        write(SECOND)._replace(generation="gen-2"),
    ]
    outcomes = [Outcome.REFUSED, Outcome.WRITTEN, Outcome.LOST, Outcome.WRITTEN]
    assert await appended(leases, *writes) == outcomes
    assert (await read(leases)).entries == (FIRST,)


async def test_a_gap_is_noticed_and_closed_by_writing_anew(leases):
    await appended(leases, write(FIRST))
    gap = SECOND._replace(start=3)
    assert await appended(leases, write(gap)) == [Outcome.LOST]
    anew = write(FIRST, SECOND, END)._replace(anew=True)
    assert await appended(leases, anew) == [Outcome.WRITTEN]
    assert (await read(leases)).entries == (FIRST, SECOND, END)


async def test_a_takeover_ends_the_old_holder(leases):
    await appended(leases, write(FIRST))
    known = await read(leases)
    await appended(leases, write(SECOND))  # between the reading and the taking
    taken = await leases.take_over(known, B)
    assert taken.entries == (FIRST, SECOND)
    assert taken.epochs == {0: 2}
    for epoch in (1, 2, 9):  # moving to another verifier does not help
        assert await appended(leases, write(END, epoch=epoch)) == [Outcome.REFUSED]
        whole = write(FIRST, SECOND, END, epoch=epoch)._replace(anew=True)
        assert await appended(leases, whole) == [Outcome.REFUSED]
    assert await appended(leases, write(END, epoch=1, holder=B)) == [Outcome.REFUSED]
    assert await appended(leases, write(END, epoch=2, holder=B)) == [Outcome.WRITTEN]
    assert (await read(leases)).entries == (FIRST, SECOND, *at(2, END))


async def test_of_two_takeovers_one_wins(leases):
    await appended(leases, write(FIRST, OTHER))
    known = await read(leases)
    await leases.take_over(known, B)
    with pytest.raises(StaleEpoch, match="gen-1 is being resumed"):
        await leases.take_over(known, C)
    assert await appended(leases, write(SECOND, epoch=2, holder=C)) == [Outcome.REFUSED]


async def test_everything_expires(leases, server):
    await appended(leases, write(FIRST))
    await leases.take_over(await read(leases), B)
    connection = Connection(server.url)
    keys = await connection.redis.keys("*")
    assert len(keys) == 2
    for key in keys:
        assert 0 < await connection.redis.pttl(key) <= 60_000
    await connection.close()


async def test_without_redis(tmp_path: Path):
    with start_redis(None, tmp_path / "log") as server:
        connection = Connection(server.url)
        leases = Leases(connection)
        assert await appended(leases, write(FIRST)) == [Outcome.WRITTEN]
    with pytest.raises(RegistryUnavailable):
        await appended(leases, write(SECOND))
    with pytest.raises(RegistryUnavailable):
        await leases.read("gen-1")
    await connection.close()
