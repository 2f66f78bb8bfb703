"""What an orchestrator remembers of where texts were computed."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.prefix_memory import HOLDERS_MAX, PrefixMemory

TEXT = [bytes([number]) * 32 for number in range(9)]


def test_the_longest_beginning_of_each_holder_is_found() -> None:
    memory = PrefixMemory()
    memory.remember(TEXT[:3], "a", 1.0)
    memory.remember(TEXT[:7], "b", 2.0)
    assert memory.holders(TEXT, -math.inf) == {"a": 3, "b": 7}
    assert memory.holders(TEXT[:5], -math.inf) == {"a": 3, "b": 5}
    assert memory.holders([b"other", *TEXT], -math.inf) == {"b": 8, "a": 4}
    assert memory.holders([], -math.inf) == {}


def test_what_is_too_long_ago_does_not_count() -> None:
    memory = PrefixMemory()
    memory.remember(TEXT[:7], "a", 1.0)
    memory.remember(TEXT[:3], "a", 5.0)
    assert memory.holders(TEXT, 2.0) == {"a": 3}
    assert memory.holders(TEXT, 1.0) == {"a": 7}
    assert memory.holders(TEXT, 6.0) == {}


def test_ends_are_forgotten_before_beginnings() -> None:
    memory = PrefixMemory(blocks_max=5)
    memory.remember(TEXT, "a", 1.0)
    assert len(memory) == 5
    assert memory.holders(TEXT, -math.inf) == {"a": 5}
    memory.remember([b"x", b"y"], "b", 2.0)
    assert memory.holders(TEXT, -math.inf) == {"a": 3}


def test_of_many_holders_the_latest_are_remembered() -> None:
    memory = PrefixMemory()
    for number in range(HOLDERS_MAX + 3):
        memory.remember(TEXT[:1], str(number), float(number))
    memory.remember(TEXT[:1], "3", 99.0)
    expected = {str(number) for number in range(3, HOLDERS_MAX + 3)}
    assert set(memory.holders(TEXT, -math.inf)) == expected


@given(
    st.lists(
        st.tuples(st.integers(0, len(TEXT)), st.sampled_from("abc"), st.floats(0, 9)), max_size=20
    ),
    st.integers(0, len(TEXT)),
)
def test_nothing_is_found_that_was_not_remembered(
    events: list[tuple[int, str, float]], asked: int
) -> None:
    memory = PrefixMemory()
    for count, holder, when_s in events:
        memory.remember(TEXT[:count], holder, when_s)
    expected = {
        holder: min(asked, max(count for count, other, _ in events if other == holder))
        for _, holder, _ in events
    }
    found = memory.holders(TEXT[:asked], -math.inf)
    assert found == {holder: count for holder, count in expected.items() if count}
