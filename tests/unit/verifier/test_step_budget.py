"""The step budget as a whole: sessions, drafters and a target in simulated time. No clock.

A step of N tokens takes `cost_s(N)`; throughput is compared with steps that verify no guess.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

import pytest

from outrider.domain import Draft, SamplingParams, SessionSpec
from outrider.model.kv_cache import SessionCache
from verifier_service.acceptance import judge
from verifier_service.calibration import Calibrations
from verifier_service.scheduling import StepTimes, choose_nodes
from verifier_service.session import Session

VOCABULARY = 50_000
PROMPT = (1, 2, 3)
WARM_UP_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)

Drafter = Callable[[Session], Draft | None]
Cost = Callable[[int], float]


def target(session: int, position: int) -> int:
    """The target's token at a position, on the committed path."""
    return (position * 7919 + session * 31) % 1_000


def steep_s(tokens: int) -> float:
    """A small machine: each further token costs a tenth of the first."""
    return 0.020 + 0.0025 * tokens


def flat_s(tokens: int) -> float:
    """A large one: free until compute is saturated."""
    return 0.020 * max(1.0, tokens / 128)


def draft_of(
    session: Session, tokens: Sequence[int], parents: Sequence[int], claim: float, *, late: int = 0
) -> Draft:
    length = max(len(PROMPT), len(session.log) - late)
    base_digest = session.log.digest_at(length)
    assert base_digest is not None
    logprobs = (math.log(claim),) * len(tokens)
    return Draft(1, length, base_digest, tuple(tokens), tuple(parents), logprobs)


class Liar:
    """256 wrong nodes after each commit, each claimed with 0.9."""

    def __init__(self) -> None:
        self._chance = random.Random(1)

    def __call__(self, session: Session) -> Draft:
        tokens = [self._chance.randrange(2_000, VOCABULARY) for _ in range(256)]
        parents = [-1] * 4 + [self._chance.randrange(max(0, i - 8), i) for i in range(4, 256)]
        return draft_of(session, tokens, parents, 0.9)


class Honest:
    """A chain whose tokens are right with the claimed probability."""

    def __init__(self, claim: float = 0.8, *, late: int = 0) -> None:
        self._chance = random.Random(2)
        self._claim = claim
        self._late = late

    def __call__(self, session: Session) -> Draft:
        length = max(len(PROMPT), len(session.log) - self._late)
        tokens, right = [], True
        for depth in range(10):
            right = right and self._chance.random() < self._claim
            token = target(session.spec.session, length + depth)
            tokens.append(token if right else token + 1_000)
        return draft_of(session, tokens, range(-1, 9), self._claim, late=self._late)


def silent(_: Session) -> None:
    """Never says anything."""


@dataclass
class Run:
    """What happened in each step."""

    rows: int
    cost_s: Cost
    durations_s: list[float] = field(default_factory=list)
    chosen: list[int] = field(default_factory=list)
    committed: list[int] = field(default_factory=list)

    def speed(self, since_s: float = 0.0) -> float:
        """Throughput over target-only, of the steps that began at `since_s` or later."""
        start, clock_s = 0, 0.0
        while clock_s < since_s:
            clock_s += self.durations_s[start]
            start += 1
        throughput = sum(self.committed[start:]) / sum(self.durations_s[start:])
        return throughput / (self.rows / self.cost_s(self.rows))


class Simulation:
    """Sessions that outlive their drafters' moods."""

    def __init__(self, rows: int, cost_s: Cost) -> None:
        self._rows, self._cost_s = rows, cost_s
        self._chance = random.Random(3)
        self._times = StepTimes()
        self.calibrations = Calibrations()
        for size in WARM_UP_SIZES:
            self._times.observe(size, cost_s(size))
        self.sessions = [self.open(number) for number in range(rows)]

    def open(self, number: int) -> Session:
        spec = SessionSpec(
            number, 1, PROMPT, (), SamplingParams(temperature=0.0), seed=1, tokens_max=1_000_000
        )
        return Session(
            spec,
            1,
            cast(SessionCache, None),
            eos_ids=frozenset(),
            vocabulary_size=VOCABULARY,
            tree_nodes_max=256,
            tree_depth_max=64,
            calibrations=self.calibrations,
        )

    def run(self, seconds: float, *drafters: Drafter) -> Run:
        """Source i + 1 of every session is `drafters[i]`."""
        run, clock_s = Run(self._rows, self._cost_s), 0.0
        while clock_s < seconds:
            for session in self.sessions:
                for source, drafter in enumerate(drafters, start=1):
                    draft = drafter(session)
                    if draft is not None and not session.passes_over(source):
                        session.merge(draft, source)
            clock_s += self._step(run)
        return run

    def _step(self, run: Run) -> float:
        choice = choose_nodes(
            [session.tree for session in self.sessions],
            [64] * self._rows,
            self._times,
            other_tokens=0,
            nodes_max=256,
        )
        self.calibrations.pay_min = choice.pay_min
        self.calibrations.rows = self._rows
        count = sum(len(nodes) for nodes in choice.nodes)
        true_s = self._cost_s(self._rows + count)
        # What is measured is noisy; what is compared is not.
        noise = 5.0 if self._chance.random() < 0.01 else self._chance.lognormvariate(0.0, 0.04)
        self._times.observe(self._rows + count, true_s * noise)
        committed = 0
        for session, nodes in zip(self.sessions, choice.nodes, strict=True):
            number = session.spec.session
            samples = [target(number, len(session.log))]
            samples += [target(number, node.position + 1) for node in nodes]
            verdict = judge(
                session.tree.root, nodes, samples, stop_ids=frozenset(), tokens_left=1_000
            )
            session.commit(verdict, nodes)
            committed += len(verdict.tokens)
        run.durations_s.append(true_s)
        run.chosen.append(count)
        run.committed.append(committed)
        return true_s


@pytest.mark.parametrize("rows", [1, 4, 16, 64])
@pytest.mark.parametrize("cost_s", [steep_s, flat_s])
def test_a_liar_costs_nothing_after_the_first_second(rows: int, cost_s: Cost) -> None:
    run = Simulation(rows, cost_s).run(6.0 if rows < 64 else 3.0, Liar())
    assert run.speed(since_s=1.0) >= 0.98
    assert sum(run.chosen[30:]) == 0


@pytest.mark.parametrize("rows", [1, 64])
def test_a_silent_drafter_costs_nothing(rows: int) -> None:
    run = Simulation(rows, steep_s).run(5.0, silent)
    assert run.speed() == pytest.approx(1.0)
    assert sum(run.chosen) == 0


@pytest.mark.parametrize(
    ("rows", "cost_s"), [(1, steep_s), (4, steep_s), (1, flat_s), (16, flat_s)]
)
def test_speculation_is_back_within_two_seconds_of_honesty(rows: int, cost_s: Cost) -> None:
    usual = Simulation(rows, cost_s).run(6.0, Honest()).speed(since_s=2.0)
    assert usual > 1.2
    simulation = Simulation(rows, cost_s)
    simulation.run(6.0, Liar())
    back = simulation.run(6.0, Honest())
    assert back.speed(since_s=2.0) >= 0.93 * usual
    # And it is found out again.
    assert simulation.run(6.0, Liar()).speed(since_s=1.0) >= 0.98


@pytest.mark.parametrize("cost_s", [steep_s, flat_s])
def test_an_honest_drafter_is_heard_beside_a_liar(cost_s: Cost) -> None:
    alone = Simulation(2, cost_s).run(8.0, Honest()).speed(since_s=2.0)
    beside = Simulation(2, cost_s).run(8.0, Liar(), Honest()).speed(since_s=2.0)
    assert beside >= 0.95 * alone


def test_who_cannot_pay_at_this_load_is_looked_at_only_in_passing() -> None:
    simulation = Simulation(64, steep_s)
    run = simulation.run(4.0, Honest())
    assert run.speed(since_s=1.0) >= 0.98
    counters = [session.counters() for session in simulation.sessions]
    received = sum(counter.received_draft_tokens for counter in counters)
    hopeless = sum(counter.dropped_nodes.get("hopeless", 0) for counter in counters)
    assert hopeless > 0.5 * received


def test_a_liars_trees_are_not_grafted() -> None:
    simulation = Simulation(8, steep_s)
    simulation.run(3.0, Liar())
    assert all(session.tree.size <= 2 for session in simulation.sessions)
    before = [session.counters() for session in simulation.sessions]
    simulation.run(1.0, Liar())
    for session, old in zip(simulation.sessions, before, strict=True):
        new = session.counters()
        received = new.received_draft_tokens - old.received_draft_tokens
        hopeless = new.dropped_nodes["hopeless"] - old.dropped_nodes["hopeless"]
        assert hopeless == received - 2 * received // 256


@pytest.mark.parametrize(("rows", "unread_each"), [(1, 7), (4, 7), (8, 15), (32, 63)])
def test_most_of_a_liars_drafts_are_not_even_read(rows: int, unread_each: int) -> None:
    """The more rows share a step, the fewer of each: they all tell of the same source."""
    simulation = Simulation(rows, steep_s)
    simulation.run(3.0, Liar())
    before = [session.counters() for session in simulation.sessions]
    simulation.run(4.0, Liar())
    read = unread = 0
    for session, old in zip(simulation.sessions, before, strict=True):
        new = session.counters()
        unread += new.dropped_drafts["hopeless"] - old.dropped_drafts["hopeless"]
        read += (new.received_draft_tokens - old.received_draft_tokens) // 256
    assert read >= 1
    assert unread == pytest.approx(unread_each * read, abs=unread_each * rows)
    assert unread >= 0.8 * unread_each / (1 + unread_each) * (unread + read)


def test_a_right_guess_in_one_session_ends_it_for_all() -> None:
    simulation = Simulation(16, steep_s)
    simulation.run(3.0, Liar())
    first, *others = simulation.sessions
    while first.passes_over(1):
        pass
    assert sum(session.passes_over(1) for session in others) > 8
    first.merge(draft_of(first, [target(0, len(first.log))], [-1], 0.9), 1)
    simulation.run(0.001)  # One step, which commits what was guessed.
    assert not any(session.passes_over(1) for session in simulation.sessions)


def test_every_draft_is_read_again_once_a_guess_was_right() -> None:
    simulation = Simulation(1, steep_s)
    simulation.run(3.0, Liar())
    session = simulation.sessions[0]
    unread = 0
    while session.passes_over(1):
        unread += 1
    assert unread <= 7
    session.merge(draft_of(session, [target(0, len(session.log))], [-1], 0.9), 1)
    assert session.passes_over(1)  # it has only been read, and is not known to be right
    simulation.run(0.001)  # one step, which commits what was guessed
    assert not session.passes_over(1)
    session.merge(draft_of(session, [target(0, len(session.log)) + 1_000], [-1], 0.9), 1)
    assert not session.passes_over(1)  # the evidence is not gone after one that is wrong


def test_who_serves_many_drafts_at_a_load_that_pays_for_none_is_still_read() -> None:
    """It is not hopeless: what it sends now may pay when the load falls."""
    simulation = Simulation(64, steep_s)
    simulation.run(4.0, Honest())
    counters = [session.counters() for session in simulation.sessions]
    assert all("hopeless" not in counter.dropped_drafts for counter in counters)


def test_a_new_session_knows_the_liar_already() -> None:
    simulation = Simulation(4, steep_s)
    simulation.run(2.0, Liar())
    simulation.sessions = [simulation.open(100 + number) for number in range(4)]
    assert sum(simulation.run(2.0, Liar()).chosen) == 0


def test_drafts_that_always_come_late_still_tell_what_they_are_worth() -> None:
    simulation = Simulation(1, steep_s)
    simulation.run(2.0, Liar())
    session = simulation.sessions[0]
    assert session.tree.estimate(_offered(session)) < -50
    # Two tokens late, so that nothing of it is ever verified; but it would have been right.
    simulation.run(1.0, Honest(0.95, late=2))
    assert session.tree.estimate(_offered(session)) > math.log(0.5)


def _offered(session: Session):  # type: ignore[no-untyped-def]
    session.merge(draft_of(session, [7], [-1], 0.9), 1)
    return session.tree.root.children[7]


def test_hostile_drafts_are_counted_whatever_their_source_is_worth() -> None:
    simulation = Simulation(1, steep_s)
    session = simulation.sessions[0]
    for _ in range(2):
        session.merge(draft_of(session, [VOCABULARY], [-1], 0.9), 1)
        session.merge(None, 1)
        session.merge(draft_of(session, [], [], 0.9), 1)
        nan = draft_of(session, [1], [-1], 0.9)
        session.merge(
            Draft(1, nan.base_length, nan.base_digest, (1, 2), (-1, 0), (math.nan, -0.1)), 1
        )
        simulation.run(1.0, Liar())
    dropped = dict(session.counters().dropped_drafts)
    assert dropped.pop("hopeless") > 0  # those of the liar that were not read
    assert dropped == {"token": 2, "malformed": 2, "empty": 2, "score": 2}


def test_all_nodes_of_a_draft_that_is_used_are_checked() -> None:
    session = Simulation(1, steep_s).sessions[0]
    session.merge(draft_of(session, [5, 6, 7, VOCABULARY], range(-1, 3), 0.9), 1)
    assert session.counters().dropped_drafts == {"token": 1}
    assert session.tree.size == 0
