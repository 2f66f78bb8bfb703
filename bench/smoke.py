"""A guard against losing speed: ratios only, with thresholds that a noisy machine keeps.

    python -m bench.smoke                 # or: make bench-smoke; two minutes
    python -m bench.smoke --no-real       # synthetic models only: half a minute, nothing to fetch

Synthetic models sleep instead of computing, so their ratios hardly depend on the machine: a good
drafter must pay, a useless one must cost next to nothing. With the real model lookup must pay where
answers repeat the prompt, and greedy answers in float32 must stay what they are. Whoever is below a
threshold is measured once more before that counts.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console

from bench.spec.contenders import Ours
from bench.spec.fleet import OURS, DrafterSpec, FleetConfig, spec_fleet
from bench.spec.options import QUESTIONS
from bench.spec.questions import Question, read_questions
from outrider.client import Client
from outrider.config import DEFAULT_CACHE

_TARGET = "synthetic:target?step=1:22,32:22,128:28"
_GOOD = "synthetic:good?step=1:2.5&agree=0.8,0.1,0.05"
_USELESS = "synthetic:useless?step=1:2.5&agree=0.01"
_ATTEMPTS = 2


@dataclass(frozen=True, slots=True)
class Check:
    """A ratio of speeds, and how low it may be."""

    name: str
    threshold: float
    ratio: float

    @property
    def passed(self) -> bool:
        """It is high enough."""
        return self.ratio >= self.threshold


@dataclass(frozen=True, slots=True)
class Guard:
    """What a contender of a fleet must reach."""

    name: str
    contender: str
    threshold: float


SYNTHETIC = (
    # Measured: about 3.
    Guard("good drafter", f"{OURS}-language-model", 1.8),
    # Measured: 0.98 or so.
    Guard("useless drafter", f"{OURS}-language-model-2", 0.85),
)
REAL = (Guard("lookup, answers that repeat the prompt", OURS, 1.1),)


def measure(endpoint: str, questions: Sequence[Question], tokens_max: int) -> tuple[float, bool]:
    """Speed over target-only, and whether all ids were the same; sides take turns."""
    seconds = {False: 0.0, True: 0.0}
    same = True
    with Client(endpoint) as client:
        sides = [Ours(str(on), client, speculation=on) for on in (False, True)]
        chats = [[("user", question.turns[0])] for question in questions]
        # The first warms up.
        for number, chat in enumerate([chats[0], *chats]):
            salts = (f"{number}-plain", f"{number}-speculated")
            plain, speculated = (
                side.answer(chat, tokens_max, 0.0, 1, salt)
                for side, salt in zip(sides, salts, strict=True)
            )
            if number:
                seconds[False] += plain.wall_s
                seconds[True] += speculated.wall_s
                same &= plain.token_ids == speculated.token_ids
    return seconds[False] / seconds[True], same


def check(
    config: FleetConfig,
    guards: Sequence[Guard],
    questions: Sequence[Question],
    tokens_max: int,
    console: Console,
) -> Iterator[Check]:
    """Start a fleet and check the guards over it; equal ids count as a ratio of 1."""
    with spec_fleet(config, console) as endpoints:
        for guard in guards:
            yield from _attempts(guard, endpoints, questions, tokens_max)


def _attempts(
    guard: Guard, endpoints: Mapping[str, str], questions: Sequence[Question], tokens_max: int
) -> Iterator[Check]:
    best, same = 0.0, True
    for _ in range(_ATTEMPTS):
        ratio, alike = measure(endpoints[guard.contender], questions, tokens_max)
        best, same = max(best, ratio), same and alike
        if best >= guard.threshold:
            break
    yield Check(guard.name, guard.threshold, best)
    yield Check(f"{guard.name}: same ids", 1.0, float(same))


def synthetic(tokens_max: int, console: Console, log_dir: Path) -> Iterator[Check]:
    """The checks with synthetic models."""
    drafters = tuple(DrafterSpec("language-model", model) for model in (_GOOD, _USELESS))
    config = FleetConfig(_TARGET, "float32", "cpu", drafters, True, DEFAULT_CACHE, log_dir)
    questions = [Question(number, "qa", (f"Question {number}?",)) for number in range(2)]
    return check(config, SYNTHETIC, questions, tokens_max, console)


def real(tokens_max: int, console: Console, log_dir: Path, cache_dir: Path) -> Iterator[Check]:
    """The checks with SmolLM2-135M, which is fetched if need be."""
    wanted = ("summarization", "rag")
    questions = [q for q in read_questions(QUESTIONS) if q.sub_task in wanted]
    config = FleetConfig(
        "smollm2", "float32", "cpu", (DrafterSpec("lookup"),), False, cache_dir, log_dir
    )
    return check(config, REAL, questions, tokens_max, console)


@click.command()
@click.option("--real/--no-real", "with_real", default=True, show_default=True)
@click.option("--max-tokens", type=click.IntRange(8, 512), default=64, show_default=True)
@click.option("--cache-dir", type=click.Path(path_type=Path), default=DEFAULT_CACHE)
def main(with_real: bool, max_tokens: int, cache_dir: Path) -> None:
    """Check that speculation still pays."""
    console = Console()
    folder = Path(tempfile.mkdtemp(prefix="outrider-smoke-"))
    checks = list(synthetic(max_tokens, console, folder / "synthetic"))
    if with_real:
        checks += real(max_tokens, console, folder / "real", cache_dir)
    for one in checks:
        verdict = "ok" if one.passed else "TOO LOW"
        console.print(f"{one.name}: {one.ratio:.2f}, at least {one.threshold:.2f}: {verdict}")
    passed = sum(one.passed for one in checks)
    good = next(one.ratio for one in checks)
    print(f"result: bench-smoke passed={passed}/{len(checks)} good_drafter={good:.2f}")
    sys.exit(0 if passed == len(checks) else 1)


if __name__ == "__main__":
    main()
