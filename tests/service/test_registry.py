"""The registry against a real server."""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from outrider.errors import ConfigError, OutriderError, RegistryUnavailable
from outrider.registry import (
    WORKERS_MAX,
    Connection,
    Registry,
    WorkerPublisher,
    WorkerRecord,
    WorkerWatch,
    redacted,
)
from tests.support.redis_process import RedisProcess

DEADLINE_S = 10.0

INDEX = "outrider:1:{w}:index"

VERIFIER = WorkerRecord(
    role="verifier",
    worker="v-1",
    incarnation="cafe",
    address="10.0.0.1:7001",
    model="tiny",
    model_fingerprint="f" * 64,
    capacity=64,
    load=3,
    state="ready",
)
DRAFTER = replace(VERIFIER, role="drafter", worker="d:1", address="[::1]:7002", state="draining")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisProcess]:
    server = RedisProcess(tmp_path)
    yield server
    server.stop()


@pytest.fixture
async def registry(server: RedisProcess) -> AsyncIterator[Registry]:
    connection = Connection(server.url, timeout_s=2.0)
    yield Registry(connection)
    await connection.close()


@pytest.fixture
async def raw(server: RedisProcess) -> AsyncIterator[Redis]:
    """A client that says anything to the server."""
    async with Redis.from_url(server.url) as client:
        yield client


class Reports:
    """Collects what a watch reports."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[list[WorkerRecord]] = asyncio.Queue()

    def __call__(self, workers: list[WorkerRecord]) -> None:
        self.queue.put_nowait(workers)

    async def until(self, condition: Callable[[list[WorkerRecord]], bool]) -> list[WorkerRecord]:
        """Return the next report that fulfils `condition`."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                workers = await self.queue.get()
                if condition(workers):
                    return workers


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 - what is waited for offers no event.
            await asyncio.sleep(0.01)


async def verifier_expiry_ms(raw: Redis) -> float:
    expiry_ms = await raw.zscore(INDEX, "verifier:v-1")
    assert isinstance(expiry_ms, float)
    return expiry_ms


# --- records -----------------------------------------------------------------------------------


async def test_what_is_published_is_read(registry: Registry) -> None:
    assert await registry.workers() == []
    await registry.publish(VERIFIER)
    await registry.publish(DRAFTER)
    assert await registry.workers() == [DRAFTER, VERIFIER]
    busier = replace(VERIFIER, load=9, state="draining")
    await registry.publish(busier)
    assert await registry.workers() == [DRAFTER, busier]


async def test_fingerprints_kv_and_state_are_read(registry: Registry, raw: Redis) -> None:
    told = replace(VERIFIER, tokenizer_fingerprint="t" * 64, kv_tokens_used=5, kv_tokens_max=2**40)
    await registry.publish(told)
    assert await registry.workers() == [told]
    # A worker of an earlier release does not say.
    later = ("tokenizer_fingerprint", "kv_tokens_used", "kv_tokens_max")
    await raw.hdel("outrider:1:{w}:verifier:v-1", *later)
    assert await registry.workers() == [VERIFIER]


async def test_records_expire_and_so_does_every_key(registry: Registry, raw: Redis) -> None:
    await registry.publish(VERIFIER, ttl_s=30)
    await registry.publish(DRAFTER, ttl_s=0.2)
    keys: list[Any] = await raw.keys("*")
    assert len(keys) == 3
    for key in keys:
        assert key.startswith(b"outrider:1:")
        assert 0 < await raw.pttl(key) <= (200 if b"d:1" in key else 30_000)
    # A short record must not shorten the life of the index.
    assert await raw.pttl(INDEX) > 20_000
    reports = Reports()
    async with WorkerWatch(registry, reports, interval_s=0.02):
        await reports.until(lambda workers: workers == [VERIFIER])
    assert await raw.zcard(INDEX) == 2
    await registry.publish(VERIFIER)
    assert await raw.zcard(INDEX) == 1  # Whoever publishes sweeps.


async def test_the_index_alone_says_who_has_expired(registry: Registry, raw: Redis) -> None:
    await registry.publish(VERIFIER)
    await raw.zadd(INDEX, {"verifier:v-1": 1})
    assert await registry.workers() == []


async def test_withdrawing(registry: Registry, raw: Redis) -> None:
    await registry.publish(VERIFIER)
    assert await registry.withdraw(VERIFIER)
    assert await registry.workers() == []
    assert await raw.keys("*") == []
    assert not await registry.withdraw(VERIFIER)


async def test_a_later_incarnation_is_not_withdrawn(registry: Registry) -> None:
    reborn = replace(VERIFIER, incarnation="beef")
    await registry.publish(VERIFIER)
    await registry.publish(reborn)
    assert not await registry.withdraw(VERIFIER)
    assert await registry.workers() == [reborn]


MALFORMED: dict[str, dict[str, Any]] = {
    "drafter:no-fields": {"x": "y"},
    "drafter:load": {"load": "many"},
    "drafter:negative": {"capacity": "-1"},
    "drafter:huge": {"capacity": str(2**40)},
    "drafter:kv": {"kv_tokens_max": "-1"},
    "drafter:state": {"state": "asleep"},
    "drafter:address": {"address": "nowhere"},
    "drafter:port": {"address": "host:0"},
    "drafter:bytes": {"model": b"\xff\xfe"},
    "drafter:escape": {"model": "\x1b[2J"},
    "drafter:nobody": {"incarnation": ""},
    "drafter:": {},
    "conductor:role": {},
    "nothing": {},
}


async def test_malformed_records_are_skipped_counted_and_logged_once(
    registry: Registry, raw: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    await registry.publish(VERIFIER)
    expiry_ms = await verifier_expiry_ms(raw)
    good: dict[Any, Any] = {name: str(value) for name, value in asdict(VERIFIER).items()}
    for member, fields in MALFORMED.items():
        whole: dict[Any, Any] = fields if "x" in fields else good | fields
        await raw.hset("outrider:1:{w}:" + member, mapping=whole)
        await raw.zadd(INDEX, {member: expiry_ms})
    await raw.set("outrider:1:{w}:drafter:wrong-type", "text")
    await raw.zadd(INDEX, {"drafter:wrong-type": expiry_ms})
    await raw.zadd(INDEX, {b"\xff:\xff": expiry_ms, b"drafter:gone": expiry_ms})
    await raw.hset(b"outrider:1:{w}:\xff:\xff", mapping=good)

    assert await registry.workers() == [VERIFIER]
    assert registry.malformed_records == len(MALFORMED) + 2
    logged = [record.message for record in caplog.records]
    assert len(logged) == len(MALFORMED) + 2
    assert any("drafter:wrong-type" in message for message in logged)
    assert await registry.workers() == [VERIFIER]
    assert registry.malformed_records == 2 * (len(MALFORMED) + 2)
    assert len(caplog.records) == len(logged)


async def test_fields_of_later_versions_are_ignored(registry: Registry, raw: Redis) -> None:
    await registry.publish(VERIFIER)
    await raw.hset("outrider:1:{w}:verifier:v-1", "colour", "green")
    assert await registry.workers() == [VERIFIER]
    # A record is replaced as a whole.
    await registry.publish(VERIFIER)
    assert not await raw.hexists("outrider:1:{w}:verifier:v-1", "colour")


async def test_a_flooded_index_is_read_in_part(registry: Registry, raw: Redis) -> None:
    await registry.publish(VERIFIER, ttl_s=30)
    soon_ms = await verifier_expiry_ms(raw) - 1
    await raw.zadd(INDEX, {f"drafter:{number}": soon_ms for number in range(WORKERS_MAX + 500)})
    assert await registry.workers() == [VERIFIER]


async def test_only_commands_that_redis_7_has(registry: Registry, raw: Redis) -> None:
    await raw.config_resetstat()  # Servers count commands of their own at the start.
    await registry.publish(VERIFIER)
    await registry.workers()
    await registry.withdraw(VERIFIER)
    used = {name.removeprefix("cmdstat_") for name in await raw.info("commandstats")}
    assert used <= {
        *("hello", "client|setinfo", "config|resetstat", "info"),
        *("eval", "evalsha", "script|load", "time", "del", "hset", "hget", "hgetall"),
        *("pexpire", "pttl", "zadd", "zrevrange", "zrem", "zremrangebyscore"),
    }


@pytest.mark.parametrize(
    "wrong",
    [
        {"role": "conductor"},
        {"state": "asleep"},
        {"worker": ""},
        {"worker": "a\nb"},
        {"incarnation": ""},
        {"address": "host"},
        {"address": ":80"},
        {"address": "host:65536"},
        {"address": "host:²"},
        {"model": "x" * 513},
        {"capacity": -1},
        {"load": -1},
    ],
)
def test_records_are_checked(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ConfigError, match=f"^{name} of a worker"):
        replace(VERIFIER, **wrong)


# --- Redis away --------------------------------------------------------------------------------


async def test_calls_fail_clearly_while_redis_is_away(
    registry: Registry, server: RedisProcess
) -> None:
    await registry.publish(VERIFIER)
    server.stop()
    calls: list[Callable[[], Awaitable[object]]] = [
        lambda: registry.publish(VERIFIER),
        lambda: registry.withdraw(VERIFIER),
        registry.workers,
    ]
    for call in calls:
        with pytest.raises(RegistryUnavailable, match=r"127\.0\.0\.1"):
            await call()
    server.start()
    assert await registry.workers() == []


async def test_a_restart_between_two_calls_is_not_noticed(
    registry: Registry, server: RedisProcess
) -> None:
    await registry.publish(VERIFIER)
    server.stop()
    server.start()
    assert await registry.workers() == []


async def test_a_silent_redis_costs_the_timeout_at_most() -> None:
    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with await asyncio.start_server(say_nothing, "127.0.0.1", 0) as silent:
        port = silent.sockets[0].getsockname()[1]
        connection = Connection(f"redis://127.0.0.1:{port}", timeout_s=1.0)
        registry = Registry(connection)
        before_s = time.monotonic()
        with pytest.raises(RegistryUnavailable):
            await registry.workers()
        # As a whole: not for each attempt.
        assert time.monotonic() - before_s < 1.8
        await connection.close()


async def test_what_is_not_redis_is_unavailable() -> None:
    async def talk_nonsense(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(talk_nonsense, "127.0.0.1", 0) as other:
        port = other.sockets[0].getsockname()[1]
        connection = Connection(f"redis://127.0.0.1:{port}", timeout_s=1.0)
        registry = Registry(connection)
        with pytest.raises(RegistryUnavailable):
            await registry.workers()
        await connection.close()


async def test_a_damaged_index_is_an_error_of_ours(registry: Registry, raw: Redis) -> None:
    await raw.set(INDEX, "text")
    with pytest.raises(RegistryUnavailable, match="WRONGTYPE"):
        await registry.workers()
    with pytest.raises(RegistryUnavailable, match="WRONGTYPE"):
        await registry.publish(VERIFIER)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:6379",
        "http://:secret@h",
        "redis://:sec/ret@host",
        "redis://:secret@h:x",
        "redis://:secret@h:99999",
        "redis://[::1",
        "redis://h?password=secret&colour=green",
        "redis://h?db=secret",
        "redis://h?retry=secret",
        "redis://h?protocol=9",
    ],
)
def test_wrong_urls_are_refused_without_quoting_them(url: str) -> None:
    with pytest.raises(ConfigError, match=r"redis://\[user:password@\]") as caught:
        Connection(url)
    assert "sec" not in "".join(traceback.format_exception(caught.value, chain=True))


async def test_passwords_are_not_told(
    server: RedisProcess, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    url = server.url.replace("redis://", "redis://me:secret@") + "?client_name=secret"
    connection = Connection(url)
    registry = Registry(connection)
    assert registry.place == server.url
    assert redacted(url) == server.url
    async with WorkerWatch(registry, Reports(), interval_s=60) as watch:
        await eventually(lambda: watch.connected is False)
    with pytest.raises(RegistryUnavailable) as caught:
        await registry.workers()
    await connection.close()
    assert caplog.records
    assert "secret" not in caplog.text
    assert "secret" not in "".join(traceback.format_exception(caught.value))


# --- publisher and watch -----------------------------------------------------------------------


async def test_publisher_renews_with_the_current_load(registry: Registry) -> None:
    """For longer than a record lives, without a gap."""
    loads = iter(range(1_000_000))
    reports = Reports()
    async with (
        WorkerPublisher(
            registry, lambda: replace(VERIFIER, load=next(loads)), interval_s=0.05, ttl_s=0.4
        ),
        WorkerWatch(registry, reports, interval_s=0.02),
    ):
        await reports.until(lambda workers: workers != [])
        seen = await reports.until(lambda workers: workers == [] or workers[0].load > 16)
        assert seen != [], "the record expired between renewals"
    assert await registry.workers() == []


async def test_closing_does_not_wait_for_an_interval(registry: Registry) -> None:
    reports = Reports()
    async with asyncio.timeout(DEADLINE_S):
        async with (
            WorkerPublisher(registry, lambda: VERIFIER, interval_s=3600),
            WorkerWatch(registry, reports, interval_s=3600) as watch,
        ):
            while not await reports.queue.get():
                watch.wake()
        assert await registry.workers() == []


async def test_a_publisher_closed_at_once_leaves_nothing(registry: Registry, raw: Redis) -> None:
    async with WorkerPublisher(registry, lambda: VERIFIER):
        pass
    assert await raw.keys("*") == []


async def test_draining_is_told_at_once_when_asked(registry: Registry) -> None:
    current = VERIFIER
    reports = Reports()
    async with (
        WorkerPublisher(registry, lambda: current, interval_s=3600) as publisher,
        WorkerWatch(registry, reports, interval_s=0.02),
    ):
        await reports.until(lambda workers: workers == [VERIFIER])
        current = replace(VERIFIER, state="draining")
        publisher.wake()
        await reports.until(lambda workers: workers == [current])


async def test_a_publisher_leaves_its_successors_record(registry: Registry) -> None:
    reborn = replace(VERIFIER, incarnation="beef")
    reports = Reports()
    async with (
        WorkerPublisher(registry, lambda: VERIFIER, interval_s=3600),
        WorkerWatch(registry, reports, interval_s=0.02),
    ):
        await reports.until(lambda workers: workers == [VERIFIER])
        await registry.publish(reborn)
    assert await registry.workers() == [reborn]


async def test_a_flushed_redis_is_told_again(registry: Registry, raw: Redis) -> None:
    reports = Reports()
    async with (
        WorkerPublisher(registry, lambda: VERIFIER, interval_s=0.1),
        WorkerWatch(registry, reports, interval_s=0.01),
    ):
        await reports.until(lambda workers: workers == [VERIFIER])
        await raw.flushall()
        await raw.script_flush()
        await reports.until(lambda workers: workers == [])
        await reports.until(lambda workers: workers == [VERIFIER])


async def test_a_redis_that_goes_and_comes_back_empty(
    registry: Registry, server: RedisProcess, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "outrider.registry")
    reports = Reports()
    renewals = 0

    def record() -> WorkerRecord:
        nonlocal renewals
        renewals += 1
        return VERIFIER

    async with (
        WorkerPublisher(registry, record, interval_s=0.02) as publisher,
        WorkerWatch(registry, reports, interval_s=0.02) as watch,
    ):
        await reports.until(lambda workers: workers == [VERIFIER])
        server.stop()
        await eventually(lambda: publisher.connected is False)
        await eventually(lambda: watch.connected is False)
        while not reports.queue.empty():
            assert reports.queue.get_nowait() == [VERIFIER]
        renewals = 0
        await eventually(lambda: renewals > 5)
        assert reports.queue.empty()  # What was known stays known.
        server.start()
        await reports.until(lambda workers: workers == [VERIFIER])
        await eventually(lambda: publisher.connected is True)
    messages = [record.message for record in caplog.records]
    for name in ("worker publisher", "worker watch"):
        ours = [message for message in messages if message.startswith(name)]
        assert len(ours) == 2
        assert "going on without the registry" in ours[0]
        assert ours[1].endswith("is back")
        assert server.url in ours[1]


async def test_closing_while_redis_is_away_is_quiet(server: RedisProcess) -> None:
    connection = Connection(server.url)
    registry = Registry(connection)
    server.stop()
    async with asyncio.timeout(DEADLINE_S):
        async with WorkerPublisher(registry, lambda: VERIFIER) as publisher:
            await eventually(lambda: publisher.connected is False)
        await connection.close()


async def test_a_failing_callback_does_not_end_the_task(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    reports = Reports()
    failures = 2

    def report(workers: list[WorkerRecord]) -> None:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise RuntimeError("defect")
        reports(workers)

    async with WorkerWatch(registry, report, interval_s=0.01):
        await reports.until(lambda workers: True)
    assert caplog.text.count("RuntimeError: defect") == 2


@pytest.mark.parametrize("away", [False, True])
async def test_cancelling_leaves_no_task_behind(
    registry: Registry, server: RedisProcess, away: bool
) -> None:
    if away:
        server.stop()
    tasks_before = asyncio.all_tasks()
    inside = asyncio.Event()

    async def work() -> None:
        async with (
            WorkerPublisher(registry, lambda: VERIFIER, interval_s=0.01),
            WorkerWatch(registry, Reports(), interval_s=0.01),
        ):
            inside.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert asyncio.all_tasks() == tasks_before
    if not away:
        assert await registry.workers() == []


async def test_cancelling_twice_ends_a_close_that_hangs() -> None:
    connected = asyncio.Event()

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.set()
        await reader.read()
        writer.close()

    async with await asyncio.start_server(say_nothing, "127.0.0.1", 0) as silent:
        port = silent.sockets[0].getsockname()[1]
        connection = Connection(f"redis://127.0.0.1:{port}", timeout_s=60)
        registry = Registry(connection)
        publisher = await WorkerPublisher(registry, lambda: VERIFIER).__aenter__()
        await connected.wait()
        closing = asyncio.create_task(publisher.__aexit__(None, None, None))
        done, _ = await asyncio.wait([closing], timeout=0.05)
        assert not done
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        assert publisher._task is not None
        assert publisher._task.done()
        await connection.close()


def test_unavailable_is_an_error_of_ours() -> None:
    assert issubclass(RegistryUnavailable, OutriderError)
