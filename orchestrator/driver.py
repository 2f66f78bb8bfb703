"""Carries out what sessions decide: the only owner of live sessions, on the event loop.

Worker messages come in as batches (one a verify step), are taken apart by session, stepped
through the state machine, and what results is regrouped by destination. There is no task, lock
or await for a token or a session on this path, and no Redis.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
import time
import uuid
from collections.abc import Mapping
from dataclasses import replace

from orchestrator.balancing import Balancer
from orchestrator.canonical import request_to_bytes
from orchestrator.config import DriverConfig
from orchestrator.dispatch import Dispatch
from orchestrator.engagement import Engagement, Rotation
from orchestrator.fleet import Fleet, Listener
from orchestrator.generation import (
    Delivery,
    Ending,
    Generation,
    Output,
    PredictionUse,
    Running,
)
from orchestrator.jobs import Job
from orchestrator.journaling import JournalWriter, Record
from orchestrator.messages import (
    AbortOnVerifier,
    AskRepeat,
    AttachDrafters,
    BindDrafter,
    ClientGone,
    Command,
    Committed,
    Deliver,
    DeliverPrompt,
    DrafterAttached,
    DrafterAvailable,
    DrafterGap,
    DrafterGone,
    DrafterUseless,
    Event,
    Fail,
    Finish,
    Forget,
    MovePays,
    NotPlaced,
    Opened,
    OpenOnVerifier,
    Placed,
    PlaceVerifier,
    PromptScored,
    Refused,
    RelayCommit,
    Silence,
    UnbindDrafter,
    VerifierLost,
)
from orchestrator.meters import Meters
from orchestrator.placement import (
    Attachment,
    WorkerView,
    credited,
    kind_of,
    primaries,
    surplus,
)
from orchestrator.placing import Placer
from orchestrator.prediction import Follower
from orchestrator.prefix_memory import Prefix
from orchestrator.reporting import Reporter
from orchestrator.resuming import Restored
from orchestrator.session import Session, State
from orchestrator.text import TextStream
from orchestrator.tracing import SessionTrace
from orchestrator.waitlist import Waitlist
from orchestrator.workers import (
    NO_STEP,
    DrafterBatch,
    DrafterLink,
    LinkState,
    VerifierBatch,
    VerifierLink,
)
from outrider.domain import (
    NOBODY,
    TARGET_SOURCE,
    Origin,
    PullOutcome,
    PullReport,
    Rejection,
    RejectionCode,
    SpeculationCounters,
)
from outrider.errors import (
    Exhausted,
    InternalError,
    InvalidRequest,
    OutriderError,
    StaleEpoch,
    Unavailable,
)
from outrider.journal import Journaled
from outrider.kv_blocks import shareable_blocks
from outrider.serving.telemetry import Tracing

REVIEWED_MAX = 1_024
"""Sessions whose drafters are reviewed in one sweep, about."""
SWEEP_SLICE = 64
"""Sessions looked at in one go."""
UNREAD_S = 1.0
"""Output that nobody has read for so long after its end counts as a session."""
STALL_S = 1.0
"""A sweep that is later than that means that this process stood still."""
OUTCOMES: Mapping[type, str] = {
    Exhausted: "exhausted",
    Unavailable: "unavailable",
    InvalidRequest: "invalid",
    StaleEpoch: "superseded",
    InternalError: "internal",
}
"""How requests that fail are counted."""

_log = logging.getLogger(__name__)


class Driver:
    """Owner of all sessions of this orchestrator."""

    def __init__(
        self,
        fleet: Fleet,
        config: DriverConfig,
        placer: Placer | None = None,
        journal: JournalWriter | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        """Without a `placer`, sessions are placed by what this orchestrator knows itself.

        Without a `journal` nothing can be resumed, without `tracing` nothing is traced.
        """
        self._reporter = Reporter(tracing)
        self._fleet = fleet
        self.placer = placer or Placer(fleet)
        self._config = config
        self._journal = journal
        self._running: dict[int, Running] = {}
        self._dispatch = Dispatch(
            fleet, config.budget_limits, config.tenant_weights, own_guesses=config.own_guesses
        )
        self._balancer = Balancer(fleet, lambda running: self.placer.held(running.prefix))
        self._rotation: Rotation = Rotation()
        self._unread: dict[Generation, float] = {}
        """Generations that have ended and not been left by whoever reads them, and since when."""
        self._homeless: set[Running] = set()
        """Sessions that wait for a verifier to take them over."""
        self._waitlist = Waitlist()
        self._lasts_s = 0.0
        """How long sessions take of late."""
        self._draining = False
        self.meters = Meters()
        self._idle: asyncio.Event | None = None
        """Set when a drain has nothing left to wait for."""
        self._sweeper: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to listen to the fleet."""
        self._fleet.start(
            Listener(
                verifier_changed=self._verifier_changed,
                verifier_batch=self._verifier_batch,
                drafter_changed=self._drafter_changed,
                drafter_batch=self._drafter_batch,
            )
        )
        self._sweeper = asyncio.create_task(self._sweep())

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new and wait for what is under way."""
        self._draining = True
        if self._running:
            self._idle = asyncio.Event()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), timeout_s)

    def hand_over(self) -> None:
        """End what is left, so that its clients resume it elsewhere."""
        for running in list(self._running.values()):
            text = "the orchestrator is stopping; another one can go on with the generation"
            self._fail(running.generation, Unavailable(text))

    async def close(self) -> None:
        """End everything."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        for running in list(self._running.values()):
            self._fail(running.generation, Unavailable("the orchestrator is stopping; try again"))
        await self._fleet.close()

    @property
    def draining(self) -> bool:
        """True once nothing new is taken."""
        return self._draining

    @property
    def sessions_max(self) -> int:
        """Sessions that are taken at most."""
        return self._config.sessions_max

    @property
    def load(self) -> int:
        """Sessions under way; each choice of a generation is one."""
        return len(self._running)

    @property
    def unread(self) -> int:
        """Generations that have ended and whose output waits for a client to read it."""
        return len(self._unread)

    def counters(self) -> SpeculationCounters:
        """What speculation did so far, in all sessions; reads all of them."""
        total = self.meters.ended
        for running in self._running.values():
            total = total.plus(running.session.counters)
        return total

    # --- requests ---

    def generate(
        self, job: Job, prefix: Prefix | None = None, origin: Origin = NOBODY
    ) -> Generation:
        """Start a generation. Raises `Exhausted` or `Unavailable`.

        `prefix` is what `placer.find` found out about the job's prompt.
        """
        self.check_room(len(job.choices))
        sessions = self._sessions(job)
        name = f"gen-{uuid.uuid4().hex}"
        generation = self._generation(name, job, sessions, prefix, origin)
        if self._journal is not None and job.resumable:
            request = request_to_bytes(job, [session.spec.session for session in sessions])
            generation.record = self._record(self._journal, generation, request)
            for choice in range(len(sessions)):
                generation.record.note(choice, epoch=1)
        self._begin(generation)
        return generation

    def check_room(self, wanted: int) -> None:
        """Raise `Exhausted` or `Unavailable` if so many sessions cannot be begun now."""
        if self._draining:
            self.meters.requests["unavailable"] += 1
            raise Unavailable("the orchestrator is draining; ask another replica")
        held = len(self._running)
        if held + len(self._unread) + wanted > self._config.sessions_max:
            held += self._unread_choices()
        if held + wanted > self._config.sessions_max:
            self.meters.requests["exhausted"] += 1
            raise Exhausted(
                f"the orchestrator has {held} of its {self._config.sessions_max} "
                f"sessions and was asked for {wanted} more; try again later",
                self._room_in_s(),
            )

    def _unread_choices(self) -> int:
        """Choices whose output is complete and held for clients that do not read it.

        Without them, clients that read slowly could have any number of outputs kept for them.
        """
        before_s = time.monotonic() - UNREAD_S
        return sum(
            len(generation.choices)
            for generation, ended_s in self._unread.items()
            if ended_s < before_s
        )

    def _room_in_s(self) -> float:
        """When there is probably room for one more who was refused, if all goes on as of late."""
        return self._waitlist.wait_s(time.monotonic(), self._lasts_s / max(1, len(self._running)))

    def resume(
        self,
        job: Job,
        restored: tuple[Restored, ...],
        journaled: Journaled,
        *,
        holder: bytes,
        prompt_logprobs_known: bool,
        origin: Origin = NOBODY,
    ) -> Generation:
        """Go on with a generation that was taken over; `job` numbers its sessions.

        What is journaled and the client lacks is replayed, the rest is decided. Raises `Exhausted`
        or `Unavailable`.
        """
        self.check_room(len(restored))
        sessions = self._sessions(job)
        generation = self._generation(journaled.generation, job, sessions, None, origin)
        generation.prompt_wanted = job.prompt_logprobs and not prompt_logprobs_known
        if self._journal is not None:
            record = self._record(self._journal, generation, journaled.request, holder=holder)
            record.restore(journaled.entries)
            generation.record = record
        for running, choice in zip(generation.choices, restored, strict=True):
            self._restore(running, choice, prompt_logprobs_known=prompt_logprobs_known)
        self._begin(generation)
        return generation

    def _restore(
        self, running: Running, restored: Restored, *, prompt_logprobs_known: bool
    ) -> None:
        """Bring a session to where its journal ends, and tell the client what it lacks."""
        session, point = running.session, restored.point
        stream = session.text
        known = stream.push(restored.tokens[: point.offset]).text
        text = known + stream.push(restored.tokens[point.offset :]).text
        if restored.finish is not None:
            text += stream.finish().text
        spec = replace(restored.spec, origin=session.spec.origin)
        session.restore(spec, restored.tokens, ended=restored.finish is not None)
        session.prompt_delivered = prompt_logprobs_known
        text = text[len(known) if point.characters is None else point.characters :]
        ids = restored.tokens[point.offset :]
        if not point.finished and (text or ids):
            deliver = Deliver(text, ids, (TARGET_SOURCE,) * len(ids), restored.logprobs)
            running.generation.replay(Delivery(running.choice, deliver))
        if restored.finish is not None:
            finish = Finish(restored.finish, len(restored.tokens), session.counters)
            if point.finished:
                running.generation.finished += 1
            else:
                running.generation.replay(Ending(running.choice, finish, 0.0, 0.0))

    def _record(
        self,
        journal: JournalWriter,
        generation: Generation,
        request: bytes,
        holder: bytes | None = None,
    ) -> Record[Output]:
        return journal.record(
            generation.id,
            request,
            deliver=generation.put,
            lost=lambda error: self._fail(generation, error),
            holder=holder,
        )

    def _generation(
        self,
        name: str,
        job: Job,
        sessions: list[Session],
        prefix: Prefix | None,
        origin: Origin,
    ) -> Generation:
        prefix = prefix or self.placer.prefix(job)
        now_s = time.monotonic()
        generation = Generation(
            job.info, now_s, prompt_wanted=job.prompt_logprobs, id=name, tenant=job.tenant
        )
        generation.choices += [
            Running(
                generation,
                choice,
                session,
                heard_s=now_s,
                progress_s=now_s,
                prefix=prefix,
                trace=SessionTrace(now_s) if job.trace else None,
                follower=Follower(job.prompt, job.prediction) if job.prediction else None,
            )
            for choice, session in enumerate(sessions)
        ]
        for running in generation.choices:
            self._reporter.begun(running, origin)
        return generation

    def _begin(self, generation: Generation) -> None:
        unfinished = list(generation.unfinished())
        if unfinished:
            self.meters.prompt_tokens += len(unfinished[0].session.spec.prompt)
        self._running.update({running.number: running for running in unfinished})
        for running in unfinished:
            # If one cannot be placed, all have ended: to them nothing happens any more.
            self._perform(running, running.session.start())
        if generation.finished == len(generation.choices):
            generation.close()

    def _sessions(self, job: Job) -> list[Session]:
        codec = self._fleet.codec(job.info)
        drafters_wanted = self._config.drafters_per_session if job.speculation else 0
        return [
            Session(
                # A session that is taken over keeps its number.
                replace(spec, session=spec.session or secrets.randbits(64)),
                TextStream(codec, job.stop),
                drafters_wanted=drafters_wanted,
            )
            for spec in job.choices
        ]

    def abandon(self, generation: Generation) -> None:
        """Free everything that a generation holds: nobody reads it any more, or has read all."""
        generation.left = True
        self._unread.pop(generation, None)
        self._end(generation)

    def _end(self, generation: Generation) -> None:
        generation.forget()
        unfinished = list(generation.unfinished())
        if unfinished and not generation.mailbox.closed:
            self.meters.requests["abandoned"] += 1
        for running in unfinished:
            self._step(running, ClientGone())

    # --- what workers say ---

    def _verifier_batch(self, link: VerifierLink, batch: VerifierBatch) -> None:
        now_s = time.monotonic()
        if batch.step is not None:
            link.took_step(batch.step, now_s)
            self.meters.step_s.observe(batch.step.duration_s)
            self._balancer.took_step(link, batch.step)
        self._opened(link, batch.opened, now_s)
        self._refused(link, batch.rejections, now_s)
        if batch.commits and link.breaker.failures:
            link.breaker.worked()
        if batch.kv_pulls:
            self._pulled(link, batch.kv_pulls, now_s)
        for piece in batch.prompt_logprobs:
            running = self._on(link, piece.session)
            if running is not None:
                running.heard_s = running.progress_s = now_s
                self._step(running, PromptScored(piece))
        for number, commit_bytes, commit, report in batch.commits:
            running = self._on(link, number)
            if running is None:
                continue
            self._count(running, now_s, len(commit.tokens))
            running.heard(now_s, commit_bytes, commit, report.sources)
            running.candidates = batch.candidates.get(number, b"")
            if running.trace is not None:
                offset_s = link.clock_offset_s
                running.trace.committed(now_s, link.address, offset_s, batch.step, commit, report)
            if running.prefill_began_s is not None and commit.tokens:
                self._balancer.committed(running, link, now_s)
            self._step(running, Committed(commit, report))
            if running.follower is not None and running.session.state is State.DECODING:
                self._dispatch.predict(running)

    def _pulled(self, link: VerifierLink, pulls: list[PullReport], now_s: float) -> None:
        """Take note of what became of fetching KV from peers."""
        for pull in pulls:
            running = self._on(link, pull.session)
            if running is None or running.session.epoch != pull.epoch:
                continue
            running.heard_s = running.progress_s = now_s
            self.meters.pulled(pull)
            if pull.outcome is PullOutcome.DECLINED:
                continue
            # How long it takes from here to the first commit says nothing of prefill.
            running.prefill_began_s = None
            if running.trace is not None and pull.outcome is not None:
                outcome, blocks = pull.outcome.value, pull.blocks
                running.trace.decided(now_s, "KV pulled", outcome=outcome, blocks=blocks)

    def _opened(self, link: VerifierLink, opened: list[tuple[int, int]], now_s: float) -> None:
        for number, epoch in opened:
            running = self._on(link, number)
            if running is not None:
                running.heard_s = running.progress_s = now_s
                self.meters.queued_s.observe(now_s - running.generation.started_s)
                self._reporter.opened(running, now_s)
                running.prefill_began_s = now_s
                self._step(running, Opened(epoch))

    def _count(self, running: Running, now_s: float, tokens: int) -> None:
        session = running.session
        if tokens and not session.bindings and running.follower is None:
            self.meters.fallback_rounds["unbound" if session.drafters_wanted else "off"] += 1
        if running.first_token_s is not None and tokens:
            self.meters.committed(tokens, now_s - running.progress_s)
        elif tokens:
            self.meters.first_token_s.observe(now_s - running.generation.started_s)
            self.meters.accepted(tokens - 1)

    def _refused(self, link: VerifierLink, rejections: list[Rejection], now_s: float) -> None:
        for rejection in rejections:
            running = self._on(link, rejection.session)
            if running is not None:
                if rejection.code is RejectionCode.INTERNAL:
                    link.breaker.failed(now_s)
                self._step(running, Refused(rejection))

    def _drafter_batch(self, link: DrafterLink, batch: DrafterBatch) -> None:
        if batch.step is not None:
            link.grow = batch.step
        if batch.drafts and link.breaker.failures:
            link.breaker.worked()
        # The hot path: looked up, checked and passed on, unread.
        for number, binding, draft in batch.drafts:
            bound = self._bound(link, number, binding)
            if bound is None:
                continue
            verifier = self._fleet.verifiers.get(bound.session.verifier or "")
            if verifier is not None:
                verifier.offer(number, link.source, draft)
                if bound.trace is not None:
                    now_s, offset_s = time.monotonic(), link.clock_offset_s
                    bound.trace.drafted(now_s, link.address, offset_s, batch.step, len(draft))
        for rejection in batch.rejections:
            running = self._bound(link, rejection.session, rejection.binding)
            if running is not None:
                named = {"request_id": running.session.spec.origin.request_id}
                _log.warning("drafter %s: %s", link.address, rejection.message, extra=named)
                link.sessions.discard(rejection.session)
                link.spares.discard(rejection.session)
                self.meters.migrations["drafter", "refused"] += 1
                self._step(running, DrafterGone(rejection.binding, refused=True))
        for resync in batch.resyncs:
            running = self._bound(link, resync.session, resync.binding)
            if running is not None:
                gap = DrafterGap(resync.binding, resync.epoch, resync.have_length)
                self._step(running, gap)

    def _verifier_changed(self, link: VerifierLink) -> None:
        if link.state is LinkState.READY:
            self._place_homeless()
        if link.state is not LinkState.LOST:
            return
        if link.sessions:
            link.breaker.failed(time.monotonic())
        link.step = NO_STEP
        for number in list(link.sessions):
            running = self._running.get(number)
            if running is not None:
                self._step(running, VerifierLost(link.reason))
        link.sessions.clear()

    def _drafter_changed(self, link: DrafterLink) -> None:
        if link.state is LinkState.READY and link.info is not None:
            refusal = self._fleet.refusal(link.info)
            if refusal is not None:
                _log.error("drafter %s is refused: %s", link.address, refusal)
            for running in list(self._running.values()):
                self._step(running, DrafterAvailable())
        if link.state is not LinkState.LOST:
            return
        numbers = list(link.sessions)
        link.sessions.clear()
        link.spares.clear()
        if numbers:
            link.breaker.failed(time.monotonic())
        for number in numbers:
            bereft = self._running.get(number)
            if bereft is None:
                continue
            bindings = bereft.session.bindings
            for binding in [b for b, address in bindings.items() if address == link.address]:
                self.meters.migrations["drafter", "unavailable"] += 1
                self._step(bereft, DrafterGone(binding))

    def _on(self, link: VerifierLink, number: int) -> Running | None:
        """The session, if this verifier is the one that serves it."""
        running = self._running.get(number)
        if running is None or running.session.verifier != link.address:
            return None
        return running

    def _bound(self, link: DrafterLink, number: int, binding: int) -> Running | None:
        """The session, if this drafter has that attachment to it."""
        running = self._running.get(number)
        if running is None or running.session.bindings.get(binding) != link.address:
            return None
        return running

    async def _sweep(self) -> None:
        """Notice what does not happen (lost commits, hung verifiers) and what does not pay."""
        interval_s = self._config.sweep_interval_s
        turn = 0
        while True:
            sessions = list(self._running.values())
            # Slices spread over the interval: no token waits for a look at all sessions.
            starts = range(0, max(1, len(sessions)), SWEEP_SLICE)
            # Looking at what drafters win takes longer than noticing silence: in turn, if many.
            turns = 1 + len(sessions) // REVIEWED_MAX
            turn = (turn + 1) % turns
            off: list[tuple[Running, Engagement]] = []
            for start in starts:
                asleep_s = time.monotonic()
                await asyncio.sleep(interval_s / len(starts))
                self._forgive(time.monotonic() - asleep_s - interval_s)
                some = sessions[start : start + SWEEP_SLICE]
                self._notice(some)
                off += self._review(some[turn::turns])
            for running in self._rotation.due(time.monotonic(), interval_s, off):
                self._step(running, DrafterAvailable())
            if self._config.rebalance:
                self._rebalance(time.monotonic())

    def _forgive(self, late_s: float) -> None:
        """Blame nobody for the time in which this process itself stood still."""
        if late_s > STALL_S:
            for running in self._running.values():
                running.progress_s += late_s
                running.heard_s += late_s

    def _rebalance(self, now_s: float) -> None:
        """Move a session to where it is served better, if one pays."""

        def on(address: str) -> list[Running]:
            numbers = self._fleet.verifiers[address].sessions
            return [self._running[number] for number in numbers if number in self._running]

        found = self._balancer.find(on, now_s)
        if found is None:
            return
        running, move = found
        running.moved_s = running.heard_s = running.progress_s = running.asked_s = now_s
        running.missing_tokens = move.missing_tokens
        # It holds all that was committed but for the last tokens.
        running.kv_peer = self._fleet.kv_peer(
            running.session.verifier or "", shareable_blocks(running.session.length)
        )
        self.meters.migrations["verifier", "rebalanced"] += 1
        if running.trace is not None:
            running.trace.decided(now_s, "moved", to=move.address, gain_s=move.gain_s)
        self._step(running, MovePays(move.address))

    def _notice(self, sessions: list[Running]) -> None:
        config = self._config
        self._place_homeless()
        patience_s = min(config.silence_s, config.verifier_timeout_s)
        now_s = time.monotonic()
        for running in sessions:
            if now_s - running.progress_s <= patience_s:
                continue
            link = self._fleet.verifiers.get(running.session.verifier or "")
            # A long prompt commits nothing for a while, but its verifier takes steps.
            stepped_s = link.stepped_s if link is not None else 0.0
            silent_s = now_s - max(running.progress_s, stepped_s)
            if silent_s > config.verifier_timeout_s:
                running.progress_s = running.heard_s = now_s
                if link is not None:
                    link.breaker.failed(now_s)
                self._step(running, VerifierLost(f"no progress for {silent_s:.0f} s"))
            elif now_s - running.heard_s > config.silence_s:
                running.heard_s = now_s
                self._step(running, Silence())

    def _review(self, sessions: list[Running]) -> list[tuple[Running, Engagement]]:
        """End attachments that win nothing and renew budgets; returns those without drafters."""
        now_s = time.monotonic()
        self._dispatch.measure_anew()
        self.placer.measure_anew()
        off: list[tuple[Running, Engagement]] = []
        for running in sessions:
            session = running.session
            if session.state is not State.DECODING or not session.drafters_wanted:
                continue
            if session.bindings:
                self._review_one(running, now_s)
            else:
                off.append((running, running.engagement))
        return off

    def _review_one(self, running: Running, now_s: float) -> None:
        verifier = self._fleet.verifiers.get(running.session.verifier or "")
        drafters = {
            binding: drafter
            for binding, address in running.session.bindings.items()
            if (drafter := self._fleet.drafters.get(address)) is not None
        }
        if verifier is None:
            return
        judgement = running.engagement.look(
            now_s,
            running.session.spell_counters,
            {binding: drafter.source for binding, drafter in drafters.items()},
            verifier.pace,
        )
        if judgement is not None:
            self._learn_gains(running, drafters)
            if running.engagement.trial and not judgement.useless:
                running.engagement.trial = False
                self._rotation.paid(now_s)
            for binding in judgement.useless:
                if running.trace is not None:
                    running.trace.decided(
                        now_s,
                        "drafter unbound",
                        drafter=drafters[binding].address,
                        speedup=judgement.speedup,
                        gain=judgement.gains[binding],
                    )
                del drafters[binding]
                self.meters.migrations["drafter", "useless"] += 1
                self._step(running, DrafterUseless(binding))
            if not running.session.bindings:
                running.engagement.ended(now_s)
        self._leave_outpaced(running, verifier, drafters)
        self._sort_out_spares(running, drafters, now_s)
        for binding, drafter in drafters.items():
            self._dispatch.renew_budget(running, binding, drafter)

    def _leave_outpaced(
        self, running: Running, verifier: VerifierLink, drafters: dict[int, DrafterLink]
    ) -> None:
        """Go on with another drafter of a kind where the present one is slow or far for it."""
        session, info, links = running.session, running.generation.info, self._fleet.drafters
        for binding, drafter in list(drafters.items()):
            # A spare may be slow: so it is found out when it is slow no longer.
            if running.number in drafter.spares or not self.placer.outpaced(verifier, drafter):
                continue
            kind = kind_of(drafter.info) if drafter.info is not None else None
            present = frozenset((*session.bindings.values(), *session.avoided))
            rest = {kind_of(d.info) for d in drafters.values() if d is not drafter and d.info}
            views = self.placer.drafters(running.prefix, verifier, info, 1, present, rest - {kind})
            others = [view for view in views if view.kind == kind]
            if not others or self.placer.outpaced(verifier, links[others[0].address]):
                continue
            if running.trace is not None:
                running.trace.decided(
                    time.monotonic(), "slow drafter left", drafter=drafter.address
                )
            del drafters[binding]
            self.meters.migrations["drafter", "outpaced"] += 1
            self._step(running, DrafterUseless(binding))
            self._bind(running, others[0])

    def _sort_out_spares(
        self, running: Running, drafters: dict[int, DrafterLink], now_s: float
    ) -> None:
        """Take note of what is a spare, and end attachments to spares that others need."""
        if len(drafters) == 1:
            for drafter in drafters.values():
                drafter.spares.discard(running.number)
            return
        attachments = self._attachments(running, drafters)
        chosen = primaries(attachments)
        for one in attachments:
            spares = drafters[one.binding].spares
            if chosen[one.kind].binding == one.binding:
                spares.discard(running.number)
            else:
                spares.add(running.number)
        for binding in surplus(attachments, chosen):
            drafter = drafters.pop(binding)
            if running.trace is not None:
                running.trace.decided(now_s, "spare drafter left", drafter=drafter.address)
            self.meters.migrations["drafter", "spare"] += 1
            self._step(running, DrafterUseless(binding))

    def _learn_gains(self, running: Running, drafters: Mapping[int, DrafterLink]) -> None:
        attachments = self._attachments(running, drafters)
        chosen = primaries(attachments)
        relied_on = {one.binding for one in chosen.values()}
        for binding, gain in credited(attachments, chosen).items():
            drafter = drafters[binding]
            # Of a spare it is known only that it is no worse.
            known = math.inf if drafter.gain is None else drafter.gain
            if binding in relied_on or gain > known:
                drafter.learn_gain(gain)

    def _attachments(
        self, running: Running, drafters: Mapping[int, DrafterLink]
    ) -> list[Attachment]:
        gains = running.engagement.gains
        return [
            Attachment(
                binding,
                kind_of(drafter.info),
                self._fleet.relied_on_by(drafter, but=running.number),
                gains.get(binding, 0.0),
            )
            for binding, drafter in drafters.items()
            if drafter.info is not None
        ]

    # --- what sessions command ---

    def _step(self, running: Running, event: Event) -> None:
        self._perform(running, running.session.step(event))

    def _perform(self, running: Running, commands: list[Command]) -> None:
        for command in commands:
            self._perform_one(running, command)

    def _perform_one(self, running: Running, command: Command) -> None:
        match command:
            case Deliver():
                running.generation.say(Delivery(running.choice, command))
            case RelayCommit():
                self._dispatch.relay(running, command)
            case DeliverPrompt() | Finish():
                self._tell_client(running, command)
            case AttachDrafters(count, exclude):
                self._attach(running, count, exclude)
            case BindDrafter():
                self._dispatch.bind(running, command)
            case UnbindDrafter():
                self._dispatch.unbind(running, command)
            case PlaceVerifier(exclude):
                self._place(running, exclude)
            case OpenOnVerifier() | AbortOnVerifier() | AskRepeat():
                self._dispatch.to_verifier(running, command)
            case Fail(error):
                self._fail(running.generation, error)
            case Forget():
                self._forget(running)

    def _tell_client(self, running: Running, command: DeliverPrompt | Finish) -> None:
        generation = running.generation
        match command:
            case DeliverPrompt():
                generation.say(command)
            case Finish():
                total_s = time.monotonic() - generation.started_s
                first_s = running.first_token_s or total_s
                proposers = self._fleet.proposers(command.counters.verified_by_source)
                trace = running.trace.to_json(proposers) if running.trace is not None else b""
                ending = Ending(
                    running.choice,
                    command,
                    first_s,
                    total_s,
                    trace,
                    running.steps_by_accepted,
                    self._use_of(running, command),
                    proposers,
                )
                running.end = command.reason.value
                generation.say(ending)
                self.meters.total_s.observe(total_s)
                self.meters.completion_tokens += command.completion_tokens
                if not any(generation.unfinished()):
                    self.meters.requests[command.reason.value] += 1

    def _use_of(self, running: Running, finish: Finish) -> PredictionUse:
        if running.follower is None:
            return PredictionUse(0, 0)
        accepted = finish.counters.accepted_by_source.get(self._fleet.prediction_source, 0)
        return PredictionUse(accepted, max(0, running.follower.predicted_tokens - accepted))

    def _fail(self, generation: Generation, error: OutriderError) -> None:
        """End all choices: half a generation is of no use, and a stream has one status."""
        if isinstance(error, Exhausted) and error.retry_after_s is None:
            error.retry_after_s = self._room_in_s()
        for running in generation.choices:
            if running.end == "left":
                running.end = OUTCOMES.get(type(error), "internal")
        if not generation.mailbox.closed:
            self.meters.requests[OUTCOMES.get(type(error), "internal")] += 1
        generation.fail(error)
        self._end(generation)

    def _forget(self, running: Running) -> None:
        if self._running.pop(running.number, None) is not None:
            self.meters.ended = self.meters.ended.plus(running.session.counters)
            self._reporter.ended(running)
            if running.first_token_s:
                lasted_s = time.monotonic() - running.generation.started_s
                share = 1.0 / 16.0 if self._lasts_s else 1.0
                self._lasts_s += share * (lasted_s - self._lasts_s)
        self._homeless.discard(running)
        if not (running.generation.left or any(running.generation.unfinished())):
            self._unread[running.generation] = time.monotonic()
        verifier = self._fleet.verifiers.get(running.session.verifier or "")
        if verifier is not None:
            verifier.sessions.discard(running.number)
            session = running.session
            self.placer.ended(running.prefix, session.spec, session.output, verifier.address)
        if self._idle is not None and not self._running:
            self._idle.set()

    def _place(self, running: Running, exclude: frozenset[str]) -> None:
        model, spec = running.generation.info.model, running.session.spec
        exclude |= self._strangers(running)
        chosen = self.placer.verifier(running.prefix, model, spec, exclude)
        now_s = time.monotonic()
        running.heard_s = running.progress_s = running.asked_s = now_s
        if chosen is not None:
            self._homeless.discard(running)
            running.missing_tokens = chosen.missing_tokens + len(running.session.output)
            running.kv_peer = self.placer.peer(running.prefix, chosen)
            if running.session.setback is not None:
                cause = OUTCOMES.get(type(running.session.setback), "internal")
                self.meters.migrations["verifier", cause] += 1
            if running.trace is not None:
                running.trace.decided(now_s, "verifier chosen", why=str(chosen))
            self._step(running, Placed(chosen.view.address))
        elif self._may_wait(running, now_s):
            self._homeless.add(running)
        else:
            self._step(running, NotPlaced(f"no verifier for {model} has room; try again later"))

    def _strangers(self, running: Running) -> frozenset[str]:
        """Verifiers that would go on otherwise than what has been said was begun."""
        if not running.session.output:
            return frozenset()
        fingerprint = running.generation.info.model_fingerprint
        return frozenset(
            address
            for address, link in self._fleet.verifiers.items()
            if link.info is not None and link.info.model_fingerprint != fingerprint
        )

    def _may_wait(self, running: Running, now_s: float) -> bool:
        """Whether a session that was under way waits for a verifier to come (back)."""
        if running.homeless_s is None:
            running.homeless_s = now_s
        waited_s = now_s - running.homeless_s
        return running.session.admitted and waited_s < self._config.failover_wait_s

    def _place_homeless(self) -> None:
        # Whoever failed before may have come back; breakers know who had better be left alone.
        for running in list(self._homeless):
            self._place(running, frozenset())

    def _attach(self, running: Running, count: int, exclude: frozenset[str]) -> None:
        verifier = self._fleet.verifiers.get(running.session.verifier or "")
        if verifier is None:
            return
        info = running.generation.info
        links = self._fleet.drafters
        bound = {
            kind_of(drafter.info)
            for address in running.session.bindings.values()
            if (drafter := links.get(address)) is not None and drafter.info is not None
        }
        views = self.placer.drafters(running.prefix, verifier, info, count, exclude, bound)
        for view in views:
            if view.kind in bound:
                links[view.address].spares.add(running.number)
            bound.add(view.kind)
            self._bind(running, view)

    def _bind(self, running: Running, view: WorkerView) -> None:
        running.bindings_made += 1
        if running.trace is not None:
            expected = round(view.tokens, 2)
            running.trace.decided(
                time.monotonic(), "drafter bound", drafter=view.address, expected=expected
            )
        self._step(running, DrafterAttached(running.bindings_made, view.address))
