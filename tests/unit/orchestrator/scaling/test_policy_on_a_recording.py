"""The policy on what a real fleet reported while its load came and went.

`tests/support/recorded_fleet.json.gz` holds what one orchestrator exported, every three seconds for
two and a half minutes: one verifier of eight sessions and one drafter (synthetic models, so the
times are those of a GPU and the machine's own do not show), with 2 clients for 30 s, 14 for 45 s,
1 for 60 s, then none. Clients that were refused tried again a second later.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest

from orchestrator.scaling.pacing import Limits
from orchestrator.scaling.policy import Decision, Memory, PolicyConfig, decide
from orchestrator.scaling.reading import Scrape, read_signals
from orchestrator.scaling.signals import FleetName, Signals
from tests.support.fleet_plant import formula_planner, turns
from tests.support.manifests import ROOT

RECORDING = ROOT / "tests" / "support" / "recorded_fleet.json.gz"
ORCHESTRATORS, VERIFIERS, DRAFTERS = FleetName
SESSIONS_MAX = 8
CALM, FULL, LATE, IDLE = (3.0, 31.0), (36.0, 74.0), (84.0, 140.0), (145.0, 160.0)
"""When what clients do has reached the metrics, in seconds of the recording."""

# Shorter times than usual, as the recording is short.
QUICK = Limits(
    floor=1,
    # What more of them would have changed is not in the recording.
    ceiling=2,
    down_window_s=40.0,
    up_period_s=12.0,
    down_period_s=24.0,
)


@cache
def looks() -> tuple[Scrape, ...]:
    with gzip.open(RECORDING, "rt") as file:
        recorded = json.load(file)
    return tuple(
        Scrape(
            "o",
            each["at_s"],
            {name: [(labels, value) for labels, value in found]
             for name, found in each["samples"].items()},
        )
        for each in recorded
    )  # fmt: skip


def signals() -> Iterator[Signals]:
    before: dict[str, Scrape] = {}
    for look in looks():
        yield read_signals([look], before, missing=0, now_s=look.at_s)
        before = {look.instance: look}


def replay() -> list[tuple[float, dict[FleetName, Decision]]]:
    """What would have been decided, if verifiers had come at once and changed nothing."""
    limits = {ORCHESTRATORS: QUICK, VERIFIERS: QUICK, DRAFTERS: replace(QUICK, floor=0)}
    config, memory = PolicyConfig(limits=limits), Memory()
    current = dict.fromkeys(FleetName, 1)
    decided = []
    for seen in signals():
        ready = current[VERIFIERS]
        there = replace(seen.verifiers, ready=ready, sessions_max=ready * SESSIONS_MAX)
        seen = replace(seen, verifiers=there)
        decisions, memory = decide(config, memory, current, seen, seen.measured_s, formula_planner)
        current = {each.fleet: each.replicas for each in decisions}
        decided.append((seen.measured_s, {each.fleet: each for each in decisions}))
    return decided


def wanted(fleet: FleetName, within: tuple[float, float]) -> list[int]:
    return [each[fleet].wanted for at_s, each in replay() if within[0] <= at_s <= within[1]]


def test_signals_are_what_was_going_on() -> None:
    seen = list(signals())
    calm, full, late = (
        [each for each in seen if begin <= each.measured_s <= end]
        for begin, end in (CALM, FULL, LATE)
    )
    assert {each.verifiers.ready for each in seen} == {1}
    assert {each.verifiers.sessions_max for each in seen} == {SESSIONS_MAX}
    assert max(each.verifiers.sessions for each in full) == SESSIONS_MAX
    assert min(each.verifiers.refused for each in full) > 10
    assert not any(each.verifiers.refused for each in (*calm, *late))
    assert seen[-1].verifiers.sessions == seen[-1].drafters.sessions == 0
    figures = [each.drafters.figures for each in full if each.drafters.figures is not None]
    assert figures
    assert all(0.015 < each.plain_s < 0.05 for each in figures)
    assert all(each.gain is not None and 0.1 < each.gain < 3.0 for each in figures)


def test_verifiers_grow_when_it_is_full_and_go_once_it_has_been_calm_for_long() -> None:
    assert set(wanted(VERIFIERS, CALM)) == {1}
    assert min(wanted(VERIFIERS, FULL)) >= 2
    assert set(wanted(VERIFIERS, LATE)) == {1}
    replicas = [each[VERIFIERS].replicas for _, each in replay()]
    assert turns(replicas) == 1, "up, and down again"
    assert max(replicas) == 2
    grown, gone = replicas.index(2), len(replicas) - replicas[::-1].index(2)
    assert looks()[grown].at_s < FULL[0], "at the first look that shows it"
    assert looks()[gone].at_s - LATE[0] == pytest.approx(QUICK.down_window_s, abs=6.0)
    assert set(replicas[gone:]) == {1}


def test_drafters_are_there_while_somebody_is_served_and_go_with_the_last() -> None:
    assert min(wanted(DRAFTERS, CALM)) >= 1
    assert min(wanted(DRAFTERS, LATE)) >= 1
    assert set(wanted(DRAFTERS, IDLE)) == {0}
    assert all(each[DRAFTERS].replicas >= 1 for at_s, each in replay() if at_s < LATE[1])


def test_one_orchestrator_is_enough_all_along() -> None:
    assert {each[ORCHESTRATORS].replicas for _, each in replay()} == {1}
