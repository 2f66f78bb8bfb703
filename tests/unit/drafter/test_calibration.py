"""Claims that mean what they say, whatever the model says."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.calibrated import deciles, worst
from drafter_service.calibration import LOGPROB_MAX, ClaimCalibration, ascending

TRUTHS: dict[str, Callable[[float], float]] = {
    "honest": lambda said: said,
    "too sure": lambda said: 0.6 * said**2,
    "too modest": lambda said: math.sqrt(said),
    "useless": lambda said: 0.02,
}


def taught(
    truth: Callable[[float], float], count: int, *, seed: int = 1, sampled: bool = True
) -> tuple[ClaimCalibration, list[tuple[float, bool]]]:
    """A calibration after so many guesses, and what it claimed of them before it knew."""
    calibration, chance, claims = ClaimCalibration(), random.Random(seed), []
    for _ in range(count):
        logprob = math.log(chance.random() or 0.5)
        right = chance.random() < truth(math.exp(logprob))
        claims.append((calibration.claim(sampled, 0, logprob), right))
        calibration.observe(sampled, 0, logprob, right)
    return calibration, claims


def test_until_something_is_known_a_model_is_taken_at_its_word() -> None:
    calibration = ClaimCalibration()
    for said in (0.002, 0.01, 0.3, 0.5, 0.77, 0.98):
        for rank in (0, 1, 9):
            assert math.exp(calibration.claim(True, rank, math.log(said))) == pytest.approx(said)
    assert calibration.claim(False, 0, 0.0) <= LOGPROB_MAX < 0.0
    assert calibration.claim(False, 0, -99.0) < math.log(1e-5)


@pytest.mark.parametrize("name", TRUTHS)
def test_claims_become_what_turns_out_to_be_true(name: str) -> None:
    _, claims = taught(TRUTHS[name], 20_000)
    off = worst(deciles(claims), 800)
    assert off is not None
    assert off < 0.04


def test_without_learning_the_same_check_fails() -> None:
    chance = random.Random(1)
    said = [chance.random() for _ in range(20_000)]
    claims = [(math.log(p), chance.random() < TRUTHS["too sure"](p)) for p in said]
    assert (worst(deciles(claims), 300) or 0.0) > 0.2


def test_ranks_and_kinds_of_sampling_are_told_apart() -> None:
    calibration = ClaimCalibration()
    for _ in range(600):
        calibration.observe(True, 1, math.log(0.4), True)
    for sampled, rank in ((True, 0), (True, 2), (False, 1)):
        assert math.exp(calibration.claim(sampled, rank, math.log(0.4))) == pytest.approx(0.4)
    assert math.exp(calibration.claim(True, 1, math.log(0.4))) > 0.95


def test_what_has_changed_is_learnt_anew() -> None:
    calibration, _ = taught(TRUTHS["useless"], 20_000)
    said = math.log(0.8)
    assert math.exp(calibration.claim(True, 0, said)) < 0.1
    chance = random.Random(2)
    for truth, low, high in ((0.8, 0.4, 1.0), (0.05, 0.0, 0.3), (0.8, 0.4, 1.0)):
        for _ in range(80):
            calibration.observe(True, 0, said, chance.random() < truth)
        assert low < math.exp(calibration.claim(True, 0, said)) < high


def test_chance_is_no_change() -> None:
    calibration, chance = ClaimCalibration(), random.Random(3)
    said = math.log(0.5)
    claims = []
    for _ in range(20_000):
        calibration.observe(True, 0, said, chance.random() < 0.5)
        claims.append(math.exp(calibration.claim(True, 0, said)))
    # Forgetting would show: a few dozen guesses alone say little.
    assert all(abs(claim - 0.5) < 0.08 for claim in claims[1_000:])


@settings(deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.floats(-12.0, 0.0), st.booleans()), max_size=200),
    st.lists(st.floats(-200.0, 0.0), min_size=2, max_size=20),
)
def test_surer_guesses_never_claim_less(seen: list[tuple[float, bool]], asked: list[float]) -> None:
    calibration = ClaimCalibration()
    for logprob, right in seen:
        calibration.observe(False, 0, logprob, right)
    claims = [calibration.claim(False, 0, logprob) for logprob in sorted(asked)]
    assert all(later >= earlier - 1e-9 for earlier, later in itertools.pairwise(claims))
    assert all(-20.0 <= claim <= LOGPROB_MAX for claim in claims)


def test_pooling_is_the_nearest_ascending_sequence() -> None:
    assert ascending([0.1, 0.2, 0.3], [1, 1, 1]) == [0.1, 0.2, 0.3]
    assert ascending([0.3, 0.1], [1, 3]) == pytest.approx([0.15, 0.15])
    assert ascending([0.1, 0.6, 0.2, 0.4, 0.9], [1, 1, 1, 1, 1]) == pytest.approx(
        [0.1, 0.4, 0.4, 0.4, 0.9]
    )
