"""Carries out what sessions decide: the only owner of live sessions, on the event loop.

Worker messages come in as batches (one a verify step), are taken apart by session, stepped
through the state machine, and what results is regrouped by destination. There is no task, lock
or await for a token or a session on this path, and no Redis.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TypeAlias

from orchestrator.config import DriverConfig
from orchestrator.fleet import Fleet, Listener
from orchestrator.messages import (
    AbortOnVerifier,
    AskRepeat,
    AttachDrafters,
    BindDrafter,
    ClientGone,
    Command,
    Committed,
    Deliver,
    DrafterAttached,
    DrafterAvailable,
    DrafterGap,
    DrafterGone,
    Event,
    Fail,
    Finish,
    Forget,
    NotPlaced,
    Opened,
    OpenOnVerifier,
    Placed,
    PlaceVerifier,
    Refused,
    RelayCommit,
    Silence,
    UnbindDrafter,
    VerifierLost,
)
from orchestrator.placement import choose_drafters, choose_verifier
from orchestrator.session import Session, State
from orchestrator.text import TextStream
from orchestrator.workers import DrafterBatch, DrafterLink, LinkState, VerifierBatch, VerifierLink
from outrider import wire
from outrider.domain import (
    BindSpec,
    ModelInfo,
    Resync,
    SamplingParams,
    SessionSpec,
    session_seed,
)
from outrider.errors import Exhausted, OutriderError, Unavailable
from outrider.serving.queues import Mailbox

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Job:
    """A checked and tokenized request."""

    info: ModelInfo
    prompt: tuple[int, ...]
    sampling: SamplingParams
    seed: int
    """The request's; the session's is derived from it."""
    tokens_max: int
    stop: tuple[str, ...]
    stop_ids: frozenset[int]
    ignore_eos: bool
    speculation: bool


@dataclass(frozen=True, slots=True)
class Ending:
    """The end of a generation, with its times in seconds."""

    finish: Finish
    first_token_s: float
    total_s: float


Output: TypeAlias = Deliver | Ending | OutriderError


@dataclass(slots=True, eq=False)
class Generation:
    """One request under way. Iterate `outputs()`; call `Driver.abandon` when nobody listens."""

    session: Session
    info: ModelInfo
    started_s: float
    mailbox: Mailbox[Output] = field(default_factory=Mailbox)
    first_token_s: float | None = None
    heard_s: float = 0.0
    """When the verifier was last heard of."""
    progress_s: float = 0.0
    """When it last made progress."""
    bindings_made: int = 0
    commit_bytes: bytes = b""
    """The commit under way, as it came."""

    async def outputs(self) -> AsyncIterator[Output]:
        """Yield deliveries as they come, joined for nobody; ends after an Ending or an error."""
        while batch := await self.mailbox.take():
            for output in batch:
                yield output


class Driver:
    """Owner of all sessions of this orchestrator."""

    def __init__(self, fleet: Fleet, config: DriverConfig) -> None:
        self._fleet = fleet
        self._config = config
        self._generations: dict[int, Generation] = {}
        self._draining = False
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
        if self._generations:
            self._idle = asyncio.Event()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), timeout_s)

    async def close(self) -> None:
        """End everything."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        for generation in list(self._generations.values()):
            self._step(generation, ClientGone())
            generation.mailbox.put(Unavailable("the orchestrator is stopping; try again"))
            generation.mailbox.close()
        await self._fleet.close()

    @property
    def load(self) -> int:
        """Generations under way."""
        return len(self._generations)

    # --- requests ---

    def generate(self, job: Job) -> Generation:
        """Start a generation. Raises `Exhausted` or `Unavailable`."""
        if self._draining:
            raise Unavailable("the orchestrator is draining; ask another replica")
        if len(self._generations) >= self._config.sessions_max:
            raise Exhausted(
                f"the orchestrator has its {self._config.sessions_max} generations; try again later"
            )
        number = secrets.randbits(64)
        spec = SessionSpec(
            session=number,
            epoch=0,
            prompt=job.prompt,
            committed=(),
            sampling=job.sampling,
            seed=session_seed(job.seed, 0),
            tokens_max=job.tokens_max,
            stop_ids=job.stop_ids,
            ignore_eos=job.ignore_eos,
        )
        session = Session(
            spec,
            TextStream(self._fleet.codec(job.info), job.stop),
            drafters_wanted=self._config.drafters_per_session if job.speculation else 0,
        )
        now_s = time.monotonic()
        generation = Generation(session, job.info, now_s, heard_s=now_s, progress_s=now_s)
        self._generations[number] = generation
        self._perform(generation, session.start())
        return generation

    def abandon(self, generation: Generation) -> None:
        """Free everything that a generation holds; harmless after its end."""
        if generation.session.state is not State.ENDED:
            self._step(generation, ClientGone())

    # --- what workers say ---

    def _verifier_batch(self, link: VerifierLink, batch: VerifierBatch) -> None:
        now_s = time.monotonic()
        if batch.step is not None:
            link.step_s, link.stepped_s = batch.step.duration_s, now_s
        for number, epoch in batch.opened:
            generation = self._on(link, number)
            if generation is not None:
                generation.heard_s = generation.progress_s = now_s
                self._step(generation, Opened(epoch))
        for rejection in batch.rejections:
            generation = self._on(link, rejection.session)
            if generation is not None:
                self._step(generation, Refused(rejection))
        for number, commit_bytes, commit, report in batch.commits:
            generation = self._on(link, number)
            if generation is None:
                continue
            generation.heard_s = now_s
            if commit.tokens:
                generation.progress_s = now_s
                if generation.first_token_s is None:
                    generation.first_token_s = now_s - generation.started_s
            generation.commit_bytes = commit_bytes
            self._step(generation, Committed(commit, report))

    def _drafter_batch(self, link: DrafterLink, batch: DrafterBatch) -> None:
        # The hot path: looked up, checked and passed on, unread.
        for number, binding, draft in batch.drafts:
            bound = self._bound(link, number, binding)
            if bound is None:
                continue
            verifier = self._fleet.verifiers.get(bound.session.verifier or "")
            if verifier is not None:
                verifier.offer(number, binding, draft)
        for rejection in batch.rejections:
            generation = self._bound(link, rejection.session, rejection.binding)
            if generation is not None:
                _log.warning("drafter %s: %s", link.address, rejection.message)
                link.sessions.discard(rejection.session)
                self._step(generation, DrafterGone(rejection.binding, refused=True))
        for resync in batch.resyncs:
            generation = self._bound(link, resync.session, resync.binding)
            if generation is not None:
                gap = DrafterGap(resync.binding, resync.epoch, resync.have_length)
                self._step(generation, gap)

    def _verifier_changed(self, link: VerifierLink) -> None:
        if link.state is not LinkState.LOST:
            return
        for number in list(link.sessions):
            generation = self._generations.get(number)
            if generation is not None:
                self._step(generation, VerifierLost(link.reason))
        link.sessions.clear()

    def _drafter_changed(self, link: DrafterLink) -> None:
        if link.state is LinkState.READY and link.info is not None:
            refusal = self._fleet.refusal(link.info)
            if refusal is not None:
                _log.error("drafter %s is refused: %s", link.address, refusal)
            for generation in list(self._generations.values()):
                self._step(generation, DrafterAvailable())
        if link.state is not LinkState.LOST:
            return
        numbers = list(link.sessions)
        link.sessions.clear()
        for number in numbers:
            bereft = self._generations.get(number)
            if bereft is None:
                continue
            bindings = bereft.session.bindings
            for binding in [b for b, address in bindings.items() if address == link.address]:
                self._step(bereft, DrafterGone(binding))

    def _on(self, link: VerifierLink, number: int) -> Generation | None:
        """The generation, if this verifier is the one that serves it."""
        generation = self._generations.get(number)
        if generation is None or generation.session.verifier != link.address:
            return None
        return generation

    def _bound(self, link: DrafterLink, number: int, binding: int) -> Generation | None:
        """The generation, if this drafter has that attachment to it."""
        generation = self._generations.get(number)
        if generation is None or generation.session.bindings.get(binding) != link.address:
            return None
        return generation

    async def _sweep(self) -> None:
        """Notice what does not happen: lost commits, hung verifiers."""
        config = self._config
        while True:
            await asyncio.sleep(config.sweep_interval_s)
            now_s = time.monotonic()
            for generation in list(self._generations.values()):
                link = self._fleet.verifiers.get(generation.session.verifier or "")
                # A long prompt commits nothing for a while, but its verifier takes steps.
                stepped_s = link.stepped_s if link is not None else 0.0
                silent_s = now_s - max(generation.progress_s, stepped_s)
                if silent_s > config.verifier_timeout_s:
                    generation.progress_s = generation.heard_s = now_s
                    self._step(generation, VerifierLost(f"no progress for {silent_s:.0f} s"))
                elif now_s - generation.heard_s > config.silence_s:
                    generation.heard_s = now_s
                    self._step(generation, Silence())

    # --- what sessions command ---

    def _step(self, generation: Generation, event: Event) -> None:
        self._perform(generation, generation.session.step(event))

    def _perform(self, generation: Generation, commands: list[Command]) -> None:
        for command in commands:
            self._perform_one(generation, command)

    def _perform_one(self, generation: Generation, command: Command) -> None:
        match command:
            case RelayCommit():
                self._relay(generation, command)
            case Deliver() | Finish() | Fail():
                self._tell_client(generation, command)
            case AttachDrafters() | BindDrafter() | UnbindDrafter():
                self._tell_drafters(generation, command)
            case PlaceVerifier(exclude):
                self._place(generation, exclude)
            case OpenOnVerifier() | AbortOnVerifier() | AskRepeat():
                self._tell_verifier(generation.session, command)
            case Forget():
                self._forget(generation.session)

    def _forget(self, session: Session) -> None:
        number = session.spec.session
        self._generations.pop(number, None)
        verifier = self._fleet.verifiers.get(session.verifier or "")
        if verifier is not None:
            verifier.sessions.discard(number)
        if self._idle is not None and not self._generations:
            self._idle.set()

    def _tell_client(self, generation: Generation, command: Deliver | Finish | Fail) -> None:
        match command:
            case Deliver():
                generation.mailbox.put(command)
            case Finish():
                total_s = time.monotonic() - generation.started_s
                first_s = generation.first_token_s or total_s
                generation.mailbox.put(Ending(command, first_s, total_s))
                generation.mailbox.close()
            case Fail(error):
                generation.mailbox.put(error)
                generation.mailbox.close()

    def _tell_verifier(
        self, session: Session, command: OpenOnVerifier | AbortOnVerifier | AskRepeat
    ) -> None:
        number = session.spec.session
        address = command.address if isinstance(command, AbortOnVerifier) else session.verifier
        verifier = self._fleet.verifiers.get(address or "")
        if verifier is None:
            return
        match command:
            case OpenOnVerifier(spec):
                verifier.sessions.add(number)
                verifier.open(spec)
            case AbortOnVerifier(_, epoch):
                verifier.sessions.discard(number)
                verifier.abort(number, epoch)
            case AskRepeat(epoch, have_length):
                verifier.ask_repeat(Resync(number, epoch, have_length))

    def _tell_drafters(
        self, generation: Generation, command: AttachDrafters | BindDrafter | UnbindDrafter
    ) -> None:
        match command:
            case AttachDrafters(count, exclude):
                self._attach(generation, count, exclude)
            case BindDrafter(binding, epoch, committed):
                self._bind(generation, binding, epoch, committed)
            case UnbindDrafter(binding, address):
                number = generation.session.spec.session
                drafter = self._fleet.drafters.get(address)
                if drafter is not None:
                    drafter.sessions.discard(number)
                    drafter.unbind(number, binding)

    def _relay(self, generation: Generation, command: RelayCommit) -> None:
        number = generation.session.spec.session
        data = generation.commit_bytes if command.verbatim else wire.commit_to_bytes(command.commit)
        for binding in command.bindings:
            drafter = self._fleet.drafters.get(generation.session.bindings.get(binding, ""))
            if drafter is not None:
                drafter.commit(number, data)

    def _place(self, generation: Generation, exclude: frozenset[str]) -> None:
        model = generation.info.model
        view = choose_verifier(self._fleet.verifier_views(), model, exclude)
        now_s = time.monotonic()
        generation.heard_s = generation.progress_s = now_s
        if view is None:
            self._step(generation, NotPlaced(f"no verifier for {model} has room; try again later"))
        else:
            self._step(generation, Placed(view.address))

    def _attach(self, generation: Generation, count: int, exclude: frozenset[str]) -> None:
        views = choose_drafters(self._fleet.drafter_views(), generation.info, count, exclude)
        for view in views:
            generation.bindings_made += 1
            self._step(generation, DrafterAttached(generation.bindings_made, view.address))

    def _bind(
        self, generation: Generation, binding: int, epoch: int, committed: tuple[int, ...]
    ) -> None:
        spec = generation.session.spec
        drafter = self._fleet.drafters.get(generation.session.bindings[binding])
        if drafter is None:
            return
        drafter.sessions.add(spec.session)
        drafter.bind(
            BindSpec(
                session=spec.session,
                epoch=epoch,
                binding=binding,
                prompt=spec.prompt,
                committed=committed,
                sampling=spec.sampling,
                seed=spec.seed,
                tokenizer_fingerprint=generation.info.tokenizer_fingerprint or "",
                vocabulary_size=generation.info.vocabulary_size,
                budget=self._config.budget,
            )
        )
