"""The session's state machine: its table, each transition by hand, and storms of events."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
from orchestrator.session import (
    BINDINGS_LOST_MAX,
    IGNORED,
    PLACEMENTS_MAX,
    PROGRESS_TOKENS,
    TRANSITIONS,
    Session,
    State,
)
from outrider.domain import (
    Commit,
    CommitReport,
    FinishReason,
    PromptLogprobs,
    Rejection,
    RejectionCode,
    SamplingParams,
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

PROMPT = (1, 2, 3)
HALF, STOP = 100, 101
"""To `Letters`: half a character, and the end of a stop string."""


@dataclass(frozen=True)
class Piece:
    text: str
    tokens_kept: int
    stopped: bool


class Letters:
    """Text of ids: 0 is a, 1 is b, ...; HALF is held back until more comes; STOP stops."""

    def __init__(self) -> None:
        self._held = ""
        self._stopped = False

    def push(self, token_ids: Sequence[int]) -> Piece:
        text = ""
        for kept, token in enumerate(token_ids, start=1):
            if token == STOP:
                self._stopped = True
                return Piece(text, kept, True)
            if token == HALF:
                self._held = "?"
            else:
                text += self._held + chr(97 + token % 26)
                self._held = ""
        return Piece(text, len(token_ids), self._stopped)

    def finish(self) -> Piece:
        text, self._held = self._held, ""
        return Piece(text, 0, self._stopped)


def new_session(
    *,
    drafters_wanted: int = 0,
    prompt: tuple[int, ...] = PROMPT,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
) -> Session:
    spec = SessionSpec(
        session=9,
        epoch=0,
        prompt=prompt,
        committed=(),
        sampling=SamplingParams(),
        seed=4,
        tokens_max=50,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )
    return Session(spec, Letters(), drafters_wanted=drafters_wanted)


def opening(address: str = "v1", *, drafters_wanted: int = 0) -> Session:
    session = new_session(drafters_wanted=drafters_wanted)
    session.start()
    session.step(Placed(address))
    return session


def decoding(address: str = "v1", *, drafters: Sequence[str] = ()) -> Session:
    """A session that decodes in epoch 1, with attachments 1, 2, ... to these drafters."""
    session = opening(address, drafters_wanted=len(drafters))
    for binding, drafter in enumerate(drafters, start=1):
        session.step(DrafterAttached(binding, drafter))
    session.step(Opened(1))
    assert session.state is State.DECODING
    return session


def scored(*tokens: int) -> tuple[TokenLogprobs, ...]:
    return tuple(TokenLogprobs(token, -token / 10) for token in tokens)


def prompt_scored(start: int, *tokens: int, epoch: int = 1) -> PromptScored:
    return PromptScored(PromptLogprobs(9, epoch, start, scored(*tokens)))


def committed(
    base_length: int,
    *tokens: int,
    epoch: int = 1,
    reason: FinishReason | None = None,
    sources: tuple[int, ...] | None = None,
    steps: int = 0,
    last: bool | None = None,
    logprobs: tuple[TokenLogprobs, ...] = (),
) -> Committed:
    return Committed(
        Commit(epoch, base_length, tokens, last=reason is not None if last is None else last),
        CommitReport(
            SpeculationCounters(verify_steps=steps),
            tuple(1 for _ in tokens) if sources is None else sources,
            reason,
            logprobs,
        ),
    )


def refused(code: RejectionCode, *, epoch: int = 1, name: str = "", current: int = 0) -> Refused:
    return Refused(Rejection(9, epoch, code, "says why", field=name, current_epoch=current))


def kinds(commands: Sequence[Command]) -> list[type]:
    return [type(command) for command in commands]


def failure(commands: Sequence[Command]) -> OutriderError:
    (error,) = [command.error for command in commands if isinstance(command, Fail)]
    return error


# --- the table --------------------------------------------------------------------------------


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("kind", get_args(Event))
def test_the_table_says_what_becomes_of_every_event(state: State, kind: type) -> None:
    assert ((state, kind) in TRANSITIONS) != ((state, kind) in IGNORED)


def test_the_table_has_no_other_rows_and_every_omission_its_reason() -> None:
    pairs = {(state, kind) for state in State for kind in get_args(Event)}
    assert TRANSITIONS.keys() | IGNORED.keys() == pairs
    assert all(IGNORED.values())
    assert {state for state, _ in TRANSITIONS} == set(State) - {State.ENDED}


EVENTS: list[Event] = [
    Placed("v9"),
    NotPlaced("none"),
    Opened(1),
    refused(RejectionCode.EXHAUSTED),
    prompt_scored(1, 2, 3),
    committed(3, 0),
    VerifierLost("gone"),
    MovePays("v9"),
    Silence(),
    DrafterAttached(77, "d9"),
    DrafterGone(1),
    DrafterUseless(1),
    DrafterAvailable(),
    DrafterGap(1, 1, 3),
    ClientGone(),
]


def test_there_is_an_example_of_every_event() -> None:
    assert {type(event) for event in EVENTS} == set(get_args(Event))


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_what_is_ignored_changes_nothing(event: Event) -> None:
    placing = new_session(drafters_wanted=1)
    ended = decoding()
    ended.step(ClientGone())
    for session in (placing, opening(drafters_wanted=1), decoding(drafters=["d1"]), ended):
        if (session.state, type(event)) in IGNORED:
            before = replace(session)
            assert session.step(event) == []
            assert session == before


# --- placing and opening ----------------------------------------------------------------------


def test_a_session_begins_by_looking_for_a_verifier() -> None:
    session = new_session()
    assert session.state is State.PLACING
    assert session.start() == [PlaceVerifier(frozenset())]


def test_a_placed_session_is_opened_one_epoch_higher_and_drafters_are_sought() -> None:
    session = new_session(drafters_wanted=2)
    commands = session.step(Placed("v1"))
    assert commands == [
        OpenOnVerifier(replace(new_session().spec, epoch=1)),
        AttachDrafters(2, frozenset()),
    ]
    assert (session.state, session.verifier, session.epoch) == (State.OPENING, "v1", 1)
    assert new_session().step(Placed("v1")) == commands[:1]


def test_no_verifier_is_a_failure() -> None:
    session = new_session()
    commands = session.step(NotPlaced("no verifier has room"))
    assert kinds(commands) == [Fail, Forget]
    assert type(failure(commands)) is Unavailable
    assert "no verifier has room" in str(failure(commands))
    assert session.state is State.ENDED


def test_the_verifiers_word_of_this_epoch_opens_it() -> None:
    session = opening()
    for epoch in (0, 2):
        assert session.step(Opened(epoch)) == []
        assert session.state is State.OPENING
    assert session.step(Opened(1)) == []
    assert session.state is State.DECODING


def test_a_client_that_leaves_early_is_forgotten() -> None:
    session = new_session()
    session.start()
    assert session.step(ClientGone()) == [Forget()]
    session = opening()
    assert session.step(ClientGone()) == [AbortOnVerifier("v1", 1), Forget()]


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [opening, decoding])
@pytest.mark.parametrize(
    "code",
    [
        RejectionCode.EXHAUSTED,
        RejectionCode.DRAINING,
        RejectionCode.MISMATCH,
        RejectionCode.INTERNAL,
        RejectionCode.UNKNOWN_SESSION,
    ],
)
def test_a_refusal_that_is_the_verifiers_is_tried_elsewhere(
    make: type[Session], code: RejectionCode
) -> None:
    session = make()
    assert session.step(refused(code)) == [
        AbortOnVerifier("v1", 1),
        PlaceVerifier(frozenset({"v1"})),
    ]
    assert (session.state, session.verifier) == (State.PLACING, None)
    # If there is no other, the client hears what was wrong with this one.
    error = failure(session.step(NotPlaced("none left")))
    assert type(error) is (Exhausted if code is RejectionCode.EXHAUSTED else Unavailable)
    assert "says why" in str(error)


@pytest.mark.parametrize("make", [opening, decoding])
def test_a_refusal_that_is_the_callers_is_final(make: type[Session]) -> None:
    session = make()
    commands = session.step(refused(RejectionCode.INVALID, name="prompt"))
    assert kinds(commands) == [AbortOnVerifier, Fail, Forget]
    error = failure(commands)
    assert isinstance(error, InvalidRequest)
    assert (error.field, error.message) == ("prompt", "says why")
    assert session.state is State.ENDED
    nameless = failure(make().step(refused(RejectionCode.INVALID)))
    assert isinstance(nameless, InvalidRequest)
    assert nameless.field == "request"


def test_a_session_that_somebody_else_holds_is_given_up() -> None:
    error = failure(decoding().step(refused(RejectionCode.STALE_EPOCH, current=7)))
    assert isinstance(error, StaleEpoch)
    assert error.current_epoch == 7


@pytest.mark.parametrize("code", RejectionCode)
@pytest.mark.parametrize("epoch", [0, 2])
def test_refusals_of_other_epochs_are_not_ours(code: RejectionCode, epoch: int) -> None:
    for session in (opening(), decoding()):
        state = session.state
        assert session.step(refused(code, epoch=epoch)) == []
        assert session.state is state


# --- commits ----------------------------------------------------------------------------------


def test_contiguous_commits_are_delivered_and_relayed() -> None:
    session = decoding(drafters=["d1", "d2"])
    event = committed(3, 0, 1, sources=(2, 0), steps=1)
    assert session.step(event) == [
        RelayCommit((1, 2), event.commit, verbatim=True),
        Deliver("ab", (0, 1), (2, 0)),
    ]
    event = committed(5, 2, steps=2)
    assert session.step(event) == [
        RelayCommit((1, 2), event.commit, verbatim=True),
        Deliver("c", (2,), (1,)),
    ]
    assert (session.output, session.length) == ([0, 1, 2], 6)
    assert session.counters.verify_steps == 2


def test_counters_of_spells_on_several_verifiers_add_up() -> None:
    session = decoding()
    session.step(committed(3, 0, steps=1))
    session.step(committed(4, 1, steps=2))
    session.step(VerifierLost("gone"))
    assert session.counters.verify_steps == 2
    session.step(Placed("v2"))
    session.step(Opened(2))
    session.step(committed(5, 2, epoch=2, steps=3))
    assert session.counters.verify_steps == 5


def test_without_drafters_nothing_is_relayed() -> None:
    assert decoding().step(committed(3, 0)) == [Deliver("a", (0,), (1,))]


def test_a_repeated_commit_says_nothing_new() -> None:
    session = decoding(drafters=["d1"])
    session.step(committed(3, 0, 1))
    assert session.step(committed(3, 0, 1)) == []
    assert session.step(committed(3, 0)) == []
    assert session.output == [0, 1]


def test_of_an_overlapping_commit_only_the_rest_counts() -> None:
    session = decoding(drafters=["d1"])
    session.step(committed(3, 0, 1))
    commands = session.step(committed(4, 1, 2, 3, sources=(5, 6, 7)))
    assert commands == [
        # Not the verifier's bytes, which begin earlier.
        RelayCommit((1,), Commit(1, 5, (2, 3)), verbatim=False),
        Deliver("cd", (2, 3), (6, 7)),
    ]


def test_a_repeat_has_forgotten_its_sources() -> None:
    # What a verifier repeats covers several commits; it knows the sources of none, or the last.
    for sources in ((), (4,)):
        session = decoding()
        session.step(committed(3, 0))
        (deliver,) = session.step(committed(3, 0, 1, 2, sources=sources))
        assert deliver == Deliver("bc", (1, 2), (0, 0))


def test_a_gap_is_asked_about_once() -> None:
    session = decoding()
    session.step(committed(3, 0))
    assert session.step(committed(6, 9)) == [AskRepeat(1, 4)]
    assert session.step(committed(7, 9)) == []
    assert session.output == [0]
    assert session.step(committed(4, 1, 2, 3)) == [Deliver("bcd", (1, 2, 3), (1, 1, 1))]
    # The next gap is another one.
    assert session.step(committed(9, 9)) == [AskRepeat(1, 7)]


def test_silence_asks_again() -> None:
    session = decoding()
    assert session.step(Silence()) == [AskRepeat(1, 3)]
    assert session.step(Silence()) == [AskRepeat(1, 3)]
    assert session.step(committed(5, 9)) == [], "it is being asked already"


@pytest.mark.parametrize(
    "fork",
    [
        committed(3, 0, 2, 3),
        committed(4, 9),
        committed(2, 3, 0),
        committed(0, 0),
        committed(1, 0),
    ],
)
def test_text_never_forks(fork: Committed) -> None:
    session = decoding(drafters=["d1"])
    session.step(committed(3, 0, 1))
    commands = session.step(fork)
    assert kinds(commands) == [AbortOnVerifier, UnbindDrafter, Fail, Forget]
    assert type(failure(commands)) is InternalError


def test_commits_of_other_epochs_are_dropped() -> None:
    session = decoding()
    for epoch in (0, 2):
        assert session.step(committed(3, 0, epoch=epoch)) == []
    assert session.output == []


@pytest.mark.parametrize("reason", FinishReason)
def test_the_last_commit_ends_it(reason: FinishReason) -> None:
    session = decoding(drafters=["d1"])
    session.step(committed(3, 0))
    commands = session.step(committed(4, 1, 2, reason=reason, steps=5))
    # The verifier has freed it by itself; the drafter has not.
    assert commands == [
        Deliver("bc", (1, 2), (1, 1)),
        UnbindDrafter(1, "d1"),
        Finish(reason, 3, SpeculationCounters(verify_steps=5)),
        Forget(),
    ]
    assert session.state is State.ENDED


def test_the_last_commit_may_come_as_a_repeat_of_what_is_known() -> None:
    session = decoding()
    session.step(committed(3, 0))
    commands = session.step(committed(3, 0, reason=FinishReason.LENGTH))
    assert kinds(commands) == [Finish, Forget]


def test_half_a_character_is_said_at_the_end() -> None:
    session = decoding()
    assert session.step(committed(3, 0, HALF)) == [Deliver("a", (0, HALF), (1, 1))]
    commands = session.step(committed(5, reason=FinishReason.LENGTH))
    assert commands[0] == Deliver("?", (), ())
    session = decoding()
    assert session.step(committed(3, HALF)) == [Deliver("", (HALF,), (1,))]


def test_a_stop_string_ends_ids_text_and_work() -> None:
    session = decoding(drafters=["d1"])
    session.step(committed(3, 0))
    commands = session.step(committed(4, 1, STOP, 2, 3, sources=(6, 7, 8, 9), steps=2))
    assert commands == [
        Deliver("b", (1, STOP), (6, 7)),
        AbortOnVerifier("v1", 1),
        UnbindDrafter(1, "d1"),
        Finish(FinishReason.STOP, 3, SpeculationCounters(verify_steps=2)),
        Forget(),
    ]
    assert session.output == [0, 1, STOP]


def test_a_stop_string_in_the_last_commit_is_the_reason() -> None:
    commands = decoding().step(committed(3, STOP, 1, reason=FinishReason.LENGTH))
    assert kinds(commands) == [Deliver, Finish, Forget]
    assert commands[1] == Finish(FinishReason.STOP, 1, SpeculationCounters())


# --- log-probabilities ------------------------------------------------------------------------


def scoring(
    *,
    prompt: tuple[int, ...] = PROMPT,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
) -> Session:
    """A session that was placed and asks for log-probabilities."""
    session = new_session(prompt=prompt, logprobs=logprobs, prompt_logprobs=prompt_logprobs)
    session.start()
    session.step(Placed("v1"))
    return session


def test_log_probabilities_go_with_their_ids() -> None:
    session = scoring(logprobs=0)
    session.step(Opened(1))
    assert session.step(committed(3, 0, 1, logprobs=scored(0, 1))) == [
        Deliver("ab", (0, 1), (1, 1), scored(0, 1))
    ]
    # A repeat has forgotten its sources, not its log-probabilities.
    assert session.step(committed(4, 1, 2, 3, sources=(), logprobs=scored(1, 2, 3))) == [
        Deliver("cd", (2, 3), (0, 0), scored(2, 3))
    ]
    assert session.step(committed(3, 0, 1, logprobs=scored(0, 1))) == []
    commands = session.step(committed(7, 4, STOP, 5, logprobs=scored(4, STOP, 5)))
    assert commands[0] == Deliver("e", (4, STOP), (1, 1), scored(4, STOP))


def test_log_probabilities_that_nobody_asked_for_are_left_out() -> None:
    session = decoding()
    assert session.step(committed(3, 0, logprobs=scored(0))) == [Deliver("a", (0,), (1,))]
    for piece in (prompt_scored(1, 9), prompt_scored(1, 2, 3)):
        assert session.step(piece) == []


@pytest.mark.parametrize("wrong", [(), scored(0), scored(0, 1, 2), scored(1, 0)], ids=len)
def test_log_probabilities_of_other_ids_are_not_passed_on(
    wrong: tuple[TokenLogprobs, ...],
) -> None:
    session = scoring(logprobs=0)
    session.step(Opened(1))
    commands = session.step(committed(3, 0, 1, logprobs=wrong))
    assert kinds(commands) == [AbortOnVerifier, Fail, Forget]
    assert type(failure(commands)) is InternalError
    assert session.output == []


def test_the_prompts_log_probabilities_are_put_together() -> None:
    session = scoring(prompt=(1, 2, 3, 4, 5), prompt_logprobs=0)
    assert session.step(prompt_scored(1, 2)) == [], "before it is opened"
    assert session.step(Opened(1)) == []
    assert session.step(prompt_scored(1, 2, epoch=2)) == []
    assert session.step(prompt_scored(2, 3)) == [], "there is a gap"
    assert session.step(prompt_scored(1, 2, 3)) == []
    assert session.step(prompt_scored(1, 2, 3)) == [], "repeated"
    assert session.step(prompt_scored(4, 5)) == [], "there is a gap"
    assert session.step(prompt_scored(2, 3, 4, 5)) == [DeliverPrompt(scored(2, 3, 4, 5))]
    assert session.step(prompt_scored(1, 2, 3, 4, 5)) == [], "they have been delivered"
    assert session.step(committed(5, 0)) == [Deliver("a", (0,), (1,))]


def test_a_prompt_of_one_token_has_nothing_to_wait_for() -> None:
    session = scoring(prompt=(1,), prompt_logprobs=0)
    assert session.step(Opened(2)) == []
    assert session.step(Opened(1)) == [DeliverPrompt(())]
    assert session.step(committed(1, 0)) == [Deliver("a", (0,), (1,))]


def test_a_move_in_mid_prompt_goes_on_with_what_is_known() -> None:
    session = scoring(prompt_logprobs=4)
    session.step(Opened(1))
    session.step(prompt_scored(1, 2))
    session.step(VerifierLost("reset"))
    (again,) = session.step(Placed("v2"))
    assert isinstance(again, OpenOnVerifier)
    assert again.spec.prompt_logprobs == 4
    session.step(Opened(2))
    assert session.step(prompt_scored(2, 3)) == [], "of the old epoch"
    assert session.step(prompt_scored(1, 2, epoch=2)) == []
    assert session.step(prompt_scored(2, 3, epoch=2)) == [DeliverPrompt(scored(2, 3))]
    # What was delivered is not asked for again, nor delivered if it comes all the same.
    session.step(committed(3, 0, epoch=2))
    session.step(VerifierLost("reset"))
    (again,) = session.step(Placed("v3"))
    assert isinstance(again, OpenOnVerifier)
    assert again.spec.prompt_logprobs is None
    assert session.step(Opened(3)) == []
    assert session.step(prompt_scored(1, 2, 3, epoch=3)) == []
    assert session.step(committed(4, 1, epoch=3)) == [Deliver("b", (1,), (1,))]


@pytest.mark.parametrize(
    "event",
    [committed(3, 0), committed(3, reason=FinishReason.LENGTH)],
    ids=["output", "end"],
)
def test_nothing_is_said_before_the_prompts_log_probabilities(event: Committed) -> None:
    session = scoring(prompt_logprobs=0)
    session.step(Opened(1))
    session.step(prompt_scored(1, 2))
    assert session.step(committed(3)) == [], "an answer to Silence during prefill"
    commands = session.step(event)
    assert kinds(commands) == [AbortOnVerifier, Fail, Forget]
    assert "whole prompt" in str(failure(commands))


@pytest.mark.parametrize("tokens", [(3, 2), (2, 3, 4), (2, 4)])
def test_log_probabilities_of_another_prompt_are_not_passed_on(tokens: tuple[int, ...]) -> None:
    session = scoring(prompt_logprobs=0)
    session.step(Opened(1))
    commands = session.step(prompt_scored(1, *tokens))
    assert kinds(commands) == [AbortOnVerifier, Fail, Forget]
    assert type(failure(commands)) is InternalError


# --- moving -----------------------------------------------------------------------------------


def test_a_lost_verifier_costs_nothing_that_was_committed() -> None:
    session = decoding(drafters=["d1"])
    session.step(committed(3, 0, 1, steps=2))
    assert session.step(VerifierLost("reset")) == [
        AbortOnVerifier("v1", 1),
        UnbindDrafter(1, "d1"),
        PlaceVerifier(frozenset({"v1"})),
    ]
    opened, attach = session.step(Placed("v2"))
    assert opened == OpenOnVerifier(replace(session.spec, epoch=2, committed=(0, 1)))
    assert isinstance(opened, OpenOnVerifier)
    assert (opened.spec.prompt, opened.spec.seed) == (PROMPT, 4)
    assert attach == AttachDrafters(1, frozenset())
    assert session.step(DrafterAttached(2, "d1")) == [BindDrafter(2, 2, (0, 1))]
    # A commit that the first had sent is of an old epoch, before the second opens and after.
    assert session.step(committed(5, 9, epoch=1)) == []
    session.step(Opened(2))
    assert session.step(committed(5, 9, epoch=1)) == []
    commands = session.step(committed(5, 2, epoch=2, steps=3))
    assert commands[1] == Deliver("c", (2,), (1,))
    # Each verifier counts from zero; the client hears the sum.
    commands = session.step(committed(6, epoch=2, reason=FinishReason.LENGTH, steps=4))
    assert commands[-2] == Finish(FinishReason.LENGTH, 3, SpeculationCounters(verify_steps=6))


def test_a_move_that_pays_costs_nothing_that_was_committed() -> None:
    session = decoding(drafters=["d1"])
    session.step(committed(3, 0, 1, steps=2))
    abort, unbind, opened, attach = session.step(MovePays("v2"))
    assert (abort, unbind) == (AbortOnVerifier("v1", 1), UnbindDrafter(1, "d1"))
    assert opened == OpenOnVerifier(replace(session.spec, epoch=2, committed=(0, 1)))
    assert attach == AttachDrafters(1, frozenset())
    assert (session.state, session.verifier) == (State.OPENING, "v2")
    # What the first had sent meanwhile will be computed again.
    assert session.step(committed(5, 2, epoch=1)) == []
    session.step(Opened(2))
    commands = session.step(committed(5, 2, epoch=2, reason=FinishReason.LENGTH, steps=3))
    assert commands[-2] == Finish(FinishReason.LENGTH, 3, SpeculationCounters(verify_steps=5))


def test_a_session_moves_at_safe_points_only() -> None:
    session = decoding()
    # Its prompt was computed for nothing if it left now.
    assert session.step(MovePays("v2")) == []
    session.step(committed(3, 0))
    assert session.step(MovePays("v1")) == []  # it is there already
    session.step(MovePays("v2"))
    session.step(Opened(2))
    assert not session.safe_to_move
    session.step(committed(4, 1, epoch=2))
    assert session.safe_to_move


def test_whoever_refuses_a_session_that_moves_there_is_not_asked_again() -> None:
    session = decoding()
    session.step(committed(3, 0))
    session.step(MovePays("v2"))
    commands = session.step(refused(RejectionCode.EXHAUSTED, epoch=2))
    assert commands == [AbortOnVerifier("v2", 2), PlaceVerifier(frozenset({"v2"}))]
    assert session.attempts == 0


def test_a_move_forgets_what_was_asked_of_the_old_verifier() -> None:
    session = decoding()
    assert session.step(committed(5, 9)) == [AskRepeat(1, 3)]
    session.step(VerifierLost("reset"))
    session.step(Placed("v2"))
    session.step(Opened(2))
    assert session.step(committed(5, 9, epoch=2)) == [AskRepeat(2, 3)]


def test_placements_are_bounded() -> None:
    session = new_session(drafters_wanted=1)
    for number in range(1, PLACEMENTS_MAX):
        session.step(Placed(f"v{number}"))
        session.step(DrafterAttached(number, "d1"))
        commands = session.step(VerifierLost("poison"))
        tried = frozenset(f"v{n}" for n in range(1, number + 1))
        assert commands[-1] == PlaceVerifier(tried)
    session.step(Placed("v-last"))
    session.step(DrafterAttached(99, "d1"))
    commands = session.step(VerifierLost("poison"))
    assert kinds(commands) == [AbortOnVerifier, UnbindDrafter, Fail, Forget]
    assert commands[0] == AbortOnVerifier("v-last", PLACEMENTS_MAX)
    assert type(failure(commands)) is Unavailable
    assert "poison" in str(failure(commands))
    assert session.state is State.ENDED


# --- drafters ---------------------------------------------------------------------------------


def test_an_attached_drafter_gets_all_that_is_committed() -> None:
    session = opening(drafters_wanted=1)
    assert session.step(DrafterAttached(1, "d1")) == [BindDrafter(1, 1, ())]
    session.step(Opened(1))
    session.step(committed(3, 0, 1))
    assert session.step(DrafterAttached(2, "d2")) == [BindDrafter(2, 1, (0, 1))]
    assert session.bindings == {1: "d1", 2: "d2"}


@pytest.mark.parametrize("make", [opening, decoding])
def test_a_drafter_that_is_gone_is_replaced(make: type[Session]) -> None:
    session = make()
    session.drafters_wanted = 2
    session.step(DrafterAttached(1, "d1"))
    session.step(DrafterAttached(2, "d2"))
    assert session.step(DrafterGone(7)) == []
    # Its stream broke: it may come back. The one that is still there is not asked again.
    assert session.step(DrafterGone(1)) == [AttachDrafters(1, frozenset({"d2"}))]
    # It refused: never again.
    assert session.step(DrafterGone(2, refused=True)) == [AttachDrafters(2, frozenset({"d2"}))]
    assert session.step(DrafterGone(2)) == []
    assert session.step(DrafterAvailable()) == [AttachDrafters(2, frozenset({"d2"}))]


def test_a_refusal_is_remembered_across_verifiers() -> None:
    session = decoding(drafters=["d1"])
    session.step(DrafterGone(1, refused=True))
    session.step(VerifierLost("reset"))
    assert session.step(Placed("v2"))[1:] == [AttachDrafters(1, frozenset({"d1"}))]


@pytest.mark.parametrize("make", [opening, decoding])
def test_a_new_drafter_is_asked_only_if_one_is_missing(make: type[Session]) -> None:
    session = make()
    assert session.step(DrafterAvailable()) == []
    session.drafters_wanted = 1
    assert session.step(DrafterAvailable()) == [AttachDrafters(1, frozenset())]
    session.step(DrafterAttached(1, "d1"))
    assert session.step(DrafterAvailable()) == []


def test_a_flapping_drafter_is_given_up() -> None:
    session = decoding()
    session.drafters_wanted = 1
    for binding in range(1, BINDINGS_LOST_MAX):
        session.step(DrafterAttached(binding, "d1"))
        assert session.step(DrafterGone(binding)) == [AttachDrafters(1, frozenset())]
    session.step(DrafterAttached(BINDINGS_LOST_MAX, "d1"))
    assert session.step(DrafterGone(BINDINGS_LOST_MAX)) == []
    assert session.step(DrafterAvailable()) == []


def test_a_useless_drafter_is_unbound_and_not_replaced_at_once() -> None:
    session = decoding(drafters=["d1", "d2"])
    assert session.step(DrafterUseless(1)) == [UnbindDrafter(1, "d1")]
    assert session.bindings == {2: "d2"}
    assert session.step(DrafterUseless(1)) == []
    # It may be tried again, and does not count as one that flaps.
    assert session.step(DrafterAvailable()) == [AttachDrafters(1, frozenset({"d2"}))]


@pytest.mark.parametrize("move", [False, True])
def test_a_drafter_that_saw_a_gap_catches_up(move: bool) -> None:
    session = decoding(drafters=["d1", "d2"])
    session.step(committed(3, 0, 1, 2))
    epoch = 1
    if move:
        session.step(VerifierLost("reset"))
        session.step(Placed("v2"))
        for binding, drafter in ((1, "d1"), (2, "d2")):
            session.step(DrafterAttached(binding, drafter))
        epoch = 2
    assert session.step(DrafterGap(2, epoch, 4)) == [
        RelayCommit((2,), Commit(epoch, 4, (1, 2)), verbatim=False)
    ]
    # It has everything, or claims more; of another epoch; of nobody; with less than the prompt,
    # which it got when it was bound.
    assert session.step(DrafterGap(2, epoch, 6)) == []
    assert session.step(DrafterGap(2, epoch, 7)) == []
    assert session.step(DrafterGap(2, epoch - 1, 4)) == []
    assert session.step(DrafterGap(3, epoch, 4)) == []
    assert session.step(DrafterGap(2, epoch, 2)) == []


def test_everybody_is_told_when_the_client_leaves() -> None:
    session = decoding(drafters=["d1", "d2"])
    assert session.step(ClientGone()) == [
        AbortOnVerifier("v1", 1),
        UnbindDrafter(1, "d1"),
        UnbindDrafter(2, "d2"),
        Forget(),
    ]


# --- storms -----------------------------------------------------------------------------------


def truth(index: int) -> int:
    """The output's token at an index: what every honest verifier says."""
    return index * 7 % 23


@dataclass
class World:
    """What the driver, the workers and the client know, from commands alone."""

    session: Session = field(
        default_factory=lambda: new_session(drafters_wanted=2, logprobs=1, prompt_logprobs=1)
    )
    ended: bool = False
    delivered: list[int] = field(default_factory=list)
    text: str = ""
    prompt_told: bool = False
    mirrors: dict[int, int] = field(default_factory=dict)
    """Committed length that each attached drafter has, if no message to it is lost."""
    addresses: dict[int, str] = field(default_factory=dict)
    held_by: tuple[str, int] | None = None
    """Verifier and epoch of the session that is open somewhere."""
    epochs: list[int] = field(default_factory=list)
    bindings_made: int = 0
    unbound: int = 0
    """Attachments that ended as useless."""

    def happen(self, event: Event) -> None:
        if isinstance(event, DrafterUseless):
            self.unbound += event.binding in self.session.bindings
        if isinstance(event, DrafterGone):
            self.mirrors.pop(event.binding, None)
            self.addresses.pop(event.binding, None)
        if isinstance(event, Committed) and event.commit.last and self.is_current(event):
            self.held_by = None
        self.obey(self.session.step(event))

    def is_current(self, event: Committed) -> bool:
        decodes = self.session.state is State.DECODING
        return decodes and event.commit.epoch == self.session.epoch

    def obey(self, commands: list[Command]) -> None:
        if commands:
            assert not self.ended, "nothing may follow Forget"
        for command in commands:
            assert not self.ended, "Forget is the last command"
            self.obey_one(command)
        assert self.delivered == self.session.output
        assert self.delivered == [truth(index) for index in range(len(self.delivered))]
        assert self.mirrors.keys() == self.session.bindings.keys()

    def obey_one(self, command: Command) -> None:
        match command:
            case DeliverPrompt(tokens):
                assert tokens == scored(*PROMPT[1:])
                assert not self.prompt_told, "once"
                self.prompt_told = True
            case Deliver(text, token_ids, sources, logprobs):
                assert self.prompt_told
                assert len(token_ids) == len(sources)
                assert logprobs == scored(*token_ids)
                self.delivered += token_ids
                self.text += text
            case OpenOnVerifier(spec):
                assert self.held_by is None, "the one before was not told"
                assert list(spec.committed) == self.delivered
                assert self.session.verifier is not None
                self.held_by = (self.session.verifier, spec.epoch)
                self.epochs.append(spec.epoch)
                assert self.epochs == sorted(set(self.epochs))
            case AbortOnVerifier(address, epoch):
                assert self.held_by in ((address, epoch), None)
                self.held_by = None
            case AskRepeat(epoch, have_length):
                assert (epoch, have_length) == (self.session.epoch, self.session.length)
            case BindDrafter(binding, epoch, tokens):
                assert epoch == self.session.epoch
                assert list(tokens) == self.delivered
                assert binding not in self.mirrors
                self.mirrors[binding] = len(PROMPT) + len(tokens)
                self.addresses[binding] = self.session.bindings[binding]
            case UnbindDrafter(binding, address):
                assert self.addresses.pop(binding) == address
                del self.mirrors[binding]
            case RelayCommit(bindings, commit, _):
                self.relay(bindings, commit)
            case Forget():
                self.ended = True
                assert self.mirrors == {}, "a drafter was not told"
                assert self.held_by is None, "the verifier was not told"
            case _:
                assert isinstance(command, PlaceVerifier | AttachDrafters | Finish | Fail)

    def relay(self, bindings: tuple[int, ...], commit: Commit) -> None:
        assert commit.epoch == self.session.epoch
        for binding in bindings:
            assert commit.base_length <= self.mirrors[binding], "a gap of our own making"
            end = commit.base_length + len(commit.tokens)
            self.mirrors[binding] = max(self.mirrors[binding], end)
        start = commit.base_length - len(PROMPT)
        # Drafters hear of it first; the client does in the same breath.
        assert list(commit.tokens) == self.session.output[start : start + len(commit.tokens)]

    def committed(
        self, start: int, tokens: list[int], epoch: int, reason: FinishReason | None = None
    ) -> Event:
        """Make a commit; an honest verifier has told all about the prompt before."""
        if epoch == self.session.epoch and not self.prompt_told:
            return prompt_scored(1, *PROMPT[1:], epoch=epoch)
        base_length = len(PROMPT) + start
        return committed(base_length, *tokens, epoch=epoch, reason=reason, logprobs=scored(*tokens))

    def event(self, kind: type, number: int) -> Event:
        """Make an event: mostly one that fits, sometimes late, early or of another epoch."""
        epoch = self.session.epoch + (0, 0, 0, 0, 0, 0, -1, 1)[number % 8]
        number //= 8
        if kind is Committed:
            ahead = (0, 0, 0, 0, -1, -2, -5, 1, 3)[number % 9]
            start = max(0, len(self.delivered) + ahead)
            tokens = [truth(start + i) for i in range(number // 9 % 5)]
            reason = FinishReason.LENGTH if number % 97 == 0 and ahead <= 0 else None
            return self.committed(start, tokens, epoch, reason)
        if kind is Refused:
            return refused(list(RejectionCode)[number % len(RejectionCode)], epoch=epoch)
        if kind is DrafterAttached:
            self.bindings_made += 1
            return DrafterAttached(self.bindings_made, f"d{number % 3}")
        if kind is PromptScored:
            start = 1 + number % 2
            return prompt_scored(start, *PROMPT[start : start + 1 + number // 2 % 2], epoch=epoch)
        binding = number % (self.bindings_made + 2)
        events: dict[type, Event] = {
            Placed: Placed(f"v{number % 9}"),
            NotPlaced: NotPlaced("none"),
            Opened: Opened(epoch),
            VerifierLost: VerifierLost("reset"),
            MovePays: MovePays(f"v{number % 9}"),
            Silence: Silence(),
            DrafterGone: DrafterGone(binding, refused=number % 5 == 0),
            DrafterUseless: DrafterUseless(binding),
            DrafterAvailable: DrafterAvailable(),
            DrafterGap: DrafterGap(binding, epoch, len(PROMPT) - 1 + number % 12),
            ClientGone: ClientGone(),
        }
        return events[kind]


# Those that end the session are rare, those that move it on are frequent.
STORM = [
    *[Placed, Opened, Committed] * 16,
    *[Committed] * 24,
    *[PromptScored] * 6,
    *[DrafterAttached, DrafterGone, DrafterGap, DrafterAvailable, Silence] * 6,
    DrafterUseless,
    DrafterUseless,
    *[VerifierLost] * 3,
    *[MovePays] * 3,
    Refused,
    NotPlaced,
    ClientGone,
]
# Drawn from a seed: hypothesis itself would prefer short storms of small numbers.
storms = given(seed=st.integers(0, 1 << 32), count=st.integers(1, 80))
thorough = settings(max_examples=400, deadline=None, derandomize=True)


def storm(seed: int, count: int) -> tuple[World, random.Random]:
    chance = random.Random(seed)
    world = World()
    world.obey(world.session.start())
    world.happen(Placed("v0"))
    world.happen(Opened(1))
    for _ in range(count):
        world.happen(world.event(chance.choice(STORM), chance.getrandbits(30)))
    return world, chance


@thorough
@storms
def test_no_storm_doubles_loses_or_leaks_anything(seed: int, count: int) -> None:
    world, chance = storm(seed, count)
    world.happen(ClientGone())
    assert world.ended
    assert world.session.state is State.ENDED
    for kind in get_args(Event):
        world.happen(world.event(kind, chance.getrandbits(30)))


@thorough
@storms
def test_a_verifier_that_contradicts_itself_is_not_believed(seed: int, count: int) -> None:
    world, chance = storm(seed, count)
    known = len(world.delivered)
    if world.session.state is State.DECODING and known:
        start = max(0, known - chance.randint(1, 5))
        wrong = [truth(index) for index in range(start, known + 2)]
        wrong[chance.randrange(known - start)] += 1
        world.happen(world.committed(start, wrong, world.session.epoch))
        assert world.ended
        assert len(world.delivered) == known


def test_storms_get_somewhere() -> None:
    """Else the properties above would hold of nothing."""
    worlds = [storm(seed, 60)[0] for seed in range(200)]
    assert sum(len(world.delivered) > 8 for world in worlds) > 50
    assert sum(len(world.epochs) > 1 for world in worlds) > 50
    assert sum(world.bindings_made > 1 for world in worlds) > 50
    assert sum(world.unbound > 0 for world in worlds) > 10
    assert sum(world.ended for world in worlds) < 170


# --- retries and take-overs -------------------------------------------------------------------


def test_progress_renews_the_budget_of_placements() -> None:
    session = decoding("v1")
    for spell in range(3 * PLACEMENTS_MAX):
        tokens = tuple(range(PROGRESS_TOKENS))
        session.step(committed(session.length, *tokens, epoch=session.epoch))
        commands = session.step(VerifierLost("died"))
        assert PlaceVerifier(frozenset({f"v{spell + 1}"})) in commands
        session.step(Placed(f"v{spell + 2}"))
        session.step(Opened(session.epoch))
    for _ in range(PLACEMENTS_MAX - 2):  # a poison request gets nowhere
        assert session.state is State.DECODING
        session.step(VerifierLost("died"))
        session.step(Placed("w"))
        session.step(Opened(session.epoch))
    assert isinstance(failure(session.step(VerifierLost("died"))), Unavailable)


def test_full_and_draining_verifiers_do_not_count_once_it_was_admitted() -> None:
    session = decoding("v1")
    session.step(VerifierLost("died"))
    for attempt, code in enumerate([RejectionCode.EXHAUSTED, RejectionCode.DRAINING] * 4):
        session.step(Placed(f"w{attempt}"))
        session.step(refused(code, epoch=session.epoch))
        assert session.state is State.PLACING


def restored() -> Session:
    """Taken over at epoch 5, with three tokens journaled."""
    session = new_session()
    session.restore(replace(session.spec, epoch=4), (7, 8, 9), ended=False)
    session.start()
    return session


def test_a_session_that_was_taken_over_goes_on_where_its_journal_ends() -> None:
    session = restored()
    (opening_,) = session.step(Placed("v1"))
    assert isinstance(opening_, OpenOnVerifier)
    assert (opening_.spec.epoch, opening_.spec.committed) == (5, (7, 8, 9))
    session.step(Opened(5))
    (deliver,) = session.step(committed(len(PROMPT) + 3, 1, epoch=5))
    assert isinstance(deliver, Deliver)
    assert deliver.token_ids == (1,)


def test_its_old_holder_may_have_been_further_than_is_known() -> None:
    session = restored()
    session.step(Placed("v1"))
    commands = session.step(refused(RejectionCode.STALE_EPOCH, epoch=5, current=8))
    assert PlaceVerifier in kinds(commands)
    (opening_,) = session.step(Placed("v1"))
    assert isinstance(opening_, OpenOnVerifier)
    assert opening_.spec.epoch == 9
    session.step(Opened(9))
    # From now on a higher epoch means that somebody else has taken it over.
    assert isinstance(
        failure(session.step(refused(RejectionCode.STALE_EPOCH, epoch=9, current=10))), StaleEpoch
    )


def test_what_had_ended_is_not_begun_again() -> None:
    session = new_session()
    session.restore(session.spec, (7,), ended=True)
    assert session.state is State.ENDED
    assert session.step(Placed("v1")) == []
