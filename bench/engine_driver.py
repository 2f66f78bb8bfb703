"""A verify engine driven in process, without network, and the times of what it commits."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from bench.rates import Run
from outrider.domain import (
    Candidates,
    Commit,
    CommitReport,
    SamplingParams,
    SessionSpec,
    StepReport,
)
from outrider.model.language_model import LanguageModel
from outrider.wire import draft_from_bytes
from verifier_service.config import EngineConfig
from verifier_service.engine import Engine
from verifier_service.messages import Abort, Offer, Open, Outputs

T = TypeVar("T")

GREEDY = SamplingParams(temperature=0.0)

_CONNECTION = 1
_EPOCH = 1
_SOURCE = 1
_WAIT_MAX_S = 900.0


class ModelThread(Executor):
    """The one thread of the process that runs torch, for one engine after the other.

    An engine shuts its thread down when it stops; this one goes on until `close`.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="model")

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Run a call on the thread."""
        return self._pool.submit(fn, *args, **kwargs)

    def run(self, fn: Callable[..., T], *args: Any) -> T:
        """Run a call on the thread and wait for it."""
        return self._pool.submit(fn, *args).result()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Do nothing: engines call it."""

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown()


class EngineError(Exception):
    """The engine refused or ended a session."""


@dataclass(slots=True)
class Trace:
    """What became of one session."""

    opened_s: float
    prompt: tuple[int, ...]
    commits: list[tuple[float, int]] = field(default_factory=list)
    """(second, tokens), one entry a commit."""
    ids: list[int] = field(default_factory=list)
    accepted: int = 0
    """Draft tokens accepted so far."""
    accepted_by_source: dict[int, int] = field(default_factory=dict)
    finished: bool = False


class EngineDriver:
    """Opens sessions and records commits. Calls may come from any one thread."""

    def __init__(self, model: LanguageModel, config: EngineConfig, thread: ModelThread) -> None:
        self.steps: list[tuple[float, int]] = []
        """(end, tokens committed) of each step that committed something."""
        self.reports: list[StepReport] = []
        """What the engine says of its steps, in order; whoever needs them clears them."""
        self.candidates: Mapping[int, Candidates] = {}
        """Of the step whose commits are being told, by session."""
        self.kv_tokens_used_max = 0
        self.on_commits: Callable[[list[tuple[int, Commit, Trace]]], None] | None = None
        """Told of a step's commits at once, on the engine's thread: must be quick."""
        self._traces: dict[int, Trace] = {}
        self._numbers = itertools.count(1)
        self._changed = threading.Condition()
        self._fault: str | None = None
        self.engine: Engine = thread.run(Engine, model, config, self._emit)
        thread.run(self.engine.warm_up)
        self.engine.start(thread)

    def open(
        self,
        prompt: Sequence[int],
        tokens_max: int,
        salt: str,
        sampling: SamplingParams = GREEDY,
        seed: int = 1,
        candidates: int = 0,
    ) -> int:
        """Open a session that ignores the end of the text; returns its number.

        Only sessions of the same salt may share KV of equal prefixes. `candidates` are the
        target's most probable ids, as many as are wanted of every node.
        """
        number = next(self._numbers)
        spec = SessionSpec(
            session=number,
            epoch=_EPOCH,
            prompt=tuple(prompt),
            committed=(),
            sampling=sampling,
            seed=seed,
            tokens_max=tokens_max,
            ignore_eos=True,
            cache_salt=salt,
            candidates=candidates,
        )
        with self._changed:
            self._traces[number] = Trace(time.perf_counter(), spec.prompt)
        self.engine.submit(Open(_CONNECTION, spec))
        return number

    def offer(self, session: int, data: bytes, source: int = _SOURCE) -> None:
        """Hand a serialized draft in, as the edge does."""
        if not self.engine.passes_over(_CONNECTION, session, source):
            self.engine.submit(Offer(_CONNECTION, session, source, draft_from_bytes(data)))

    def trace(self, session: int) -> Trace:
        """What became of a session; changes while it runs."""
        return self._traces[session]

    def wait(self, done: Callable[[], bool]) -> None:
        """Wait until `done`, which is asked after each commit. Raises EngineError."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._fault is not None or done(), _WAIT_MAX_S):
                raise EngineError(f"nothing for {_WAIT_MAX_S:g} s")
            if self._fault is not None:
                raise EngineError(self._fault)

    def wait_finished(self, sessions: Sequence[int]) -> None:
        """Wait until all of them have ended."""
        self.wait(lambda: all(self._traces[number].finished for number in sessions))

    def abort(self, sessions: Sequence[int]) -> None:
        """End sessions and wait until the engine has let go of them."""
        for number in sessions:
            self.engine.submit(Abort(_CONNECTION, number, _EPOCH))
        deadline = time.perf_counter() + _WAIT_MAX_S
        while self.engine.load and time.perf_counter() < deadline:
            time.sleep(0.001)  # the engine says nothing of an abort

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int, salt: str) -> Run:
        """Decode `tokens` tokens for each prompt, all opened at once."""
        started = time.perf_counter()
        sessions = [
            self.open(prompt, tokens, f"{salt}-{index}") for index, prompt in enumerate(prompts)
        ]
        self.wait_finished(sessions)
        traces = [self._traces[number] for number in sessions]
        return Run(
            tuple(
                tuple(at - started for at, count in trace.commits for _ in range(count))
                for trace in traces
            ),
            tuple(tuple(trace.ids) for trace in traces),
        )

    def stop(self) -> None:
        """Stop the engine; its sessions end first."""
        self.abort([number for number, trace in self._traces.items() if not trace.finished])
        self.engine.stop()

    def _emit(self, outputs: dict[int, Outputs]) -> None:
        now = time.perf_counter()
        mine = outputs.get(_CONNECTION)
        if mine is None:
            return
        with self._changed:
            for rejection in mine.rejections:
                self._fault = f"{rejection.code.value}: {rejection.message}"
            for number, commit, report in mine.commits:
                self._record(now, number, commit, report)
            if mine.commits:
                self.steps.append((now, sum(len(c.tokens) for _, c, _ in mine.commits)))
                self.candidates = mine.candidates
                if self.on_commits is not None:
                    self.on_commits([(n, c, self._traces[n]) for n, c, _ in mine.commits])
            if mine.step is not None:
                self.reports.append(mine.step)
                self.kv_tokens_used_max = max(self.kv_tokens_used_max, mine.step.kv_tokens_used)
            self._changed.notify_all()

    def _record(self, now: float, number: int, commit: Commit, report: CommitReport) -> None:
        trace = self._traces[number]
        trace.commits.append((now, len(commit.tokens)))
        trace.ids.extend(commit.tokens)
        trace.accepted = report.counters.accepted_draft_tokens
        trace.accepted_by_source = dict(report.counters.accepted_by_source)
        trace.finished = commit.last
