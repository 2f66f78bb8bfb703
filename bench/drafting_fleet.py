"""Drafters beside an engine, in one process: what they say to each other goes through no network.

Target and each draft model compute on a thread of their own, with one core each, as separate
processes on a small machine would.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from bench.engine_driver import EngineDriver, Trace
from drafter_service.config import GrowingConfig
from drafter_service.growing import Grower
from drafter_service.messages import Bind, Follow, Outputs, Unbind
from drafter_service.mirror import Mirror
from drafter_service.proposers.base import CandidateTaker, Proposer
from outrider.domain import BindSpec, Candidates, Commit, DraftBudget, ModelInfo, SamplingParams
from outrider.draft_tree import Advance
from outrider.model.threads import set_threads
from outrider.wire import draft_to_bytes

BUDGET = DraftBudget(nodes_max=256, depth_max=64, flush_interval_s=0.001, width_max=3)
_EPOCH = 1
_CONNECTION = 1


class Timed:
    """A proposer, and what its steps took."""

    def __init__(self, inner: Proposer) -> None:
        self.busy_s = 0.0
        self.steps = 0
        """Growing steps; for who says everything at once, commits that were answered."""
        self.on_path: dict[int, bool] = {}
        """By a text's length after a commit, whether all of it had been guessed when it came."""
        self._inner = inner

    @property
    def info(self) -> ModelInfo:
        """See `Proposer.info`."""
        return self._inner.info

    @property
    def leaves_max(self) -> int:
        """See `Proposer.leaves_max`."""
        return self._inner.leaves_max

    def open(self, mirror: Mirror) -> None:
        """See `Proposer.open`."""
        self._inner.open(mirror)

    def advanced(self, mirror: Mirror, tokens: Sequence[int], advance: Advance) -> None:
        """See `Proposer.advanced`."""
        self.on_path[len(mirror.log)] = len(advance.matched) == len(tokens)
        begin_s = time.perf_counter()
        self._inner.advanced(mirror, tokens, advance)
        self.busy_s += time.perf_counter() - begin_s
        self.steps += not self._inner.leaves_max

    def take(self, mirror: Mirror, candidates: Candidates) -> None:
        """See `CandidateTaker.take`."""
        if isinstance(self._inner, CandidateTaker):
            self._inner.take(mirror, candidates)

    def close(self, mirror: Mirror) -> None:
        """See `Proposer.close`."""
        self._inner.close(mirror)

    def grow(self, mirrors: Sequence[Mirror]) -> bool:
        """See `Proposer.grow`."""
        begin_s = time.perf_counter()
        busy = self._inner.grow(mirrors)
        if busy or not self._inner.leaves_max:
            self.busy_s += time.perf_counter() - begin_s
        self.steps += busy
        return busy

    @property
    def step_ms(self) -> float:
        """Mean of a step; 0 before the first."""
        return 1_000 * self.busy_s / self.steps if self.steps else 0.0

    def reset(self) -> None:
        """Begin to measure anew."""
        self.busy_s, self.steps = 0.0, 0
        self.on_path.clear()


class NeighbourDrafter:
    """A grower in the process of the engine."""

    def __init__(self, driver: EngineDriver, source: int, make: Callable[[], Proposer]) -> None:
        """`make` loads the proposer, on the thread that will run it."""
        self._driver = driver
        self._source = source
        self._sessions: set[int] = set()
        thread = ThreadPoolExecutor(1, thread_name_prefix=f"drafter-{source}")
        thread.submit(set_threads, 1).result()
        self.proposer = Timed(thread.submit(make).result())
        self._grower = Grower(self.proposer, GrowingConfig(), self._emit)
        self._grower.start(thread)

    def close(self) -> None:
        """End the thread."""
        self._grower.stop()

    def bind(self, spec: BindSpec) -> None:
        """Begin to guess for a session."""
        self._sessions.add(spec.session)
        self._grower.submit(Bind(_CONNECTION, spec))

    def unbind(self, session: int) -> None:
        """Forget a session."""
        self._sessions.discard(session)
        self._grower.submit(Unbind(_CONNECTION, session, 1))

    def follow(self, session: int, commit: Commit, candidates: Candidates | None) -> None:
        """Hear of a commit, and of what else the target thought probable."""
        if session in self._sessions:
            self._grower.submit(Follow(_CONNECTION, session, commit, candidates))

    def _emit(self, outputs: dict[int, Outputs]) -> None:
        """Pass on what the grower says; called on its thread."""
        for output in outputs.values():
            for session, _, draft in output.drafts:
                self._driver.offer(session, draft_to_bytes(draft), self._source)
            for resync in output.resyncs:
                trace = self._driver.trace(resync.session)
                missing = tuple(trace.ids[resync.have_length - len(trace.prompt) :])
                commit = Commit(_EPOCH, resync.have_length, missing)
                self._grower.submit(Follow(_CONNECTION, resync.session, commit))


class DraftingFleet:
    """An engine and its drafters by name; sessions choose among them."""

    def __init__(self, driver: EngineDriver, vocabulary_size: int, fingerprint: str) -> None:
        self.drafters: dict[str, NeighbourDrafter] = {}
        self._driver = driver
        self._vocabulary_size = vocabulary_size
        self._fingerprint = fingerprint
        self._lock = threading.Lock()
        driver.on_commits = self._tell

    def add(self, name: str, make: Callable[[], Proposer]) -> NeighbourDrafter:
        """Start a drafter."""
        drafter = NeighbourDrafter(self._driver, len(self.drafters) + 1, make)
        with self._lock:
            self.drafters[name] = drafter
        return drafter

    def close(self) -> None:
        """End the drafters; the engine is the caller's."""
        self._driver.on_commits = None
        for drafter in self.drafters.values():
            drafter.close()

    def run(
        self,
        names: Sequence[str],
        prompt: Sequence[int],
        tokens: int,
        sampling: SamplingParams,
        *,
        seed: int,
        salt: str,
    ) -> Trace:
        """Decode one session with some of the drafters, and wait for its end."""
        infos = [self.drafters[name].proposer.info for name in names]
        candidates = max((info.candidates for info in infos), default=0)
        number = self._driver.open(prompt, tokens, salt, sampling, seed, candidates)
        spec = BindSpec(
            session=number,
            epoch=_EPOCH,
            binding=1,
            prompt=tuple(prompt),
            committed=(),
            sampling=sampling,
            seed=seed,
            tokenizer_fingerprint=self._fingerprint,
            vocabulary_size=self._vocabulary_size,
            budget=BUDGET,
            cache_salt=salt,
        )
        for name in names:
            self.drafters[name].bind(spec)
        try:
            self._driver.wait_finished([number])
        finally:
            for name in names:
                self.drafters[name].unbind(number)
        return self._driver.trace(number)

    def _tell(self, step: list[tuple[int, Commit, Trace]]) -> None:
        """Pass a step's commits on; called on the engine's thread."""
        with self._lock:
            drafters = list(self.drafters.values())
        for session, commit, _ in step:
            for drafter in drafters:
                drafter.follow(session, commit, self._driver.candidates.get(session))
