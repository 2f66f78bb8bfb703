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
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

from drafter_service.admission import bind_fault, known_ids, rejection, wrong_id
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
from drafter_service.proposers.base import CandidateTaker, Overlapping, Proposer
from drafter_service.shelf import Key, Shelf
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

_REPORT_S = 0.25
"""Steps are reported at least so often while there are sessions, drafts or not."""
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
        self._config = config
        self._emit = emit
        self._use(proposer)
        self._inbox: Inbox[Command | Swap] = Inbox(droppable_max=0)
        self._shelf = Shelf(config.mirrors_bytes_max, config.aside_tokens_max)
        self._outputs: dict[int, Outputs] = {}
        self._draining = False
        self._step: GrowReport | None = None
        """Of the last step."""
        self._reported_s = 0.0
        """When steps were reported last."""
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
        """Sessions mirrored, idle ones included."""
        return len(self._shelf)

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
                # After each: a thousand may have come at once.
                self._bound_memory()
            busy = self._grow()
            if not busy:
                self._flush(everything=True)
            elif not self._overlaps:
                self._flush()

    def _use(self, proposer: Proposer) -> None:
        """Guess with `proposer` from now on."""
        self._proposer = proposer
        self._taker = proposer if isinstance(proposer, CandidateTaker) else None
        # What a step guessed leaves while the next one computes: no step waits for it.
        self._overlaps = isinstance(proposer, Overlapping) and proposer.overlap(self._flush)

    def _grow(self) -> bool:
        mirrors = self._shelf.live
        if not mirrors:
            return False
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

    def _flush(self, *, everything: bool = False) -> None:
        now_s = time.monotonic()
        for mirror in self._shelf.live:
            if not mirror.fresh:
                continue
            if not everything and now_s - mirror.flushed_s < mirror.budget.flush_interval_s:
                continue
            draft = mirror.take_draft()
            if draft is not None:
                mirror.flushed_s = now_s
                spec = mirror.spec
                self._to(mirror.connection).drafts.append((spec.session, spec.binding, draft))
        if self._step is not None and now_s - self._reported_s >= _REPORT_S:
            # Who is too slow to guess anything in time should be known for it.
            for mirror in self._shelf.live:
                self._to(mirror.connection)
        if self._outputs:
            outputs, self._outputs = self._outputs, {}
            if self._step is not None:
                self._reported_s = now_s
                for output in outputs.values():
                    output.step = self._step
            self._emit(outputs)

    def _to(self, connection: int) -> Outputs:
        return self._outputs.setdefault(connection, Outputs())

    def _apply(self, command: Command | Swap) -> None:
        match command:
            case Bind(connection, spec):
                self._bind(connection, spec)
            case Follow():
                self._hear(command)
            case SetBudget(connection, session, binding, budget):
                self._set_budget((connection, session), binding, self._bounded(budget))
            case Unbind(connection, session, binding):
                known = self._spec((connection, session))
                if known is not None and known.binding <= binding:
                    self._forget((connection, session))
            case Disconnect(connection):
                for key in self._shelf.of_connection(connection):
                    self._forget(key)
            case Drain():
                self._draining = True
            case Swap():
                self._swap(command)

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
        mirrors = self._shelf.live
        for mirror in mirrors:
            self._free(mirror)
        self._use(new)
        self._step, self._step_s = None, 0.0
        command.swapped(new)
        for mirror in mirrors:
            mirror.restart(known_ids(mirror.spec, new.info))
            try:
                new.open(mirror)
            except Exception:
                self._give_up(mirror)
        _log.info("swapped: %s, version %s", new.info.model, new.info.model_fingerprint[:12])

    def _bind(self, connection: int, spec: BindSpec) -> None:
        known = self._spec((connection, spec.session))
        if known is not None:
            if spec.binding <= known.binding:
                return
            self._forget((connection, spec.session))
        fault = self._bind_fault(spec)
        if fault is not None:
            self._to(connection).rejections.append(fault)
            return
        size = known_ids(spec, self._proposer.info)
        spec = replace(spec, budget=self._bounded(spec.budget), vocabulary_size=size)
        mirror = Mirror(connection, spec)
        if self._open(mirror):
            self._to(connection).bound.append((spec.session, spec.binding))

    def _open(self, mirror: Mirror) -> bool:
        """Hand a mirror to the proposer; False if that failed and the session is gone."""
        self._shelf.use(mirror)
        try:
            self._proposer.open(mirror)
        except Exception:
            self._give_up(mirror)
            return False
        return True

    def _spec(self, key: Key) -> BindSpec | None:
        """Return what a session was bound with, if it is known."""
        mirror = self._shelf.get(key)
        if mirror is not None:
            return mirror.spec
        aside = self._shelf.aside(key)
        return None if aside is None else aside.spec

    def _set_budget(self, key: Key, binding: int, budget: DraftBudget) -> None:
        mirror, aside = self._shelf.get(key), self._shelf.aside(key)
        if mirror is not None and mirror.spec.binding == binding:
            mirror.set_budget(budget)
            self._shelf.use(mirror)
        elif aside is not None and aside.spec.binding == binding:
            self._shelf.change_aside(key, replace(aside.spec, budget=budget))

    def _bound_memory(self) -> None:
        """Keep mirrors within their memory; what is freed is rebuilt when its session goes on."""
        for mirror in self._shelf.put_aside():
            self._free(mirror)
        for aside in self._shelf.give_up():
            fault = rejection(
                aside.spec, RejectionCode.EXHAUSTED, "idle for too long: the drafter has no room"
            )
            self._to(aside.connection).rejections.append(fault)

    def _bind_fault(self, spec: BindSpec) -> Rejection | None:
        config = self._config
        return bind_fault(
            spec,
            self._proposer.info,
            draining=self._draining,
            room=config.sessions_max - len(self._shelf),
            sessions_max=config.sessions_max,
        )

    def _bounded(self, budget: DraftBudget) -> DraftBudget:
        return replace(
            budget,
            nodes_max=min(budget.nodes_max, self._config.nodes_max),
            depth_max=min(budget.depth_max, self._config.depth_max),
        )

    def _hear(self, news: Follow) -> None:
        mirror = self._shelf.get((news.connection, news.session))
        # Whoever was put aside has forgotten what candidates would be added to.
        if mirror is not None and news.candidates is not None and self._taker is not None:
            self._taker.take(mirror, news.candidates)
        if news.commit is not None:
            self._follow((news.connection, news.session), news.commit)

    def _follow(self, key: Key, commit: Commit) -> None:
        spec = self._spec(key)
        if spec is None or commit.epoch != spec.epoch:
            return
        wrong = wrong_id(spec, self._proposer.info, commit.tokens)
        if wrong is not None:
            fault = rejection(spec, RejectionCode.INVALID, wrong, "tokens")
            self._to(key[0]).rejections.append(fault)
            self._forget(key)
            return
        mirror = self._shelf.get(key)
        if mirror is None and commit.last:
            self._forget(key)
            return
        if mirror is None:
            mirror = self._shelf.revive(key)
            # The proposer may be another one by now.
            mirror.restart(known_ids(mirror.spec, self._proposer.info))
            if not self._open(mirror):
                return
        try:
            news = mirror.apply(commit)
        except GapError:
            self._ask_repeat(mirror)
            return
        if news is not None:
            self._shelf.use(mirror)
            tokens, advance = news
            try:
                self._proposer.advanced(mirror, tokens, advance)
            except Exception:
                self._give_up(mirror)
                return
        if commit.last:
            self._forget(key)

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
        _log.exception("the proposer failed; a session is dropped", extra=_named(mirror))
        self._reject(mirror)

    def _reject(self, mirror: Mirror) -> None:
        fault = rejection(mirror.spec, RejectionCode.INTERNAL, "the proposer failed")
        self._to(mirror.connection).rejections.append(fault)
        self._forget(mirror.key)

    def _forget(self, key: Key) -> None:
        """End a session."""
        mirror = self._shelf.get(key)
        self._shelf.discard(key)
        if mirror is not None:
            self._free(mirror)

    def _free(self, mirror: Mirror) -> None:
        """Let the proposer forget a mirror."""
        try:
            self._proposer.close(mirror)
        except Exception:
            _log.exception("a session could not be closed", extra=_named(mirror))


def _named(mirror: Mirror) -> dict[str, str]:
    spec = mirror.spec
    return {"request_id": spec.origin.request_id, "session": f"{spec.session:016x}"}
