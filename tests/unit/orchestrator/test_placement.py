"""Which workers serve a session."""

from __future__ import annotations

import pytest

from orchestrator.placement import WorkerView, choose_drafters, choose_verifier, pairing_fault
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


def test_different_kinds_come_first_then_the_least_loaded() -> None:
    views = [
        view("lookup", drafter("lookup", None, proposer="lookup"), sessions=9),
        view("lm-2", drafter("small"), sessions=1),
        view("lm-1", drafter("small"), sessions=2),
        view("lm-3", drafter("tiny"), sessions=5),
        view("foreign", drafter("foreign", "others")),
    ]
    assert addresses(choose_drafters(views, TARGET, 9, ())) == ["lm-2", "lm-3", "lookup", "lm-1"]
    assert addresses(choose_drafters(views, TARGET, 2, ())) == ["lm-2", "lm-3"]
    assert addresses(choose_drafters(views, TARGET, 2, {"lm-2"})) == ["lm-1", "lm-3"]
    assert choose_drafters(views, TARGET, 0, ()) == []
    assert choose_drafters([], TARGET, 3, ()) == []
