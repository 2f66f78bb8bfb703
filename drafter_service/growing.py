"""The growing loop: one thread that owns the proposer and every mirror.

    while running:
        apply what arrived -> one step of the proposer over all sessions -> flush what is due

Growth does not wait for verification: the thread sleeps only when no budget leaves anything to
guess. Drafts are flushed at once when they are new, and joined when they come faster than the
session's flush interval.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

from drafter_service.config import GrowingConfig
from drafter_service.messages import (
    Bind,
    Command,
    Disconnect,
    Drain,
    Follow,
    Outputs,
    SetBudget,
    Unbind,
)
from drafter_service.mirror import GapError, Mirror
from drafter_service.proposers.base import CandidateTaker, Proposer
from outrider.domain import (
    BindSpec,
    Commit,
    DraftBudget,
    GrowReport,
    Rejection,
    RejectionCode,
    Resync,
)
from outrider.errors import ConfigError
from outrider.serving.pulse import Pulse
from outrider.serving.queues import Inbox

_IDLE_WAIT_S = 0.5
_RESYNC_AGAIN_S = 1.0
_STEP_SHARE = 1.0 / 16.0
"""Of the latest step in the average of their durations."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Swap:
    """Guess with another proposer from now on; sessions stay."""

    make: Callable[[], Proposer]
    """Makes it, on the growing thread; if it raises, or it does not fit, the old one goes on."""
    swapped: Callable[[Proposer], None]
    """Is told of it, on that thread, before it guesses anything."""


class Grower:
    """Owner of the mirrors."""

    def __init__(
        self,
        proposer: Proposer,
        config: GrowingConfig,
        emit: Callable[[dict[int, Outputs]], None],
    ) -> None:
        self.steps = 0
        self._proposer = proposer
        self._taker = proposer if isinstance(proposer, CandidateTaker) else None
        self._config = config
        self._emit = emit
        self._inbox: Inbox[Command | Swap] = Inbox(droppable_max=0)
        self._mirrors: dict[tuple[int, int], Mirror] = {}
        self._outputs: dict[int, Outputs] = {}
        self._draining = False
        self._step: GrowReport | None = None
        """Of the last step, until it has been reported."""
        self._step_s = 0.0
        """Moving average of the steps' durations."""
        self._thread: Executor | None = None
        self._ended_run: Future[None] | None = None
        self.pulse = Pulse()
        """Of the loop, for whoever asks whether it still turns."""

    # --- called from other threads ---

    def start(self, thread: Executor | None = None) -> None:
        """Start the loop on `thread`, the one that loaded the model, or on a new one."""
        self._thread = thread or ThreadPoolExecutor(1, thread_name_prefix="grow")
        self.pulse.beat()
        self._ended_run = self._thread.submit(self._run)

    def submit(self, command: Command | Swap) -> None:
        """Queue a command."""
        self._inbox.put(command)

    def stop(self, timeout_s: float = 30.0) -> None:
        """End the loop after the step under way, and its thread."""
        self._inbox.close()
        if self._ended_run is not None and self._thread is not None:
            self._ended_run.result(timeout_s)
            self._thread.shutdown()

    @property
    def load(self) -> int:
        """Sessions mirrored."""
        return len(self._mirrors)

    # --- the thread ---

    def _run(self) -> None:
        busy = False
        while not self._inbox.closed:
            self.pulse.beat()
            for command in self._inbox.take_all(wait_s=0.0 if busy else _IDLE_WAIT_S):
                try:
                    self._apply(command)
                except Exception:
                    # One bad message must not end the thread that serves everybody.
                    _log.exception("command failed: %s", type(command).__name__)
            busy = bool(self._mirrors) and self._grow()
            self._flush(everything=not busy)

    def _grow(self) -> bool:
        mirrors = list(self._mirrors.values())
        started_s = time.perf_counter()
        try:
            busy = self._proposer.grow(mirrors)
        except Exception:
            _log.exception("a growing step failed; its %d sessions are dropped", len(mirrors))
            for mirror in mirrors:
                self._reject(mirror)
            return False
        self.steps += busy
        if busy and self._config.step_delay_s:
            time.sleep(self._config.step_delay_s)
        if busy:
            duration_s = time.perf_counter() - started_s
            share = _STEP_SHARE if self._step_s else 1.0
            self._step_s += share * (duration_s - self._step_s)
            self._step = GrowReport(self._step_s, self._proposer.leaves_max, started_s)
        return busy

    def _flush(self, *, everything: bool) -> None:
        now_s = time.monotonic()
        for mirror in self._mirrors.values():
            if not mirror.fresh:
                continue
            if not everything and now_s - mirror.flushed_s < mirror.budget.flush_interval_s:
                continue
            draft = mirror.take_draft()
            if draft is not None:
                mirror.flushed_s = now_s
                spec = mirror.spec
                self._to(mirror.connection).drafts.append((spec.session, spec.binding, draft))
        if self._outputs:
            outputs, self._outputs = self._outputs, {}
            if self._step is not None:
                for output in outputs.values():
                    output.step = self._step
            self._emit(outputs)

    def _to(self, connection: int) -> Outputs:
        return self._outputs.setdefault(connection, Outputs())

    def _apply(self, command: Command | Swap) -> None:
        match command:
            case Bind(connection, spec):
                self._bind(connection, spec)
            case Follow(connection, session):
                mirror = self._mirrors.get((connection, session))
                if mirror is not None:
                    self._hear(mirror, command)
            case SetBudget(connection, session, binding, budget):
                mirror = self._mirrors.get((connection, session))
                if mirror is not None and mirror.spec.binding == binding:
                    mirror.set_budget(self._bounded(budget))
            case Unbind(connection, session, binding):
                mirror = self._mirrors.get((connection, session))
                if mirror is not None and mirror.spec.binding <= binding:
                    self._close(mirror)
            case Disconnect(connection):
                self._disconnect(connection)
            case Drain():
                self._draining = True
            case Swap():
                self._swap(command)

    def _disconnect(self, connection: int) -> None:
        for mirror in list(self._mirrors.values()):
            if mirror.connection == connection:
                self._close(mirror)

    def _swap(self, command: Swap) -> None:
        """Go on with another proposer; whatever is wrong with it, sessions keep the old one."""
        old = self._proposer
        # Loading takes as long as it takes.
        self.pulse.rest()
        try:
            new = command.make()
            wanted, found = old.info.tokenizer_fingerprint, new.info.tokenizer_fingerprint
            if wanted != found:
                raise ConfigError("it has another tokenizer; start a drafter of its own with it")
        except Exception as error:
            _log.error("the old version goes on, since the new one cannot be used: %s", error)
            return
        mirrors = list(self._mirrors.values())
        for mirror in mirrors:
            self._free(mirror)
        self._proposer = new
        self._taker = new if isinstance(new, CandidateTaker) else None
        self._step, self._step_s = None, 0.0
        command.swapped(new)
        for mirror in mirrors:
            mirror.restart(self._vocabulary_size(mirror.spec))
            try:
                new.open(mirror)
            except Exception:
                self._give_up(mirror)
        _log.info("swapped: %s, version %s", new.info.model, new.info.model_fingerprint[:12])

    def _bind(self, connection: int, spec: BindSpec) -> None:
        known = self._mirrors.get((connection, spec.session))
        if known is not None:
            if spec.binding <= known.spec.binding:
                return
            self._close(known)
        fault = self._bind_fault(spec)
        if fault is not None:
            self._to(connection).rejections.append(fault)
            return
        size = self._vocabulary_size(spec)
        spec = replace(spec, budget=self._bounded(spec.budget), vocabulary_size=size)
        mirror = Mirror(connection, spec)
        self._mirrors[mirror.key] = mirror
        try:
            self._proposer.open(mirror)
        except Exception:
            self._give_up(mirror)
            return
        self._to(connection).bound.append((spec.session, spec.binding))

    def _bind_fault(self, spec: BindSpec) -> Rejection | None:
        own = self._proposer.info.tokenizer_fingerprint
        if own is not None and own != spec.tokenizer_fingerprint:
            return _rejection(
                spec,
                RejectionCode.MISMATCH,
                f"tokenizer mismatch: this drafter has {own[:12]}, the target "
                f"{spec.tokenizer_fingerprint[:12]}",
                "tokenizer_fingerprint",
            )
        if self._draining:
            return _rejection(spec, RejectionCode.DRAINING, "the drafter is draining")
        wrong = self._wrong_id(spec, (*spec.prompt, *spec.committed))
        if wrong is not None:
            return _rejection(spec, RejectionCode.INVALID, wrong, "prompt")
        if len(self._mirrors) >= self._config.sessions_max:
            return _rejection(
                spec,
                RejectionCode.EXHAUSTED,
                f"the drafter has its {self._config.sessions_max} sessions",
            )
        return None

    def _wrong_id(self, spec: BindSpec, tokens: Sequence[int]) -> str | None:
        """Name an id that target or proposer does not know: it would break everybody's step."""
        size = self._vocabulary_size(spec)
        wrong = next((token for token in tokens if not 0 <= token < size), None)
        return None if wrong is None else f"id {wrong} is outside the vocabulary of {size}"

    def _vocabulary_size(self, spec: BindSpec) -> int:
        """Ids that target and proposer both know; 0 is a proposer's that takes any."""
        own = self._proposer.info.vocabulary_size
        return min(spec.vocabulary_size, own) if own else spec.vocabulary_size

    def _bounded(self, budget: DraftBudget) -> DraftBudget:
        return replace(
            budget,
            nodes_max=min(budget.nodes_max, self._config.nodes_max),
            depth_max=min(budget.depth_max, self._config.depth_max),
        )

    def _hear(self, mirror: Mirror, news: Follow) -> None:
        if news.candidates is not None and self._taker is not None:
            self._taker.take(mirror, news.candidates)
        if news.commit is not None:
            self._follow(mirror, news.commit)

    def _follow(self, mirror: Mirror, commit: Commit) -> None:
        if commit.epoch != mirror.spec.epoch:
            return
        wrong = self._wrong_id(mirror.spec, commit.tokens)
        if wrong is not None:
            fault = _rejection(mirror.spec, RejectionCode.INVALID, wrong, "tokens")
            self._to(mirror.connection).rejections.append(fault)
            self._close(mirror)
            return
        try:
            news = mirror.apply(commit)
        except GapError:
            self._ask_repeat(mirror)
            return
        if news is not None:
            tokens, advance = news
            try:
                self._proposer.advanced(mirror, tokens, advance)
            except Exception:
                self._give_up(mirror)
                return
        if commit.last:
            self._close(mirror)

    def _ask_repeat(self, mirror: Mirror) -> None:
        length, now_s = len(mirror.log), time.monotonic()
        asked = mirror.resync_asked
        # Each commit that follows shows the gap again; the answer may be lost as well.
        if asked is not None and asked[0] == length and now_s - asked[1] < _RESYNC_AGAIN_S:
            return
        mirror.resync_asked = length, now_s
        spec = mirror.spec
        self._to(mirror.connection).resyncs.append(
            Resync(spec.session, spec.epoch, length, spec.binding)
        )

    def _give_up(self, mirror: Mirror) -> None:
        """Within an except block: end the one session that the proposer failed for."""
        _log.exception("the proposer failed; session %d is dropped", mirror.spec.session)
        self._reject(mirror)

    def _reject(self, mirror: Mirror) -> None:
        fault = _rejection(mirror.spec, RejectionCode.INTERNAL, "the proposer failed")
        self._to(mirror.connection).rejections.append(fault)
        self._close(mirror)

    def _close(self, mirror: Mirror) -> None:
        del self._mirrors[mirror.key]
        self._free(mirror)

    def _free(self, mirror: Mirror) -> None:
        try:
            self._proposer.close(mirror)
        except Exception:
            _log.exception("session %d could not be closed", mirror.spec.session)


def _rejection(spec: BindSpec, code: RejectionCode, message: str, field: str = "") -> Rejection:
    return Rejection(spec.session, spec.epoch, code, message, field=field, binding=spec.binding)
