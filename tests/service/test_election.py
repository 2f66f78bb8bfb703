"""Leader election where answers are slow, and where things happen between a read and a write."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest
from aiohttp import web

from orchestrator.cluster.api import Cluster, Endpoints, LeaseRecord
from orchestrator.cluster.discovery import SELECTOR, EndpointWatch, Pace, workers
from orchestrator.cluster.election import Election, ElectionTimes
from tests.support.api_clusters import FakeCluster, test_cluster

DEADLINE_S = 20.0
NOW = datetime.datetime(2026, 11, 21, tzinfo=datetime.UTC)
TIMES = ElectionTimes(lease_s=15, renew_s=10.0, retry_s=2.0)
QUICK = Pace(watch_s=30.0, backoff_min_s=0.01, backoff_max_s=0.05)


class Clock:
    """Virtual time."""

    def __init__(self) -> None:
        self.now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
async def there() -> AsyncIterator[FakeCluster]:
    async with test_cluster("fake") as cluster:
        assert isinstance(cluster, FakeCluster)
        yield cluster


@pytest.fixture
async def cluster(there: FakeCluster) -> AsyncIterator[Cluster]:
    connected = there.connect()
    yield connected
    await connected.close()


@contextlib.asynccontextmanager
async def held(there: FakeCluster, method: str) -> AsyncIterator[asyncio.Event]:
    """Requests of a method wait at the API server until the context ends; set when one does."""
    arrived, go_on = asyncio.Event(), asyncio.Event()

    def delay(request: web.Request) -> asyncio.Event | None:
        if request.method != method:
            return None
        arrived.set()
        return go_on

    there.server.delay = delay
    try:
        yield arrived
    finally:
        there.server.delay = lambda _: None
        go_on.set()


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait for what nobody reports."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_an_answer_that_was_long_under_way_counts_from_when_it_was_asked_for(
    there: FakeCluster, cluster: Cluster
) -> None:
    """Others count from when they saw the Lease written, which may have been long before."""
    clock = Clock()
    election = Election(cluster, "lead", "one", TIMES, clock)
    async with held(there, "POST") as arrived:
        attempt = asyncio.create_task(election.attempt())
        await arrived.wait()
        clock.now_s += TIMES.renew_s - 1.0
    await attempt
    assert election.leads
    clock.now_s += 1.0
    assert not election.leads


async def test_a_leader_whose_renewal_is_refused_stops_at_once(
    there: FakeCluster, cluster: Cluster
) -> None:
    clock = Clock()
    election = Election(cluster, "lead", "one", TIMES, clock)
    await election.attempt()
    clock.now_s += TIMES.retry_s
    async with held(there, "PUT") as arrived:
        attempt = asyncio.create_task(election.attempt())
        await arrived.wait()
        # Somebody writes between its look and its write.
        taken = there.server.objects["leases", "lead"]
        await there.server.put("leases", taken)
        assert election.leads
    await attempt
    assert not election.leads


async def test_a_leader_that_sees_another_in_its_lease_stops_at_once(cluster: Cluster) -> None:
    clock = Clock()
    election = Election(cluster, "lead", "one", TIMES, clock)
    await election.attempt()
    record = await cluster.read_lease("lead")
    assert record is not None
    await cluster.write_lease("lead", replace(record, holder="other"), NOW)
    assert election.leads, "it cannot know yet"
    await election.attempt()
    assert not election.leads
    assert election.leader == "other"


async def test_a_lease_is_left_to_its_holder_for_as_long_as_the_holder_says(
    cluster: Cluster,
) -> None:
    """A rolling update may bring other times than those of the old leader."""
    clock = Clock()
    await cluster.write_lease("lead", LeaseRecord("other", 60, "", 1), NOW)
    election = Election(cluster, "lead", "one", TIMES, clock)
    await election.attempt()
    clock.now_s += 59.0
    await election.attempt()
    assert not election.leads
    clock.now_s += 2.0
    await election.attempt()
    assert election.leads


async def test_how_often_a_lease_changed_hands_is_counted(cluster: Cluster) -> None:
    clock = Clock()
    one, other = (Election(cluster, "lead", name, TIMES, clock) for name in ("one", "other"))
    for election in (one, one, other):
        await election.attempt()
    await one.release()
    await other.attempt()
    record = await cluster.read_lease("lead")
    assert record is not None
    assert (record.holder, record.transitions) == ("other", 2)


class Unlucky(Cluster):
    """A defect at the first look."""

    looks = 0

    async def read_lease(self, name: str) -> LeaseRecord | None:
        self.looks += 1
        if self.looks == 1:
            raise ValueError("an answer that nobody thought of")
        return await super().read_lease(name)


async def test_a_defect_does_not_leave_the_fleets_without_a_leader(
    there: FakeCluster, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = there.connect()
    cluster.__class__ = Unlucky
    times = ElectionTimes(lease_s=3, renew_s=2.0, retry_s=0.01)
    election = Election(cluster, "lead", "one", times, asyncio.get_running_loop().time)
    running = asyncio.create_task(election.run())
    try:
        await eventually(lambda: election.leads)
    finally:
        running.cancel()
        await cluster.close()
    assert "leader election failed" in caplog.text


# --- and the watch, likewise ---


async def test_a_defect_in_what_is_reported_to_does_not_end_the_watch(
    there: FakeCluster, cluster: Cluster
) -> None:
    found: list[list[str]] = []

    def report(endpoints: list[Endpoints]) -> None:
        found.append(workers(endpoints)[0])
        if len(found) == 1:
            raise ValueError("whoever is told has a defect")

    await there.put_slice("v-1", "verifier", ["10.0.0.1"])
    async with EndpointWatch(cluster, SELECTOR, report, QUICK) as watch:
        await eventually(lambda: len(found) > 0)
        await there.put_slice("v-2", "verifier", ["10.0.0.2"])
        await eventually(lambda: found[-1] == ["10.0.0.1:7000", "10.0.0.2:7000"])
        assert watch.connected


async def test_that_there_is_nobody_is_said_too(cluster: Cluster) -> None:
    found: list[list[Endpoints]] = []
    async with EndpointWatch(cluster, SELECTOR, found.append, QUICK):
        await eventually(lambda: found == [[]])


def test_pauses_grow_up_to_a_bound_and_differ(cluster: Cluster) -> None:
    """A thousand orchestrators lose the same API server at once."""
    watch = EndpointWatch(cluster, SELECTOR, lambda _: None, Pace())
    pace = Pace()
    assert watch._backoff_s(0) == 0.0
    for failures, most_s in ((1, 2 * pace.backoff_min_s), (100, pace.backoff_max_s)):
        pauses_s = {watch._backoff_s(failures) for _ in range(50)}
        assert len(pauses_s) > 10
        assert most_s / 2 <= min(pauses_s) <= max(pauses_s) <= most_s
