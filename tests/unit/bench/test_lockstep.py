"""Imagined verify steps accept what real ones would, and the order in turn is one."""

from __future__ import annotations

import math

from bench.lockstep import Known, Lockstep
from bench.sharing import RoundRobin
from drafter_service.mirror import Mirror
from drafter_service.proposers.frontier import Frontier
from drafter_service.proposers.leaf_queue import Offer
from drafter_service.proposers.lookup import LookupProposer
from outrider.domain import BindSpec, DraftBudget, SamplingParams


def spec_of(*prompt: int, session: int = 1) -> BindSpec:
    return BindSpec(
        session=session,
        epoch=1,
        binding=1,
        prompt=prompt,
        committed=(),
        sampling=SamplingParams(),
        seed=1,
        tokenizer_fingerprint="",
        vocabulary_size=100,
        budget=DraftBudget(64, 3),
    )


def test_guesses_are_accepted_as_far_as_the_text_goes_and_one_token_follows() -> None:
    known = Known(spec_of(1, 2, 3, 4, 5, 1, 2), (3, 4, 9, 9, 5, 6))
    rounds = Lockstep(LookupProposer(), [known], grows=1, verified_max=8)
    rounds.warm_up()
    (one,) = rounds.followed
    rounds.step()
    # 3, 4 were right, 5 was not; then nothing is known of what follows 4, 9.
    assert (one.accepted, one.done) == ([2], 3)
    assert [right for _, right in rounds.claims] == [True, True, False]
    rounds.run(99)
    assert one.done == 6
    assert sum(one.accepted) + len(one.accepted) == 6
    assert one.mirror.log.tokens == [1, 2, 3, 4, 5, 1, 2, 3, 4, 9, 9, 5, 6]
    assert rounds.running == []


def test_no_more_nodes_are_verified_than_there_is_room_for() -> None:
    known = [Known(spec_of(1, 2, 3, 4, 5, 1, 2, session=n), (3, 4, 5, 1)) for n in (1, 2)]
    rounds = Lockstep(LookupProposer(), known, grows=1, verified_max=3)
    rounds.warm_up()
    rounds.step()
    assert sum(sum(one.accepted) for one in rounds.followed) == 3


def test_a_step_is_ready_if_there_is_a_guess_below_the_tip() -> None:
    known = Known(spec_of(1, 2, 3, 4, 5, 1, 2), (3, 4, 5, 1, 2, 99, 98, 97))
    rounds = Lockstep(LookupProposer(), [known], grows=1, verified_max=8)
    rounds.warm_up()
    rounds.run(99)
    (one,) = rounds.followed
    # Guesses go three deep, and are there again until the text says something new.
    assert one.accepted == [3, 1, 0, 0]
    assert one.ready == [True, False, False]
    # 3, 4, 5 and 1, then 2 and 99, 98, 97: of the last of the first four nothing was guessed.
    assert one.on_path == [False, False, False, False]
    assert one.ready_on_path == []


def test_in_turn_means_in_turn() -> None:
    def offers() -> list[Offer]:
        found = []
        for session, logprob in ((1, -0.1), (2, -3.0), (3, -1.0)):
            mirror = Mirror(1, spec_of(1, 2, session=session))
            mirror.expand(mirror.tree.root, [(5, logprob), (6, logprob - 1)])
            frontier = Frontier(mirror.tree, (), logprob_min=math.log(1e-9), deepest=99)
            found.append(Offer(mirror, frontier, 9))
        return found

    queue = RoundRobin()
    first = [mirror.spec.session for mirror, _ in queue.take(offers(), 2)]
    again = [mirror.spec.session for mirror, _ in queue.take(offers(), 4)]
    assert (first, again) == ([1, 2], [3, 1, 2, 3])
    assert len(queue.take(offers(), 99)) == 6
