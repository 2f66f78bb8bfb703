"""Target-only throughput beside other engines, and the time to the first token."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from bench.engine_driver import EngineDriver
from bench.peers.process import PeerError
from bench.rates import Run
from bench.texts import Texts

PROMPT_TOKENS = 300
SESSIONS = (1, 4, 16)
PREFIX_TOKENS = 1_000
_TAIL_TOKENS = 16

Generate = Callable[[Sequence[Sequence[int]], int], Run]


@dataclass(slots=True)
class Rates:
    """One contender's output tokens a second, repeat by repeat, and its last ids."""

    decode: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)
    ids: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Throughput:
    """All contenders at one number of sessions."""

    sessions: int
    rates: Mapping[str, Rates]

    def decode(self, name: str) -> float | None:
        """Median decode throughput, or None if the contender has none."""
        rates = self.rates.get(name)
        return statistics.median(rates.decode) if rates is not None and rates.decode else None

    def total(self, name: str) -> float | None:
        """Median throughput, prefill included."""
        rates = self.rates.get(name)
        return statistics.median(rates.total) if rates is not None and rates.total else None

    def agreement(self, name: str, with_name: str) -> float | None:
        """Share of sessions in which two contenders gave the same ids."""
        pair = [self.rates[key].ids for key in (name, with_name) if key in self.rates]
        if len(pair) < 2 or not all(pair):
            return None
        return statistics.fmean(mine == theirs for mine, theirs in zip(*pair, strict=True))


def measure_throughput(
    contenders: Mapping[str, Generate],
    texts: Texts,
    tokens: int,
    repeats: int,
    advance: Callable[[str], None],
    failed: Callable[[str, str], None],
) -> list[Throughput]:
    """Let the contenders decode the same prompts in turn; one that fails is left out after that.

    `advance` hears what comes next, `failed` who failed and why.
    """
    alive = dict(contenders)
    results = []
    for sessions in SESSIONS:
        prompts = [texts.take(index, PROMPT_TOKENS) for index in range(sessions)]
        rates = {name: Rates() for name in alive}
        # The first round warms up (compilation, allocation) and is short.
        for number in range(-1, repeats):
            names = list(alive)
            turn = max(0, number) % len(names)
            for name in names[turn:] + names[:turn]:
                advance(f"{sessions} sessions, {name}")
                try:
                    run = alive[name](prompts, tokens if number >= 0 else 2)
                    if number >= 0:
                        rates[name].decode.append(run.decode_rate)
                        rates[name].total.append(run.total_rate)
                        rates[name].ids = run.ids
                except (PeerError, ValueError) as error:
                    failed(name, f"{sessions} sessions: {error}")
                    del alive[name]
                    rates[name] = Rates()
        results.append(Throughput(sessions, rates))
    return results


@dataclass(frozen=True, slots=True)
class PrefixResult:
    """Seconds to the first token of a prompt that starts with a thousand tokens."""

    cold_s: tuple[float, ...]
    hit_s: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Median without over median with a hit."""
        return statistics.median(self.cold_s) / statistics.median(self.hit_s)


def measure_prefix(
    driver: EngineDriver, texts: Texts, repeats: int, advance: Callable[[], None]
) -> PrefixResult:
    """Open a prompt under a fresh salt, then another with the same prefix and another tail."""
    prefix = texts.take(0, PREFIX_TOKENS)
    cold: list[float] = []
    hit: list[float] = []
    for number in range(repeats):
        for seconds, tail in ((cold, 3), (hit, 7)):
            prompt = (*prefix, *texts.take(tail, _TAIL_TOKENS))
            # Two tokens: with one, ending the session would be part of the first token's step.
            session = driver.open(prompt, 2, f"prefix-{number}")
            driver.wait_finished([session])
            trace = driver.trace(session)
            seconds.append(trace.commits[0][0] - trace.opened_s)
            advance()
    return PrefixResult(tuple(cold), tuple(hit))
