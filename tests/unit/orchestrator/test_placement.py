"""Which workers serve a session."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.placement import (
    LOAD_SLACK_MIN,
    LOAD_TOKENS,
    SESSION_TOKENS,
    TIE_TOKENS,
    Attachment,
    WorkerView,
    choose_drafters,
    choose_verifier,
    credited,
    pairing_fault,
    pick,
    primaries,
    shortlist,
    surplus,
    weigh_verifiers,
)
from outrider.domain import ModelInfo

TARGET = ModelInfo("big", "f-big", "tokens", 100, 2048, "float32")


def drafter(
    name: str, tokenizer: str | None = "tokens", *, proposer: str = "language-model"
) -> ModelInfo:
    return ModelInfo(name, f"f-{name}", tokenizer, 100, 2048, "float32", proposer=proposer)


def view(address: str, info: ModelInfo = TARGET, sessions: int = 0, most: int = 10) -> WorkerView:
    return WorkerView(address, info, sessions, most)


def addresses(views: list[WorkerView]) -> list[str]:
    return [view.address for view in views]


# --- verifiers --------------------------------------------------------------------------------


def test_the_least_loaded_verifier_of_the_model_is_chosen() -> None:
    views = [
        view("a", sessions=5),
        view("b", sessions=3),
        view("c", drafter("other"), sessions=0),
    ]
    chosen = choose_verifier(views, "big", ())
    assert chosen is not None
    assert chosen.address == "b"


def test_load_is_a_share_not_a_count() -> None:
    chosen = choose_verifier(
        [view("a", sessions=5, most=10), view("b", sessions=8, most=64)], "big", ()
    )
    assert chosen is not None
    assert chosen.address == "b"
    # One that takes no sessions at all must not divide by zero.
    chosen = choose_verifier([view("a", sessions=1, most=0), view("b", sessions=9)], "big", ())
    assert chosen is not None
    assert chosen.address == "b"


def test_of_equals_the_first_by_address() -> None:
    chosen = choose_verifier([view("b"), view("a"), view("c")], "big", ())
    assert chosen is not None
    assert chosen.address == "a"


def test_what_was_tried_is_not_tried_again() -> None:
    views = [view("a"), view("b", sessions=9)]
    chosen = choose_verifier(views, "big", {"a"})
    assert chosen is not None
    assert chosen.address == "b"
    assert choose_verifier(views, "big", {"a", "b"}) is None
    assert choose_verifier(views, "small", ()) is None
    assert choose_verifier([], "big", ()) is None


def holding(address: str, tokens: int, **known: float) -> WorkerView:
    return replace(view(address), held_tokens=tokens, **known)  # type: ignore[arg-type]


def cheapest(views: list[WorkerView], prompt_tokens: int) -> str:
    return weigh_verifiers(views, "big", (), prompt_tokens)[0].view.address


def test_who_holds_the_beginning_is_chosen() -> None:
    assert cheapest([view("a"), holding("b", 256), holding("c", 128)], 300) == "b"
    # More than the prompt is no more than the prompt.
    assert cheapest([holding("b", 999, rtt_s=0.001), holding("c", 300)], 300) == "c"


def test_load_can_outweigh_a_hit() -> None:
    def loaded(sessions: int) -> WorkerView:
        return replace(holding("busy", 800), sessions=sessions)

    assert cheapest([view("idle"), loaded(5)], 1_000) == "busy"
    assert cheapest([view("idle"), loaded(7)], 1_000) == "idle"
    # A short hit is worth less.
    assert cheapest([view("idle"), replace(loaded(5), held_tokens=100)], 1_000) == "idle"


def test_scarce_kv_counts_as_load() -> None:
    assert cheapest([holding("a", 0, kv_share=0.5), view("b", sessions=4)], 10) == "b"
    assert cheapest([holding("a", 0, waiting=True), view("b", sessions=9)], 10) == "b"


def test_distance_counts_less_than_a_long_prompt() -> None:
    near, far = holding("near", 0, rtt_s=0.0005), holding("far", 512, rtt_s=0.02)
    assert cheapest([near, far], 600) == "far"
    assert cheapest([near, replace(far, held_tokens=64)], 600) == "near"


def test_what_was_weighed_says_why() -> None:
    (weighed,) = weigh_verifiers([holding("a", 64, rtt_s=0.002)], "big", (), 100)
    for word in ("a costs 46", "holds 64", "misses 36", "load 0.00", "2.0 ms as 10"):
        assert word in str(weighed)


VIEWS = st.lists(
    st.builds(
        WorkerView,
        st.integers(0, 30).map(str),
        st.just(TARGET),
        st.integers(0, 12),
        st.just(10),
        rtt_s=st.floats(0, 0.1),
        kv_share=st.floats(0, 1),
        waiting=st.booleans(),
        held_tokens=st.integers(0, 2_000),
    ),
    max_size=8,
    unique_by=lambda view: view.address,
)


@given(VIEWS, st.integers(1, 2_000), st.randoms(use_true_random=False))
def test_the_choice_is_among_the_best(
    views: list[WorkerView], prompt_tokens: int, chance: random.Random
) -> None:
    weighed = weigh_verifiers(views, "big", {"3"}, prompt_tokens)
    assert {one.view.address for one in weighed} == {v.address for v in views} - {"3"}
    costs = [one.cost_tokens for one in weighed]
    assert costs == sorted(costs)
    assert all(cost >= 0 for cost in costs)
    chosen = pick(weighed, chance.randrange)
    if chosen is None:
        assert not weighed
    else:
        assert chosen.cost_tokens <= costs[0] + TIE_TOKENS


@given(VIEWS, st.integers(1, 2_000), st.integers(1, 2_000))
def test_holding_more_never_costs_more(views: list[WorkerView], prompt: int, more: int) -> None:
    for one in weigh_verifiers(views, "big", (), prompt):
        richer = replace(one.view, held_tokens=one.view.held_tokens + more)
        busier = replace(one.view, sessions=one.view.sessions + more)
        (held,) = weigh_verifiers([richer], "big", (), prompt)
        (busy,) = weigh_verifiers([busier], "big", (), prompt)
        assert held.cost_tokens <= one.cost_tokens <= busy.cost_tokens


def test_a_full_verifier_is_never_sticky() -> None:
    # However much it holds of a text of a thousand blocks.
    assert LOAD_TOKENS / LOAD_SLACK_MIN > 10_000


def test_equals_share_the_sessions() -> None:
    chance = random.Random(1)
    counts = dict.fromkeys("abcdefgh", 0)
    for _ in range(400):
        views = [view(name, sessions=count, most=100) for name, count in counts.items()]
        chosen = pick(weigh_verifiers(views, "big", (), 100), chance.randrange)
        assert chosen is not None
        counts[chosen.view.address] += 1
    assert max(counts.values()) - min(counts.values()) <= 10


def test_of_equals_the_better_of_two_is_taken() -> None:
    weighed = weigh_verifiers([view("a"), holding("b", 8), holding("c", 16)], "big", (), 100)
    assert [one.view.address for one in weighed] == ["c", "b", "a"]
    for draws, expected in (([1, 1], "b"), ([2, 1], "b"), ([2, 0], "c"), ([0, 0], "c")):
        drawn = iter(draws)
        chosen = pick(weighed, lambda below, drawn=drawn: next(drawn))  # type: ignore[misc]
        assert chosen is not None
        assert chosen.view.address == expected


@given(st.integers(0, 50), st.integers(1, 10), st.randoms(use_true_random=False))
def test_a_shortlist_is_some_of_many_and_all_of_few(
    count: int, most: int, chance: random.Random
) -> None:
    drawn = shortlist(count, most, chance.randrange)
    assert len(drawn) == len(set(drawn)) == min(count, most)
    assert all(0 <= index < count for index in drawn)


# --- drafters ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", [None, "tokens"])
def test_a_drafter_of_the_same_ids_fits(tokenizer: str | None) -> None:
    assert pairing_fault(TARGET, drafter("small", tokenizer)) is None


def test_a_drafter_of_other_ids_is_told_why_and_what_to_do() -> None:
    fault = pairing_fault(TARGET, drafter("small", "0123456789abcdef"))
    assert fault is not None
    for word in ("small", "0123456789ab", "big", "tokens", "family"):
        assert word in fault
    assert "0123456789abc" not in fault
    nameless = ModelInfo("big", "f", None, 100, 2048, "float32")
    fault = pairing_fault(nameless, drafter("small"))
    assert fault is not None
    assert "none" in fault


def test_different_kinds_come_first_then_an_idle_spare() -> None:
    views = [
        view("lookup", drafter("lookup", None, proposer="lookup"), sessions=9),
        view("lm-2", drafter("small"), sessions=1),
        view("lm-1", drafter("small"), sessions=2),
        view("lm-3", drafter("tiny"), sessions=5),
        view("foreign", drafter("foreign", "others")),
    ]
    assert addresses(choose_drafters(views, TARGET, 9, ())) == ["lm-2", "lm-3", "lookup"]
    assert addresses(choose_drafters(views, TARGET, 2, ())) == ["lm-2", "lm-3"]
    assert addresses(choose_drafters(views, TARGET, 2, {"lm-2"})) == ["lm-1", "lm-3"]
    assert choose_drafters(views, TARGET, 0, ()) == []
    assert choose_drafters([], TARGET, 3, ()) == []
    # Another one of a kind guesses the same: it is worth having where nobody else needs it.
    views.append(view("lm-4", drafter("tiny")))
    assert addresses(choose_drafters(views, TARGET, 9, ())) == ["lm-4", "lm-2", "lookup"]
    views.append(view("lm-5", drafter("tiny")))
    assert addresses(choose_drafters(views, TARGET, 9, ()))[3:] == ["lm-5"]


def test_a_kind_that_a_session_has_is_only_a_spare() -> None:
    views = [view("one", drafter("small"), sessions=1), view("two", drafter("small"))]
    bound = {views[0].kind}
    assert addresses(choose_drafters(views, TARGET, 1, {"one"}, bound)) == ["two"]
    views[1] = replace(views[1], sessions=1)
    assert choose_drafters(views, TARGET, 1, {"one"}, bound) == []


def test_spares_are_no_load() -> None:
    views = [
        view("needed", drafter("small"), sessions=1),
        replace(view("spare", drafter("small"), sessions=1), spares=1),
    ]
    assert addresses(choose_drafters(views, TARGET, 1, ())) == ["spare"]


def test_drafters_of_a_kind_share_the_work_though_estimates_differ_a_little() -> None:
    kind = drafter("small")
    views = [
        replace(view("lucky", kind, sessions=3), tokens=3.4),
        replace(view("other", kind, sessions=1), tokens=3.0),
        replace(view("slow", kind), tokens=1.5),
    ]
    assert addresses(choose_drafters(views, TARGET, 1, ())) == ["other"]
    # Who is slow is the last one of its kind, and a spare for as long as it is idle.
    assert addresses(choose_drafters(views, TARGET, 3, ())) == ["other", "slow"]


def test_sessions_that_come_one_by_one_spread_over_all_drafters() -> None:
    kind, loads, spares = drafter("small"), [0] * 8, [set[int]() for _ in range(8)]
    attached: dict[int, list[int]] = {}
    for number in range(16):
        views = [
            replace(view(str(i), kind, sessions=loads[i]), spares=len(spares[i])) for i in range(8)
        ]
        chosen = [int(v.address) for v in choose_drafters(views, TARGET, 2, ())]
        attached[number] = chosen
        for place, index in enumerate(chosen):
            loads[index] += 1
            if place:
                spares[index].add(number)
        # What the sweep does: spares are left where somebody else works.
        for other, indices in attached.items():
            attachments = [
                Attachment(i, views[0].kind, loads[i] - len(spares[i]) - (other not in spares[i]))
                for i in indices
            ]
            own = {views[0].kind: attachments[0]}
            for index in surplus(attachments, own):
                indices.remove(index)
                loads[index] -= 1
                spares[index].discard(other)
        if number == 3:
            assert loads == [1] * 8
    assert loads == [2] * 8
    assert not any(spares)


def test_who_won_most_is_relied_on() -> None:
    small, tiny = ("language-model", "f-small"), ("language-model", "f-tiny")
    attachments = [
        Attachment(1, small, 0, 0.5),
        Attachment(2, small, 3, 1.5),
        Attachment(3, tiny, 2, 0.1),
    ]
    chosen = primaries(attachments)
    assert {kind: one.binding for kind, one in chosen.items()} == {small: 2, tiny: 3}
    assert surplus(attachments, chosen) == []
    crowded = [replace(attachments[0], others=1), *attachments[1:]]
    assert surplus(crowded, primaries(crowded)) == [1]
    assert credited(attachments, chosen) == {1: 0.5, 2: 2.0, 3: 0.1}
    # Nothing is known yet: whoever was bound first.
    fresh = [replace(one, gain=0.0) for one in crowded]
    assert surplus(fresh, primaries(fresh)) == [2]


def test_among_equal_drafters_the_warm_one_comes_first() -> None:
    views = [view("cold", drafter("small")), replace(view("warm", drafter("small")), sessions=5)]
    views[1] = replace(views[1], held_tokens=int(4 * SESSION_TOKENS))
    assert addresses(choose_drafters(views, TARGET, 1, ())) == ["cold"]
    views[1] = replace(views[1], sessions=3)
    assert addresses(choose_drafters(views, TARGET, 1, ())) == ["warm"]
    # One that wins more, being nearer say, comes first even so.
    views[0] = replace(views[0], tokens=1.5)
    assert addresses(choose_drafters(views, TARGET, 1, ())) == ["cold"]
