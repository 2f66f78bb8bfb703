"""Whose leaves go next: the most probable, the heavier tenants' first, nobody's share lost."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest

from drafter_service.mirror import Mirror
from drafter_service.proposers.frontier import Frontier
from drafter_service.proposers.leaf_queue import SLACK_LEAVES, LeafQueue, Offer, turns
from outrider.domain import BindSpec, DraftBudget, SamplingParams

LEAST = math.log(1e-6)


def mirror_of(session: int = 1, tenant: str = "", weight: float = 1.0) -> Mirror:
    spec = BindSpec(
        session=session,
        epoch=1,
        binding=1,
        prompt=(1, 2),
        committed=(),
        sampling=SamplingParams(),
        seed=1,
        tokenizer_fingerprint="",
        vocabulary_size=99_999,
        budget=DraftBudget(4_096, 64, 0.0),
        tenant=tenant,
        tenant_weight=weight,
    )
    return Mirror(1, spec)


def offer(mirror: Mirror, *probabilities: float, leaves_max: int = 99) -> Offer:
    """A session whose leaves are guesses of these probabilities after its tip."""
    mirror.expand(mirror.tree.root, [(at, math.log(p)) for at, p in enumerate(probabilities)])
    frontier = Frontier(mirror.tree, (), logprob_min=LEAST, deepest=99)
    return Offer(mirror, frontier, leaves_max)


def taken(queue: LeafQueue, offers: list[Offer], count: int) -> list[tuple[int, float]]:
    """(session, probability) of what is taken."""
    leaves = queue.take(offers, count)
    return [(mirror.spec.session, round(math.exp(-entry[0]), 6)) for mirror, entry in leaves]


def test_all_sessions_leaves_are_one_queue() -> None:
    offers = [offer(mirror_of(1), 0.5, 0.1, 0.05), offer(mirror_of(2), 0.9, 0.4, 0.01)]
    queue = LeafQueue()
    assert taken(queue, offers, 4) == [(2, 0.9), (1, 0.5), (2, 0.4), (1, 0.1)]
    assert taken(queue, offers, 4) == [(1, 0.05), (2, 0.01)]
    assert taken(queue, offers, 4) == []


def test_a_session_has_no_more_than_it_has_room_for() -> None:
    offers = [offer(mirror_of(1), 0.9, 0.8, 0.7, leaves_max=2), offer(mirror_of(2), 0.1)]
    assert taken(LeafQueue(), offers, 4) == [(1, 0.9), (1, 0.8), (2, 0.1)]
    assert taken(LeafQueue(), [offer(mirror_of(3), 0.9, leaves_max=0)], 4) == []


def test_a_heavier_tenants_leaf_counts_as_surer() -> None:
    heavy, light = mirror_of(1, "heavy", 3.0), mirror_of(2, "light")
    offers = [offer(light, 0.5, 0.2), offer(heavy, 0.3, 0.1)]
    assert taken(LeafQueue(), offers, 4) == [(1, 0.3), (2, 0.5), (1, 0.1), (2, 0.2)]


def served(weights: dict[str, float], scale: dict[str, float], steps: int = 400) -> Counter[str]:
    """Leaves that tenants had expanded, who have as many as they like in every step."""
    chance, queue = random.Random(1), LeafQueue()
    counts: Counter[str] = Counter()
    for _ in range(steps):
        offers = []
        for number, (tenant, weight) in enumerate(weights.items()):
            probabilities = [scale[tenant] * chance.random() for _ in range(20)]
            offers.append(offer(mirror_of(number, tenant, weight), *probabilities))
        for mirror, _ in queue.take(offers, 16):
            counts[mirror.spec.tenant] += 1
    return counts


@pytest.mark.parametrize(
    "weights", [{"easy": 1.0, "hard": 1.0}, {"easy": 1.0, "hard": 3.0}, {"easy": 8.0, "hard": 1.0}]
)
def test_a_tenant_with_difficult_texts_has_its_share_all_the_same(
    weights: dict[str, float],
) -> None:
    counts = served(weights, {"easy": 1.0, "hard": 0.01})
    share = counts["hard"] / counts.total()
    assert share == pytest.approx(weights["hard"] / sum(weights.values()), abs=0.01)


def test_a_tenant_is_behind_its_share_by_the_slack_at_most() -> None:
    queue, mirrors = LeafQueue(), [mirror_of(1, "easy"), mirror_of(2, "hard")]
    easy = [0.9] * 400
    hard = [0.01] * 400
    offers = [offer(mirrors[0], *easy), offer(mirrors[1], *hard)]
    counts: Counter[int] = Counter()
    for step in range(1, 40):
        counts.update(session for session, _ in taken(queue, offers, 8))
        assert counts[2] >= 4 * step - SLACK_LEAVES - 1
        # Until then the surest go first.
        assert counts[2] == 0 or counts[1] >= SLACK_LEAVES
    assert counts[2] > 100


def test_what_a_tenant_has_no_use_for_goes_to_the_others_and_is_not_saved_up() -> None:
    queue = LeafQueue()
    for _ in range(100):
        few = offer(mirror_of(1, "quiet"), 0.9)
        many = offer(mirror_of(2, "busy"), *[0.5] * 20)
        assert len(queue.take([few, many], 16)) == 16
    # Now it wants much, of little worth: it has half, not all that it once did without.
    counts: Counter[int] = Counter()
    for _ in range(20):
        offers = [
            offer(mirror_of(1, "quiet"), *[0.01] * 20),
            offer(mirror_of(2, "busy"), *[0.5] * 20),
        ]
        counts.update(session for session, _ in taken(queue, offers, 16))
    assert counts[1] <= 160 + SLACK_LEAVES


def test_who_was_alone_for_long_is_not_made_to_wait_for_it() -> None:
    queue = LeafQueue()
    for _ in range(200):
        queue.take([offer(mirror_of(1, "first"), *[0.01] * 20)], 16)
    counts: Counter[int] = Counter()
    for _ in range(50):
        offers = [
            offer(mirror_of(1, "first"), *[0.01] * 20),
            offer(mirror_of(2, "late"), *[0.9] * 20),
        ]
        counts.update(session for session, _ in taken(queue, offers, 16))
    assert counts[1] >= 400 - 3 * SLACK_LEAVES


def test_commits_come_before_prompts_and_the_longest_waiting_first() -> None:
    mirrors = [mirror_of(number) for number in range(4)]
    behind = [(mirrors[0], 500, 0), (mirrors[1], 3, 9), (mirrors[2], 32, 4), (mirrors[3], 33, 2)]
    assert turns(behind, 32) == ([mirrors[2], mirrors[1]], [mirrors[0], mirrors[3]])


def test_tenants_prompts_take_turns_by_weight() -> None:
    many = [mirror_of(number, "many") for number in range(4)]
    one, heavy = mirror_of(8, "one"), [mirror_of(n, "heavy", 2.0) for n in (9, 10)]
    _, prompts = turns([(mirror, 500, 0) for mirror in (*many, one, *heavy)], 32)
    assert prompts == [heavy[0], many[0], one, heavy[1], *many[1:]]
