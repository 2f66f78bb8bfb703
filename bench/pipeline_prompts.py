"""Prompts answered with and without speculation, for the pipelining benchmark's real models."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from outrider.client import Client, Completion, Request

PROMPTS = Path(__file__).with_name("prompts.json")


@dataclass(frozen=True, slots=True)
class Case:
    """One prompt, measured."""

    category: str
    tokens: int
    target_s: float
    speculated_s: float
    tau: float
    acceptance: float | None
    identical: bool

    @property
    def speedup(self) -> float:
        """Target-only over speculated time."""
        return self.target_s / self.speculated_s


def load_prompts() -> list[dict[str, str]]:
    """The benchmark's prompts, each with its category."""
    prompts: list[dict[str, str]] = json.loads(PROMPTS.read_text())["prompts"]
    return prompts


def measure_prompts(
    client: Client,
    prompts: Sequence[dict[str, str]],
    repeats: int,
    tokens_max: int,
    temperature: float,
    advance: Callable[[], object],
) -> list[Case]:
    """Answer each prompt `repeats` times with and without speculation, in turn."""
    return [_measure(client, entry, repeats, tokens_max, temperature, advance) for entry in prompts]


def _measure(
    client: Client,
    entry: dict[str, str],
    repeats: int,
    tokens_max: int,
    temperature: float,
    advance: Callable[[], object],
) -> Case:
    def run(speculation: bool) -> Completion:
        request = Request(
            chat=[("user", entry["prompt"])],
            temperature=temperature,
            seed=1,
            tokens_max=tokens_max,
            speculation=speculation,
        )
        completion = client.complete(request)
        advance()
        return completion

    run(True)  # warms caches; not counted
    plain, speculated = [], []
    for _ in range(repeats):
        plain.append(run(False))
        speculated.append(run(True))
    counters = [c.finished.speculation for c in speculated]
    verified = sum(c.verified_draft_tokens for c in counters)
    accepted = sum(c.accepted_draft_tokens for c in counters)
    tokens = len(plain[0].token_ids)
    return Case(
        category=entry["category"],
        tokens=tokens,
        target_s=statistics.median(c.finished.total_s for c in plain),
        speculated_s=statistics.median(c.finished.total_s for c in speculated),
        tau=tokens / statistics.median(c.verify_steps for c in counters),
        acceptance=accepted / verified if verified else None,
        identical=all(c.token_ids == plain[0].token_ids for c in (*plain, *speculated)),
    )


_HEADER = ("prompt", "tokens", "target", "Outrider", "speed-up", "tau", "accepted", "same ids")


def _cells(case: Case) -> tuple[str, ...]:
    return (
        case.category,
        str(case.tokens),
        f"{case.tokens / case.target_s:.1f}",
        f"{case.tokens / case.speculated_s:.1f}",
        f"{case.speedup:.2f}",
        f"{case.tau:.2f}",
        "-" if case.acceptance is None else f"{case.acceptance:.2f}",
        "yes" if case.identical else "no",
    )


def markdown(cases: Sequence[Case]) -> str:
    """A table of the cases."""
    rows = [_HEADER, ("---",) * len(_HEADER), *map(_cells, cases)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"
