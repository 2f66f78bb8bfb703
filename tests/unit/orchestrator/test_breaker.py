"""Workers that keep failing are left alone, for longer and longer, and forgiven when they work."""

from __future__ import annotations

from orchestrator.breaker import FAILURES_MAX, PAUSE_MAX_S, PAUSE_MIN_S, Breaker


def test_a_few_failures_are_nothing():
    breaker = Breaker()
    for _ in range(FAILURES_MAX):
        breaker.failed(10.0)
    assert breaker.allows(10.0)


def test_pauses_grow_up_to_a_bound_and_end():
    breaker = Breaker(failures=FAILURES_MAX)
    pauses = []
    for _ in range(40):
        breaker.failed(100.0)
        assert not breaker.allows(100.0)
        pauses.append(breaker.opened_until_s - 100.0)
        assert breaker.allows(breaker.opened_until_s)
    assert pauses[:3] == [PAUSE_MIN_S, 2 * PAUSE_MIN_S, 4 * PAUSE_MIN_S]
    assert pauses[-1] == PAUSE_MAX_S
    assert pauses == sorted(pauses)


def test_work_done_is_all_it_takes():
    breaker = Breaker()
    for _ in range(9):
        breaker.failed(5.0)
    breaker.worked()
    assert breaker.allows(5.0)
    breaker.failed(5.0)
    assert breaker.allows(5.0)
