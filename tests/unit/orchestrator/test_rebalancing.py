"""When a move pays, and when it does not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.rebalancing import (
    GAIN_PER_COST_MIN,
    Move,
    Mover,
    Site,
    StepCurve,
    best_move,
    cost_s,
    extremes,
    gain_s,
    steps_left,
)

RISING = StepCurve({1: 0.02, 8: 0.09})
"""10 ms for each row, and 10 ms."""
FLAT = StepCurve({1: 0.02, 8: 0.02})
PREFILL_S = 0.0005


def site(address: str, sessions: int, curve: StepCurve = RISING, **changes: float) -> Site:
    settings = {"sessions_max": 16, "waiting": 0, "prefill_s": PREFILL_S, **changes}
    return Site(address, sessions, curve=curve, **settings)  # type: ignore[arg-type]


def mover(number: int = 1, *, steps: float = 100.0, tokens: int = 64, **held: int) -> Mover:
    return Mover(number, steps, tokens, held)


# --- what steps take ---


def test_between_what_was_seen_there_are_straight_lines():
    assert RISING.step_s(4) == pytest.approx(0.05)
    assert RISING.step_s(1) == pytest.approx(0.02)


def test_beyond_what_was_seen_nothing_is_promised():
    assert RISING.step_s(100) == RISING.step_s(8)
    assert RISING.step_s(0) == RISING.step_s(1)
    assert StepCurve().step_s(3) == 0.0


def test_a_step_that_was_disturbed_hardly_counts():
    curve = StepCurve()
    for duration_s in (0.5, 0.02, 0.02, 0.02, 0.02, 0.02):
        curve.observe(4, duration_s)
    before_s = curve.step_s(4)
    curve.observe(4, 0.5)
    assert before_s < 0.04
    assert curve.step_s(4) - before_s == pytest.approx((0.5 - before_s) / 16)


def test_an_unknown_end_is_as_another_curve_says():
    short = StepCurve({1: 0.03}).extended(RISING)
    assert short.step_s(1) == 0.03
    assert short.step_s(8) == RISING.step_s(8)


@given(st.dictionaries(st.integers(1, 40), st.floats(1e-4, 1.0), min_size=1, max_size=12))
def test_more_rows_are_never_quicker(knots: dict[int, float]) -> None:
    times = [StepCurve(knots).step_s(rows) for rows in range(45)]
    assert times == sorted(times)


def test_knots_are_bounded():
    curve = StepCurve()
    for rows in range(1, 1_000):
        curve.observe(rows, 0.01)
    assert len(curve.knots) <= 64


# --- whether a move pays ---


def test_after_a_scale_up_a_session_moves():
    here, there = site("old", 8), site("new", 0)
    assert extremes([there, here]) == (here, there)
    move = best_move(here, there, [mover(1), mover(2, steps=200.0)])
    assert move is not None
    # Whoever has most left wins most.
    assert (move.number, move.address, move.missing_tokens) == (2, "new", 64)
    # 70 ms a step for itself, 10 ms for each of the seven that stay.
    assert move.gain_s == pytest.approx(200 * (0.07 + 7 * 0.01))
    assert move.cost_s == pytest.approx(0.09 + 64 * PREFILL_S)


def test_moves_end_when_loads_are_alike():
    loads = {"a": 8, "b": 0, "c": 0}
    moves = 0
    while True:
        sites = [site(address, sessions) for address, sessions in loads.items()]
        pair = extremes(sites)
        if pair is None or best_move(*pair, [mover(steps=1_000.0)]) is None:
            break
        loads[pair[0].address] -= 1
        loads[pair[1].address] += 1
        moves += 1
        assert moves < 20
    assert sorted(loads.values()) == [2, 3, 3]
    assert moves == 5


def test_where_load_costs_nothing_nothing_moves():
    assert best_move(site("old", 8, FLAT), site("new", 0, FLAT), [mover(steps=1e6)]) is None


def test_what_is_nearly_done_stays():
    here, there = site("old", 8), site("new", 0)
    assert best_move(here, there, [mover(steps=2.0)]) is None


@pytest.mark.parametrize(("held", "moves"), [(0, False), (19_990, True)])
def test_a_long_text_moves_only_to_who_holds_it(held, moves):
    here, there = site("old", 8), site("new", 2)
    long_text = mover(tokens=20_000, new=held)
    assert (best_move(here, there, [long_text]) is not None) is moves


def test_a_prefill_that_was_never_measured_might_cost_anything():
    assert best_move(site("old", 8), site("new", 0, prefill_s=0.0), [mover()]) is None


def test_a_load_that_was_never_seen_might_cost_anything():
    here, there = site("old", 12), site("new", 8)
    assert best_move(here, there, [mover(steps=1e6)]) is None


def test_a_full_verifier_is_not_moved_to():
    here, there = site("old", 8), site("new", 0, sessions_max=0)
    assert extremes([here, there]) is None


def test_one_alone_stays():
    assert extremes([site("old", 1), site("new", 0)]) is None


def test_whoever_waits_for_kv_wins_by_moving_although_steps_are_flat():
    """Four of eight run at a time: half of the speed, however long a step takes."""
    here, there = site("old", 8, FLAT, waiting=4), site("new", 0, FLAT)
    move = best_move(here, there, [mover()])
    assert move is not None
    assert here.token_s(8) == pytest.approx(0.04)
    assert there.token_s(1) == pytest.approx(0.02)


@given(
    st.integers(2, 16),
    st.integers(0, 15),
    st.floats(0, 1e4),
    st.integers(1, 10_000),
    st.floats(1e-6, 1e-2),
)
def test_a_move_always_wins_more_than_it_costs(
    here_sessions: int, there_sessions: int, steps: float, tokens: int, prefill_s: float
) -> None:
    here, there = site("a", here_sessions), site("b", there_sessions, prefill_s=prefill_s)
    one = mover(steps=steps, tokens=tokens)
    move = best_move(here, there, [one])
    assert move == best_move(here, there, [one, one])
    if move is not None:
        assert isinstance(move, Move)
        assert move.gain_s >= GAIN_PER_COST_MIN * move.cost_s
        assert move.gain_s == gain_s(here, there, steps)
        assert move.cost_s == cost_s(here, there, one)
        assert there_sessions + 1 < here_sessions


@pytest.mark.parametrize(
    ("said", "tokens_max", "per_step", "steps"),
    [(100, 1_000, 1.0, 100), (900, 1_000, 1.0, 100), (100, 1_000, 4.0, 25), (10, 1_000, 0.0, 10)],
)
def test_as_much_is_to_come_as_has_been(said, tokens_max, per_step, steps):
    assert steps_left(said, tokens_max, per_step) == steps
