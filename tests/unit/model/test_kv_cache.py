"""What a session's cache holds where, without any model.

Each token's keys and values are its own number, so that it can be found wherever it was moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from outrider.kv_blocks import BLOCK_TOKENS, OutOfBlocks
from outrider.model.kv_cache import Extension, KvLayout, KvPool, SessionCache

LAYOUT = KvLayout(2, 3, 4, torch.float32, torch.device("cpu"))
TEXT = list(range(1000, 1000 + 8 * BLOCK_TOKENS))


def new_pool(blocks: int = 16, fingerprint: str = "model") -> KvPool:
    pool = KvPool(LAYOUT, blocks * BLOCK_TOKENS, fingerprint)
    pool.buffer.fill_(torch.nan)
    return pool


def write(cache: SessionCache, first: int, numbers: Sequence[float]) -> None:
    slots = torch.from_numpy(cache.slots[first : first + len(numbers)])
    values = torch.tensor(list(numbers), dtype=torch.float32)
    cache.pool.buffer[:, :, slots] = values[:, None, None].expand(-1, 3, 4)


def append(
    cache: SessionCache, numbers: Sequence[float], parents: Sequence[int] | None
) -> Extension:
    extension = cache.plan(len(numbers), parents)
    cache.reserve(extension.start + extension.size)
    write(cache, extension.start, numbers)
    cache.apply(extension)
    return extension


def held(cache: SessionCache) -> list[float]:
    slots = torch.from_numpy(cache.slots[: cache.prefix_length + cache.tree_size])
    tokens = cache.pool.buffer[:, :, slots]  # [layers, 2, tokens, kv_heads, head_dim]
    numbers = tokens[0, 0, :, 0, 0]
    assert torch.equal(tokens, numbers[:, None, None].expand_as(tokens)), "layers moved apart"
    return [float(number) for number in numbers]


@pytest.fixture
def cache() -> SessionCache:
    """A prefix of three tokens and the tree 0 -> (1 -> (3, 4), 2 -> 5)."""
    cache = new_pool().new_cache()
    append(cache, [100, 101, 102], None)
    append(cache, [0, 1, 2, 3, 4, 5], [-1, 0, 0, 1, 1, 2])
    return cache


# --- one session ------------------------------------------------------------------------------


def test_a_chain_extends_the_prefix() -> None:
    cache = new_pool().new_cache()
    append(cache, [7, 8], None)
    extension = append(cache, [9], None)
    assert (cache.prefix_length, cache.tree_size) == (3, 0)
    assert extension.positions.tolist() == [2]
    assert extension.visible is None
    assert held(cache) == [7, 8, 9]


def test_a_tree_stands_at_depths_and_sees_its_ancestors(cache: SessionCache) -> None:
    assert cache.tree_positions.tolist() == [3, 4, 4, 5, 5, 5]
    extension = cache.plan(3, [4, 6, -1])
    assert extension.start == 9
    assert extension.positions.tolist() == [3 + 3, 3 + 4, 3]
    assert extension.visible is not None
    seen = [np.flatnonzero(row).tolist() for row in extension.visible]
    assert seen == [[0, 1, 4, 6], [0, 1, 4, 6, 7], [8]]


def test_advance_along_slots_in_place_moves_nothing(
    cache: SessionCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cache.advance([0, 1], [3, 4]) == {3: 0, 4: 1}
    assert (cache.prefix_length, cache.tree_size) == (5, 2)
    assert held(cache) == [100, 101, 102, 0, 1, 3, 4]

    def refuse(*_: object) -> None:
        raise AssertionError("something was moved")

    monkeypatch.setattr(KvPool, "move", refuse)
    assert cache.advance([], [0, 1]) == {0: 0, 1: 1}
    cache.advance([0])
    assert held(cache) == [100, 101, 102, 0, 1, 3]


def test_only_what_is_out_of_place_is_moved(
    cache: SessionCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[int] = []
    move = KvPool.move

    def watch(pool: KvPool, sources: np.ndarray, targets: np.ndarray) -> None:
        moved.append(len(sources))
        move(pool, sources, targets)

    monkeypatch.setattr(KvPool, "move", watch)
    cache.advance([0, 1, 4])
    assert (held(cache), moved) == ([100, 101, 102, 0, 1, 4], [1])


def test_advance_moves_path_and_kept_slots_together(cache: SessionCache) -> None:
    assert cache.advance([0, 2], [5]) == {5: 0}
    assert (cache.prefix_length, cache.tree_size) == (5, 1)
    assert cache.parents == (-1,)
    assert held(cache) == [100, 101, 102, 0, 2, 5]
    assert cache.plan(1, [0]).positions.tolist() == [6]


def test_kept_slots_get_new_parents_in_the_order_given(cache: SessionCache) -> None:
    assert cache.advance([0], [2, 5, 1, 4]) == {2: 0, 5: 1, 1: 2, 4: 3}
    assert cache.parents == (-1, 0, -1, 2)
    assert held(cache) == [100, 101, 102, 0, 2, 5, 1, 4]
    extension = cache.plan(2, [1, 3])
    assert extension.positions.tolist() == [6, 6]
    assert extension.visible is not None
    seen = [np.flatnonzero(row).tolist() for row in extension.visible]
    assert seen == [[0, 1, 4], [2, 3, 5]]


def test_without_keep_the_tree_is_gone(cache: SessionCache) -> None:
    assert cache.advance([0, 1, 4]) == {}
    assert (cache.prefix_length, cache.tree_size) == (6, 0)
    assert held(cache) == [100, 101, 102, 0, 1, 4]
    append(cache, [6], None)
    assert cache.prefix_length == 7


def test_an_empty_path_prunes(cache: SessionCache) -> None:
    assert cache.advance([], [0, 2]) == {0: 0, 2: 1}
    assert cache.prefix_length == 3
    assert held(cache) == [100, 101, 102, 0, 2]


@pytest.mark.parametrize(
    ("path", "keep"),
    [
        ([1], []),  # does not start at the prefix
        ([0, 3], []),  # leaves out a node
        ([0, 9], []),
        ([-1], []),
        ([0, 1], [5]),  # under another branch
        ([0, 1], [2]),
        ([0], [3]),  # without its parent
        ([0], [3, 1]),  # before its parent
        ([0], [1, 1]),
        ([0], [7]),
        ([0, 1], [0]),  # part of the path
    ],
)
def test_a_wrong_advance_changes_nothing(
    cache: SessionCache, path: list[int], keep: list[int]
) -> None:
    before = held(cache)
    with pytest.raises(ValueError, match=r"path|slot"):
        cache.advance(path, keep)
    assert (held(cache), cache.parents) == (before, (-1, 0, 0, 1, 1, 2))


@pytest.mark.parametrize("parents", [[6], [-2], [-1, 7], [-1, 8], [0]])
def test_parents_must_be_earlier_slots_one_each(cache: SessionCache, parents: list[int]) -> None:
    count = 2 if parents == [0] else len(parents)
    with pytest.raises(ValueError, match="parent"):
        cache.plan(count, parents)


def test_the_prefix_cannot_grow_beneath_a_tree(cache: SessionCache) -> None:
    with pytest.raises(ValueError, match="tree slots"):
        cache.plan(1, None)


def test_a_plan_is_good_for_one_state(cache: SessionCache) -> None:
    extension = cache.plan(1, [0])
    cache.truncate(2)
    with pytest.raises(ValueError, match="changed"):
        cache.apply(extension)


def test_truncate_drops_the_tree_and_the_end_of_the_prefix(cache: SessionCache) -> None:
    cache.truncate(2)
    assert (cache.prefix_length, cache.tree_size) == (2, 0)
    assert held(cache) == [100, 101]
    extension = append(cache, [5], [-1])
    assert (extension.start, extension.positions.tolist()) == (2, [2])
    for length in (3, -1):
        with pytest.raises(ValueError, match="truncate"):
            cache.truncate(length)


# --- its blocks -------------------------------------------------------------------------------


def test_blocks_come_and_go_with_the_tokens() -> None:
    pool = new_pool()
    cache = pool.new_cache()
    assert (cache.blocks, pool.tokens_used) == ((), 0)
    assert cache.blocks_needed(0) == 0
    assert [cache.blocks_needed(tokens) for tokens in (1, 32, 33)] == [1, 1, 2]
    append(cache, range(30), None)
    append(cache, range(30, 40), [-1, 0, 1, 2, 3, 4, 5, 6, 7, 8])
    assert (len(cache.blocks), pool.tokens_used) == (2, 64)
    assert [cache.blocks_needed(tokens) for tokens in (0, 24, 25)] == [0, 0, 1]
    # The tree's own block is given back with it.
    cache.advance([0, 1])
    assert (len(cache.blocks), cache.prefix_length) == (1, 32)
    cache.reserve(100)
    assert len(cache.slots) == 128
    assert held(cache) == [*range(32)]
    cache.truncate(0)
    assert (cache.blocks, pool.tokens_used) == ((), 0)
    assert pool.tokens_available == pool.tokens_max == 16 * 32


def test_a_budget_is_rounded_up_to_whole_blocks() -> None:
    pool = KvPool(LAYOUT, 33)
    assert (pool.tokens_max, pool.buffer.shape) == (64, (2, 2, 64, 3, 4))


def test_a_cache_for_which_there_is_no_room_is_as_before() -> None:
    pool = new_pool(3)
    first, second = pool.new_cache(), pool.new_cache()
    append(first, range(40), None)
    append(second, [1, 2], None)
    with pytest.raises(OutOfBlocks):
        second.reserve(33)
    assert (held(second), len(second.blocks), pool.tokens_available) == ([1, 2], 1, 0)
    second.reserve(32)
    first.release()
    second.reserve(96)


def test_growing_keeps_what_is_held(cache: SessionCache) -> None:
    before, blocks = held(cache), cache.blocks
    other = cache.pool.new_cache()
    append(other, [9], None)
    cache.reserve(200)
    assert cache.blocks[: len(blocks)] == blocks
    assert not set(cache.blocks) & set(other.blocks)
    assert (held(cache), held(other)) == (before, [9])


def test_a_cleared_cache_begins_anew(cache: SessionCache) -> None:
    cache.clear()
    assert (cache.prefix_length, cache.tree_size, cache.blocks) == (0, 0, ())
    assert cache.pool.tokens_used == 0
    extension = append(cache, [5, 6], [-1, 0])
    assert extension.positions.tolist() == [0, 1]
    assert held(cache) == [5, 6]


def test_released_caches_hold_no_memory_and_refuse_to_work(cache: SessionCache) -> None:
    cache.release()
    cache.release()
    assert cache.pool.tokens_used == 0
    for use in (
        lambda: cache.reserve(1),
        lambda: cache.truncate(0),
        lambda: cache.advance([]),
        lambda: cache.adopt(TEXT),
        lambda: cache.publish(TEXT),
        lambda: cache.blocks_needed(1),
        lambda: cache.blocks,
        lambda: cache.slots,
        cache.clear,
    ):
        with pytest.raises(RuntimeError, match="released"):
            use()


def test_bytes_per_token_counts_keys_and_values_of_all_layers() -> None:
    assert LAYOUT.bytes_per_token == 2 * 2 * 3 * 4 * 4


# --- sharing ----------------------------------------------------------------------------------


def computed(pool: KvPool, tokens: Sequence[int], salt: str | None = "") -> SessionCache:
    """A session that computed a whole text and published what is full."""
    cache = pool.new_cache(salt)
    append(cache, tokens, None)
    cache.publish(tokens)
    return cache


@pytest.mark.parametrize(
    ("length", "adopted"), [(1, 0), (32, 0), (33, 32), (64, 32), (65, 64), (100, 96), (256, 224)]
)
def test_all_full_blocks_are_adopted_but_never_the_last_token(length: int, adopted: int) -> None:
    pool = new_pool()
    owner = computed(pool, TEXT)
    used = pool.tokens_used
    cache = pool.new_cache("")
    assert cache.adopt(TEXT[:length]) == cache.prefix_length == adopted
    assert held(cache) == TEXT[:adopted]
    assert cache.blocks == owner.blocks[: adopted // 32]
    assert pool.tokens_used == used
    # The rest is its own.
    append(cache, TEXT[adopted:length], None)
    assert held(cache) == TEXT[:length]
    assert held(owner) == TEXT


def test_what_nobody_holds_any_more_can_be_adopted() -> None:
    pool = new_pool()
    computed(pool, TEXT[:70]).release()
    assert pool.tokens_used == 0
    cache = pool.new_cache("")
    assert cache.adopt(TEXT) == 64
    assert (held(cache), pool.tokens_used) == (TEXT[:64], 64)


def test_sharing_stays_within_one_salt_and_one_model() -> None:
    pool, other = new_pool(), new_pool(fingerprint="another")
    owner = computed(pool, TEXT, "mine")
    for salt in ("", "other", None):
        assert pool.new_cache(salt).adopt(TEXT) == 0
    assert pool.new_cache("mine").adopt(TEXT) == 224
    unsalted = pool.new_cache(None)
    append(unsalted, TEXT[:32], None)
    unsalted.publish(TEXT)
    assert pool.blocks.published == 8
    mine, theirs = (p.new_cache("mine").next_hash(TEXT) for p in (pool, other))
    assert mine is not None
    assert mine != theirs
    assert owner.next_hash(TEXT) is None


def test_texts_share_up_to_where_they_differ() -> None:
    pool = new_pool()
    computed(pool, TEXT)
    for at, adopted in ((0, 0), (31, 0), (32, 32), (70, 64)):
        assert pool.new_cache("").adopt([*TEXT[:at], 7, *TEXT[at + 1 :]]) == adopted
    # A block is what it is by what came before it.
    assert pool.new_cache("").adopt(TEXT[32:]) == 0


def test_adopting_goes_on_where_it_ended() -> None:
    pool = new_pool()
    owner, cache = pool.new_cache(""), pool.new_cache("")
    append(owner, TEXT[:40], None)
    owner.publish(TEXT)
    assert cache.adopt(TEXT) == 32
    append(owner, TEXT[40:100], None)
    owner.publish(TEXT)
    assert cache.adopt(TEXT) == 96
    assert held(cache) == TEXT[:96]
    # Not once something else was computed: a token, or a block that was not published.
    append(cache, TEXT[96:97], None)
    append(owner, TEXT[100:], None)
    owner.publish(TEXT)
    assert cache.adopt(TEXT) == 97
    append(cache, TEXT[97:128], None)
    assert cache.adopt(TEXT) == 128
    cache.publish(TEXT)
    assert cache.adopt(TEXT) == 224


def test_a_tree_or_reserved_room_stops_adoption() -> None:
    pool = new_pool()
    computed(pool, TEXT)
    cache = pool.new_cache("")
    cache.reserve(1)
    assert cache.adopt(TEXT) == 0
    cache.clear()
    append(cache, [1], [-1])
    assert cache.adopt(TEXT) == 0


def test_what_was_computed_twice_is_kept_once_both_are_gone() -> None:
    pool = new_pool()
    first, second = computed(pool, TEXT[:64]), computed(pool, TEXT[:64])
    assert pool.tokens_used == 128
    assert pool.blocks.published == 2
    second.release()
    assert pool.new_cache("").adopt(TEXT) == 64
    first.release()
    third = pool.new_cache("")
    assert third.adopt(TEXT) == 64
    assert held(third) == TEXT[:64]


def test_a_block_is_not_published_before_it_is_full() -> None:
    pool = new_pool()
    cache = pool.new_cache("")
    append(cache, TEXT[:31], None)
    append(cache, TEXT[31:33], [-1, 0])
    cache.publish(TEXT)
    assert pool.blocks.published == 0
    cache.advance([0])
    cache.publish(TEXT)
    assert pool.blocks.published == 1


@pytest.mark.parametrize("adopted", [True, False])
def test_truncating_within_a_shared_block_goes_on_in_a_copy(adopted: bool) -> None:
    pool = new_pool()
    owner = computed(pool, TEXT[:70])
    cache = pool.new_cache("")
    if adopted:
        assert cache.adopt(TEXT) == 64
    else:
        cache = owner  # what it has published may be found by others
    before = cache.blocks
    cache.truncate(40)
    assert cache.blocks[0] == before[0]
    assert cache.blocks[1] not in owner.blocks[:2] if adopted else cache.blocks[1] != before[1]
    assert held(cache) == TEXT[:40]
    append(cache, [5, 6], None)
    assert held(cache) == [*TEXT[:40], 5, 6]
    other = pool.new_cache("")
    assert other.adopt(TEXT) == 64
    assert held(other) == TEXT[:64]
    # It is not known by what it no longer holds.
    append(cache, range(22), None)
    changed = [*TEXT[:40], 5, 6, *range(22)]
    cache.publish(changed)
    assert pool.new_cache("").adopt([*changed, 1]) == 64


def test_truncating_at_a_border_copies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = new_pool(3)
    cache = computed(pool, TEXT[:96])
    monkeypatch.setattr(KvPool, "move", None)
    cache.truncate(64)
    append(cache, [9], None)
    assert held(cache) == [*TEXT[:64], 9]


def test_a_copy_for_which_there_is_no_room_changes_nothing() -> None:
    pool = new_pool(2)
    cache = computed(pool, TEXT[:64])
    with pytest.raises(OutOfBlocks):
        cache.truncate(40)
    assert (held(cache), pool.tokens_used) == (TEXT[:64], 64)
    cache.truncate(32)
    assert held(cache) == TEXT[:32]


def test_a_cleared_cache_finds_its_own_blocks_again() -> None:
    pool = new_pool(4)
    cache = computed(pool, TEXT[:70])
    cache.clear()
    assert cache.adopt(TEXT[:70]) == 64
    assert held(cache) == TEXT[:64]


# --- any sequence -----------------------------------------------------------------------------


@dataclass(eq=False)
class Twin:
    """A cache and what it must hold."""

    cache: SessionCache
    salt: str | None
    prefix: list[int] = field(default_factory=list)
    tree: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)


class Sessions(RuleBasedStateMachine):
    """Sessions of few different texts in a small pool: what each holds stays what it computed."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = new_pool(9)
        self.twins: list[Twin] = []

    @rule(salt=st.sampled_from(["", "", "b", None]))
    def open(self, salt: str | None) -> None:
        if len(self.twins) < 5:
            self.twins.append(Twin(self.pool.new_cache(salt), salt))

    def pick(self, data: st.DataObject) -> Twin:
        return data.draw(st.sampled_from(self.twins), label="session")

    @precondition(lambda self: self.twins)
    @rule(data=st.data(), count=st.integers(1, 50), letter=st.integers(0, 1))
    def prefill(self, data: st.DataObject, count: int, letter: int) -> None:
        twin = self.pick(data)
        if twin.tree:
            return
        tokens = [letter * 1000 + len(twin.prefix) + index for index in range(count)]
        if self.try_append(twin, tokens, None):
            twin.prefix += tokens

    @precondition(lambda self: self.twins)
    @rule(data=st.data(), count=st.integers(1, 6))
    def grow(self, data: st.DataObject, count: int) -> None:
        twin = self.pick(data)
        first = len(twin.tree)
        parents = [data.draw(st.integers(-1, first + index - 1)) for index in range(count)]
        tokens = [5000 + 10 * parent + index for index, parent in enumerate(parents)]
        if self.try_append(twin, tokens, parents):
            twin.tree += tokens
            twin.parents += parents

    def try_append(self, twin: Twin, tokens: list[int], parents: list[int] | None) -> bool:
        needed = twin.cache.blocks_needed(len(tokens))
        if needed > self.pool.blocks.available:
            with pytest.raises(OutOfBlocks):
                append(twin.cache, tokens, parents)
            return False
        append(twin.cache, tokens, parents)
        return True

    @precondition(lambda self: self.twins)
    @rule(data=st.data(), depth=st.integers(0, 4))
    def advance(self, data: st.DataObject, depth: int) -> None:
        twin = self.pick(data)
        path: list[int] = []
        for _ in range(depth):
            end = path[-1] if path else -1
            below = [slot for slot, parent in enumerate(twin.parents) if parent == end]
            if not below:
                break
            path.append(data.draw(st.sampled_from(below)))
        end = path[-1] if path else -1
        keep: list[int] = []
        for slot, parent in enumerate(twin.parents):
            if (parent == end or parent in keep) and data.draw(st.booleans()):
                keep.append(slot)
        remap = twin.cache.advance(path, keep)
        assert remap == {slot: place for place, slot in enumerate(keep)}
        twin.prefix += [twin.tree[slot] for slot in path]
        twin.parents = [remap.get(twin.parents[slot], -1) for slot in keep]
        twin.tree = [twin.tree[slot] for slot in keep]

    @precondition(lambda self: self.twins)
    @rule(data=st.data(), back=st.integers(0, 70))
    def truncate(self, data: st.DataObject, back: int) -> None:
        twin = self.pick(data)
        length = max(0, len(twin.prefix) - back)
        try:
            twin.cache.truncate(length)
        except OutOfBlocks:
            assert self.pool.blocks.available == 0
            return
        twin.prefix, twin.tree, twin.parents = twin.prefix[:length], [], []

    @precondition(lambda self: self.twins)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        twin = self.pick(data)
        twin.cache.publish(twin.prefix)

    @precondition(lambda self: self.twins)
    @rule(data=st.data(), letter=st.integers(0, 1), length=st.integers(1, 120))
    def adopt(self, data: st.DataObject, letter: int, length: int) -> None:
        twin = self.pick(data)
        before = len(twin.prefix)
        rest = [letter * 1000 + index for index in range(before, before + length)]
        text = [*twin.prefix, *rest]
        adopted = twin.cache.adopt(text)
        assert before <= adopted <= max(before, len(text) - 1)
        assert adopted == before or adopted % BLOCK_TOKENS == 0
        twin.prefix = text[:adopted]

    @precondition(lambda self: self.twins)
    @rule(data=st.data(), end=st.booleans())
    def give_up(self, data: st.DataObject, end: bool) -> None:
        twin = self.pick(data)
        if end:
            twin.cache.release()
            self.twins.remove(twin)
        else:
            twin.cache.clear()
            twin.prefix, twin.tree, twin.parents = [], [], []

    @invariant()
    def everybody_holds_what_was_computed(self) -> None:
        for twin in self.twins:
            assert held(twin.cache) == [*twin.prefix, *twin.tree]
            assert twin.cache.parents == tuple(twin.parents)

    @invariant()
    def what_is_written_next_has_one_holder(self) -> None:
        tables = [twin.cache.blocks for twin in self.twins]
        for twin, table in zip(self.twins, tables, strict=True):
            for block in table[len(twin.prefix) // BLOCK_TOKENS :]:
                assert sum(other.count(block) for other in tables) == 1
                assert not self.pool.blocks.shared(block)

    @invariant()
    def blocks_are_shared_within_a_salt_only(self) -> None:
        salt_of: dict[int, str | None] = {}
        for twin in self.twins:
            for block in twin.cache.blocks:
                if block in salt_of:
                    assert twin.salt is not None
                    assert salt_of[block] == twin.salt
                salt_of[block] = twin.salt
        assert self.pool.blocks.used == len(salt_of)

    def teardown(self) -> None:
        for twin in self.twins:
            twin.cache.release()
        assert self.pool.tokens_used == 0


TestSessions = Sessions.TestCase
TestSessions.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, derandomize=True
)
