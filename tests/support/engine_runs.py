"""Many sessions through one verify engine, driven directly, with guesses from a script."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from outrider.committed import digest
from outrider.domain import (
    Draft,
    FinishReason,
    PromptLogprobs,
    Rejection,
    SessionSpec,
    SpeculationCounters,
    TokenLogprobs,
)
from outrider.model.language_model import LanguageModel
from tests.support.flat_times import FlatTimes
from verifier_service.config import EngineConfig
from verifier_service.engine import Engine
from verifier_service.messages import Command, Offer, Open, Outputs

CONNECTION = 1


@dataclass(slots=True)
class Outcome:
    """What became of one session."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)
    finish: FinishReason | None = None
    rejection: Rejection | None = None
    counters: SpeculationCounters = field(default_factory=SpeculationCounters)
    commits: int = 0


Guesser = Callable[[SessionSpec, Sequence[int]], Draft | None]
"""(session, output so far) -> a draft."""


class EngineRun:
    """An engine on its own thread, fed until all sessions have ended."""

    def __init__(
        self,
        model: LanguageModel,
        config: EngineConfig,
        guesser: Guesser | None = None,
        on_commit: Callable[[int, int], Iterable[Command]] | None = None,
    ) -> None:
        """`on_commit(session, commits so far)` gives commands to submit then."""
        self.outcomes: dict[int, Outcome] = {}
        self.engine = Engine(model, config, self._emit, times=FlatTimes())
        self._specs: dict[int, SessionSpec] = {}
        self._left: set[int] = set()
        self._guesser = guesser
        self._on_commit = on_commit
        self._done = threading.Event()

    def run(self, specs: Sequence[SessionSpec], timeout_s: float = 60.0) -> dict[int, Outcome]:
        """Open all sessions at once, decode them to their ends, and stop."""
        for spec in specs:
            self._specs[spec.session] = spec
            self._left.add(spec.session)
            self.outcomes[spec.session] = Outcome(list(spec.committed))
            self.engine.submit(Open(CONNECTION, spec))
            self._guess(spec.session)
        self.engine.start()
        ended = self._done.wait(timeout_s)
        self.engine.stop()
        assert ended, f"sessions {sorted(self._left)} did not end"
        return self.outcomes

    def let_go(self, session: int) -> None:
        """Expect no end of a session: somebody aborts it."""
        self._left.discard(session)

    def _emit(self, outputs: dict[int, Outputs]) -> None:
        mine = outputs.get(CONNECTION, Outputs())
        for rejection in mine.rejections:
            self.outcomes[rejection.session].rejection = rejection
            self._left.discard(rejection.session)
        for piece in mine.prompt_logprobs:
            self.outcomes[piece.session].prompt_logprobs.append(piece)
        for number, commit, report in mine.commits:
            outcome = self.outcomes[number]
            assert commit.base_length == len(self._specs[number].prompt) + len(outcome.ids)
            outcome.ids += commit.tokens
            outcome.logprobs += report.logprobs
            outcome.counters = report.counters
            outcome.finish = report.finish_reason
            outcome.commits += 1
            if commit.last:
                self._left.discard(number)
            else:
                self._guess(number)
            if self._on_commit is not None:
                for command in self._on_commit(number, outcome.commits):
                    self.engine.submit(command)
        if not self._left:
            self._done.set()

    def _guess(self, number: int) -> None:
        if self._guesser is None:
            return
        draft = self._guesser(self._specs[number], self.outcomes[number].ids)
        if draft is not None:
            self.engine.submit(Offer(CONNECTION, number, 1, draft))


def guess(
    spec: SessionSpec, outputs: Sequence[int], tokens: Sequence[int], parents: Sequence[int]
) -> Draft:
    """Build a draft below the present tip."""
    committed = [*spec.prompt, *outputs]
    return Draft(
        spec.epoch,
        len(committed),
        digest(committed),
        tuple(tokens),
        tuple(parents),
        (-0.05,) * len(tokens),
    )


def oracle(truth: dict[int, Sequence[int]], depth: int = 4) -> Guesser:
    """Guess what is true, `depth` tokens of it, beside a wrong sibling for each."""

    def guesser(spec: SessionSpec, outputs: Sequence[int]) -> Draft | None:
        right = truth[spec.session][len(outputs) : len(outputs) + depth]
        tokens: list[int] = []
        parents: list[int] = []
        parent = -1
        for token in right:
            # Wrong one first, so that the accepted path has to be moved together.
            tokens += [(token + 1) % 256, token]
            parents += [parent, parent]
            parent = len(tokens) - 1
        return guess(spec, outputs, tokens, parents) if tokens else None

    return guesser
