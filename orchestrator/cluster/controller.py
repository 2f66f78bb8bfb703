"""Sizes the fleets: looks, decides, and writes the scale of each, as long as it leads."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from orchestrator.cluster.api import (
    Cluster,
    ClusterUnavailable,
    Conflict,
    Endpoints,
    Scale,
    Workload,
)
from orchestrator.cluster.discovery import COMPONENT
from orchestrator.cluster.election import Election
from orchestrator.cluster.scraping import Scraper
from orchestrator.scaling.policy import Decision, Memory, PolicyConfig, decide
from orchestrator.scaling.reading import Scrape, read_signals
from orchestrator.scaling.signals import FleetName, Signals
from orchestrator.scaling.worth import Planner, ask_planner
from outrider.errors import ConfigError

HTTP_PORT = "http"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ControllerConfig:
    """What is sized, and how often."""

    policy: PolicyConfig
    workloads: Mapping[FleetName, Workload]
    """Of the fleets that are to be sized."""
    interval_s: float = 15.0
    dry_run: bool = False
    """Say what would be done, and do nothing."""


@dataclass(slots=True)
class Status:
    """How the controller stands, for people and probes."""

    looked_s: float = 0.0
    """When a round ended last, whatever came of it."""
    decisions: tuple[Decision, ...] = ()
    signals: Signals | None = None
    writes: int = 0
    refused_writes: int = 0
    """Since somebody else had changed the scale, or this replica no longer led."""
    faults: int = 0
    """Rounds that the API server or the orchestrators cut short."""


@dataclass(slots=True)
class Controller:
    """One replica of the controller; only the one that leads writes."""

    cluster: Cluster
    election: Election
    scraper: Scraper
    config: ControllerConfig
    planner: Planner = ask_planner
    clock: Callable[[], float] = time.monotonic
    status: Status = field(default_factory=Status)
    _addresses: tuple[str, ...] = ()
    """Of orchestrators' HTTP doors."""
    _memory: Memory = field(default_factory=Memory)
    _before: dict[str, Scrape] = field(default_factory=dict)
    _signals: Signals | None = None
    _said: dict[FleetName, str] = field(default_factory=dict)

    def found(self, endpoints: list[Endpoints]) -> None:
        """Take note of where orchestrators are; an `EndpointWatch` reports here."""
        addresses = {
            address
            for each in endpoints
            if each.labels.get(COMPONENT) == "orchestrator"
            for address in each.addresses(HTTP_PORT)
        }
        self._addresses = tuple(sorted(addresses))

    async def run(self) -> None:
        """Look and decide, for ever."""
        while True:
            started_s = self.clock()
            try:
                await self.round()
            except (ClusterUnavailable, ConfigError) as error:
                self.status.faults += 1
                _log.warning("nothing is changed: %s", error)
            except Exception:
                self.status.faults += 1
                _log.exception("a round failed; nothing is changed")
            self.status.looked_s = self.clock()
            await asyncio.sleep(max(0.0, self.config.interval_s - (self.clock() - started_s)))

    async def round(self) -> None:
        """Look once, and do what is to be done.

        Raises `ClusterUnavailable` and `ConfigError`.
        """
        if not self.election.leads and not self.config.dry_run:
            # What another leader does meanwhile makes what is remembered here wrong.
            self._memory, self._before, self._signals = Memory(), {}, None
            return
        await self._look()
        scales = {
            fleet: await self.cluster.read_scale(workload)
            for fleet, workload in self.config.workloads.items()
        }
        current = {fleet: scale.replicas for fleet, scale in scales.items()}
        # The planner computes for seconds: not on the loop, which renews the lease.
        decisions, memory = await asyncio.to_thread(
            decide,
            self.config.policy,
            self._memory,
            current,
            self._signals,
            self.clock(),
            self.planner,
        )
        self._memory = memory
        self.status.decisions, self.status.signals = decisions, self._signals
        for decision in decisions:
            self._explain(decision)
            if decision.changes and not self.config.dry_run:
                await self._write(decision, scales[decision.fleet])

    async def _look(self) -> None:
        addresses = self._addresses
        scrapes = await self.scraper.scrape(addresses)
        if not scrapes:
            # The last look stays, and grows stale.
            return
        missing = len(addresses) - len(scrapes)
        self._signals = read_signals(scrapes, self._before, missing=missing, now_s=self.clock())
        self._before = {scrape.instance: scrape for scrape in scrapes}

    async def _write(self, decision: Decision, scale: Scale) -> None:
        workload = self.config.workloads[decision.fleet]
        # Deciding has taken time; the lease may be another's by now.
        if not self.election.leads:
            self.status.refused_writes += 1
            _log.warning("%s is not scaled: no longer leading", workload)
            return
        try:
            await self.cluster.write_scale(workload, decision.replicas, scale.version)
        except Conflict:
            self.status.refused_writes += 1
            _log.info("%s was changed meanwhile; looking again", workload)
            return
        self.status.writes += 1

    def _explain(self, decision: Decision) -> None:
        said = str(decision)
        mode = "would scale " if self.config.dry_run and decision.changes else ""
        if decision.changes:
            _log.info("%s%s", mode, said)
        elif self._said.get(decision.fleet) != said:
            _log.debug("%s", said)
        self._said[decision.fleet] = said
