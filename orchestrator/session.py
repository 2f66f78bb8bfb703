"""One session at the orchestrator: a state machine without IO.

`session.step(event)` returns the commands that the driver carries out. The transition table at
the end of this file is the documentation of what may happen when; pairs that are missing there
are listed, with the reason, in `IGNORED`. Nothing here knows gRPC, Redis, time or chance.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

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
    Report,
    Silence,
    UnbindDrafter,
    VerifierLost,
)
from outrider.domain import (
    TARGET_SOURCE,
    Commit,
    FinishReason,
    RejectionCode,
    SessionSpec,
    SpeculationCounters,
    TokenLogprobs,
)
from outrider.errors import (
    Exhausted,
    InternalError,
    InvalidRequest,
    OutriderError,
    StaleEpoch,
    Unavailable,
)

PLACEMENTS_MAX = 4
"""Verifiers tried in a row for one session before it fails: bounded, so that a poison request
ends."""
PROGRESS_TOKENS = 16
"""Committed in one spell, they show that the session is none, so that counting begins anew."""
BINDINGS_LOST_MAX = 16
"""Attachments of a session that may break before it does without drafters: one that flaps is
given up."""


class Piece(Protocol):
    """What a text stream makes of pushed ids; see `orchestrator.text.TextPiece`."""

    @property
    def text(self) -> str: ...
    @property
    def tokens_kept(self) -> int: ...
    @property
    def stopped(self) -> bool: ...


class Text(Protocol):
    """Detokenizer with stop strings; see `orchestrator.text.TextStream`."""

    def push(self, token_ids: Sequence[int]) -> Piece: ...
    def finish(self) -> Piece: ...


class State(enum.Enum):
    """Where a session stands."""

    PLACING = "placing"
    """A verifier is being looked for; no worker has the session."""
    OPENING = "opening"
    """A verifier was asked; it owes nothing yet."""
    DECODING = "decoding"
    """A verifier has it and owes commits."""
    ENDED = "ended"
    """Finished, failed or abandoned; nothing may follow."""


@dataclass(slots=True)
class Session:
    """State of one session; mutated by `step` alone."""

    spec: SessionSpec
    """Epoch and committed tokens are those of the last opening."""
    text: Text
    drafters_wanted: int
    state: State = State.PLACING
    verifier: str | None = None
    output: list[int] = field(default_factory=list)
    """Committed tokens after the prompt."""
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Of the prompt's tokens from the second on, as far as they are known."""
    prompt_delivered: bool = False
    """True once the client has them."""
    bindings: dict[int, str] = field(default_factory=dict)
    """Live attachments: number to drafter's address."""
    bindings_lost: int = 0
    avoided: set[str] = field(default_factory=set)
    """Drafters that refused the session."""
    tried: list[str] = field(default_factory=list)
    """Verifiers that refused, failed or were lost, in order, since there was progress."""
    attempts: int = 0
    """Those of them that count."""
    admitted: bool = False
    """A verifier has taken it once: now it is worth waiting for another one."""
    contested: bool = False
    """It was taken over: its old holder may have opened it under a higher epoch than is known."""
    setback: OutriderError | None = None
    """Why the latest of them did not work out."""
    repeat_asked_at: int | None = None
    """Length for which a repeat is outstanding."""
    report: Report | None = None
    """The last one of this spell; its counters are those of the whole spell."""
    counters_before: SpeculationCounters = field(default_factory=SpeculationCounters)
    """Of spells on earlier verifiers."""

    @property
    def counters(self) -> SpeculationCounters:
        """What speculation did so far. Decoded and added up here: read it seldom."""
        if self.report is None:
            return self.counters_before
        return self.counters_before.plus(self.report.counters)

    @property
    def spell_counters(self) -> SpeculationCounters:
        """As the present verifier last stated them."""
        return SpeculationCounters() if self.report is None else self.report.counters

    @property
    def epoch(self) -> int:
        """The session's fence."""
        return self.spec.epoch

    @property
    def length(self) -> int:
        """Committed tokens, prompt included."""
        return len(self.spec.prompt) + len(self.output)

    def start(self) -> list[Command]:
        """Commands of a new session."""
        return [PlaceVerifier(frozenset())]

    def restore(self, spec: SessionSpec, output: tuple[int, ...], *, ended: bool) -> None:
        """Begin where another orchestrator's journal ends."""
        self.spec, self.contested, self.admitted = spec, True, True
        self.output.extend(output)
        if ended:
            self.state = State.ENDED

    def step(self, event: Event) -> list[Command]:
        """Apply an event; events that do not fit the state are without effect."""
        handler = TRANSITIONS.get((self.state, type(event)))
        return handler(self, event) if handler is not None else []

    # --- handlers: one for each entry of the table ---

    def _on_placed(self, event: Placed) -> list[Command]:
        self.verifier = event.address
        self.state = State.OPENING
        self.spec = replace(
            self.spec,
            epoch=self.epoch + 1,
            committed=tuple(self.output),
            # What the client has need not be computed again.
            prompt_logprobs=None if self.prompt_delivered else self.spec.prompt_logprobs,
        )
        commands: list[Command] = [OpenOnVerifier(self.spec)]
        return [*commands, *self._attach()]

    def _on_not_placed(self, event: NotPlaced) -> list[Command]:
        return self._end(Fail(self.setback or Unavailable(event.reason)))

    def _on_opened(self, event: Opened) -> list[Command]:
        if event.epoch != self.epoch:
            return []
        self.state = State.DECODING
        self.admitted, self.contested = True, False
        return self._deliver_prompt()  # A prompt of one token has nothing to wait for.

    def _on_refused(self, event: Refused) -> list[Command]:
        rejection = event.rejection
        if rejection.epoch != self.epoch:
            return []
        match rejection.code:
            case RejectionCode.INVALID:
                error: OutriderError = InvalidRequest(
                    rejection.field or "request", rejection.message
                )
            case RejectionCode.STALE_EPOCH if self.contested:
                self.spec = replace(self.spec, epoch=max(self.epoch, rejection.current_epoch))
                return self._place_again(StaleEpoch(rejection.message, rejection.current_epoch))
            case RejectionCode.STALE_EPOCH:
                error = StaleEpoch(rejection.message, rejection.current_epoch)
            case RejectionCode.EXHAUSTED:
                exhausted = Exhausted(rejection.message)
                return self._place_again(exhausted, counts=not self.admitted)
            case RejectionCode.DRAINING:
                return self._place_again(Unavailable(rejection.message), counts=False)
            case _:
                return self._place_again(Unavailable(rejection.message))
        return self._end(Fail(error))

    def _on_verifier_lost(self, event: VerifierLost) -> list[Command]:
        return self._place_again(Unavailable(f"the verifier was lost: {event.reason}"))

    def _on_move_pays(self, event: MovePays) -> list[Command]:
        """Go on elsewhere; a safe point is wherever the prompt is known and something was said.

        Between two commits nothing is lost but the step under way.
        """
        if not self.safe_to_move or event.address == self.verifier:
            return []
        return [*self._leave(), *self._on_placed(Placed(event.address))]

    @property
    def safe_to_move(self) -> bool:
        """Its verifier owes nothing but the next commit."""
        said = len(self.output) - len(self.spec.committed)
        owed = self.spec.prompt_logprobs is not None and not self.prompt_delivered
        return self.state is State.DECODING and said > 0 and not owed

    def _leave(self) -> list[Command]:
        """Give up the present verifier, and all that is bound to its epoch."""
        assert self.verifier is not None, "one was asked in every state that leads here"
        commands: list[Command] = [AbortOnVerifier(self.verifier, self.epoch), *self._unbind_all()]
        self.counters_before, self.report = self.counters, None
        self.verifier = None
        self.repeat_asked_at = None
        self.state = State.PLACING
        return commands

    def _place_again(self, setback: OutriderError, *, counts: bool = True) -> list[Command]:
        """Move to another verifier; prompt and committed tokens are all it needs.

        What does not count is bounded by the verifiers that there are, or by the driver's patience.
        """
        assert self.verifier is not None, "one was asked in every state that leads here"
        if len(self.output) - len(self.spec.committed) >= PROGRESS_TOKENS:
            self.tried.clear()
            self.attempts = 0
        self.tried.append(self.verifier)
        self.attempts += counts
        self.setback = setback
        if self.attempts >= PLACEMENTS_MAX:
            return self._end(Fail(setback))
        return [*self._leave(), PlaceVerifier(frozenset(self.tried))]

    def _on_prompt_scored(self, event: PromptScored) -> list[Command]:
        piece = event.piece
        known = len(self.prompt_logprobs) + 1 - piece.start
        if piece.epoch != self.epoch or self._prompt_known or known < 0:
            return []  # What is missing will be missed at the first commit.
        fresh = piece.tokens[known:]
        start = 1 + len(self.prompt_logprobs)
        if tuple(entry.token for entry in fresh) != self.spec.prompt[start : start + len(fresh)]:
            return self._end(Fail(InternalError("the verifier scored another prompt")))
        self.prompt_logprobs += fresh
        return self._deliver_prompt()

    @property
    def _prompt_known(self) -> bool:
        """True if the prompt's log-probabilities are complete, or not asked for."""
        if self.spec.prompt_logprobs is None:
            return True
        return len(self.prompt_logprobs) == len(self.spec.prompt) - 1

    def _deliver_prompt(self) -> list[Command]:
        wanted = self.spec.prompt_logprobs is not None and not self.prompt_delivered
        if not (wanted and self._prompt_known):
            return []
        self.prompt_delivered = True
        return [DeliverPrompt(tuple(self.prompt_logprobs))]

    def _on_committed(self, event: Committed) -> list[Command]:
        commit, report = event
        if commit.epoch != self.spec.epoch:
            return []
        known = self.length - commit.base_length
        if known < 0:
            return self._ask_repeat()
        if known and not self._agrees(commit, known):
            return self._end(Fail(InternalError("the verifier contradicts its own commits")))
        fault = self._logprobs_fault(event)
        if fault is not None:
            return self._end(Fail(InternalError(fault)))
        self.repeat_asked_at = None
        self.report = report
        sources = report.sources
        if len(sources) != len(commit.tokens):  # a repeat, which has forgotten them
            sources = (TARGET_SOURCE,) * len(commit.tokens)
        # Unlike sources, log-probabilities are repeated.
        logprobs = report.logprobs if self.spec.logprobs is not None else ()
        if known:
            commit = Commit(commit.epoch, self.length, commit.tokens[known:], commit.last)
            sources, logprobs = sources[known:], logprobs[known:]
        return self._deliver(commit, sources, logprobs, report.finish_reason, verbatim=not known)

    def _logprobs_fault(self, event: Committed) -> str | None:
        """Say which log-probabilities a commit should have come with and did not, or None."""
        tokens = event.commit.tokens
        # A repeat that was asked for during prefill holds neither.
        if (tokens or event.report.finish_reason) and not self._prompt_known:
            return "the verifier did not send the log-probabilities of the whole prompt"
        if self.spec.logprobs is not None:
            scored = tuple(entry.token for entry in event.report.logprobs)
            if scored != tokens:
                return "the verifier did not send the log-probabilities of what it committed"
        return None

    def _agrees(self, commit: Commit, known: int) -> bool:
        """Check a repeated stretch against what was delivered: text must never fork."""
        start = commit.base_length - len(self.spec.prompt)
        if start < 0:
            return False
        overlap = commit.tokens[:known]
        return tuple(self.output[start : start + len(overlap)]) == overlap

    def _deliver(
        self,
        commit: Commit,
        sources: tuple[int, ...],
        logprobs: tuple[TokenLogprobs, ...],
        reason: FinishReason | None,
        *,
        verbatim: bool,
    ) -> list[Command]:
        piece = self.text.push(commit.tokens)
        kept = commit.tokens[: piece.tokens_kept]
        self.output.extend(kept)
        text = piece.text
        if piece.stopped:
            reason = FinishReason.STOP
        elif reason is not None:
            text += self.text.finish().text
        commands: list[Command] = []
        # First: a drafter guesses in vain until it knows.
        if self.bindings and commit.tokens and reason is None:
            commands.append(RelayCommit(tuple(self.bindings), commit, verbatim))
        if text or kept:
            count = len(kept)
            commands.append(Deliver(text, kept, sources[:count], logprobs[:count]))
        if reason is not None:
            finish = Finish(reason, len(self.output), self.counters)
            commands += self._end(finish, abort=not commit.last)
        return commands

    def _on_silence(self, event: Silence) -> list[Command]:
        self.repeat_asked_at = None
        return self._ask_repeat()

    def _ask_repeat(self) -> list[Command]:
        if self.repeat_asked_at == self.length:
            return []
        self.repeat_asked_at = self.length
        return [AskRepeat(self.epoch, self.length)]

    def _on_drafter_attached(self, event: DrafterAttached) -> list[Command]:
        self.bindings[event.binding] = event.address
        return [BindDrafter(event.binding, self.epoch, tuple(self.output))]

    def _on_drafter_gone(self, event: DrafterGone) -> list[Command]:
        address = self.bindings.pop(event.binding, None)
        if address is None:
            return []
        self.bindings_lost += 1
        if event.refused:
            self.avoided.add(address)
        return self._attach()

    def _on_drafter_useless(self, event: DrafterUseless) -> list[Command]:
        address = self.bindings.pop(event.binding, None)
        return [] if address is None else [UnbindDrafter(event.binding, address)]

    def _on_drafter_available(self, event: DrafterAvailable) -> list[Command]:
        return self._attach()

    def _attach(self) -> list[Command]:
        missing = self.drafters_wanted - len(self.bindings)
        if missing <= 0 or self.bindings_lost >= BINDINGS_LOST_MAX:
            return []
        return [AttachDrafters(missing, frozenset((*self.bindings.values(), *self.avoided)))]

    def _on_drafter_gap(self, event: DrafterGap) -> list[Command]:
        have = event.have_length - len(self.spec.prompt)
        if event.binding not in self.bindings or event.epoch != self.epoch or have < 0:
            return []
        tokens = tuple(self.output[have:])
        if not tokens:
            return []
        return [
            RelayCommit(
                (event.binding,), Commit(self.epoch, event.have_length, tokens), verbatim=False
            )
        ]

    def _on_client_gone(self, event: ClientGone) -> list[Command]:
        return self._end(None)

    def _unbind_all(self) -> list[Command]:
        commands: list[Command] = [UnbindDrafter(*item) for item in self.bindings.items()]
        self.bindings.clear()
        return commands

    def _end(self, last_word: Finish | Fail | None, *, abort: bool = True) -> list[Command]:
        """Free both fleets, say the last word to the client if there is one, and forget."""
        self.state = State.ENDED
        commands: list[Command] = []
        if abort and self.verifier is not None:
            commands.append(AbortOnVerifier(self.verifier, self.epoch))
        commands += self._unbind_all()
        if last_word is not None:
            commands.append(last_word)
        return [*commands, Forget()]


_PLACING, _OPENING, _DECODING, _ENDED = State

# (state, event) -> handler; the comment names the state that follows.
TRANSITIONS: dict[tuple[State, type], Callable[[Session, Any], list[Command]]] = {
    (_PLACING, Placed): Session._on_placed,  # OPENING, one epoch higher
    (_PLACING, NotPlaced): Session._on_not_placed,  # ENDED
    (_PLACING, ClientGone): Session._on_client_gone,  # ENDED
    (_OPENING, Opened): Session._on_opened,  # DECODING
    (_OPENING, Refused): Session._on_refused,  # PLACING, or ENDED
    (_OPENING, VerifierLost): Session._on_verifier_lost,  # PLACING, or ENDED
    (_OPENING, DrafterAttached): Session._on_drafter_attached,  # OPENING
    (_OPENING, DrafterGone): Session._on_drafter_gone,  # OPENING
    (_OPENING, DrafterUseless): Session._on_drafter_useless,  # OPENING
    (_OPENING, DrafterAvailable): Session._on_drafter_available,  # OPENING
    (_OPENING, DrafterGap): Session._on_drafter_gap,  # OPENING
    (_OPENING, ClientGone): Session._on_client_gone,  # ENDED
    (_DECODING, PromptScored): Session._on_prompt_scored,  # DECODING
    (_DECODING, Committed): Session._on_committed,  # DECODING, or ENDED at the last one
    (_DECODING, Refused): Session._on_refused,  # PLACING, or ENDED
    (_DECODING, VerifierLost): Session._on_verifier_lost,  # PLACING, or ENDED
    (_DECODING, MovePays): Session._on_move_pays,  # OPENING, one epoch higher, or DECODING
    (_DECODING, Silence): Session._on_silence,  # DECODING
    (_DECODING, DrafterAttached): Session._on_drafter_attached,  # DECODING
    (_DECODING, DrafterGone): Session._on_drafter_gone,  # DECODING
    (_DECODING, DrafterUseless): Session._on_drafter_useless,  # DECODING
    (_DECODING, DrafterAvailable): Session._on_drafter_available,  # DECODING
    (_DECODING, DrafterGap): Session._on_drafter_gap,  # DECODING
    (_DECODING, ClientGone): Session._on_client_gone,  # ENDED
}

IGNORED: dict[tuple[State, type], str] = {
    (_PLACING, Opened): "of an older epoch: the session has moved",
    (_PLACING, Refused): "of an older epoch: the session has moved",
    (_PLACING, PromptScored): "of an older epoch: the session has moved",
    (_PLACING, Committed): "of an older epoch: the session has moved",
    (_PLACING, VerifierLost): "it has been given up already",
    (_PLACING, MovePays): "it is moving as it is",
    (_PLACING, Silence): "nobody owes anything",
    (_PLACING, DrafterAttached): "the attachment would not outlive the epoch, so it is not made",
    (_PLACING, DrafterGone): "none is attached",
    (_PLACING, DrafterUseless): "none is attached",
    (_PLACING, DrafterAvailable): "drafters are attached once a verifier is placed",
    (_PLACING, DrafterGap): "none is attached",
    (_OPENING, Placed): "a verifier has been asked already",
    (_OPENING, NotPlaced): "a verifier has been asked already",
    (_OPENING, PromptScored): "of an older epoch: the session has moved",
    (_OPENING, Committed): "of an older epoch: the session has moved",
    (_OPENING, MovePays): "what a prefill has cost so far would be lost",
    (_OPENING, Silence): "the verifier owes no commit yet; its stream breaks if it is gone",
    (_DECODING, Placed): "a verifier has the session already",
    (_DECODING, NotPlaced): "a verifier has the session already",
    (_DECODING, Opened): "repeated",
    **{(_ENDED, kind): "nothing may follow the end" for kind in Event.__args__},
}
