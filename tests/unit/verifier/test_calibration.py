"""What claims are worth."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.draft_tree import ESTIMATE_FLOOR
from verifier_service.calibration import WORTH_MIN, Calibrations, SessionCalibration

thorough = settings(max_examples=100, deadline=None, derandomize=True)


def fresh() -> SessionCalibration:
    return Calibrations().of_session(1, 1)


def probability(calibration: SessionCalibration, claim: float) -> float:
    return math.exp(calibration.apply(math.log(claim)))


def play(
    calibration: SessionCalibration,
    rounds: int,
    chance: random.Random,
    *,
    claims: Sequence[float],
    truth: Callable[[float], float],
) -> dict[float, float]:
    """Let a source claim and be found out; returns the mean calibrated probability by claim."""
    sums = dict.fromkeys(claims, 0.0)
    counts = dict.fromkeys(claims, 0)
    for _ in range(rounds):
        claim = chance.choice(claims)
        sums[claim] += probability(calibration, claim)
        counts[claim] += 1
        calibration.observe(math.log(claim), chance.random() < truth(claim))
    return {claim: sums[claim] / max(1, counts[claim]) for claim in claims}


def test_an_unknown_source_is_taken_at_its_word() -> None:
    for claim in (0.01, 0.3, 0.9):
        assert probability(fresh(), claim) == pytest.approx(claim, rel=0.01)


def test_a_liar_is_worthless_within_twenty_guesses() -> None:
    calibration = fresh()
    play(calibration, 20, random.Random(1), claims=[0.9], truth=lambda _: 0.0)
    assert calibration.apply(math.log(0.9)) == ESTIMATE_FLOOR
    assert calibration.apply(0.0) == ESTIMATE_FLOOR


def test_a_liar_of_many_claims_is_worthless_within_thirty_guesses() -> None:
    calibration = fresh()
    play(calibration, 30, random.Random(1), claims=[0.9, 0.5, 0.2], truth=lambda _: 0.0)
    assert calibration.apply(math.log(0.9)) == ESTIMATE_FLOOR


@pytest.mark.parametrize("claim", [0.6, 0.9])
def test_who_was_honest_for_long_is_found_out_as_fast(claim: float) -> None:
    calibration = fresh()
    play(calibration, 1000, random.Random(1), claims=[claim], truth=lambda claim: claim)
    play(calibration, 25, random.Random(1), claims=[claim], truth=lambda _: 0.0)
    assert calibration.apply(math.log(claim)) == ESTIMATE_FLOOR


@pytest.mark.parametrize("seed", range(5))
def test_a_source_that_turns_honest_is_believed_again(seed: int) -> None:
    calibration = fresh()
    play(calibration, 2000, random.Random(seed), claims=[0.9], truth=lambda _: 0.0)
    play(calibration, 25, random.Random(seed), claims=[0.8], truth=lambda claim: claim)
    assert probability(calibration, 0.8) > 0.5
    means = play(calibration, 2000, random.Random(7), claims=[0.8], truth=lambda claim: claim)
    assert means[0.8] == pytest.approx(0.8, abs=0.05)


def test_now_and_then_right_by_chance_is_not_honest() -> None:
    calibration = fresh()
    means = play(calibration, 5000, random.Random(1), claims=[0.9], truth=lambda _: 0.01)
    assert means[0.9] < WORTH_MIN


def test_an_honest_sources_estimates_stay_what_they_are() -> None:
    claims = [0.1, 0.3, 0.6, 0.85]
    means = play(fresh(), 4000, random.Random(2), claims=claims, truth=lambda claim: claim)
    for claim in claims:
        assert means[claim] == pytest.approx(claim, abs=0.05), means


def test_an_honest_source_is_hardly_ever_doubted() -> None:
    calibration, chance, doubted = fresh(), random.Random(3), 0
    play(calibration, 100, chance, claims=[0.8], truth=lambda claim: claim)
    for _ in range(5000):
        doubted += probability(calibration, 0.8) < 0.5
        calibration.observe(math.log(0.8), chance.random() < 0.8)
    assert doubted < 50


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.6])
def test_a_source_that_is_off_by_a_factor_is_corrected(factor: float) -> None:
    claims = [0.2, 0.4, 0.6]
    calibration = fresh()
    play(calibration, 500, random.Random(3), claims=claims, truth=lambda claim: claim * factor)
    means = play(
        calibration, 4000, random.Random(4), claims=claims, truth=lambda claim: claim * factor
    )
    for claim in claims:
        assert means[claim] == pytest.approx(claim * factor, abs=0.05), means


def test_a_source_whose_high_claims_alone_are_empty_is_corrected() -> None:
    claims, calibration = [0.3, 0.95], fresh()

    def truth(claim: float) -> float:
        return 0.3 if claim == 0.3 else 0.4

    play(calibration, 1500, random.Random(3), claims=claims, truth=truth)
    means = play(calibration, 4000, random.Random(4), claims=claims, truth=truth)
    assert means[0.3] == pytest.approx(0.3, abs=0.06)
    assert means[0.95] == pytest.approx(0.4, abs=0.06)
    # Once they are meant, what they were worth in those thousands of guesses is forgotten.
    play(calibration, 1000, random.Random(5), claims=claims, truth=lambda claim: claim)
    means = play(calibration, 1000, random.Random(6), claims=claims, truth=lambda claim: claim)
    assert means[0.3] == pytest.approx(0.3, abs=0.06)
    assert means[0.95] == pytest.approx(0.95, abs=0.06)


@thorough
@given(
    history=st.lists(
        st.tuples(st.floats(-70.0, 0.0), st.booleans(), st.integers(1, 30)), max_size=40
    )
)
def test_a_higher_claim_never_means_less_and_nothing_is_certain(
    history: list[tuple[float, bool, int]],
) -> None:
    calibration = fresh()
    for claim_logprob, accepted, times in history:
        for _ in range(times):
            calibration.observe(claim_logprob, accepted)
    claims = [-(0.8**step) * 60.0 for step in range(40)] + [0.0]
    values = [calibration.apply(claim) for claim in claims]
    assert all(math.isfinite(value) for value in values)
    assert all(b >= a - 1e-9 for a, b in itertools.pairwise(values))
    assert max(values) <= math.log(0.99) + 1e-12


def test_a_new_session_begins_with_what_the_others_know() -> None:
    calibrations = Calibrations()
    for session in range(5):
        play(
            calibrations.of_session(1, 2),
            8,
            random.Random(session),
            claims=[0.9],
            truth=lambda _: 0.0,
        )
    assert calibrations.of_session(1, 2).apply(0.0) == ESTIMATE_FLOOR
    # Of another connection's second source, or of this one's first, nothing is known.
    assert probability(calibrations.of_session(2, 2), 0.9) == pytest.approx(0.9, rel=0.01)
    assert probability(calibrations.of_session(1, 1), 0.9) == pytest.approx(0.9, rel=0.01)


def test_a_source_may_be_good_in_one_session_and_bad_in_the_others() -> None:
    calibrations, chance = Calibrations(), random.Random(1)
    good, *bad = (calibrations.of_session(1, 1) for _ in range(8))
    for _ in range(200):
        good.observe(math.log(0.9), chance.random() < 0.9)
        for other in bad:
            other.observe(math.log(0.9), chance.random() < 0.02)
    assert probability(good, 0.9) > 0.75
    assert all(probability(other, 0.9) < 0.1 for other in bad)


def test_what_is_remembered_of_sources_is_bounded() -> None:
    calibrations = Calibrations()
    play(calibrations.of_session(1, 1), 30, random.Random(1), claims=[0.9], truth=lambda _: 0.0)
    for connection in range(2, 3000):
        calibrations.of_session(connection, 1)
    assert probability(calibrations.of_session(1, 1), 0.9) == pytest.approx(0.9, rel=0.01)
