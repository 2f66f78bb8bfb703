"""T(N): what steps cost, and how soon that is known."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verifier_service.step_times import KNOTS, StepTimes

thorough = settings(max_examples=150, deadline=None, derandomize=True)


def learnt(cost_s: Callable[[int], float], rounds: int = 60) -> StepTimes:
    """Step times after steps of the knots' sizes up to 256, in turn."""
    times = StepTimes()
    for _ in range(rounds):
        for size in (size for size in KNOTS if size <= 256):
            times.observe(size, cost_s(size))
    return times


def linear_s(tokens: int) -> float:
    return 0.010 + 0.001 * tokens


def test_before_anything_was_seen_all_sizes_cost_the_same() -> None:
    times = StepTimes()
    assert {times.predict(size) for size in (0, 1, 7, 5000)} == {1.0}


@thorough
@given(
    samples=st.lists(
        st.tuples(
            st.integers(1, 3000), st.floats(0.0, 10.0), st.integers(0, 100_000), st.booleans()
        ),
        min_size=1,
        max_size=40,
    ),
    kv_tokens=st.integers(0, 200_000),
)
def test_a_larger_step_is_never_predicted_to_be_cheaper(
    samples: list[tuple[int, float, int, bool]], kv_tokens: int
) -> None:
    times = StepTimes()
    for tokens, duration_s, kv, mixed in samples:
        times.observe(
            tokens, duration_s, kv_tokens=kv, prefill_tokens=tokens // 2 + 1 if mixed else 0
        )
    for prefill in (0, 5):
        predicted = [
            times.predict(size, kv_tokens=kv_tokens, prefill_tokens=prefill)
            for size in range(0, 3000, 7)
        ]
        assert all(math.isfinite(value) and value > 0 for value in predicted)
        assert all(b >= a * (1 - 1e-9) for a, b in itertools.pairwise(predicted))
        row = times.predict_all(3, 50, kv_tokens=kv_tokens, prefill_tokens=prefill)
        expected = [
            times.predict(3 + more, kv_tokens=kv_tokens, prefill_tokens=prefill)
            for more in range(51)
        ]
        assert row == pytest.approx(expected, rel=1e-12)


def test_a_staircase_is_learnt() -> None:
    def staircase_s(tokens: int) -> float:
        return 0.010 if tokens <= 32 else 0.020 if tokens <= 64 else 0.055

    times = learnt(staircase_s)
    for size in (1, 5, 16, 31, 32, 64, 96, 200, 256):
        assert times.predict(size) == pytest.approx(staircase_s(size), rel=0.02), size
    # Between two steps something in between.
    assert 0.010 < times.predict(48) <= 0.020
    # Beyond what was seen it grows in proportion.
    assert times.predict(1024) == pytest.approx(4 * times.predict(256))


def test_sizes_between_the_knots_do_not_blur_the_knots() -> None:
    times = learnt(linear_s)
    for _ in range(300):
        times.observe(20, linear_s(20))
        times.observe(11, linear_s(11))
    for size in (8, 11, 12, 16, 20, 24):
        assert times.predict(size) == pytest.approx(linear_s(size), rel=0.02), size


def test_noise_is_averaged() -> None:
    chance = random.Random(1)
    times = learnt(lambda tokens: linear_s(tokens) * chance.lognormvariate(0.0, 0.05))
    for size in (1, 8, 32, 128):
        # What decides is how sizes compare.
        compared = times.predict(size) / times.predict(16)
        assert compared == pytest.approx(linear_s(size) / linear_s(16), rel=0.05), size


def test_one_slow_sample_is_forgotten() -> None:
    times = learnt(lambda _: 0.010)
    times.observe(16, 5.0)
    # It counts as a little over the usual, and mostly as a matter of all sizes.
    assert times.predict(16) <= 0.0111
    assert times.predict(16) / times.predict(1) <= 1.05
    for _ in range(30):
        times.observe(16, 0.010)
    assert times.predict(16) == pytest.approx(0.010, rel=0.01)


def test_a_lasting_change_is_learnt() -> None:
    times = learnt(lambda _: 0.010)
    for duration_s in (0.030, 0.010):
        for _ in range(40):
            times.observe(16, duration_s)
        assert times.predict(16) == pytest.approx(duration_s, rel=0.05)


def test_when_the_machine_changes_speed_sizes_nobody_visits_follow() -> None:
    for factor in (3.0, 0.4):
        times = learnt(linear_s)
        for _ in range(50):
            times.observe(1, factor * linear_s(1))
        for size in (8, 64, 256):
            assert times.predict(size) == pytest.approx(factor * linear_s(size), rel=0.2), size


def test_a_size_that_alone_has_changed_is_soon_told_apart() -> None:
    times = learnt(linear_s)
    for _ in range(150):
        times.observe(1, linear_s(1))
    # Steps of 16 tokens have become twice as slow; they are visited now and then.
    for _ in range(5):
        times.observe(16, 2 * linear_s(16))
        for _ in range(3):
            times.observe(1, linear_s(1))
    assert times.predict(16) / times.predict(1) == pytest.approx(
        2 * linear_s(16) / linear_s(1), rel=0.12
    )


def test_a_size_once_seen_slow_is_tried_again_after_a_while() -> None:
    times = learnt(linear_s, rounds=5)
    for _ in range(30):
        times.observe(8, 0.2)
        times.observe(1, linear_s(1))
    slow = times.predict(8) / times.predict(1)
    assert slow > 5
    for _ in range(60):
        times.observe(1, linear_s(1))
    assert times.predict(8) / times.predict(1) > 5, "not forgotten at once"
    shares = []
    for _ in range(6):
        for _ in range(400):
            times.observe(1, linear_s(1))
        shares.append(times.predict(8) / times.predict(1) - 1)
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.1 * (slow - 1)
    # One look is enough to know again what is true.
    times.observe(8, linear_s(8))
    times.observe(8, linear_s(8))
    assert times.predict(8) == pytest.approx(linear_s(8), rel=0.15)


def test_a_first_hiccup_is_corrected_as_well() -> None:
    times = StepTimes()
    times.observe(1, 0.010)
    times.observe(8, 7.0)
    assert times.predict(8) <= 0.161
    for _ in range(3):
        times.observe(8, 0.012)
    assert times.predict(8) == pytest.approx(0.012, rel=0.1)


def test_prompts_computed_beside_do_not_distort_decoding() -> None:
    times = learnt(linear_s)
    before = [times.predict(size) for size in (1, 8, 64, 256)]
    # Prompt tokens are three times as dear here, and steps of all sizes contain some.
    for _ in range(50):
        for size in (12, 40, 70, 256):
            times.observe(size, 3 * linear_s(size), prefill_tokens=size - 3)
    after = [times.predict(size) for size in (1, 8, 64, 256)]
    assert after == pytest.approx(before, rel=1e-6)
    assert times.predict(256, prefill_tokens=253) == pytest.approx(3 * linear_s(256), rel=0.05)


def test_before_any_prompt_mixed_steps_are_taken_for_decoding_ones() -> None:
    times = learnt(linear_s)
    assert times.predict(64, prefill_tokens=9) == times.predict(64)


def test_steps_with_long_contexts_cost_more() -> None:
    chance = random.Random(2)

    def cost_s(tokens: int, kv_tokens: int) -> float:
        return (linear_s(tokens) + 1e-6 * kv_tokens) * chance.lognormvariate(0.0, 0.02)

    times = StepTimes()
    for _ in range(400):
        tokens, kv_tokens = chance.choice([1, 2, 4, 8]), chance.choice([500, 4_000, 16_000])
        times.observe(tokens, cost_s(tokens, kv_tokens), kv_tokens=kv_tokens)
    for kv_tokens in (500, 16_000):
        predicted_s = times.predict(4, kv_tokens=kv_tokens)
        assert predicted_s == pytest.approx(linear_s(4) + 1e-6 * kv_tokens, rel=0.15)


def test_a_machine_that_slows_down_while_contexts_grow_is_not_taken_for_kv() -> None:
    times = StepTimes()
    for step in range(300):
        times.observe(4, 0.010 + 0.00002 * step, kv_tokens=10_000 + 4 * step)
    at = times.predict(4, kv_tokens=11_200)
    assert times.predict(4, kv_tokens=22_400) <= 1.1 * at
