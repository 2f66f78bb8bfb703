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
CONFIG = EngineConfig(sessions_max=2)


def refusal(
    spec: SessionSpec = SPEC,
    *,
    others: int = 0,
    known_epoch: int = 0,
    draining: bool = False,
    config: EngineConfig = CONFIG,
    length_max: int = 200,
    kv_tokens_max: int = 128,
) -> Rejection | None:
    admission = Admission(config, 100, length_max, kv_tokens_max)
    beside = [replace(SPEC, session=100 + number) for number in range(others)]
    return admission.refusal(spec, others=beside, known_epoch=known_epoch, draining=draining)


def test_a_session_that_fits_is_taken() -> None:
    assert refusal() is None
    assert refusal(others=1) is None
    assert refusal(known_epoch=2) is None


def test_the_whole_output_is_counted_in_whole_blocks() -> None:
    # Committed tokens count within tokens_max.
    needs = [kv_need(replace(SPEC, tokens_max=count)) for count in (10, 29, 30, 61, 62)]
    assert needs == [32, 32, 64, 64, 96]


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
        ({"tokens_max": 198}, "tokens_max", "201"),
        ({"tokens_max": 126}, "tokens_max", "160"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, object], field: str, word: str) -> None:
    answer = refusal(replace(SPEC, **change))  # type: ignore[arg-type]
    assert answer is not None
    assert (answer.code, answer.field) == (RejectionCode.INVALID, field)
    assert word in answer.message


def test_the_limits_themselves_are_allowed() -> None:
    assert refusal(replace(SPEC, tokens_max=125)) is None
    assert refusal(replace(SPEC, tokens_max=197), kv_tokens_max=224) is None
    assert refusal(replace(SPEC, tokens_max=10), length_max=13) is None
    assert refusal(replace(SPEC, tokens_max=2)) is None
    assert refusal(replace(SPEC, prompt=(0, 99))) is None


def test_what_can_never_fit_is_invalid_not_exhausted() -> None:
    # Trying again later would not help, so the caller must not be told to.
    for overcommit in (1.0, 9.0):
        config = EngineConfig(sessions_max=2, kv_overcommit=overcommit)
        answer = refusal(replace(SPEC, tokens_max=126), others=2, config=config)
        assert answer is not None
        assert answer.code is RejectionCode.INVALID


def test_a_full_verifier_says_so() -> None:
    answer = refusal(others=2)
    assert answer is not None
    assert (answer.code, answer.field) == (RejectionCode.EXHAUSTED, "")
    assert "try again later" in answer.message


@pytest.mark.parametrize(
    ("overcommit", "promises_max"), [(1.0, 128), (0.5, 128), (1.5, 192), (2.0, 256), (2.4, 307)]
)
def test_kv_is_promised_up_to_the_overcommitment(overcommit: float, promises_max: int) -> None:
    config = EngineConfig(sessions_max=99, kv_overcommit=overcommit)
    # Each needs a block.
    fits = promises_max // 32
    assert refusal(others=fits - 1, config=config) is None
    answer = refusal(others=fits, config=config)
    assert answer is not None
    assert (answer.code, answer.field) == (RejectionCode.EXHAUSTED, "")
    assert "needs KV for up to 32 tokens" in answer.message
    assert f"{fits * 32} of {promises_max}" in answer.message
    larger = replace(SPEC, tokens_max=30)
    assert refusal(larger, others=fits - 2, config=config) is None
    answer = refusal(larger, others=fits - 1, config=config)
    assert answer is not None
    assert "64 tokens" in answer.message
