"""What a session's cache holds where, without any model.

Each token's keys and values are its own number, so that it can be found wherever it was moved.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from outrider.model.kv_cache import Extension, KvLayout, SessionCache

LAYOUT = KvLayout(2, 3, 4, torch.float32, torch.device("cpu"))


def append(
    cache: SessionCache, numbers: Sequence[float], parents: Sequence[int] | None
) -> Extension:
    extension = cache.plan(len(numbers), parents)
    cache.reserve(extension.start + extension.size)
    for index, number in enumerate(numbers):
        cache.buffer[:, :, :, extension.start + index] = number
    cache.apply(extension)
    return extension


def held(cache: SessionCache) -> list[float]:
    tokens = cache.buffer[:, :, :, : cache.prefix_length + cache.tree_size]
    numbers = tokens[0, 0, 0, :, 0]
    assert torch.equal(tokens, numbers[:, None].expand_as(tokens)), "layers were moved apart"
    return [float(number) for number in numbers]


@pytest.fixture
def cache() -> SessionCache:
    """A prefix of three tokens and the tree 0 -> (1 -> (3, 4), 2 -> 5)."""
    cache = SessionCache(LAYOUT)
    append(cache, [100, 101, 102], None)
    append(cache, [0, 1, 2, 3, 4, 5], [-1, 0, 0, 1, 1, 2])
    return cache


def test_a_chain_extends_the_prefix() -> None:
    cache = SessionCache(LAYOUT)
    append(cache, [7, 8], None)
    extension = append(cache, [9], None)
    assert (cache.prefix_length, cache.tree_size) == (3, 0)
    assert extension.positions.tolist() == [2]
    assert extension.visible is None
    assert held(cache) == [7, 8, 9]


def test_a_tree_stands_at_depths_and_sees_its_ancestors(cache: SessionCache) -> None:
    extension = cache.plan(3, [4, 6, -1])
    assert extension.start == 9
    assert extension.positions.tolist() == [3 + 3, 3 + 4, 3]
    assert extension.visible is not None
    seen = [np.flatnonzero(row).tolist() for row in extension.visible]
    assert seen == [[0, 1, 4, 6], [0, 1, 4, 6, 7], [8]]


def test_advance_along_slots_in_place_moves_nothing(cache: SessionCache) -> None:
    before = cache.buffer.clone()
    assert cache.advance([0, 1], [3, 4]) == {3: 0, 4: 1}
    assert (cache.prefix_length, cache.tree_size) == (5, 2)
    assert held(cache) == [100, 101, 102, 0, 1, 3, 4]
    assert cache.advance([], [0, 1]) == {0: 0, 1: 1}
    assert torch.equal(cache.buffer[:, :, :, :5], before[:, :, :, :5])


def test_advance_makes_no_copy_when_all_is_in_place(
    cache: SessionCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("something was moved")

    monkeypatch.setattr(torch.Tensor, "index_copy_", refuse)
    cache.advance([0, 1])
    assert held(cache) == [100, 101, 102, 0, 1]


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


def test_growing_keeps_what_is_held(cache: SessionCache) -> None:
    before, bytes_before = held(cache), cache.bytes
    cache.reserve(cache.capacity + 1)
    assert cache.bytes >= 2 * bytes_before
    assert held(cache) == before
    grown = cache.buffer
    cache.reserve(cache.capacity)
    assert cache.buffer is grown


def test_released_caches_hold_no_memory_and_refuse_to_work(cache: SessionCache) -> None:
    assert cache.bytes == cache.capacity * LAYOUT.bytes_per_token
    cache.release()
    cache.release()
    assert cache.bytes == 0
    with pytest.raises(RuntimeError, match="released"):
        cache.reserve(1)
    with pytest.raises(RuntimeError, match="released"):
        cache.truncate(0)
    with pytest.raises(RuntimeError, match="released"):
        cache.advance([])


def test_bytes_per_token_counts_keys_and_values_of_all_layers() -> None:
    assert LAYOUT.bytes_per_token == 2 * 2 * 3 * 4 * 4
