"""The verify loop: one thread that owns the model and every session on it.

    while running:
        apply what arrived -> plan a batch -> one forward pass -> the rule -> commits

Nothing else touches torch or a session. Commands come in through a bounded inbox; each step's
outputs leave through one callback. The engine knows nothing of gRPC, Redis or text.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass

from outrider.domain import (
    Commit,
    CommitReport,
    Rejection,
    RejectionCode,
    Resync,
    SessionSpec,
    StepReport,
)
from outrider.draft_tree import Node
from outrider.model.language_model import LanguageModel, Row
from outrider.model.sampling import sample_nodes
from outrider.serving.queues import Inbox
from verifier_service.acceptance import AcceptRule, accept_path, judge
from verifier_service.admission import Admission, kv_need, reject
from verifier_service.config import EngineConfig
from verifier_service.messages import (
    Abort,
    Command,
    Disconnect,
    Drain,
    Offer,
    Open,
    Outputs,
    Repeat,
)
from verifier_service.scheduling import StepTimes, choose_nodes
from verifier_service.session import Session

_IDLE_WAIT_S = 0.5
_ENDED_KEPT_MAX = 1_024

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ended:
    """What is remembered of a session that ended, to answer a late resync."""

    connection: int
    epoch: int
    tokens: tuple[int, ...]
    report: CommitReport


@dataclass(frozen=True, slots=True)
class _RowPlan:
    session: Session
    tokens: tuple[int, ...]
    nodes: tuple[Node, ...]
    decodes: bool


class Engine:
    """Continuous batching over sessions, token trees as native input."""

    def __init__(
        self,
        model: LanguageModel,
        config: EngineConfig,
        emit: Callable[[dict[int, Outputs]], None],
        *,
        rule: AcceptRule = accept_path,
    ) -> None:
        self.model = model
        self.times = StepTimes()
        self.steps = 0
        self._config = config
        self._emit = emit
        self._rule = rule
        self._inbox: Inbox[Command] = Inbox(config.drafts_queued_max)
        self._sessions: dict[int, Session] = {}
        self._ended: OrderedDict[int, Ended] = OrderedDict()
        self._outputs: dict[int, Outputs] = {}
        self._draining = False
        self._drafts_dropped = 0
        self._eos_ids = frozenset(model.eos_ids)
        self._admission = Admission(config, model.vocabulary_size, model.length_max)
        self._thread: Executor | None = None
        self._ended_run: Future[None] | None = None

    # --- called from other threads ---

    def start(self, thread: Executor | None = None) -> None:
        """Start the loop on `thread`, the one that loaded the model, or on a new one."""
        self._thread = thread or ThreadPoolExecutor(1, thread_name_prefix="verify")
        self._ended_run = self._thread.submit(self._run)

    def submit(self, command: Command) -> None:
        """Queue a command; drafts are dropped when too many wait."""
        if not self._inbox.put(command, droppable=isinstance(command, Offer)):
            self._drafts_dropped += 1

    def stop(self, timeout_s: float = 30.0) -> None:
        """End the loop after the step under way, and its thread."""
        self._inbox.close()
        if self._ended_run is not None and self._thread is not None:
            self._ended_run.result(timeout_s)
            self._thread.shutdown()

    @property
    def load(self) -> int:
        """Sessions in use."""
        return len(self._sessions)

    @property
    def kv_tokens_in_use(self) -> int:
        """Tokens of KV that admitted sessions may need together."""
        return sum(kv_need(session.spec) for session in list(self._sessions.values()))

    def warm_up(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Measure T(N) at the sizes that steps will have. Call before `start`."""
        sizes = [size for size in (1, 2, 4, 8, 16, 32, 64) if size <= self._config.step_nodes_max]
        sizes.append(self._config.prefill_tokens_max)
        for done, size in enumerate(sizes):
            cache = self.model.new_cache()
            self.model.forward([Row(cache, [0] * 64, None, [63])])
            best = float("inf")
            for _ in range(3):
                row = Row(cache, [0] * size, [-1] * size, list(range(min(size, 64))))
                started = time.perf_counter()
                self.model.forward([row])
                best = min(best, time.perf_counter() - started)
                cache.truncate(64)
            self.times.observe(size, best)
            cache.release()
            if progress is not None:
                progress(done + 1, len(sizes))

    # --- the thread ---

    def _run(self) -> None:
        while not self._inbox.closed:
            commands = self._inbox.take_all(wait_s=0.0 if self._sessions else _IDLE_WAIT_S)
            for command in commands:
                try:
                    self._apply(command)
                except Exception:
                    # One bad message must not end the thread that serves everybody.
                    _log.exception("command failed: %s", type(command).__name__)
            if self._sessions:
                self._step()
            self._flush()

    def _flush(self) -> None:
        if self._outputs:
            outputs, self._outputs = self._outputs, {}
            self._emit(outputs)

    def _to(self, connection: int) -> Outputs:
        return self._outputs.setdefault(connection, Outputs())

    def _apply(self, command: Command) -> None:
        match command:
            case Open(connection, spec):
                self._open(connection, spec)
            case Offer(connection, number, source, draft):
                session = self._sessions.get(number)
                if session is not None and session.connection == connection:
                    session.merge(draft, source)
            case Repeat(connection, resync):
                self._repeat(connection, resync)
            case Abort(connection, number, epoch):
                session = self._sessions.get(number)
                if (
                    session is not None
                    and session.connection == connection
                    and session.spec.epoch <= epoch
                ):
                    self._close(session)
            case Disconnect(connection):
                for session in list(self._sessions.values()):
                    if session.connection == connection:
                        self._close(session)
            case Drain():
                self._draining = True

    def _open(self, connection: int, spec: SessionSpec) -> None:
        known = self._sessions.get(spec.session)
        refusal = self._admission.refusal(
            spec,
            others=[s.spec for s in self._sessions.values() if s is not known],
            known_epoch=self._known_epoch(spec.session),
            draining=self._draining,
        )
        if refusal is not None:
            self._to(connection).rejections.append(refusal)
            return
        if known is not None:
            # A newer epoch fences whoever held the session before.
            self._to(known.connection).rejections.append(
                reject(
                    known.spec,
                    RejectionCode.STALE_EPOCH,
                    "another orchestrator or a newer placement took the session over",
                    current_epoch=spec.epoch,
                )
            )
            self._close(known)
        self._sessions[spec.session] = Session(
            spec,
            connection,
            self.model.new_cache(),
            eos_ids=self._eos_ids,
            vocabulary_size=self.model.vocabulary_size,
            tree_nodes_max=self._config.tree_nodes_max,
            tree_depth_max=self._config.tree_depth_max,
        )
        self._to(connection).opened.append((spec.session, spec.epoch))

    def _known_epoch(self, session: int) -> int:
        known, ended = self._sessions.get(session), self._ended.get(session)
        return known.spec.epoch if known else ended.epoch if ended else 0

    def _repeat(self, connection: int, resync: Resync) -> None:
        session = self._sessions.get(resync.session)
        ended = self._ended.get(resync.session)
        if session is not None and session.connection == connection:
            epoch, tokens = session.spec.epoch, tuple(session.log.since(resync.have_length))
            report = CommitReport(session.counters(), ())
        elif ended is not None and ended.connection == connection:
            epoch, tokens = ended.epoch, ended.tokens[resync.have_length :]
            report = ended.report
        else:
            self._to(connection).rejections.append(
                Rejection(
                    resync.session,
                    resync.epoch,
                    RejectionCode.UNKNOWN_SESSION,
                    "no such session on this verifier",
                )
            )
            return
        last = report.finish_reason is not None
        commit = Commit(epoch, resync.have_length, tokens, last)
        self._to(connection).commits.append((resync.session, commit, report))

    def _close(self, session: Session) -> None:
        session.cache.release()
        del self._sessions[session.spec.session]

    # --- a verify step ---

    def _step(self) -> None:
        plans: list[_RowPlan] = []
        try:
            plans = self._plan()
            started = time.perf_counter()
            samples = self._forward(plans)
        except Exception:
            _log.exception("verify step failed; its sessions end")
            for session in [plan.session for plan in plans] or list(self._sessions.values()):
                self._fail(session)
            return
        if self._config.step_delay_s:
            time.sleep(self._config.step_delay_s)
        duration_s = time.perf_counter() - started
        tokens = sum(len(plan.tokens) + len(plan.nodes) for plan in plans)
        self.times.observe(tokens, duration_s)
        self.steps += 1
        rows = [plan for plan in plans if plan.decodes]
        report = StepReport(duration_s, len(rows), tokens)
        for plan, row_samples in zip(rows, samples, strict=True):
            try:
                self._commit(plan, row_samples)
            except Exception:
                _log.exception("commit failed; its session ends")
                self._fail(plan.session)
        # To those in prefill too: a step is a sign of life.
        for plan in plans:
            self._to(plan.session.connection).step = report

    def _fail(self, session: Session) -> None:
        """End one session after a defect of ours; the others go on."""
        self._to(session.connection).rejections.append(
            reject(session.spec, RejectionCode.INTERNAL, "the verify step failed")
        )
        self._close(session)

    def _plan(self) -> list[_RowPlan]:
        """Every decoding session joins; prefill shares what `prefill_tokens_max` leaves."""
        left = self._config.prefill_tokens_max
        chunks: list[tuple[Session, tuple[int, ...], bool]] = []
        decoding: list[Session] = []
        for session in self._sessions.values():
            pending = session.pending
            if len(pending) == 1:
                decoding.append(session)
            elif left > 0:
                chunk = tuple(pending[:left])
                left -= len(chunk)
                # The last chunk ends with the tip: its logits decide the first token.
                chunks.append((session, chunk, len(chunk) == len(pending)))
        choice = choose_nodes(
            [session.tree for session in decoding],
            [session.tokens_left - 1 for session in decoding],
            self.times,
            other_tokens=sum(len(chunk) for _, chunk, _ in chunks),
            nodes_max=self._config.step_nodes_max,
        )
        plans = [
            _RowPlan(session, (session.log.tip,), nodes, True)
            for session, nodes in zip(decoding, choice.nodes, strict=True)
        ]
        plans += [_RowPlan(session, chunk, (), done) for session, chunk, done in chunks]
        return plans

    def _forward(self, plans: Sequence[_RowPlan]) -> list[list[int]]:
        """One forward pass and the rule; returns each decoding row's samples, tip first."""
        logits = self.model.forward([_row(plan) for plan in plans])
        rows = [plan for plan in plans if plan.decodes]
        params, seeds, positions = [], [], []
        for plan in rows:
            spec = plan.session.spec
            count = 1 + len(plan.nodes)
            params += [spec.sampling] * count
            seeds += [spec.seed] * count
            # A node at index i of the sequence decides the token at index i + 1.
            positions.append(len(plan.session.log))
            positions += [node.position + 1 for node in plan.nodes]
        samples = sample_nodes(logits, params, seeds, positions)
        split: list[list[int]] = []
        for plan in rows:
            count = 1 + len(plan.nodes)
            split.append(samples[:count])
            samples = samples[count:]
        return split

    def _commit(self, plan: _RowPlan, samples: Sequence[int]) -> None:
        session, nodes = plan.session, plan.nodes
        verdict = judge(
            session.tree.root,
            nodes,
            samples,
            stop_ids=session.stop_ids,
            tokens_left=session.tokens_left,
            rule=self._rule,
        )
        base_length = len(session.log)
        sources = session.commit(verdict, nodes)
        if nodes:
            # Slot 0 is the tip, slot 1 + i is nodes[i]: what was accepted becomes prefix.
            session.cache.advance([0, *(1 + index for index in verdict.accepted)])
        last = verdict.finish_reason is not None
        commit = Commit(session.spec.epoch, base_length, verdict.tokens, last)
        report = CommitReport(session.counters(), sources, verdict.finish_reason)
        self._to(session.connection).commits.append((session.spec.session, commit, report))
        if last:
            self._remember(session, report)
            self._close(session)

    def _remember(self, session: Session, report: CommitReport) -> None:
        spec = session.spec
        self._ended[spec.session] = Ended(
            session.connection, spec.epoch, tuple(session.log.tokens), report
        )
        if len(self._ended) > _ENDED_KEPT_MAX:
            self._ended.popitem(last=False)


def _row(plan: _RowPlan) -> Row:
    """Lay a plan out: a chain straight into the prefix, or the tip and its nodes as a tree."""
    cache = plan.session.cache
    if not plan.nodes:
        wanted = [len(plan.tokens) - 1] if plan.decodes else []
        return Row(cache, plan.tokens, None, wanted)
    slot_of: dict[Node, int] = {plan.session.tree.root: 0}
    parents = [-1]
    for slot, node in enumerate(plan.nodes, start=1):
        assert node.parent is not None, "chosen nodes descend from the root"
        parents.append(slot_of[node.parent])
        slot_of[node] = slot
    tokens = (*plan.tokens, *(node.token for node in plan.nodes))
    return Row(cache, tokens, parents, range(len(tokens)))
