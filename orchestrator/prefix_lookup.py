"""Asks Redis who holds the beginning of a text, and never waits for long.

A lookup that is late is not cut off, which would cost its connection: it goes on, unheeded, and
until one has come in time again, nobody waits.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence

from orchestrator.meters import LOOKUP_S, Histogram
from outrider.errors import RegistryUnavailable
from outrider.registry import KvIndex

IN_FLIGHT_MAX = 32
TRIAL_INTERVAL_S = 0.1
"""How often a slow Redis is tried."""
WARNING_INTERVAL_S = 60.0
"""Who is slow now and then need not be told of each time."""

_log = logging.getLogger(__name__)


class PrefixLookup:
    """Lookups with a deadline."""

    def __init__(self, index: KvIndex, deadline_s: float) -> None:
        self._index = index
        self._deadline_s = deadline_s
        self._tasks: set[asyncio.Task[Mapping[str, int]]] = set()
        self._tried_s = 0.0
        self._warn_s = 0.0
        self.slow = False
        """The last lookup was late, or failed."""
        self.asked = 0
        self.late = 0
        """Of those asked: came too late, or not at all."""
        self.skipped = 0
        """Lookups that were not waited for, since Redis was slow."""
        self.took_s = Histogram(LOOKUP_S)
        """Of those that were answered, in time or not."""

    async def holders(self, hashes: Sequence[bytes]) -> Mapping[str, int] | None:
        """Return holders as `KvIndex.holders` does; None: not known in time. Never raises."""
        loop = asyncio.get_running_loop()
        trial = self.slow
        due = loop.time() - self._tried_s >= TRIAL_INTERVAL_S
        if len(self._tasks) >= IN_FLIGHT_MAX or (trial and (self._tasks or not due)):
            self.skipped += 1
            return None
        started_s = self._tried_s = loop.time()
        self.asked += 1
        task = asyncio.create_task(self._index.holders(hashes))
        self._tasks.add(task)
        task.add_done_callback(lambda task: self._ended(task, loop.time() - started_s))
        if trial:
            return None
        done, _ = await asyncio.wait({task}, timeout=self._deadline_s)
        if not done:
            self._set_slow("is slow")
            return None
        return None if task.cancelled() or task.exception() else task.result()

    async def close(self) -> None:
        """Cut off what is under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _ended(self, task: asyncio.Task[Mapping[str, int]], duration_s: float) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            self.took_s.observe(duration_s)
        if error is not None or duration_s > self._deadline_s:
            self.late += 1
            self._set_slow("is slow" if error is None else f"does not answer: {error}")
            if error is not None and not isinstance(error, RegistryUnavailable):
                _log.error("a lookup failed", exc_info=error)
        elif self.slow:
            self.slow = False
            _log.debug("the KV index answers again")

    def _set_slow(self, reason: str) -> None:
        self.slow = True
        now_s = asyncio.get_running_loop().time()
        if now_s >= self._warn_s:
            self._warn_s = now_s + WARNING_INTERVAL_S
            _log.warning("placement goes on without the KV index: Redis %s", reason)
