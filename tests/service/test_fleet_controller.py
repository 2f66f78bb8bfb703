"""The fleet controller against an API server and orchestrators' metrics, over real HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from click.testing import CliRunner

from orchestrator.cluster.__main__ import command
from orchestrator.cluster.api import Cluster, ClusterUnavailable, Workload
from orchestrator.cluster.controller import Controller, ControllerConfig
from orchestrator.cluster.discovery import SELECTOR, EndpointWatch, Pace
from orchestrator.cluster.election import Election, ElectionTimes
from orchestrator.cluster.scraping import Scraper, read_samples
from orchestrator.cluster.status import NAMES, PREFIX, StatusServer
from orchestrator.config import DriverConfig
from orchestrator.driver import Driver
from orchestrator.fleet import Fleet
from orchestrator.http.metrics import Exposition
from orchestrator.planner.drafter_choice import DrafterChoice, Prices
from orchestrator.planner.scenario import TreeScenario
from orchestrator.scaling import reading
from orchestrator.scaling.pacing import Limits
from orchestrator.scaling.policy import Memory, PolicyConfig
from orchestrator.scaling.reading import Scrape, read_signals
from orchestrator.scaling.signals import FleetName
from tests.support.api_clusters import FakeCluster, test_cluster

DEADLINE_S = 20.0
ORCHESTRATORS, VERIFIERS, DRAFTERS = FleetName
WORKLOADS = {
    VERIFIERS: Workload("statefulset", "outrider-verifier"),
    DRAFTERS: Workload("deployment", "outrider-drafter"),
}
TIMES = ElectionTimes(lease_s=15, renew_s=10.0, retry_s=2.0)


def planner(scenario: TreeScenario, prices: Prices | None) -> DrafterChoice:
    """Two drafters for each verifier that is shown, and they pay."""
    count = 2 * scenario.verifiers
    return DrafterChoice(count, 1.5, {count: 150.0})


@dataclass
class Door:
    """An orchestrator's HTTP door, as far as metrics go."""

    sessions: int = 100
    verifiers: int = 2
    answers: bool = True
    key: str | None = None
    text: str | None = None
    asked: int = 0
    port: int = 0
    _runner: web.AppRunner | None = field(default=None, repr=False)

    async def start(self) -> None:
        app = web.Application()
        app.router.add_get("/metrics", self._serve)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    async def _serve(self, request: web.Request) -> web.Response:
        self.asked += 1
        if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
            return web.Response(status=401)
        if not self.answers:
            return web.Response(status=503)
        return web.Response(text=self.text if self.text is not None else self._metrics())

    def _metrics(self) -> str:
        lines = [
            f'outrider_sessions{{role="orchestrator"}} {self.sessions}',
            "outrider_sessions_max 1024",
            "outrider_draining 0",
            'outrider_queue_depth{role="verifier"} 0',
        ]
        for number in range(self.verifiers):
            share = self.sessions // self.verifiers
            worker = f'role="verifier",worker="10.0.0.{number}:7000"'
            lines.append(f"outrider_worker_sessions{{{worker}}} {share}")
            lines.append(f"outrider_worker_sessions_max{{{worker}}} 64")
            verifier = f'verifier="10.0.0.{number}:7000"'
            lines.append(f"outrider_verify_rows{{{verifier}}} {share}")
            lines.append(f"outrider_plain_step_seconds{{{verifier}}} 0.022")
        drafter = 'drafter="10.0.1.1:7001"'
        lines.append('outrider_worker_sessions{role="drafter",worker="10.0.1.1:7001"} 50')
        lines.append('outrider_worker_sessions_max{role="drafter",worker="10.0.1.1:7001"} 256')
        lines.append(f"outrider_draft_gain_tokens{{{drafter}}} 1.5")
        return "\n".join(lines) + "\n"


@dataclass
class Running:
    """A controller whose rounds the test runs."""

    there: FakeCluster
    controller: Controller
    watch: EndpointWatch
    doors: list[Door]
    clock: Clock


class Clock:
    """Virtual time."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def __call__(self) -> float:
        return asyncio.get_running_loop().time() + self.ahead_s


@contextlib.asynccontextmanager
async def doors(*wanted: Door) -> AsyncIterator[list[Door]]:
    for door in wanted:
        await door.start()
    try:
        yield list(wanted)
    finally:
        for door in wanted:
            await door.stop()


def config(**changes: object) -> ControllerConfig:
    limits = {
        VERIFIERS: Limits(floor=1, ceiling=8, tolerance=0.0),
        DRAFTERS: Limits(floor=0, ceiling=8, tolerance=0.0),
    }
    made = ControllerConfig(PolicyConfig(limits=limits), WORKLOADS)
    return replace(made, **changes)  # type: ignore[arg-type]


async def list_doors(there: FakeCluster, opened: list[Door]) -> None:
    """Orchestrators share an address here, so each has a slice of its own."""
    for number, door in enumerate(opened):
        await there.server.put_slice(
            f"o-{number}", "orchestrator", ["127.0.0.1"], ("http", door.port)
        )


@contextlib.asynccontextmanager
async def controller(
    there: FakeCluster, opened: list[Door], *, name: str = "one", **changes: object
) -> AsyncIterator[Running]:
    clock = Clock()
    cluster = there.connect(timeout_s=2.0)
    election = Election(cluster, "outrider-controller", name, TIMES, clock)
    scraper = Scraper(timeout_s=2.0, clock=clock)
    made = Controller(cluster, election, scraper, config(**changes), planner, clock)
    pace = Pace(backoff_min_s=0.01, backoff_max_s=0.05)
    try:
        async with EndpointWatch(cluster, SELECTOR, made.found, pace) as watch:
            async with asyncio.timeout(DEADLINE_S):
                while len(made._addresses) < len(opened):  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
            yield Running(there, made, watch, opened, clock)
    finally:
        await scraper.close()
        await cluster.close()


@pytest.fixture
async def there() -> AsyncIterator[FakeCluster]:
    async with test_cluster("fake") as cluster:
        assert isinstance(cluster, FakeCluster)
        await cluster.put_workload("statefulset", "outrider-verifier", 2)
        await cluster.put_workload("deployment", "outrider-drafter", 1)
        await cluster.put_workload("deployment", "outrider-orchestrator", 1)
        yield cluster


async def replicas(there: FakeCluster) -> tuple[int, int]:
    return (
        await there.replicas("statefulset", "outrider-verifier"),
        await there.replicas("deployment", "outrider-drafter"),
    )


async def test_the_leader_scales_what_is_measured(there: FakeCluster) -> None:
    async with doors(Door(sessions=60), Door(sessions=60)) as opened:
        await list_doors(there, opened)
        async with controller(there, opened) as running:
            await running.controller.election.attempt()
            await running.controller.round()
            # 120 sessions of 64 each, three quarters full; two drafters for each that is ready.
            assert await replicas(there) == (3, 4)
            assert running.controller.status.writes == 2
            await running.controller.round()
            assert await replicas(there) == (3, 4)
            assert running.controller.status.writes == 2, "nothing is written twice"


async def test_who_does_not_lead_writes_nothing_and_asks_nobody(there: FakeCluster) -> None:
    async with doors(Door()) as opened:
        await list_doors(there, opened)
        async with (
            controller(there, opened, name="one") as one,
            controller(there, opened, name="other") as other,
        ):
            await one.controller.election.attempt()
            await other.controller.election.attempt()
            await other.controller.round()
            assert await replicas(there) == (2, 1)
            assert not opened[0].asked
            # Its lease has run out while it slept: it stops, and the other goes on.
            one.clock.ahead_s += 60.0
            other.clock.ahead_s += 60.0
            await other.controller.election.attempt()
            await one.controller.round()
            assert one.controller.status.writes == 0
            await other.controller.round()
            assert other.controller.status.writes == 2


async def test_a_leader_that_loses_its_lease_while_it_decides_does_not_write(
    there: FakeCluster,
) -> None:
    async with doors(Door()) as opened:
        await list_doors(there, opened)
        async with controller(there, opened) as running:

            def slow(scenario: TreeScenario, prices: Prices | None) -> DrafterChoice:
                running.clock.ahead_s += 60.0
                return planner(scenario, prices)

            running.controller.planner = slow
            await running.controller.election.attempt()
            await running.controller.round()
            assert await replicas(there) == (2, 1)
            assert running.controller.status.refused_writes >= 1


async def test_what_somebody_else_scales_meanwhile_is_not_overwritten(there: FakeCluster) -> None:
    async with doors(Door(sessions=120)) as opened:
        await list_doors(there, opened)
        async with controller(there, opened) as running:
            await running.controller.election.attempt()
            loop = asyncio.get_running_loop()

            def slow(scenario: TreeScenario, prices: Prices | None) -> DrafterChoice:
                scaled = there.server.put_workload("statefulsets", "outrider-verifier", 7)
                asyncio.run_coroutine_threadsafe(scaled, loop).result(DEADLINE_S)
                return planner(scenario, prices)

            running.controller.planner = slow
            await running.controller.round()
            assert (await replicas(there))[0] == 7
            assert running.controller.status.refused_writes == 1


async def test_a_dry_run_explains_and_writes_nothing(
    there: FakeCluster, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with doors(Door(sessions=120)) as opened:
        await list_doors(there, opened)
        async with controller(there, opened, dry_run=True) as running:
            await running.controller.round()
            assert await replicas(there) == (2, 1)
    assert "would scale verifiers 2 -> 3 (wanted 3): 120 sessions of 128 want 3" in caplog.text
    assert {verb for verb, _, _ in there.server.asked} <= {"get", "list", "watch"}


async def test_a_dry_run_scales_nothing_even_where_it_would_lead(there: FakeCluster) -> None:
    async with doors(Door(sessions=120)) as opened:
        await list_doors(there, opened)
        async with controller(there, opened, dry_run=True) as running:
            await running.controller.election.attempt()
            await running.controller.round()
            assert running.controller.election.leads
            assert await replicas(there) == (2, 1)


async def test_an_orchestrator_that_does_not_answer_holds_everything(there: FakeCluster) -> None:
    async with doors(Door(sessions=120), Door(sessions=0)) as opened:
        await list_doors(there, opened)
        async with controller(there, opened) as running:
            await running.controller.election.attempt()
            opened[1].answers = False
            await running.controller.round()
            assert await replicas(there) == (2, 1)
            assert "could not be asked" in str(running.controller.status.decisions[0])
            opened[1].answers = True
            await running.controller.round()
            assert (await replicas(there))[0] == 3


async def test_measurements_that_grow_old_change_nothing(there: FakeCluster) -> None:
    async with doors(Door(sessions=60)) as opened:
        await list_doors(there, opened)
        async with controller(there, opened) as running:
            await running.controller.election.attempt()
            await running.controller.round()
            before = await replicas(there)
            opened[0].answers = False
            for _ in range(3):
                running.clock.ahead_s += 500.0
                await running.controller.election.attempt()
                await running.controller.round()
            assert await replicas(there) == before
            assert "held: measured" in str(running.controller.status.decisions[0])


async def test_the_api_server_is_away_for_a_while(there: FakeCluster) -> None:
    async with doors(Door(sessions=60)) as opened:
        await list_doors(there, opened)
        async with controller(there, opened) as running:
            await running.controller.election.attempt()
            await running.controller.round()
            await there.link.stop()
            opened[0].sessions = 120
            for _ in range(4):
                running.clock.ahead_s += 2.0
                await running.controller.election.attempt()
                with pytest.raises(ClusterUnavailable):
                    await running.controller.round()
            running.clock.ahead_s += 60.0
            await running.controller.election.attempt()
            assert not running.controller.election.leads
            await running.controller.round()
            assert (await replicas(there))[0] == 2
            await there.link.start()
            await running.controller.election.attempt()
            await running.controller.round()
            assert (await replicas(there))[0] == 3


async def test_who_leads_again_remembers_nothing_of_before(there: FakeCluster) -> None:
    """Another leader has changed things meanwhile, and its reasons are not known here."""
    async with doors(Door()) as opened:
        await list_doors(there, opened)
        async with controller(there, opened) as running:
            await running.controller.election.attempt()
            await running.controller.round()
            assert running.controller._memory.paces
            assert running.controller._before
            running.clock.ahead_s += 60.0
            assert not running.controller.election.leads
            await running.controller.round()
            assert running.controller._memory == Memory()
            assert not running.controller._before


async def test_refusals_since_the_last_look_ask_for_more(there: FakeCluster) -> None:
    async with doors(Door(sessions=10)) as opened:
        await list_doors(there, opened)
        async with controller(there, opened) as running:
            counted = "# TYPE outrider_requests counter\n"
            counted += 'outrider_requests_total{outcome="exhausted"} '
            await running.controller.election.attempt()
            opened[0].text = opened[0]._metrics() + counted + "1000\n"
            await running.controller.round()
            assert (await replicas(there))[0] == 2, "nobody knows since when"
            opened[0].text = opened[0]._metrics() + counted + "1080\n"
            await running.controller.round()
            assert (await replicas(there))[0] == 4


async def test_a_round_that_fails_is_not_the_last(
    there: FakeCluster, caplog: pytest.LogCaptureFixture
) -> None:
    async with doors(Door(sessions=120)) as opened:
        await list_doors(there, opened)
        async with controller(there, opened, interval_s=0.01) as running:
            failures = [ValueError("a defect"), ClusterUnavailable("away")]

            def failing(scenario: TreeScenario, prices: Prices | None) -> DrafterChoice:
                if failures:
                    raise failures.pop()
                return planner(scenario, prices)

            running.controller.planner = failing
            await running.controller.election.attempt()
            rounds = asyncio.create_task(running.controller.run())
            try:
                async with asyncio.timeout(DEADLINE_S):
                    while running.controller.status.writes < 2:  # noqa: ASYNC110
                        await asyncio.sleep(0.005)
            finally:
                rounds.cancel()
            assert running.controller.status.faults == 2
            assert await replicas(there) == (3, 4)
    assert "a defect" in caplog.text


async def test_nonsense_from_an_orchestrator_is_not_taken(there: FakeCluster) -> None:
    async with doors(Door(text="outrider_sessions{role=")) as opened:
        await list_doors(there, opened)
        async with controller(there, opened) as running:
            await running.controller.election.attempt()
            await running.controller.round()
            assert await replicas(there) == (2, 1)


async def test_orchestrators_are_asked_with_a_key(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("secret\n")
    async with doors(Door(key="secret")) as opened:
        scraper = Scraper(key_file=file)
        try:
            assert len(await scraper.scrape([f"127.0.0.1:{opened[0].port}"])) == 1
            file.write_text("another")
            assert await scraper.scrape([f"127.0.0.1:{opened[0].port}"]) == []
        finally:
            await scraper.close()


async def test_probes_metrics_and_decisions(there: FakeCluster) -> None:
    async with doors(Door(sessions=120)) as opened:
        await list_doors(there, opened)
        async with controller(there, opened) as running, aiohttp.ClientSession() as client:
            status = StatusServer(running.controller)
            base = f"http://{await status.start('127.0.0.1', 0)}"
            try:
                assert (await client.get(f"{base}/health/ready")).status == 503
                assert (await client.get(f"{base}/health/live")).status == 200
                await running.controller.election.attempt()
                rounds = asyncio.create_task(running.controller.run())
                async with asyncio.timeout(DEADLINE_S):
                    while not running.controller.status.looked_s:  # noqa: ASYNC110
                        await asyncio.sleep(0.005)
                rounds.cancel()
                assert (await client.get(f"{base}/health/ready")).status == 200
                metrics = await (await client.get(f"{base}/metrics")).text()
                assert f'{PREFIX}wanted_replicas{{fleet="verifiers"}} 3.0' in metrics
                assert f"{PREFIX}leads 1.0" in metrics
                assert all(f"{PREFIX}{name}" in metrics for name in NAMES)
                said = json.loads(await (await client.get(f"{base}/decisions")).text())
                assert said["leader"] == "one"
                assert said["decisions"][0]["replicas"] == 3
                running.clock.ahead_s += 600.0
                hung = await client.get(f"{base}/health/live")
                assert hung.status == 503
                assert "no round has ended" in await hung.text()
            finally:
                await status.stop()


# --- what is read is what is exported ---


async def test_every_metric_that_is_read_is_exported() -> None:
    fleet = Fleet("test")
    driver = Driver(fleet, DriverConfig())
    try:
        exposition = Exposition(driver, fleet, {}, vllm_names=False)
        names: set[str] = set()
        for family in exposition.collect():
            ends = {"histogram": ("_bucket",), "counter": ("_total",)}.get(family.type, ("",))
            names |= {family.name.removeprefix(reading.PREFIX) + end for end in ends}
        assert names >= reading.NAMES
        text = exposition.text().decode()
        assert read_samples(text)["sessions_max"] == [({}, DriverConfig().sessions_max)]
    finally:
        await driver.close()


def scrape(instance: str, at_s: float, text: str) -> Scrape:
    return Scrape(instance, at_s, read_samples(text))


def test_what_grows_is_read_as_a_difference() -> None:
    def text(waits: tuple[int, int], refused: int, cpu_s: float) -> str:
        return (
            "# TYPE outrider_queue_wait_seconds histogram\n"
            f'outrider_queue_wait_seconds_bucket{{le="0.5"}} {waits[0]}\n'
            f'outrider_queue_wait_seconds_bucket{{le="2.0"}} {waits[1]}\n'
            f'outrider_queue_wait_seconds_bucket{{le="+Inf"}} {waits[1]}\n'
            "# TYPE outrider_requests counter\n"
            f'outrider_requests_total{{outcome="exhausted"}} {refused}\n'
            "# TYPE outrider_cpu_seconds counter\n"
            f"outrider_cpu_seconds_total {cpu_s}\n"
        )

    before = {"a": scrape("a", 0.0, text((1_000, 1_000), 5, 100.0))}
    now = [
        scrape("a", 10.0, text((1_010, 1_100), 8, 105.0)),
        scrape("b", 10.0, text((9_000, 9_000), 70, 500.0)),
    ]
    signals = read_signals(now, before, missing=0, now_s=10.0)
    assert signals.verifiers.queue_wait_s == 2.0, "90 of 100 new ones took longer than 0.5 s"
    assert signals.verifiers.refused == 3, "what b counted before it was known does not count"
    assert signals.orchestrators.cpu_cores == pytest.approx(1.0), "b counts as a does"
    anew = [scrape("a", 20.0, text((0, 4), 1, 2.0))]
    restarted = read_signals(anew, {"a": now[0]}, missing=0, now_s=20.0)
    assert restarted.verifiers.refused == 1
    assert restarted.verifiers.queue_wait_s == 2.0


def test_what_several_say_of_one_worker_counts_once() -> None:
    text = (
        'outrider_worker_sessions{role="verifier",worker="v:1"} 10\n'
        'outrider_worker_sessions_max{role="verifier",worker="v:1"} 64\n'
        'outrider_verify_rows{verifier="v:1"} 20\n'
        'outrider_plain_step_seconds{verifier="v:1"} 0.02\n'
        'outrider_queue_depth{role="verifier"} 3\n'
        'outrider_kv_used_ratio{verifier="v:1"} 0.5\n'
    )
    signals = read_signals([scrape("a", 0, text), scrape("b", 0, text)], {}, missing=0, now_s=0)
    verifiers = signals.verifiers
    assert (verifiers.ready, verifiers.sessions, verifiers.sessions_max) == (1, 20, 64)
    assert (verifiers.waiting, verifiers.kv_share) == (3, 0.5)
    assert signals.drafters.figures is not None
    assert signals.drafters.figures.rows == 20
    assert signals.drafters.figures.gain is None


# --- the command ---


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--discover", "redis"], "--discover"),
        (["--verifiers", "pod/x"], "'pod/x' is no workload"),
        (["--verifiers-floor", "9", "--verifiers-ceiling", "2"], "--verifiers-floor"),
        (["--verifiers-floor", "0"], "floor: of verifiers"),
        (["--verifier-price", "3"], "give both prices"),
        (["--stale-after", "0"], "--stale-after"),
    ],
)
def test_wrong_options_are_refused_by_name(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 2
    assert said in result.output


def test_outside_of_a_cluster_it_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    result = CliRunner().invoke(command, ["--dry-run"])
    assert result.exit_code == 2
    assert "cannot tell how to reach the Kubernetes API" in result.output


def used(asked: Mapping[tuple[str, str, str], int]) -> set[tuple[str, str, str]]:
    return set(asked)


async def test_nobody_asks_for_what_is_not_granted(there: FakeCluster) -> None:
    """All that controller and discovery do, against the Roles that the manifests give."""
    from tests.support.manifests import granted

    async with doors(Door(sessions=120)) as opened:
        await list_doors(there, opened)
        workloads = {**WORKLOADS, ORCHESTRATORS: Workload("deployment", "outrider-orchestrator")}
        limits = {name: Limits(floor=1, ceiling=8, tolerance=0.0) for name in FleetName}
        policy = PolicyConfig(limits=limits)
        async with controller(there, opened, workloads=workloads, policy=policy) as running:
            await running.controller.election.attempt()
            await running.controller.election.attempt()
            await running.controller.round()
            await running.controller.election.release()
    # Each kind of scale is written, whoever needed it just now.
    cluster: Cluster = there.connect()
    try:
        workload = Workload("deployment", "outrider-orchestrator")
        scale = await cluster.read_scale(workload)
        await cluster.write_scale(workload, 2, scale.version)
    finally:
        await cluster.close()
    assert used(there.server.asked) == granted("production", "outrider-controller")
    there.server.asked.clear()
    cluster = there.connect()
    try:
        async with EndpointWatch(cluster, SELECTOR, lambda _: None) as watch:
            async with asyncio.timeout(DEADLINE_S):
                while not there.server.asked["watch", "discovery.k8s.io", "endpointslices"]:  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
            assert watch.connected
    finally:
        await cluster.close()
    assert used(there.server.asked) == granted("production", "outrider-orchestrator")
