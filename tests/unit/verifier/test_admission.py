"""Which sessions a verifier takes, and what it says to the others."""

from __future__ import annotations

from dataclasses import replace

import pytest

from outrider.domain import Rejection, RejectionCode, SamplingParams, SessionSpec
from verifier_service.admission import Admission, kv_need
from verifier_service.config import EngineConfig

SPEC = SessionSpec(
    session=1,
    epoch=3,
    prompt=(1, 2, 3),
    committed=(4,),
    sampling=SamplingParams(),
    seed=5,
    tokens_max=10,
    stop_ids=frozenset({99}),
)
CONFIG = EngineConfig(sessions_max=2, kv_tokens_max=40)


def refusal(
    spec: SessionSpec = SPEC,
    *,
    others: int = 0,
    known_epoch: int = 0,
    draining: bool = False,
    config: EngineConfig = CONFIG,
    length_max: int = 50,
) -> Rejection | None:
    admission = Admission(config, vocabulary_size=100, length_max=length_max)
    beside = [replace(SPEC, session=100 + number) for number in range(others)]
    return admission.refusal(spec, others=beside, known_epoch=known_epoch, draining=draining)


def test_a_session_that_fits_is_taken() -> None:
    assert refusal() is None
    assert refusal(others=1) is None
    assert refusal(known_epoch=2) is None


def test_the_whole_output_is_reserved() -> None:
    # Committed tokens count within tokens_max.
    assert kv_need(SPEC) == 13


@pytest.mark.parametrize("known_epoch", [3, 4])
def test_an_old_epoch_is_told_the_present_one(known_epoch: int) -> None:
    answer = refusal(known_epoch=known_epoch, draining=True)
    assert answer is not None
    assert (answer.code, answer.current_epoch) == (RejectionCode.STALE_EPOCH, known_epoch)
    assert (answer.session, answer.epoch) == (1, 3)


def test_a_draining_verifier_takes_nothing() -> None:
    answer = refusal(draining=True)
    assert answer is not None
    assert answer.code is RejectionCode.DRAINING


@pytest.mark.parametrize(
    ("change", "field", "word"),
    [
        ({"prompt": (1, 100)}, "prompt", "100"),
        ({"prompt": (-1,)}, "prompt", "-1"),
        ({"committed": (100,)}, "committed", "100"),
        ({"stop_ids": frozenset({100})}, "stop_ids", "100"),
        ({"tokens_max": 1}, "tokens_max", "nothing"),
        ({"tokens_max": 0}, "tokens_max", "nothing"),
        ({"tokens_max": 48}, "tokens_max", "51"),
        ({"tokens_max": 38}, "tokens_max", "41"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, object], field: str, word: str) -> None:
    answer = refusal(replace(SPEC, **change))  # type: ignore[arg-type]
    assert answer is not None
    assert (answer.code, answer.field) == (RejectionCode.INVALID, field)
    assert word in answer.message


def test_the_limits_themselves_are_allowed() -> None:
    assert refusal(replace(SPEC, tokens_max=37)) is None
    assert refusal(replace(SPEC, tokens_max=10), length_max=13) is None
    assert refusal(replace(SPEC, tokens_max=2)) is None
    assert refusal(replace(SPEC, prompt=(0, 99))) is None


def test_what_can_never_fit_is_invalid_not_exhausted() -> None:
    # Trying again later would not help, so the caller must not be told to.
    answer = refusal(replace(SPEC, tokens_max=38), others=2)
    assert answer is not None
    assert answer.code is RejectionCode.INVALID


def test_a_full_verifier_says_so() -> None:
    answer = refusal(others=2)
    assert answer is not None
    assert (answer.code, answer.field) == (RejectionCode.EXHAUSTED, "")
    assert "try again later" in answer.message


def test_kv_that_is_taken_is_not_given_twice() -> None:
    config = EngineConfig(sessions_max=9, kv_tokens_max=39)
    assert refusal(others=2, config=config) is None
    answer = refusal(replace(SPEC, tokens_max=11), others=2, config=config)
    assert answer is not None
    assert answer.code is RejectionCode.EXHAUSTED
    assert "14" in answer.message
    assert "26 of 39" in answer.message
