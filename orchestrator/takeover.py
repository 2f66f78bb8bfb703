"""Takes a generation over from another orchestrator, or from an earlier run of this one."""

from __future__ import annotations

import logging

from orchestrator.canonical import job_of_request, request_from_bytes
from orchestrator.driver import Driver
from orchestrator.fleet import Fleet
from orchestrator.generation import Generation
from orchestrator.jobs import Job
from orchestrator.journaling import new_holder
from orchestrator.resuming import ResumeRequest, check_points, restore
from outrider.domain import NOBODY, Origin
from outrider.errors import Mismatch, Unavailable, UnknownGeneration
from outrider.journal import LeaseStore

_log = logging.getLogger(__name__)


class Takeover:
    """Resumes generations for all doors."""

    def __init__(self, driver: Driver, fleet: Fleet, store: LeaseStore | None) -> None:
        """Without a store, nothing can be resumed."""
        self._driver, self._fleet, self._store = driver, fleet, store

    async def resume(
        self, request: ResumeRequest, origin: Origin = NOBODY
    ) -> tuple[Job, Generation]:
        """Continue a generation; its old run, wherever it is, says nothing more.

        Raises `UnknownGeneration`, `InvalidRequest` for what was never said, `Mismatch` for what
        cannot be continued, `StaleEpoch` if somebody else was quicker, `Exhausted`, `Unavailable`.
        """
        if self._store is None:
            raise Mismatch("this orchestrator keeps no journal, so nothing can be resumed")
        journaled = await self._store.read(request.generation)
        canonical = None if journaled is None else request_from_bytes(journaled.request)
        # Whose it is, is nobody else's business.
        if journaled is None or canonical is None or canonical.tenant != request.tenant:
            raise UnknownGeneration(
                "generation_id",
                f"no generation {request.generation!r} is journaled; it may have expired",
            )
        info = self._fleet.model_of(canonical.model_fingerprint)
        if info is None:
            raise Unavailable(
                f"no verifier is ready that continues {canonical.model} exactly as it was begun "
                f"(fingerprint {canonical.model_fingerprint[:12]}); try again in a moment"
            )
        job = job_of_request(canonical, info)
        check_points(request, journaled, len(job.choices))
        self._driver.check_room(len(job.choices))
        holder = new_holder()
        journaled = await self._store.take_over(journaled, holder)
        restored = restore(request, journaled, job)
        _log.info("taking over generation %s", request.generation)
        generation = self._driver.resume(
            job,
            restored,
            journaled,
            holder=holder,
            prompt_logprobs_known=request.prompt_logprobs_known,
            origin=origin,
        )
        return job, generation
