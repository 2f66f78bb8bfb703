"""Mirrors within a bound of memory, and what is left of those that were put aside."""

from __future__ import annotations

from dataclasses import replace

from drafter_service.mirror import Mirror
from drafter_service.shelf import NODE_BYTES, TOKEN_BYTES, Shelf
from outrider.committed import digest
from outrider.domain import BindSpec, Commit, DraftBudget, SamplingParams

BUDGET = DraftBudget(nodes_max=10, depth_max=8)
BYTES = 4 * TOKEN_BYTES + 10 * NODE_BYTES
"""That a mirror of `mirror_of` counts for."""


def mirror_of(session: int) -> Mirror:
    spec = BindSpec(
        session=session,
        epoch=3,
        binding=2,
        prompt=(session, 2),
        committed=(3, 4),
        sampling=SamplingParams(temperature=0.5),
        seed=9,
        tokenizer_fingerprint="t",
        vocabulary_size=50,
        budget=BUDGET,
        tenant="somebody",
    )
    return Mirror(7, spec)


def test_who_was_idle_longest_is_put_aside() -> None:
    shelf = Shelf(3 * BYTES, 1_000)
    mirrors = [mirror_of(number) for number in range(4)]
    for mirror in mirrors[:3]:
        shelf.use(mirror)
    assert shelf.put_aside() == []
    shelf.use(mirrors[0])
    shelf.use(mirrors[3])
    assert shelf.put_aside() == [mirrors[1]]
    assert (len(shelf), shelf.bytes_used) == (4, 3 * BYTES)
    assert shelf.get((7, 1)) is None
    assert [mirror.spec.session for mirror in shelf.live] == [0, 2, 3]


def test_what_was_put_aside_comes_back_as_it_was() -> None:
    shelf = Shelf(BYTES, 1_000)
    mirror = mirror_of(5)
    mirror.apply(Commit(3, 4, (6, 7)))
    mirror.set_budget(replace(BUDGET, depth_max=5))
    shelf.use(mirror)
    shelf.use(mirror_of(6))
    assert shelf.put_aside() == [mirror]
    again = shelf.revive((7, 5))
    assert again is not mirror
    assert again.log.tokens == [5, 2, 3, 4, 6, 7]
    assert again.log.digest_at(6) == digest([5, 2, 3, 4, 6, 7])
    assert (again.tree.root.token, again.tree.root.position, again.tree.size) == (7, 5, 0)
    expected = replace(mirror.spec, committed=(3, 4, 6, 7), budget=mirror.budget)
    assert (again.spec, again.key) == (expected, mirror.key)
    assert (again.tree.nodes_max, again.tree.depth_max) == (10, 5)
    assert shelf.aside((7, 5)) is None
    assert shelf.get((7, 5)) is again


def test_a_mirror_that_grows_counts_for_more() -> None:
    shelf = Shelf(1 << 30, 1_000)
    mirror = mirror_of(1)
    shelf.use(mirror)
    mirror.apply(Commit(3, 4, (6, 7)))
    shelf.use(mirror)
    assert shelf.bytes_used == BYTES + 2 * TOKEN_BYTES
    shelf.discard(mirror.key)
    assert (shelf.bytes_used, len(shelf)) == (0, 0)


def test_one_mirror_is_kept_whatever_its_size() -> None:
    shelf = Shelf(1, 1_000)
    first, second = mirror_of(1), mirror_of(2)
    shelf.use(first)
    assert shelf.put_aside() == []
    shelf.use(second)
    assert shelf.put_aside() == [first]
    assert shelf.live == [second]


def test_tokens_put_aside_have_a_bound_of_their_own() -> None:
    shelf = Shelf(1, 12)
    for number in range(5):
        shelf.use(mirror_of(number))
        shelf.put_aside()
    # One is live, four have four tokens each: one too many.
    assert [aside.spec.session for aside in shelf.give_up()] == [0]
    assert (len(shelf), shelf.give_up()) == (4, [])
    shelf.discard((7, 1))
    shelf.use(mirror_of(9))
    shelf.put_aside()
    assert shelf.give_up() == []


def test_a_connections_sessions_are_found_wherever_they_are() -> None:
    shelf = Shelf(1, 1_000)
    for number in range(3):
        shelf.use(mirror_of(number))
        shelf.put_aside()
    assert sorted(shelf.of_connection(7)) == [(7, 0), (7, 1), (7, 2)]
    assert shelf.of_connection(8) == []
    for key in shelf.of_connection(7):
        shelf.discard(key)
    assert len(shelf) == 0
