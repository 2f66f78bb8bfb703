"""What a client asks for after its stream broke, and for how long."""

from __future__ import annotations

import pytest

from outrider.client import Delta, Finished, PromptTokens, Request, Started
from outrider.client.resuming import Attempts, Progress
from outrider.committed import digest
from outrider.domain import FinishReason, SpeculationCounters, Usage
from outrider.errors import (
    Exhausted,
    InvalidRequest,
    StaleEpoch,
    Unavailable,
    UnknownGeneration,
)

STARTED = Started("gen-1", "tiny", 3, 7, "f", resumable=True)
BROKEN = Unavailable("the connection broke")


def finished(choice: int = 0) -> Finished:
    return Finished(FinishReason.STOP, Usage(3, 2), SpeculationCounters(), 0.1, 0.2, choice)


def progress_of(*events, n: int = 1) -> Progress:
    progress = Progress(Request(prompt="x", n=n))
    for event in events:
        assert progress.takes(event)
    return progress


def test_what_is_known_is_counted_for_each_choice():
    progress = progress_of(
        STARTED,
        Delta("ab", (1, 2), (0, 0)),
        Delta("", (9,), (0,), choice=1),
        Delta("€", (3,), (0,)),
        finished(1),
        n=2,
    )
    assert not progress.takes(STARTED)  # the caller has been told
    message = progress.to_pb()
    assert message.generation_id == "gen-1"
    assert message.prompt_logprobs_known
    first, second = message.choices
    assert (first.offset, first.digest, first.characters) == (3, digest((1, 2, 3)), 3)
    assert not first.finished
    assert (second.offset, second.digest, second.finished) == (1, digest((9,)), True)
    assert not progress.complete
    progress.takes(finished(0))
    assert progress.complete


def test_what_has_not_started_is_not_complete():
    assert not Progress(Request(prompt="x", n=0)).complete


def test_log_probabilities_of_the_prompt_are_asked_for_until_they_came():
    progress = Progress(Request(prompt="x", prompt_logprobs=1))
    progress.takes(STARTED)
    assert not progress.to_pb().prompt_logprobs_known
    progress.takes(PromptTokens(()))
    assert progress.to_pb().prompt_logprobs_known


def test_a_generation_that_goes_on_is_asked_for_again_and_again():
    progress = progress_of(STARTED)
    attempts = Attempts(progress, 2, resume_s=10.0)
    for second in range(100):
        progress.takes(Delta("a", (1,), (0,)))
        assert attempts.pause_s(BROKEN, second * 60.0, answered=False) < 0.2


def test_without_progress_pauses_grow_and_end():
    attempts = Attempts(progress_of(STARTED), 2, resume_s=10.0)
    pauses = [attempts.pause_s(BROKEN, now_s, answered=False) for now_s in range(10)]
    assert pauses == sorted(pauses)
    assert pauses[0] < 0.1
    assert pauses[-1] <= 1.0
    with pytest.raises(Unavailable, match="the connection broke"):
        attempts.pause_s(BROKEN, 10.1, answered=False)


@pytest.mark.parametrize("error", [Unavailable("x"), Exhausted("x"), StaleEpoch("x", 0)])
def test_what_may_pass_is_waited_for(error):
    attempts = Attempts(progress_of(STARTED), 1, resume_s=10.0)
    attempts.pause_s(BROKEN, 0.0, answered=False)
    attempts.pause_s(error, 1.0, answered=True)


def test_what_will_not_pass_is_said_with_what_began_it():
    attempts = Attempts(progress_of(STARTED), 1, resume_s=10.0)
    attempts.pause_s(BROKEN, 0.0, answered=False)
    with pytest.raises(Unavailable, match=r"the connection broke.*cannot be resumed.*no gen"):
        attempts.pause_s(UnknownGeneration("generation_id", "no gen"), 1.0, answered=True)


def test_who_was_fenced_out_does_not_fight_for_it():
    attempts = Attempts(progress_of(STARTED, Delta("a", (1,), (0,))), 1, resume_s=10.0)
    with pytest.raises(StaleEpoch):
        attempts.pause_s(StaleEpoch("taken over", 0), 0.0, answered=True)


def test_what_is_not_journaled_is_not_asked_for_again():
    started = Started("gen-1", "tiny", 3, 7, "f", resumable=False)
    with pytest.raises(Unavailable):
        Attempts(progress_of(started), 3, 10.0).pause_s(BROKEN, 0.0, answered=False)
    with pytest.raises(Unavailable):
        Attempts(progress_of(STARTED), 3, 0.0).pause_s(BROKEN, 0.0, answered=False)


def test_before_the_start_every_orchestrator_is_asked_once():
    attempts = Attempts(progress_of(), 3, 10.0)
    for _ in range(2):
        attempts.pause_s(Exhausted("full"), 0.0, answered=True)
    with pytest.raises(Exhausted):
        attempts.pause_s(Exhausted("full"), 0.0, answered=True)
    with pytest.raises(InvalidRequest):
        Attempts(progress_of(), 3, 10.0).pause_s(InvalidRequest("n", "no"), 0.0, answered=True)
