"""The committed log: digests of every length since it was opened, and none before."""

from __future__ import annotations

import struct

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.committed import CommittedLog, digest

thorough = settings(deadline=None, derandomize=True)
ids = st.integers(0, (1 << 32) - 1)


def plain_digest(tokens: list[int]) -> int:
    data = b"".join(token.to_bytes(4, "little") for token in tokens)
    return xxhash.xxh3_64_intdigest(data)


def test_the_digest_is_pinned_down() -> None:
    # Written down once: verifier and drafter may run different releases.
    assert digest([]) == 0x2D06800538D394C2
    assert digest([1, 2, 3]) == xxhash.xxh3_64_intdigest(
        bytes([1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0])
    )
    assert digest([0x01020304]) == xxhash.xxh3_64_intdigest(b"\x04\x03\x02\x01")


@pytest.mark.parametrize("token", [-1, 1 << 32])
def test_ids_that_do_not_fit_are_refused(token: int) -> None:
    with pytest.raises(struct.error):
        digest([token])


def test_a_log_cannot_be_empty() -> None:
    with pytest.raises(ValueError, match="at least one"):
        CommittedLog([])


@thorough
@given(first=st.lists(ids, min_size=1, max_size=20), groups=st.lists(st.lists(ids, max_size=5)))
def test_every_length_since_the_opening_has_its_digest(
    first: list[int], groups: list[list[int]]
) -> None:
    log = CommittedLog(first)
    expected = list(first)
    for group in groups:
        log.append(group)
        expected += group
    assert log.tokens == expected
    assert len(log) == len(expected)
    assert log.tip == expected[-1]
    for length in range(len(expected) + 2):
        known = log.digest_at(length)
        if len(first) <= length <= len(expected):
            assert known == plain_digest(expected[:length]) == digest(expected[:length])
            assert log.since(length) == expected[length:]
        else:
            assert known is None


def test_the_log_is_a_copy() -> None:
    prompt = [1, 2]
    log = CommittedLog(prompt)
    prompt.append(3)
    log.append([4])
    assert (log.tokens, prompt) == ([1, 2, 4], [1, 2, 3])
