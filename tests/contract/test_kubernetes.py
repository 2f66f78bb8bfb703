"""What we expect of a Kubernetes API server, and it of us.

The same suite runs against the fake and, where KUBECONFIG is set, against a real one.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest

from orchestrator.cluster.api import (
    Change,
    Cluster,
    ClusterUnavailable,
    Conflict,
    Endpoints,
    Expired,
    LeaseRecord,
    Workload,
)
from orchestrator.cluster.discovery import SELECTOR, EndpointWatch, Pace, Place, workers
from orchestrator.cluster.election import Election, ElectionTimes
from outrider.errors import ConfigError
from tests.support.api_clusters import FakeCluster, TestCluster, test_cluster

DEADLINE_S = 20.0
QUICK = Pace(watch_s=30.0, backoff_min_s=0.01, backoff_max_s=0.05)
NOW = datetime.datetime(2026, 11, 21, tzinfo=datetime.UTC)
TIMES = ElectionTimes(lease_s=15, renew_s=10.0, retry_s=2.0)


@pytest.fixture(params=["fake", "real"])
async def there(request: pytest.FixtureRequest) -> AsyncIterator[TestCluster]:
    async with test_cluster(request.param) as cluster:
        yield cluster


@pytest.fixture
async def cluster(there: TestCluster) -> AsyncIterator[Cluster]:
    connected = there.connect()
    yield connected
    await connected.close()


class Clock:
    """Virtual time."""

    def __init__(self) -> None:
        self.now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s


class Watched:
    """What an `EndpointWatch` has reported."""

    def __init__(self) -> None:
        self.found: list[Endpoints] = []
        self._news = asyncio.Event()

    def __call__(self, found: list[Endpoints]) -> None:
        self.found = found
        self._news.set()

    @property
    def verifiers(self) -> list[str]:
        return workers(self.found)[0]

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for reports until something is so."""
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                self._news.clear()
                await self._news.wait()


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait for what nobody reports."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(QUICK.backoff_min_s)


# --- leases ---


async def test_a_lease_is_made_once(cluster: Cluster) -> None:
    assert await cluster.read_lease("lead") is None
    mine = LeaseRecord("a", 15, "", 1)
    written = await cluster.write_lease("lead", mine, NOW)
    assert written.version
    read = await cluster.read_lease("lead")
    assert read is not None
    assert (read.holder, read.duration_s, read.transitions) == ("a", 15, 1)
    assert read == written
    with pytest.raises(Conflict):
        await cluster.write_lease("lead", replace(mine, holder="b"), NOW)


async def test_a_stale_lease_write_is_refused(cluster: Cluster) -> None:
    first = await cluster.write_lease("lead", LeaseRecord("a", 15, "", 1), NOW)
    later = NOW + datetime.timedelta(seconds=1)
    second = await cluster.write_lease("lead", replace(first, holder="b"), later)
    with pytest.raises(Conflict):
        await cluster.write_lease("lead", replace(first, holder="a"), later)
    read = await cluster.read_lease("lead")
    assert read is not None
    assert read.holder == "b"
    assert read.version == second.version


async def test_of_two_replicas_one_leads(there: TestCluster) -> None:
    clock = Clock()
    clusters = [there.connect(), there.connect()]
    one, other = (
        Election(cluster, "lead", name, TIMES, clock)
        for cluster, name in zip(clusters, ("one", "other"), strict=True)
    )
    try:
        # At once: whoever is second is refused by the API server.
        await asyncio.gather(one.attempt(), other.attempt())
        assert one.leads is not other.leads
        leader, standby = (one, other) if one.leads else (other, one)
        for _ in range(20):
            clock.now_s += TIMES.retry_s
            await asyncio.gather(leader.attempt(), standby.attempt())
            assert leader.leads
            assert not standby.leads
        # The leader hangs. It stops by itself before the other may begin.
        clock.now_s += TIMES.renew_s
        assert not leader.leads
        await standby.attempt()
        assert not standby.leads
        clock.now_s += TIMES.lease_s + 0.1
        await standby.attempt()
        assert standby.leads
        # The former leader wakes up and tries to go on where it was.
        await leader.attempt()
        assert not leader.leads
        assert leader.leader == standby.leader
    finally:
        for cluster in clusters:
            await cluster.close()


async def test_a_leader_whose_write_was_under_way_loses_to_one_that_was_quicker(
    there: TestCluster,
) -> None:
    """It has read the Lease, and writes when the other already has."""
    clock = Clock()
    clusters = [there.connect(), there.connect()]
    slow, quick = (
        Election(cluster, "lead", name, TIMES, clock)
        for cluster, name in zip(clusters, ("slow", "quick"), strict=True)
    )
    try:
        await slow.attempt()
        assert slow.leads
        record = await clusters[0].read_lease("lead")
        assert record is not None
        await quick.attempt()
        clock.now_s += TIMES.lease_s + 1.0
        await quick.attempt()
        assert quick.leads
        with pytest.raises(Conflict):
            await slow._write(record, clock())
        assert not slow.leads
        assert quick.leads
    finally:
        for cluster in clusters:
            await cluster.close()


async def test_a_lease_that_is_given_back_is_free_at_once(there: TestCluster) -> None:
    clock = Clock()
    clusters = [there.connect(), there.connect()]
    one = Election(clusters[0], "lead", "one", TIMES, clock)
    other = Election(clusters[1], "lead", "other", TIMES, clock)
    try:
        await one.attempt()
        await other.attempt()
        await one.release()
        assert not one.leads
        await other.attempt()
        assert other.leads
    finally:
        for cluster in clusters:
            await cluster.close()


async def test_without_the_api_server_a_leader_stops_and_leads_again_later(
    there: TestCluster,
) -> None:
    clock = Clock()
    cluster = there.connect(timeout_s=1.0)
    election = Election(cluster, "lead", "one", TIMES, clock)
    try:
        await election.attempt()
        await there.link.stop()
        for _ in range(4):
            clock.now_s += TIMES.retry_s
            await election.attempt()
            assert election.leads, "others cannot have taken over yet"
        clock.now_s += TIMES.retry_s
        await election.attempt()
        assert not election.leads
        clock.now_s += 60.0
        await there.link.start()
        await election.attempt()
        assert election.leads
    finally:
        await cluster.close()


# --- scale ---


@pytest.mark.parametrize("kind", ["deployment", "statefulset"])
async def test_the_scale_of_a_workload(there: TestCluster, cluster: Cluster, kind: str) -> None:
    await there.put_workload(kind, "fleet", 3)
    workload = Workload.read(f"{kind}/fleet")
    scale = await cluster.read_scale(workload)
    assert scale.replicas == 3
    await cluster.write_scale(workload, 5, scale.version)
    assert await there.replicas(kind, "fleet") == 5
    with pytest.raises(Conflict):
        await cluster.write_scale(workload, 1, scale.version)
    assert await there.replicas(kind, "fleet") == 5
    with pytest.raises(ClusterUnavailable, match="404"):
        await cluster.read_scale(Workload.read(f"{kind}/other"))
    scale = await cluster.read_scale(workload)
    await cluster.write_scale(workload, 0, scale.version)
    assert (await cluster.read_scale(workload)).replicas == 0


# --- endpoints ---


async def test_endpoints_are_listed_by_the_labels_of_their_service(
    there: TestCluster, cluster: Cluster
) -> None:
    await there.put_slice("v-1", "verifier", ["10.0.0.1", "10.0.0.2"], unready=("10.0.0.2",))
    await there.put_slice("d-1", "drafter", ["10.0.1.1"])
    found, version = await cluster.endpoints(SELECTOR)
    assert workers(found) == (["10.0.0.1:7000"], ["10.0.1.1:7000"])
    assert version
    assert (await cluster.endpoints("app.kubernetes.io/name=other"))[0] == []


async def test_a_watch_goes_on_from_a_version(there: TestCluster, cluster: Cluster) -> None:
    await there.put_slice("v-1", "verifier", ["10.0.0.1"])
    _, version = await cluster.endpoints(SELECTOR)
    await there.put_slice("v-1", "verifier", ["10.0.0.1", "10.0.0.2"])
    await there.put_slice("v-2", "verifier", ["10.0.0.3"])
    await there.delete_slice("v-1")
    changes: list[Change] = []
    enough = asyncio.Event()

    def report(change: Change) -> None:
        if change.endpoints is not None:
            changes.append(change)
        if len(changes) == 3:
            enough.set()

    watching = asyncio.create_task(cluster.watch(SELECTOR, version, 10.0, report))
    async with asyncio.timeout(DEADLINE_S):
        await enough.wait()
    watching.cancel()
    names = [each.endpoints.name for each in changes if each.endpoints is not None]
    assert names == ["v-1", "v-2", "v-1"]
    assert [each.deleted for each in changes] == [False, False, True]


async def test_a_watch_ends_by_itself(cluster: Cluster) -> None:
    _, version = await cluster.endpoints(SELECTOR)
    async with asyncio.timeout(DEADLINE_S):
        await cluster.watch(SELECTOR, version, 1.0, lambda _: None)


async def test_a_watch_from_what_is_forgotten_says_so(there: TestCluster, cluster: Cluster) -> None:
    await there.put_slice("v-1", "verifier", ["10.0.0.1"])
    forgotten = await there.forget()
    with pytest.raises(Expired):
        await cluster.watch(SELECTOR, forgotten, 5.0, lambda _: None)


async def test_pods_are_found_and_lost(there: TestCluster, cluster: Cluster) -> None:
    watched = Watched()
    async with EndpointWatch(cluster, SELECTOR, watched, QUICK):
        await there.put_slice("v-1", "verifier", ["10.0.0.1"])
        await watched.until(lambda: watched.verifiers == ["10.0.0.1:7000"])
        await there.put_slice("v-1", "verifier", ["10.0.0.1", "10.0.0.2"])
        await watched.until(lambda: len(watched.verifiers) == 2)
        await there.put_slice("v-1", "verifier", ["10.0.0.2"])
        await watched.until(lambda: watched.verifiers == ["10.0.0.2:7000"])
        await there.delete_slice("v-1")
        await watched.until(lambda: not watched.verifiers)


async def test_a_watch_that_was_cut_is_resumed_without_a_list(
    there: TestCluster, cluster: Cluster
) -> None:
    watched = Watched()
    await there.put_slice("v-1", "verifier", ["10.0.0.1"])
    async with EndpointWatch(cluster, SELECTOR, watched, QUICK) as watch:
        for number in range(2, 6):
            await watched.until(lambda: len(watched.verifiers) == number - 1)  # noqa: B023
            there.link.cut()
            await there.put_slice(f"v-{number}", "verifier", [f"10.0.0.{number}"])
        await watched.until(lambda: len(watched.verifiers) == 5)
        assert watch.lists == 1
        assert watch.watches >= 4


async def test_a_watch_that_has_expired_begins_anew(there: TestCluster, cluster: Cluster) -> None:
    watched = Watched()
    await there.put_slice("v-1", "verifier", ["10.0.0.1"])
    await there.put_slice("v-2", "verifier", ["10.0.0.2"])
    async with EndpointWatch(cluster, SELECTOR, watched, QUICK) as watch:
        await watched.until(lambda: len(watched.verifiers) == 2)
        # It looks away; meanwhile a slice goes, and that is forgotten.
        await there.link.stop()
        await there.delete_slice("v-1")
        watch._version = await there.forget()
        await there.link.start()
        await watched.until(lambda: watched.verifiers == ["10.0.0.2:7000"])
        assert watch.lists >= 2
        await there.put_slice("v-3", "verifier", ["10.0.0.3"])
        await watched.until(lambda: len(watched.verifiers) == 2)


async def test_what_is_known_is_held_while_the_api_server_is_away(
    there: TestCluster, cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    watched = Watched()
    await there.put_slice("v-1", "verifier", ["10.0.0.1"])
    async with EndpointWatch(cluster, SELECTOR, watched, QUICK) as watch:
        await watched.until(lambda: len(watched.verifiers) == 1)
        await there.link.stop()
        # Many attempts: as in a minute, since the pauses are short here.
        tried = watch.watches
        await eventually(lambda: watch.watches >= tried + 10)
        assert watched.verifiers == ["10.0.0.1:7000"]
        assert watch.connected is False
        await there.put_slice("v-2", "verifier", ["10.0.0.2"])
        await there.link.start()
        await watched.until(lambda: len(watched.verifiers) == 2)
        assert watch.connected is True
    warnings = [each for each in caplog.records if each.levelno == logging.WARNING]
    assert len(warnings) == 1, "said once, not with each attempt"


async def test_an_api_server_that_is_not_there_at_the_start_is_waited_for(
    there: TestCluster,
) -> None:
    await there.put_slice("v-1", "verifier", ["10.0.0.1"])
    await there.link.stop()
    cluster = there.connect()
    watched = Watched()
    try:
        async with EndpointWatch(cluster, SELECTOR, watched, QUICK) as watch:
            await eventually(lambda: watch.lists >= 4)
            await there.link.start()
            await watched.until(lambda: watched.verifiers == ["10.0.0.1:7000"])
    finally:
        await cluster.close()


# --- only with the fake: what a real one does not do when asked ---


@pytest.fixture
async def fake() -> AsyncIterator[FakeCluster]:
    async with test_cluster("fake") as cluster:
        assert isinstance(cluster, FakeCluster)
        yield cluster


async def test_a_line_that_was_cut_in_the_middle_is_not_taken(fake: FakeCluster) -> None:
    cluster, watched = fake.connect(), Watched()
    await fake.put_slice("v-1", "verifier", ["10.0.0.1"])
    try:
        async with EndpointWatch(cluster, SELECTOR, watched, QUICK):
            await watched.until(lambda: len(watched.verifiers) == 1)
            await fake.server.cut(broken=True)
            await fake.put_slice("v-2", "verifier", ["10.0.0.2"])
            await watched.until(lambda: len(watched.verifiers) == 2)
    finally:
        await cluster.close()


async def test_bookmarks_keep_a_quiet_watch_from_expiring(fake: FakeCluster) -> None:
    cluster, watched = fake.connect(), Watched()
    await fake.put_slice("v-1", "verifier", ["10.0.0.1"])
    try:
        async with EndpointWatch(cluster, SELECTOR, watched, QUICK) as watch:
            await watched.until(lambda: len(watched.verifiers) == 1)
            before = watch._version
            await fake.server.bookmark()
            await eventually(lambda: watch._version != before)
            await fake.server.cut()
            await fake.put_slice("v-2", "verifier", ["10.0.0.2"])
            await watched.until(lambda: len(watched.verifiers) == 2)
            assert watch.lists == 1
    finally:
        await cluster.close()


@pytest.mark.parametrize("status", [401, 403, 429, 500, 503])
async def test_refusals_are_errors_of_ours(fake: FakeCluster, status: int) -> None:
    cluster = fake.connect()
    fake.server.refuse = lambda _: status
    try:
        with pytest.raises(ClusterUnavailable, match=str(status)):
            await cluster.endpoints(SELECTOR)
        with pytest.raises(ClusterUnavailable, match=str(status)):
            await cluster.read_lease("lead")
        with pytest.raises(ClusterUnavailable, match=str(status)):
            await cluster.watch(SELECTOR, "1", 5.0, lambda _: None)
    finally:
        await cluster.close()


async def test_an_api_server_that_does_not_answer_is_not_waited_for(fake: FakeCluster) -> None:
    never = asyncio.Event()
    fake.server.delay = lambda _: never
    cluster = fake.connect(timeout_s=0.05)
    try:
        with pytest.raises(ClusterUnavailable, match=r"within 0\.05 s"):
            await cluster.read_lease("lead")
    finally:
        never.set()
        await cluster.close()


@pytest.mark.parametrize("text", ["outrider", "kubernetes", "kubernetes:", "kubernetes:a/", "x:a"])
def test_a_place_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--discover"):
        Place.read(text)


def test_places() -> None:
    assert Place.read("kubernetes:outrider") == Place("outrider", SELECTOR)
    assert Place.read("kubernetes:a/app=x,b=c") == Place("a", "app=x,b=c")
