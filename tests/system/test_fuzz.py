"""A share of `make fuzz`: ten thousand messages at a verifier, many not as they should be."""

from __future__ import annotations

import pytest

from tests.fuzz.verifier_stream import Fuzz, Result


def nothing(result: Result) -> None:
    """Report no progress."""


@pytest.mark.slow
async def test_a_verifier_survives_its_stream():
    result = await Fuzz(messages=10_000, seed=1, sockets=1, cases=32).run(nothing)
    assert not result.faults
    assert result.clean
    # That it was worth something: all of this happened, and not just once or twice.
    counts = result.counts
    assert result.messages >= 10_000
    assert result.preemptions > 0
    assert counts["over sockets"] > 1_000
    for what in ("finished", "released", "taken", "accepted", "repeats", "wild"):
        assert counts[what] > 100, what
    for code in ("invalid", "exhausted", "stale_epoch", "unknown_session"):
        assert counts[f"rejected: {code}"] > 100, code


async def test_a_run_repeats_itself():
    runs = [Fuzz(messages=300, seed=7, sockets=0, cases=6) for _ in range(2)]
    first, second = [await run.run(nothing) for run in runs]
    assert first.clean
    assert first.counts == second.counts
