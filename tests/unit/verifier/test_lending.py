"""Drafts that come while the model computes are merged at once; no thread, no clock."""

from __future__ import annotations

from collections.abc import Callable

from outrider.domain import Draft, SamplingParams, SessionSpec
from outrider.model.synthetic import Pacer, SyntheticModel, parse_synthetic_spec
from verifier_service.config import EngineConfig
from verifier_service.engine import Engine
from verifier_service.messages import Abort, Command, Offer, Open
from verifier_service.session import Session

PROMPT = (40, 41, 42)
WRONG = 1
"""What this target does not choose within 40 steps."""


class Rig:
    """An engine whose steps call `meanwhile` in the middle of a pass."""

    def __init__(self, meanwhile: Callable[[Rig], None]) -> None:
        self._now_s = 0.0
        self._meanwhile = meanwhile
        model = SyntheticModel(
            parse_synthetic_spec("synthetic:target?seed=1&step=1:1"),
            Pacer(lambda: self._now_s, self._sleep),
        )
        self.engine = Engine(
            model,
            EngineConfig(kv_tokens_max=1_024, tree_nodes_max=2, drafts_queued_max=2),
            lambda outputs: None,
        )
        spec = SessionSpec(
            session=5,
            epoch=1,
            prompt=PROMPT,
            committed=(),
            sampling=SamplingParams(temperature=0.0),
            seed=1,
            tokens_max=50,
            stop_ids=frozenset(),
        )
        self.take(Open(1, spec))

    def _sleep(self, delay_s: float) -> None:
        self._now_s += max(delay_s, 1e-3)
        self._meanwhile(self)

    def take(self, command: Command) -> None:
        self.engine.submit(command)
        self.apply()

    def apply(self) -> None:
        for command in self.engine._inbox.take_all(wait_s=0.0):
            self.engine._apply(command)

    @property
    def session(self) -> Session:
        return self.engine._seats[5].session

    def offer(self, token: int) -> Offer:
        log = self.session.log
        base_digest = log.digest_at(len(log))
        assert base_digest is not None
        return Offer(1, 5, 1, Draft(1, len(log), base_digest, (token,), (-1,), (-0.1,)))


def test_what_comes_while_the_model_computes_is_merged_then() -> None:
    seen: list[int] = []

    def meanwhile(rig: Rig) -> None:
        rig.engine.submit(rig.offer(50))
        seen.append(rig.session.tree.size)

    rig = Rig(meanwhile)
    rig.engine._step()
    assert seen == [1]
    assert rig.engine._inbox.waiting == 0
    assert rig.session.counters().received_draft_tokens == 1


def test_what_comes_between_steps_waits_for_its_turn() -> None:
    rig = Rig(lambda rig: None)
    rig.engine._step()
    rig.engine.submit(rig.offer(50))
    assert rig.session.tree.size == 0
    rig.apply()
    assert rig.session.tree.size == 1


def test_what_came_before_goes_first() -> None:
    def meanwhile(rig: Rig) -> None:
        offer = rig.offer(50)
        rig.engine.submit(Abort(1, 5, 1))
        rig.engine.submit(offer)

    rig = Rig(meanwhile)
    rig.engine._step()
    assert rig.engine._inbox.waiting == 2
    rig.apply()
    assert rig.engine.load == 0


def test_nothing_is_evicted_under_a_step() -> None:
    sizes: list[int] = []

    def meanwhile(rig: Rig) -> None:
        for token in (50, 51, 52):
            rig.engine.submit(rig.offer(token))
            sizes.append(rig.session.tree.size)

    rig = Rig(meanwhile)
    rig.engine._step()
    assert sizes == [1, 2, 2]
    assert rig.engine._inbox.waiting == 1


def test_a_pass_that_fails_takes_back_what_it_lent() -> None:
    def meanwhile(rig: Rig) -> None:
        raise RuntimeError("out of memory")

    rig = Rig(meanwhile)
    offer = rig.offer(50)
    rig.engine._step()
    rig.engine.submit(offer)
    assert rig.engine._inbox.waiting == 1


def test_drafts_that_find_the_queue_full_are_counted() -> None:
    rig = Rig(lambda rig: None)
    for token in (50, 51, 52):
        rig.engine.submit(rig.offer(token))
    rig.apply()
    assert rig.session.counters().received_draft_tokens == 2
    assert rig.session.counters().dropped_drafts == {"queue_full": 1}


def test_a_source_that_proved_hopeless_is_passed_over() -> None:
    rig = Rig(lambda rig: None)
    unread = 0
    for _ in range(40):
        if rig.engine.passes_over(1, 5, 1):
            unread += 1
            assert not rig.engine.passes_over(2, 5, 1)  # a session of another connection
            assert not rig.engine.passes_over(1, 5, 2)  # another source
            assert not rig.engine.passes_over(1, 6, 1)  # no such session
        else:
            rig.engine.submit(rig.offer(WRONG))
            rig.apply()
        rig.engine._step()
    counters = rig.session.counters()
    assert counters.dropped_drafts == {"hopeless": unread}
    assert counters.received_draft_tokens == 40 - unread
    assert unread > 10
