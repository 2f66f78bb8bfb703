"""The books of a KV budget, against a model of them that is too simple to be wrong."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from outrider.kv_blocks import (
    BLOCK_TOKENS,
    BlockPool,
    OutOfBlocks,
    block_hash,
    chain_hashes,
    chain_root,
    shareable_blocks,
)

COUNT = 6
DIGESTS = [bytes([number]) * 32 for number in range(5)]


class Findable:
    """What can be found, as a listener heard."""

    def __init__(self) -> None:
        self.digests: set[bytes] = set()

    def held(self, digest: bytes, first: bytes) -> None:
        assert digest not in self.digests
        assert first == DIGESTS[0]
        self.digests.add(digest)

    def dropped(self, digest: bytes) -> None:
        self.digests.remove(digest)


class Books(RuleBasedStateMachine):
    """Holders take, publish, share and give up blocks; what a found block holds is checked."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(COUNT)
        self.pool.listener = self.heard = Findable()
        self.holders: list[list[int]] = []
        self.known: dict[bytes, int] = {}
        """What can be found: hash to block."""
        self.idle: list[int] = []
        """Published blocks without a holder, least recently used first."""
        self.content: dict[int, int] = {}
        """What was written last into each block; each allocation writes something new."""
        self.published: dict[bytes, int] = {}
        """What a hash promises."""
        self.written = 0

    def references(self, block: int) -> int:
        return sum(blocks.count(block) for blocks in self.holders)

    def _free(self) -> int:
        return sum(not self.references(block) for block in range(COUNT))

    @rule(count=st.integers(0, COUNT + 1))
    def allocate(self, count: int) -> None:
        before = (self.pool.available, self.pool.used, self.pool.published)
        if count > self._free():
            with pytest.raises(OutOfBlocks, match=rf"{count} blocks .* {self._free()} are"):
                self.pool.allocate(count)
            assert (self.pool.available, self.pool.used, self.pool.published) == before
            return
        evicted = max(0, count - (self._free() - len(self.idle)))
        expected, self.idle = self.idle[:evicted], self.idle[evicted:]
        blocks = self.pool.allocate(count)
        assert len(set(blocks)) == count
        assert not any(self.references(block) for block in blocks)
        # Blocks that hold nothing go first, then the least recently used.
        assert set(blocks) & set(expected + self.idle) == set(expected)
        self.known = {key: block for key, block in self.known.items() if block not in expected}
        for block in blocks:
            self.written += 1
            self.content[block] = self.written
        self.holders.append(blocks)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        blocks = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        self.pool.release(blocks)
        for block in reversed(blocks):
            if not self.references(block) and block in self.known.values():
                self.idle.append(block)

    @precondition(lambda self: any(self.holders))
    @rule(data=st.data(), digest=st.sampled_from(DIGESTS))
    def publish(self, data: st.DataObject, digest: bytes) -> None:
        block = data.draw(st.sampled_from(sorted({b for held in self.holders for b in held})))
        self.pool.publish(block, digest, DIGESTS[0])
        if digest not in self.known and block not in self.known.values():
            self.known[digest] = block
            self.published[digest] = self.content[block]

    @rule(digest=st.sampled_from(DIGESTS))
    def share(self, digest: bytes) -> None:
        block = self.pool.share(digest)
        assert block == self.known.get(digest)
        if block is not None:
            assert self.content[block] == self.published[digest]
            self.idle = [other for other in self.idle if other != block]
            self.holders.append([block])

    @rule()
    def forget(self) -> None:
        self.pool.forget()
        self.known = {key: block for key, block in self.known.items() if block not in self.idle}
        self.idle = []

    @invariant()
    def the_books_are_right(self) -> None:
        assert self.pool.available == self._free()
        assert self.pool.used + self.pool.available == self.pool.count == COUNT
        assert self.heard.digests == set(self.known)
        assert self.pool.published == len(self.known)
        for block in range(COUNT):
            published = block in self.known.values()
            assert self.pool.shared(block) == (self.references(block) > 1 or published)

    def teardown(self) -> None:
        for blocks in self.holders:
            self.pool.release(blocks)
        assert self.pool.used == 0


TestBooks = Books.TestCase
TestBooks.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, derandomize=True
)


def published(pool: BlockPool, *digests: bytes) -> list[int]:
    blocks = pool.allocate(len(digests))
    for block, digest in zip(blocks, digests, strict=True):
        pool.publish(block, digest)
    return blocks


def test_the_least_recently_used_goes_first() -> None:
    pool = BlockPool(3)
    old, middle, new = (published(pool, digest) for digest in DIGESTS[:3])
    for blocks in (old, middle, new):
        pool.release(blocks)
    # Used again, it is the most recent one.
    assert pool.share(DIGESTS[0]) == old[0]
    pool.release(old)
    assert pool.allocate(1) == middle
    assert pool.allocate(1) == new
    assert pool.share(DIGESTS[1]) is pool.share(DIGESTS[2]) is None
    assert pool.share(DIGESTS[0]) == old[0]


def test_a_chain_is_given_up_from_its_end() -> None:
    pool = BlockPool(3)
    chain = published(pool, *DIGESTS[:3])
    pool.release(chain)
    for left in (2, 1, 0):
        # What is left is the beginning, which alone is of use.
        assert pool.allocate(1) == [chain[left]]
        assert pool.published == left


def test_what_holds_nothing_is_taken_before_what_can_be_shared() -> None:
    pool = BlockPool(4)
    kept = published(pool, *DIGESTS[:2])
    pool.release(kept)
    assert not set(pool.allocate(2)) & set(kept)
    assert pool.published == 2


def test_of_equal_blocks_the_first_stays_the_one() -> None:
    pool = BlockPool(3)
    (first,), (second,) = published(pool, DIGESTS[0]), published(pool, DIGESTS[0])
    assert pool.shared(first)
    assert not pool.shared(second)
    assert pool.share(DIGESTS[0]) == first
    pool.release([second])
    assert (pool.available, pool.published) == (2, 1)


def test_what_nobody_holds_cannot_be_given_up_or_published() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.release([block])
    with pytest.raises(ValueError, match="not in use"):
        pool.release([block])
    with pytest.raises(ValueError, match="not in use"):
        pool.publish(block, DIGESTS[0])
    assert (pool.available, pool.used) == (2, 0)
    with pytest.raises(ValueError, match="at least one"):
        BlockPool(0)


def test_untouched_memory_stays_untouched() -> None:
    pool = BlockPool(100)
    touched = set()
    for _ in range(20):
        blocks = pool.allocate(3)
        touched |= set(blocks)
        pool.release(blocks)
    assert len(touched) == 3


def test_hashes_depend_on_all_that_makes_keys_and_values() -> None:
    tokens = list(range(BLOCK_TOKENS))
    roots = [chain_root("model", ""), chain_root("model", "a"), chain_root("other", "")]
    # Where the fingerprint ends and the salt begins is told.
    roots += [chain_root("mode", "l"), chain_root("", "model")]
    texts = [tokens, tokens[::-1], [*tokens[:-1], 1 << 31]]
    hashes = {block_hash(root, text) for root in roots for text in texts}
    hashes |= {block_hash(parent, tokens) for parent in hashes}
    assert len(hashes) == 2 * len(roots) * len(texts)
    assert hashes.isdisjoint(roots)


def test_hashes_are_the_same_everywhere() -> None:
    # Other verifiers and the registry compare them.
    root = chain_root("f", "s")
    assert root == hashlib.sha256(b"f\0s").digest()
    words = b"".join(token.to_bytes(4, "little") for token in range(BLOCK_TOKENS))
    assert block_hash(root, range(BLOCK_TOKENS)) == hashlib.sha256(root + words).digest()
    assert BLOCK_TOKENS == 32


def test_chains_are_those_of_the_caches() -> None:
    root, tokens = chain_root("f", "s"), list(range(5 * BLOCK_TOKENS))
    first = block_hash(root, tokens[:BLOCK_TOKENS])
    second = block_hash(first, tokens[BLOCK_TOKENS : 2 * BLOCK_TOKENS])
    assert chain_hashes(root, tokens, 2) == [first, second]
    # The last token is computed, and so is its block.
    assert len(chain_hashes(root, tokens, 99)) == shareable_blocks(len(tokens)) == 4
    assert chain_hashes(root, [*tokens, 0], 99)[:4] == chain_hashes(root, tokens, 99)
    assert shareable_blocks(len(tokens) + 1) == 5
    assert chain_hashes(root, [], 99) == chain_hashes(root, tokens[:BLOCK_TOKENS], 99) == []
