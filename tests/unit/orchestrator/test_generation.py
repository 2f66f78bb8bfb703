"""What a client is told when it reads slower than its sessions decode."""

from __future__ import annotations

from orchestrator.generation import Delivery, Ending, Output, joined
from orchestrator.messages import Deliver, DeliverPrompt, Finish
from outrider.domain import FinishReason, SpeculationCounters, TokenLogprobs
from outrider.errors import Unavailable


def delivery(choice: int, text: str, *ids: int, sources: tuple[int, ...] | None = None) -> Delivery:
    return Delivery(
        choice,
        Deliver(
            text,
            ids,
            (0,) * len(ids) if sources is None else sources,
            tuple(TokenLogprobs(token, -1.0) for token in ids),
        ),
    )


def ending(choice: int) -> Ending:
    return Ending(choice, Finish(FinishReason.LENGTH, 3, SpeculationCounters()), 0.5, 1.0)


def test_one_output_is_passed_on_as_it_is() -> None:
    batch: list[Output] = [delivery(0, "a", 1)]
    assert joined(batch) is batch


def test_what_has_piled_up_is_joined_in_order() -> None:
    batch: list[Output] = [
        delivery(0, "a", 1, sources=(2,)),
        delivery(0, "", 2, 3, sources=(1, 0)),
        delivery(0, "bc", 4),
        ending(0),
    ]
    assert joined(batch) == [delivery(0, "abc", 1, 2, 3, 4, sources=(2, 1, 0, 0)), ending(0)]


def test_choices_are_joined_one_by_one() -> None:
    prompt = DeliverPrompt((TokenLogprobs(5, -0.5),))
    batch: list[Output] = [
        prompt,
        delivery(1, "x", 7),
        delivery(0, "a", 1),
        delivery(1, "y", 8),
        ending(1),
        delivery(0, "b", 2),
    ]
    assert joined(batch) == [prompt, delivery(1, "xy", 7, 8), delivery(0, "ab", 1, 2), ending(1)]


def test_an_error_stays_behind_what_was_said() -> None:
    error = Unavailable("gone")
    batch: list[Output] = [delivery(0, "a", 1), delivery(0, "b", 2), error]
    assert joined(batch) == [delivery(0, "ab", 1, 2), error]
