"""The verify loop: one thread that owns the model and every session on it.

    while running:
        apply what arrived -> plan a batch -> one forward pass -> the rule -> commits

Nothing else touches torch, and nothing else a session but for drafts, which are merged by whoever
submits them while the forward pass is under way. Commands come in through a bounded inbox; each
step's outputs leave through one callback. The engine knows nothing of gRPC, Redis or text.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

from outrider.domain import (
    Commit,
    CommitReport,
    PromptLogprobs,
    Rejection,
    RejectionCode,
    Resync,
    SessionSpec,
    StepReport,
    TokenLogprobs,
)
from outrider.errors import InvalidRequest
from outrider.model.language_model import LanguageModel, Logits, Row
from outrider.serving.pulse import Pulse
from outrider.serving.queues import Inbox
from verifier_service.acceptance import AcceptRule, Verdict, accept_path, judge
from verifier_service.admission import Admission, reject
from verifier_service.calibration import Calibrations
from verifier_service.config import EngineConfig
from verifier_service.deciding import Decider
from verifier_service.grammar import GrammarCompiler, GrammarState
from verifier_service.messages import (
    Abort,
    Command,
    Disconnect,
    Drain,
    GiveBack,
    Lend,
    Offer,
    Open,
    Outputs,
    PulledBlock,
    PullOver,
    Repeat,
)
from verifier_service.planning import Planner, RowPlan, Seat, kv_read
from verifier_service.pulls import Pulls
from verifier_service.sampling_step import (
    Sampled,
    candidates_of,
    committed_logprobs,
    sample_rows,
)
from verifier_service.session import Session
from verifier_service.step_times import StepTimes

_IDLE_WAIT_S = 0.5
_ENDED_KEPT_MAX = 1_024
_WARM_UP_CONTEXT = 64
_PULL_SHARE = 0.1
"""Of a step, that blocks from peers may take up beside it."""
_PULL_WAIT_S = 0.01
"""Between looks at what comes from peers while there is nothing else to do."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ended:
    """What is remembered of a session that ended, to answer a late resync.

    No more than that: a grammar's states alone may be megabytes.
    """

    connection: int
    epoch: int
    tokens: tuple[int, ...]
    report: CommitReport
    logprobs: tuple[TokenLogprobs, ...]
    """Of the last tokens: those decided here, if they were asked for."""


class Engine:
    """Continuous batching over sessions, token trees as native input."""

    def __init__(
        self,
        model: LanguageModel,
        config: EngineConfig,
        emit: Callable[[dict[int, Outputs]], None],
        *,
        rule: AcceptRule = accept_path,
        times: StepTimes | None = None,
    ) -> None:
        """`rule` and `times` are there for tests that break the one or flatten the other."""
        self.model = model
        self.pool = model.new_pool(config.kv_tokens_max)
        self.times = times or StepTimes()
        self.steps = 0
        self._config = config
        self._emit = emit
        self._rule = rule
        self._inbox: Inbox[Command] = Inbox(config.drafts_queued_max)
        self._seats: dict[int, Seat] = {}
        """In the order of admission."""
        self._ended: OrderedDict[int, Ended] = OrderedDict()
        self._outputs: dict[int, Outputs] = {}
        self._computing = threading.Lock()
        """Held to look at `_lent`, and for as long as something is done on account of it."""
        self._lent = False
        """The model computes, and what its thread owns is lent to whoever submits a draft."""
        self._draining = False
        self._eos_ids = frozenset(model.eos_ids)
        self._grammars = GrammarCompiler(
            model.tokenizer_files, model.vocabulary_size, model.eos_ids
        )
        self._admission = Admission(
            config, model.vocabulary_size, model.length_max, self.pool.tokens_max
        )
        self._calibrations = Calibrations()
        self._planner = Planner(self.pool, self.times, config, self._calibrations)
        self.pulls = Pulls(self.pool, self.times, config)
        """KV that peers have computed."""
        self._step_s = 0.0
        """Duration of the last step."""
        self._thread: Executor | None = None
        self._ended_run: Future[None] | None = None
        self.pulse = Pulse()
        """Of the loop, for whoever asks whether it still turns."""

    # --- called from other threads ---

    def start(self, thread: Executor | None = None) -> None:
        """Start the loop on `thread`, the one that loaded the model, or on a new one."""
        self._thread = thread or ThreadPoolExecutor(1, thread_name_prefix="verify")
        self.pulse.beat()
        self._ended_run = self._thread.submit(self._run)

    def passes_over(self, connection: int, session: int, source: int) -> bool:
        """Return whether a draft shall be dropped unread, for its source proved hopeless.

        To be asked for each draft before it is parsed. Most drafts of such a source are passed
        over; the rest are read, so that one that turns honest is noticed.
        """
        served = self._session_of(connection, session)
        return served is not None and served.passes_over(source)

    def _session_of(self, connection: int, number: int) -> Session | None:
        seat = self._seats.get(number)
        return seat.session if seat is not None and seat.session.connection == connection else None

    def submit(self, command: Command) -> None:
        """Queue a command; drafts are dropped when too many wait.

        A draft that comes while the model computes is merged at once, by the caller; what peers
        borrow is looked up then as well.
        """
        if isinstance(command, Lend | GiveBack):
            self._submit_loan(command)
            return
        if isinstance(command, Offer) and self._computing.acquire(blocking=False):
            try:
                # In the order of arrival: its session may still wait to be opened.
                if self._lent and not self._inbox.waiting and not self._evicts(command):
                    self._apply_safely(command)
                    return
            finally:
                self._computing.release()
        queued = self._inbox.put(command, droppable=isinstance(command, Offer))
        if not queued and isinstance(command, Offer):
            session = self._session_of(command.connection, command.session)
            if session is not None:
                session.drop_unread("queue_full")

    def _submit_loan(self, command: Lend | GiveBack) -> None:
        with self._computing:
            if self._lent:
                # The model reads its sessions' tables meanwhile, and not the books of the pool.
                self._apply_safely(command)
                return
        if not self._inbox.put(command) and isinstance(command, Lend):
            command.reply(None)

    def _evicts(self, offer: Offer) -> bool:
        """True if merging a draft may cost the tree nodes, which a step may be verifying."""
        seat = self._seats.get(offer.session)
        if seat is None or offer.draft is None:
            return False
        tree = seat.session.tree
        return tree.size + len(offer.draft.tokens) > tree.nodes_max

    def stop(self, timeout_s: float = 30.0) -> None:
        """End the loop after the step under way, and its thread."""
        self._inbox.close()
        if self._ended_run is not None and self._thread is not None:
            self._ended_run.result(timeout_s)
            self._thread.shutdown()

    @property
    def load(self) -> int:
        """Sessions in use."""
        return len(self._seats)

    @property
    def kv_tokens_used(self) -> int:
        """Tokens in KV blocks that sessions hold, shared ones counted once."""
        return self.pool.tokens_used

    @property
    def preemptions(self) -> int:
        """How often a session lost its KV to make room for another."""
        return self._planner.preemptions

    def warm_up(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Measure T(N) at the sizes that steps will have. Call before `start`.

        A model that compiles its steps does so here, size by size.
        """
        sizes = [size for size in (1, 2, 4, 8, 16, 32, 64) if size <= self._config.step_nodes_max]
        sizes.append(self._config.prefill_tokens_max)
        room = self.pool.tokens_max - _WARM_UP_CONTEXT
        sizes = [size for size in sizes if size <= room]
        if not sizes:
            return
        cache = self.pool.new_cache()
        try:
            self.model.forward([Row(cache, [0] * _WARM_UP_CONTEXT, None, [0])])
            for done, size in enumerate(sizes):
                best = float("inf")
                for _ in range(3):
                    row = Row(cache, [0] * size, [-1] * size, range(min(size, 64)))
                    started = time.perf_counter()
                    logits = self.model.forward([row])
                    logits[:1].argmax().item()  # a GPU is waited for
                    best = min(best, time.perf_counter() - started)
                    cache.truncate(_WARM_UP_CONTEXT)
                self.times.observe(size, best)
                if progress is not None:
                    progress(done + 1, len(sizes))
        finally:
            cache.release()

    # --- the thread ---

    def _run(self) -> None:
        try:
            wait_s = _IDLE_WAIT_S
            while not self._inbox.closed:
                self.pulse.beat()
                wait_s = self._turn(wait_s)
        finally:
            for seat in list(self._seats.values()):
                self._close(seat)

    def _turn(self, wait_s: float) -> float:
        """Wait so long for commands, apply them, compute; returns how long to wait next time."""
        for command in self._inbox.take_all(wait_s=wait_s):
            self._apply_safely(command)
        # Whoever waits for a peer computes nothing, and keeps nobody busy.
        working = any(not seat.pulling for seat in self._seats.values())
        if self.pulls.active:
            self._settle_pulls(_PULL_SHARE * self._step_s if working else math.inf)
            working = any(not seat.pulling for seat in self._seats.values())
        stepped = working and self._step()
        self._flush()
        return 0.0 if stepped else _PULL_WAIT_S if self._seats else _IDLE_WAIT_S

    def _apply_safely(self, command: Command) -> None:
        try:
            self._apply(command)
        except Exception:
            # One bad message must not end the thread that serves everybody.
            _log.exception("command failed: %s", type(command).__name__)

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
                seat = self._seats.get(number)
                if seat is not None and seat.session.connection == connection:
                    seat.session.merge(draft, source)
            case Repeat(connection, resync):
                self._repeat(connection, resync)
            case Abort(connection, number, epoch):
                seat = self._seats.get(number)
                if (
                    seat is not None
                    and seat.session.connection == connection
                    and seat.session.spec.epoch <= epoch
                ):
                    self._close(seat)
            case Disconnect(connection):
                for seat in list(self._seats.values()):
                    if seat.session.connection == connection:
                        self._close(seat)
            case Drain():
                self._draining = True
            case Lend() | GiveBack() | PulledBlock() | PullOver():
                self._exchange(command)

    def _exchange(self, command: Lend | GiveBack | PulledBlock | PullOver) -> None:
        """Apply what has to do with KV of other verifiers."""
        match command:
            case Lend(digest, reply):
                block = self.pool.blocks.share(digest)
                if not reply(block) and block is not None:
                    self.pool.blocks.release([block])
            case GiveBack(block):
                self.pool.blocks.release([block])
            case PulledBlock():
                self.pulls.came(command)
            case PullOver():
                self.pulls.over(command, time.perf_counter())

    def _settle_pulls(self, budget_s: float) -> None:
        """Take in what has come from peers: beside sessions that compute, a little at a time."""
        for connection, report in self.pulls.settle(time.perf_counter, budget_s):
            self._to(connection).kv_pulls.append(report)

    def _open(self, connection: int, spec: SessionSpec) -> None:
        known = self._seats.get(spec.session)
        refusal = self._admission.refusal(
            spec,
            others=[seat.session.spec for seat in self._seats.values() if seat is not known],
            known_epoch=self._known_epoch(spec.session),
            draining=self._draining,
        )
        if refusal is not None:
            self._to(connection).rejections.append(refusal)
            return
        stop_ids = spec.stop_ids | (frozenset() if spec.ignore_eos else self._eos_ids)
        try:
            decider = Decider(spec, stop_ids, self._grammar(spec))
        except InvalidRequest as error:
            code = RejectionCode.INVALID
            self._to(connection).rejections.append(reject(spec, code, error.message, error.field))
            return
        if known is not None:
            # A newer epoch fences whoever held the session before.
            self._to(known.session.connection).rejections.append(
                reject(
                    known.session.spec,
                    RejectionCode.STALE_EPOCH,
                    "another orchestrator or a newer placement took the session over",
                    current_epoch=spec.epoch,
                )
            )
            self._close(known)
        # Whose prompt's log-probabilities are wanted must compute all of it.
        salt = spec.cache_salt if spec.prompt_logprobs is None else None
        session = Session(
            spec,
            connection,
            self.pool.new_cache(salt),
            eos_ids=self._eos_ids,
            vocabulary_size=self.model.vocabulary_size,
            tree_nodes_max=self._config.tree_nodes_max,
            tree_depth_max=self._config.tree_depth_max,
            calibrations=self._calibrations,
            own_guesses=spec.own_guesses and self._config.own_guesses,
        )
        seat = self._seats[spec.session] = Seat(session, decider)
        self._to(connection).opened.append((spec.session, spec.epoch))
        report = self.pulls.consider(seat, self._seats.values(), time.perf_counter())
        if report is not None:
            self._to(connection).kv_pulls.append(report)

    def _grammar(self, spec: SessionSpec) -> GrammarState | None:
        grammar = spec.sampling.grammar
        return None if grammar is None else self._grammars.compile(grammar)

    def _known_epoch(self, session: int) -> int:
        seat, ended = self._seats.get(session), self._ended.get(session)
        return seat.session.spec.epoch if seat else ended.epoch if ended else 0

    def _repeat(self, connection: int, resync: Resync) -> None:
        seat = self._seats.get(resync.session)
        ended = self._ended.get(resync.session)
        if seat is not None and seat.session.connection == connection:
            session = seat.session
            epoch, tokens = session.spec.epoch, tuple(session.log.since(resync.have_length))
            report = CommitReport(session.counters(), ())
            logprobs = seat.decider.logprobs_since(resync.have_length)
        elif ended is not None and ended.connection == connection:
            epoch, tokens = ended.epoch, ended.tokens[resync.have_length :]
            report, first = ended.report, len(ended.tokens) - len(ended.logprobs)
            logprobs = ended.logprobs[max(0, resync.have_length - first) :]
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
        report = replace(report, logprobs=logprobs)
        commit = Commit(epoch, resync.have_length, tokens, report.finish_reason is not None)
        self._to(connection).commits.append((resync.session, commit, report))

    def _close(self, seat: Seat) -> None:
        self.pulls.leave(seat)
        seat.session.cache.release()
        del self._seats[seat.session.spec.session]

    # --- a verify step ---

    def _step(self) -> bool:
        """Compute something; False if all that could be computed waits for KV from peers."""
        plans: list[RowPlan] = []
        try:
            plans = self._planner.plan(self._seats.values())
            refused = self._planner.refused
            for seat, error in refused:
                self._fail(seat, RejectionCode.INVALID, error)
            if refused and not plans:
                return True
            if not plans and any(seat.pulling for seat in self._seats.values()):
                return False
            assert plans, "the session admitted first always computes something"
            started = time.perf_counter()
            logits = self._forward([plan.row() for plan in plans])
            sampled = sample_rows(logits, plans)
        except Exception:
            _log.exception("verify step failed; its sessions end")
            for seat in [plan.seat for plan in plans] or list(self._seats.values()):
                self._fail(seat)
            return True
        if self._config.step_delay_s:
            time.sleep(self._config.step_delay_s)
        duration_s = self._step_s = time.perf_counter() - started
        tokens = sum(plan.size for plan in plans)
        rows = sum(plan.decodes for plan in plans)
        prefill = sum(plan.size for plan in plans if plan.prefills)
        plain = sum(len(plan.tokens) for plan in plans)
        self.times.observe(
            tokens,
            duration_s,
            kv_tokens=kv_read(plans),
            prefill_tokens=prefill,
        )
        plain_s = self.times.predict(plain, prefill_tokens=prefill)
        self.steps += 1
        self._decide(sampled)
        report = StepReport(
            duration_s,
            rows=rows,
            tokens=tokens,
            kv_tokens_used=self.pool.tokens_used,
            waiting=sum(seat.waiting and not seat.pulling for seat in self._seats.values()),
            plain_s=plain_s,
            started_s=started,
            pay_min=min(1.0, self._calibrations.pay_min),
            prefill_tokens=prefill,
        )
        # To those in prefill, and to those that wait: a step is a sign of life.
        connections = {plan.seat.session.connection for plan in plans}
        connections |= {seat.session.connection for seat in self._seats.values()}
        for connection in connections:
            self._to(connection).step = report
        return True

    def _forward(self, rows: Sequence[Row]) -> Logits:
        """Run the model; sessions are lent to `submit` for as long."""
        self._lent = True
        try:
            return self.model.forward(rows)
        finally:
            # A draft that is being merged is waited for.
            with self._computing:
                self._lent = False

    def _decide(self, sampled: Sequence[Sampled]) -> None:
        """Apply the rule to every row, then make the verdicts true, each session for itself."""
        verdicts: list[Verdict | None] = []
        for row in sampled:
            session = row.plan.seat.session
            verdicts.append(
                judge(
                    session.tree.root,
                    row.plan.nodes,
                    row.samples,
                    stop_ids=session.stop_ids,
                    tokens_left=session.tokens_left,
                    rule=self._rule,
                )
                if row.plan.decodes
                else None
            )
        logprobs = committed_logprobs(sampled, verdicts)
        for row, verdict, scores in zip(sampled, verdicts, logprobs, strict=True):
            seat = row.plan.seat
            try:
                self._report_prompt(row)
                self._report_candidates(row)
                if verdict is not None:
                    self._commit(row.plan, verdict, scores)
                seat.session.cache.publish(seat.session.log.tokens)
                if verdict is not None and verdict.finish_reason is not None:
                    self._close(seat)
            except InvalidRequest as error:
                # A limit of the session's own grammar.
                self._fail(seat, RejectionCode.INVALID, error)
            except Exception:
                named = {"request_id": seat.session.spec.origin.request_id}
                _log.exception("commit failed; its session ends", extra=named)
                self._fail(seat)

    def _fail(
        self,
        seat: Seat,
        code: RejectionCode = RejectionCode.INTERNAL,
        error: InvalidRequest | None = None,
    ) -> None:
        """End one session; the others go on. Without an `error` it was a defect of ours."""
        message = "the verify step failed" if error is None else error.message
        field = "" if error is None else error.field
        self._to(seat.session.connection).rejections.append(
            reject(seat.session.spec, code, message, field=field)
        )
        self._close(seat)

    def _report_prompt(self, row: Sampled) -> None:
        if not row.prompt_logprobs:
            return
        spec, decider = row.plan.seat.session.spec, row.plan.seat.decider
        self._to(row.plan.seat.session.connection).prompt_logprobs.append(
            PromptLogprobs(spec.session, spec.epoch, decider.prompt_scored, row.prompt_logprobs)
        )
        decider.prompt_scored += len(row.prompt_logprobs)

    def _report_candidates(self, row: Sampled) -> None:
        candidates = candidates_of(row)
        if candidates is not None:
            session = row.plan.seat.session
            number = session.spec.session
            self._to(session.connection).candidates[number] = candidates

    def _commit(self, plan: RowPlan, verdict: Verdict, logprobs: tuple[TokenLogprobs, ...]) -> None:
        session, nodes = plan.seat.session, plan.nodes
        base_length = len(session.log)
        sources = session.commit(verdict, nodes)
        if nodes:
            # Slot 0 is the tip, slot 1 + i is nodes[i]: what was accepted becomes prefix.
            session.cache.advance([0, *(1 + index for index in verdict.accepted)])
        plan.seat.decider.advance(verdict.tokens, logprobs)
        last = verdict.finish_reason is not None
        commit = Commit(session.spec.epoch, base_length, verdict.tokens, last)
        report = CommitReport(session.counters(), sources, verdict.finish_reason, logprobs)
        self._to(session.connection).commits.append((session.spec.session, commit, report))
        if _log.isEnabledFor(logging.DEBUG):
            # Digests, not ids: what is said to whom is in no log.
            length = len(session.log)
            _log.debug(
                "committed session=%016x epoch=%d base=%d length=%d digest=%016x",
                session.spec.session,
                session.spec.epoch,
                base_length,
                length,
                session.log.digest_at(length),
            )
        if last:
            self._remember(plan.seat, report)
        else:
            session.guess()

    def _remember(self, seat: Seat, report: CommitReport) -> None:
        session = seat.session
        self._ended[session.spec.session] = Ended(
            session.connection,
            session.spec.epoch,
            tuple(session.log.tokens),
            report,
            tuple(seat.decider.logprobs),
        )
        if len(self._ended) > _ENDED_KEPT_MAX:
            self._ended.popitem(last=False)
