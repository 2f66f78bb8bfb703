"""Who leads: one of several replicas, by a Lease. As client-go's leader election.

The Lease is written only in the version that was read, so of two that try at once one is refused.
Clocks are not compared: a Lease has run out when it has not changed for its duration on one's own
clock. A leader counts from before its last successful write was sent, and stops well before the
others could begin.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from orchestrator.cluster.api import Cluster, ClusterUnavailable, Conflict, LeaseRecord
from outrider.errors import ConfigError

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ElectionTimes:
    """As client-go has them. Raises `ConfigError`."""

    lease_s: int = 15
    """After so long without renewal others may take over."""
    renew_s: float = 10.0
    """A leader that could not renew for so long stops."""
    retry_s: float = 2.0

    def __post_init__(self) -> None:
        if not 0.0 < self.retry_s < self.renew_s < self.lease_s:
            raise ConfigError(
                "retry_s, renew_s, lease_s: must rise, got "
                f"{self.retry_s:g}, {self.renew_s:g}, {self.lease_s}"
            )


class Election:
    """One candidate."""

    def __init__(
        self,
        cluster: Cluster,
        lease: str,
        identity: str,
        times: ElectionTimes,
        clock: Callable[[], float],
    ) -> None:
        """`identity` must be another replica's never; `clock` is monotonic, in seconds."""
        self._cluster, self._lease, self._identity = cluster, lease, identity
        self._times, self._clock = times, clock
        self._seen: LeaseRecord | None = None
        self._seen_s = 0.0
        """When the Lease was first seen as it is."""
        self._leads_until_s = float("-inf")
        self._led = False

    @property
    def leads(self) -> bool:
        """Whether this is the leader right now. Ask just before each write."""
        return self._clock() < self._leads_until_s

    @property
    def leader(self) -> str:
        """Who was seen to lead last; empty if nobody."""
        return self._seen.holder if self._seen is not None else ""

    async def run(self) -> None:
        """Try to lead and to go on leading, for ever."""
        while True:
            try:
                await self.attempt()
            except Exception:
                # A defect must not leave the fleets without a leader for ever.
                _log.exception("leader election failed; trying again")
            await asyncio.sleep(self._times.retry_s)

    async def attempt(self) -> None:
        """Take the Lease if it is free, renew it if it is ours."""
        asked_s = self._clock()
        try:
            record = await self._cluster.read_lease(self._lease)
            self._observe(record)
            if record is None or self._may_take(record):
                await self._write(record, asked_s)
        except Conflict as error:
            # Somebody was quicker: whoever it is, it is not us.
            _log.info("lease %s: %s", self._lease, error)
            self._leads_until_s = float("-inf")
        except ClusterUnavailable as error:
            _log.warning("lease %s: %s", self._lease, error)
        self._tell()

    async def release(self) -> None:
        """Give the Lease back, so that another may lead at once."""
        if not self.leads or self._seen is None:
            return
        self._leads_until_s = float("-inf")
        free = replace(self._seen, holder="", duration_s=1)
        try:
            await self._cluster.write_lease(self._lease, free, _now())
        except (Conflict, ClusterUnavailable) as error:
            _log.info("lease %s is left to run out: %s", self._lease, error)

    def _observe(self, record: LeaseRecord | None) -> None:
        if record != self._seen:
            self._seen, self._seen_s = record, self._clock()
        if record is not None and record.holder != self._identity:
            self._leads_until_s = float("-inf")

    def _may_take(self, record: LeaseRecord) -> bool:
        if record.holder in ("", self._identity):
            return True
        return self._clock() - self._seen_s > max(record.duration_s, self._times.lease_s)

    async def _write(self, record: LeaseRecord | None, asked_s: float) -> None:
        changes_hands = record is None or record.holder != self._identity
        wanted = LeaseRecord(
            holder=self._identity,
            duration_s=self._times.lease_s,
            renewed_at="",
            transitions=(record.transitions if record else 0) + changes_hands,
            version=record.version if record else "",
        )
        self._seen = await self._cluster.write_lease(self._lease, wanted, _now())
        self._seen_s = self._clock()
        # From before it was asked for: an answer may have been long under way.
        self._leads_until_s = asked_s + self._times.renew_s

    def _tell(self) -> None:
        leads = self.leads
        if leads is not self._led:
            self._led = leads
            _log.info("%s", "leading" if leads else "not leading")


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
