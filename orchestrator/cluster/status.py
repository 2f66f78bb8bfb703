"""The controller's own door: probes, metrics, and the last decisions for people."""

from __future__ import annotations

import json

from aiohttp import web
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from orchestrator.cluster.controller import Controller

PREFIX = "outrider_controller_"
NAMES = {
    "leads": "Is this the replica that leads?",
    "replicas": "How many replicas does a fleet have?",
    "wanted_replicas": "How many would do, if they could be had at once?",
    "looks_age_seconds": "How long ago were the fleets measured?",
    "writes_total": "How often was a fleet scaled?",
    "refused_writes_total": "How often not, since another had done so or leads by now?",
    "faults_total": "How many rounds were cut short?",
}
"""What is exported, without the prefix; help texts."""
_ROUNDS_LATE = 8
"""So many rounds late, the process hangs."""
_ROUND_S = 30.0
"""What a round may take beside its interval: the planner computes."""


class StatusServer(Collector):
    """Serves /health/live, /health/ready, /metrics and /decisions."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._started_s = controller.clock()
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        self._runner: web.AppRunner | None = None

    async def start(self, host: str, port: int) -> str:
        """Listen; returns host:port as really bound."""
        app = web.Application()
        app.router.add_get("/health/live", self._live)
        app.router.add_get("/health/ready", self._ready)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/decisions", self._decisions)
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False)
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port)
        await site.start()
        bound = self._runner.addresses[0]
        return f"{bound[0]}:{bound[1]}"

    async def stop(self) -> None:
        """Stop listening."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _live(self, request: web.Request) -> web.Response:
        """Forward progress: a round ends, whatever comes of it."""
        controller = self._controller
        since_s = controller.clock() - max(self._started_s, controller.status.looked_s)
        most_s = _ROUNDS_LATE * controller.config.interval_s + _ROUND_S
        if since_s > most_s:
            return web.Response(status=503, text=f"no round has ended for {since_s:.0f} s\n")
        return web.Response(text="ok\n")

    async def _ready(self, request: web.Request) -> web.Response:
        """Those that do not lead stand by, which is all they should do."""
        if self._controller.status.looked_s == 0.0:
            return web.Response(status=503, text="starting\n")
        return web.Response(text="ok\n")

    async def _metrics(self, request: web.Request) -> web.Response:
        text = generate_latest(self._registry)
        return web.Response(body=text, headers={"content-type": CONTENT_TYPE_PLAIN_0_0_4})

    async def _decisions(self, request: web.Request) -> web.Response:
        status = self._controller.status
        decided = [
            {
                "fleet": decision.fleet.value,
                "current": decision.current,
                "wanted": decision.wanted,
                "replicas": decision.replicas,
                "reasons": decision.reasons,
            }
            for decision in status.decisions
        ]
        said = {
            "leads": self._controller.election.leads,
            "leader": self._controller.election.leader,
            "dry_run": self._controller.config.dry_run,
            "decisions": decided,
        }
        return web.Response(text=json.dumps(said, indent=2) + "\n", content_type="application/json")

    def collect(self) -> list[Metric]:
        """Read everything."""
        controller = self._controller
        status = controller.status
        metrics: list[Metric] = [_gauge("leads", float(controller.election.leads))]
        for name, field in (("replicas", "replicas"), ("wanted_replicas", "wanted")):
            family = GaugeMetricFamily(PREFIX + name, NAMES[name], labels=("fleet",))
            for decision in status.decisions:
                family.add_metric((decision.fleet.value,), getattr(decision, field))
            metrics.append(family)
        if status.signals is not None:
            age_s = controller.clock() - status.signals.measured_s
            metrics.append(_gauge("looks_age_seconds", age_s))
        for name in ("writes", "refused_writes", "faults"):
            text = NAMES[f"{name}_total"]
            metrics.append(CounterMetricFamily(PREFIX + name, text, value=getattr(status, name)))
        return metrics


def _gauge(name: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, NAMES[name], value=value)
