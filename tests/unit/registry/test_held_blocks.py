"""What is told of held blocks adds up to what is held."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from outrider.registry import HeldBlocks

FIRST = b"first"

events = st.lists(
    st.tuples(st.sampled_from(["held", "dropped", "told", "failed"]), st.integers(0, 5))
)


@given(events)
def test_a_reader_ends_up_knowing_what_is_held(
    happened: list[tuple[str, int]],
) -> None:
    blocks, held, known = HeldBlocks(), set[bytes](), set[bytes]()
    lost = False
    for what, number in happened:
        digest = bytes([number])
        match what:
            case "held":
                held.add(digest)
                blocks.held(digest, FIRST)
            case "dropped":
                held.discard(digest)
                blocks.dropped(digest)
            case "told":
                news = blocks.take(number)
                assert len(news.held) + len(news.dropped) <= number
                known = (known - news.dropped.keys()) | news.held.keys()
            case "failed":
                # Drops are told again; of what is held all is told again.
                blocks.give_back(blocks.take(number))
                lost = True
    if lost:
        known |= blocks.still_held(blocks.everything()).keys()
    news = blocks.take(99)
    known = (known - news.dropped.keys()) | news.held.keys()
    assert known == held == set(blocks.everything())
    assert set(news.held.values()) | set(news.dropped.values()) <= {FIRST}
    assert not blocks.take(99).held
    assert not blocks.overflowed


def test_too_much_news_is_given_up_and_said_so() -> None:
    blocks = HeldBlocks(news_max=3)
    for number in range(4):
        blocks.held(bytes([number]), FIRST)
    assert blocks.overflowed
    assert blocks.take(9).held == {}
    assert len(blocks.everything()) == len(blocks) == 4
    blocks.dropped(bytes([9]))  # Never heard of.
    assert blocks.take(9).dropped == {}
