"""When KV is fetched and when it is computed: by what was measured, with made-up clocks."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verifier_service.pull_policy import (
    ASSUMED_BYTES_PER_S,
    ASSUMED_LATENCY_S,
    PeerRates,
    PullPlan,
    plan_pull,
    prefill_s,
)

MB = 1_000_000


def plan(**changes: Any) -> PullPlan | None:
    given: dict[str, Any] = {
        "blocks": 10,
        "block_bytes": MB,
        "transfer_s": 0.1,
        "latency_s": 0.01,
        "prefill_s": 1.0,
        "wait_max_s": 5.0,
    }
    return plan_pull(**{**given, **changes})


# --- whether to begin -----------------------------------------------------------------------------


def test_what_is_quicker_is_done() -> None:
    assert plan(transfer_s=0.1, prefill_s=1.0) is not None
    assert plan(transfer_s=1.0, prefill_s=0.1) is None
    assert plan(transfer_s=1.0, prefill_s=1.1) is None, "neither is known exactly"
    assert plan(transfer_s=1.0, prefill_s=1.3) is not None


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_known_is_not_begun(value: float) -> None:
    assert plan(transfer_s=value) is None
    assert plan(prefill_s=math.nan) is None


def test_a_single_block_is_computed() -> None:
    assert plan(blocks=1) is None
    assert plan(blocks=2) is not None


def test_nobody_waits_longer_than_the_prefill_would_have_taken() -> None:
    found = plan(prefill_s=1.0)
    assert found is not None
    assert found.wait_s == 1.0
    found = plan(prefill_s=60.0, wait_max_s=5.0)
    assert found is not None
    assert found.wait_s == 5.0


# --- whether to go on -----------------------------------------------------------------------------


def test_a_peer_that_says_nothing_is_left_after_a_share_of_the_prefill() -> None:
    found = plan(prefill_s=1.0)
    assert found is not None
    assert found.still_pays(0.25, 0)
    assert not found.still_pays(0.26, 0)


def test_a_peer_that_is_far_is_given_its_round_trip() -> None:
    found = plan(prefill_s=1.0, latency_s=0.3, transfer_s=0.5)
    assert found is not None
    assert found.still_pays(0.6, 0)
    assert not found.still_pays(0.61, 0)


def test_one_that_is_too_slow_is_left() -> None:
    found = plan(prefill_s=1.0)
    assert found is not None
    # At this pace all would take 0.8 and 1.2 times as long as the prefill.
    assert found.still_pays(0.4, 5 * MB)
    assert not found.still_pays(0.6, 5 * MB)


def test_one_that_stalls_is_left_with_what_it_has_brought() -> None:
    found = plan(prefill_s=1.0)
    assert found is not None
    assert found.still_pays(0.3, 5 * MB)
    assert not found.still_pays(0.51, 5 * MB)


def test_what_has_come_whole_is_taken_however_late() -> None:
    found = plan(prefill_s=1.0)
    assert found is not None
    assert found.still_pays(9.0, 10 * MB)
    assert not found.still_pays(9.0, 9 * MB)


@given(st.floats(0.001, 100), st.floats(0, 1), st.floats(0, 1))
@settings(deadline=None, derandomize=True)
def test_whatever_comes_it_costs_no_more_than_the_prefill(
    seconds: float, latency: float, share: float
) -> None:
    found = plan(prefill_s=seconds, transfer_s=0.0, latency_s=latency * seconds, wait_max_s=1e9)
    assert found is not None
    assert not found.still_pays(seconds * 1.001, int(share * (10 * MB - 1)))


# --- how quick peers are --------------------------------------------------------------------------


def test_of_a_stranger_something_ordinary_is_assumed() -> None:
    rates = PeerRates()
    expected = ASSUMED_LATENCY_S + MB / ASSUMED_BYTES_PER_S
    assert rates.expected_s("a:1", MB, 0.0) == pytest.approx(expected)
    rates.observe("b:1", 10 * MB, 0.01, 1.01, 0.0)
    assert rates.expected_s("a:1", 10 * MB, 0.0) == pytest.approx(ASSUMED_LATENCY_S + 1.0)


def test_latency_and_rate_are_learnt_apart() -> None:
    rates = PeerRates()
    rates.observe("a:1", 10 * MB, 0.2, 1.2, 0.0)
    assert rates.expected_s("a:1", 10 * MB, 1.0) == pytest.approx(1.2)
    assert rates.expected_s("a:1", 100 * MB, 1.0) == pytest.approx(10.2)
    assert rates.latency_s("a:1") == pytest.approx(0.2)


def test_a_peer_that_changes_is_followed() -> None:
    rates = PeerRates()
    rates.observe("a:1", 10 * MB, 0.0, 0.1, 0.0)
    for turn in range(6):
        rates.observe("a:1", 10 * MB, 0.0, 10.0, float(turn))
    assert rates.expected_s("a:1", 10 * MB, 6.0) == pytest.approx(10.0, rel=0.1)


def test_one_that_was_slow_is_tried_again_some_day() -> None:
    rates = PeerRates()
    rates.observe("a:1", MB, 0.0, 100.0, 0.0)
    assert rates.expected_s("a:1", MB, 59.0) == pytest.approx(100.0)
    assert rates.expected_s("a:1", MB, 61.0) < 1.0


def test_one_that_fails_is_left_alone_for_longer_each_time() -> None:
    rates = PeerRates()
    now_s, waits = 0.0, []
    for _ in range(8):
        rates.failed("a:1", now_s)
        wait_s = next(s for s in range(1, 100) if rates.expected_s("a:1", 1, now_s + s) < math.inf)
        waits.append(wait_s)
        now_s += wait_s
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]
    assert rates.expected_s("b:1", 1, now_s) < math.inf, "others are not"
    rates.observe("a:1", MB, 0.0, 0.1, now_s)
    rates.failed("a:1", now_s)
    assert rates.expected_s("a:1", 1, now_s + 1.0) < math.inf, "it had worked in between"


@pytest.mark.parametrize(("size", "first_s", "took_s"), [(0, 0.0, 1.0), (MB, 2.0, 1.0)])
def test_nonsense_teaches_nothing(size: int, first_s: float, took_s: float) -> None:
    rates = PeerRates()
    rates.observe("a:1", size, first_s, took_s, 0.0)
    assert rates.expected_s("a:1", MB, 0.0) == PeerRates().expected_s("a:1", MB, 0.0)


def test_any_number_of_addresses_may_be_hinted_at() -> None:
    rates = PeerRates()
    for number in range(3_000):
        rates.failed(f"h:{number}", 0.0)
    assert len(rates._peers) == 1_024


# --- how long a prefill takes ---------------------------------------------------------------------


def test_a_prefill_takes_the_steps_that_it_takes() -> None:
    asked: list[tuple[int, int]] = []

    def predict(tokens: int, prefill_tokens: int) -> float:
        asked.append((tokens, prefill_tokens))
        return tokens / 100

    assert prefill_s(predict, 600, 256, 4) == pytest.approx((2 * 260 + 92) / 100)
    assert asked == [(260, 256), (92, 88)]
    assert prefill_s(predict, 512, 256, 0) == pytest.approx(5.12)
    assert prefill_s(predict, 0, 256, 9) == 0.0
