"""The target's candidates at every node of a step, for sessions that ask for them."""

from __future__ import annotations

import torch

from outrider.committed import digest
from outrider.domain import Candidates, Draft, SamplingParams, SessionSpec
from outrider.model.processing import top_candidates
from tests.support.flat_times import FlatTimes
from tests.support.fleet import TARGET, load
from verifier_service.config import EngineConfig
from verifier_service.engine import Engine
from verifier_service.messages import Offer, Open, Outputs

PROMPT = tuple(b"Once upon a time")


def session(number: int, *, candidates: int = 0) -> SessionSpec:
    return SessionSpec(
        session=number,
        epoch=1,
        prompt=PROMPT,
        committed=(),
        sampling=SamplingParams(temperature=0.0),
        seed=1,
        tokens_max=4,
        ignore_eos=True,
        candidates=candidates,
    )


class Steps:
    """An engine that is stepped by hand."""

    def __init__(self, *specs: SessionSpec) -> None:
        self._said: list[Outputs] = []
        config = EngineConfig(kv_tokens_max=1_024, warm_up=False)
        self.engine = Engine(
            load(TARGET), config, lambda out: self._said.extend(out.values()), times=FlatTimes()
        )
        for spec in specs:
            self.engine._apply(Open(1, spec))

    def step(self) -> Outputs:
        self._said.clear()
        self.engine._step()
        self.engine._flush()
        [output] = self._said
        return output


def test_nobody_asks_and_nothing_is_said() -> None:
    assert Steps(session(1)).step().candidates == {}


def test_the_tip_and_every_verified_node_have_theirs() -> None:
    steps = Steps(session(1), session(2, candidates=3))
    said = steps.step()
    commits = {number: commit.tokens for number, commit, _ in said.commits}
    assert set(said.candidates) == {2}
    [first] = commits[2]
    tip = said.candidates[2]
    assert tip.tokens == PROMPT[-1:]
    assert len(tip.tops[0]) == 3
    assert tip.tops[0][0] == first, "greedy: the best candidate is what is committed"
    second = tip.tops[0][1]
    log = (*PROMPT, first)
    # Two guesses beside each other; at most one of them can be right.
    draft = Draft(1, len(log), digest(log), (first, second), (-1, -1), (-0.1, -0.1))
    steps.engine._apply(Offer(1, 2, 1, draft))
    said = steps.step()
    [after] = [commit.tokens for number, commit, _ in said.commits if number == 2]
    found = said.candidates[2]
    assert found.tokens == (first, first, second)
    assert found.tops[0][0] == after[0]
    assert {len(tops) for tops in found.tops} == {3}
    # What was not accepted has candidates all the same.
    assert len(set(found.tops)) == 3


def test_they_are_the_best_in_order() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0], [float("nan"), -1.0, float("inf"), 5.0]])
    assert top_candidates(logits, 2) == [(1, 3), (2, 3)]
    assert top_candidates(logits, 9)[0] == (1, 3, 2, 0)


def test_they_may_be_of_any_width_the_vocabulary_has() -> None:
    assert isinstance(Steps(session(1, candidates=32)).step().candidates[1], Candidates)
