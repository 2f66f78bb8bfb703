"""Figures of the load benchmark: what requests at a rate came to. Pure but for reading."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from bench.machine import Origin
from bench.spec.report import table
from outrider.errors import ConfigError

TARGET_ONLY = "target-only"
SPECULATED = "outrider"
SIDES = (TARGET_ONLY, SPECULATED)


@dataclass(frozen=True, slots=True)
class Served:
    """One request; seconds from when it was due to arrive, whether or not it was sent then."""

    first_token_s: float
    total_s: float
    tokens: int

    @property
    def per_token_s(self) -> float:
        """Mean time of a token after the first."""
        return (self.total_s - self.first_token_s) / max(1, self.tokens - 1)


@dataclass(frozen=True, slots=True)
class Goal:
    """What a request must keep to count as good."""

    first_token_s: float
    per_token_s: float

    def met(self, request: Served) -> bool:
        """Tell whether a request did."""
        return (
            request.first_token_s <= self.first_token_s and request.per_token_s <= self.per_token_s
        )


@dataclass(frozen=True, slots=True)
class Run:
    """All requests of one side at one rate."""

    side: str
    rate: float
    """Requests a second, as asked for."""
    seconds: float
    """From the first arrival to the last token."""
    requests: tuple[Served, ...]

    @property
    def tokens_per_s(self) -> float:
        """Output tokens over all of the time."""
        return sum(request.tokens for request in self.requests) / self.seconds

    def goodput(self, goal: Goal) -> float:
        """Good requests a second."""
        return sum(map(goal.met, self.requests)) / self.seconds


@dataclass(frozen=True, slots=True)
class LoadResults:
    """All runs, in the order in which they were measured."""

    origin: Origin
    setting: Mapping[str, Any]
    goal: Goal
    runs: tuple[Run, ...] = ()

    @property
    def rates(self) -> list[float]:
        """Those that both sides were measured at, ascending."""
        sides = [{run.rate for run in self.runs if run.side == side} for side in SIDES]
        return sorted(set.intersection(*sides))

    def of(self, side: str, rate: float) -> list[Run]:
        """The repeats of a side at a rate."""
        return [run for run in self.runs if (run.side, run.rate) == (side, rate)]

    def tokens_per_s(self, side: str, rate: float) -> float:
        """Median of the repeats."""
        return statistics.median(run.tokens_per_s for run in self.of(side, rate))

    def goodput(self, side: str, rate: float) -> float:
        """Median of the repeats, in requests a second."""
        return statistics.median(run.goodput(self.goal) for run in self.of(side, rate))

    def percentile(self, side: str, rate: float, field: str, share: float) -> float:
        """Nearest-rank percentile over all requests of the repeats."""
        values = sorted(
            getattr(request, field) for run in self.of(side, rate) for request in run.requests
        )
        return float(values[min(len(values) - 1, int(share * len(values)))])

    def ratio(self, rate: float) -> float:
        """Speculated over target-only tokens a second: median over pairs of the same arrivals."""
        pairs = zip(self.of(SPECULATED, rate), self.of(TARGET_ONLY, rate), strict=False)
        return statistics.median(ours.tokens_per_s / plain.tokens_per_s for ours, plain in pairs)


_ADAPTER = TypeAdapter(LoadResults)


def write_load(results: LoadResults, path: Path) -> None:
    """Write them as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"benchmark": "load", "synthetic": False, **asdict(results)}
    path.write_text(json.dumps(record) + "\n")


def read_load(path: Path) -> LoadResults:
    """Read what `write_load` wrote. Raises `ConfigError`."""
    try:
        return _ADAPTER.validate_python(json.loads(path.read_text()))
    except (OSError, ValueError, ValidationError) as error:
        raise ConfigError(f"{path} holds no results of this version: {error}") from error


def markdown(results: LoadResults) -> str:
    """A table, two lines a rate."""
    goal = results.goal
    head = (
        f"Poisson arrivals, {results.setting['concurrency']} requests at once at most, greedy."
        f" Latencies count from the arrival. Good is a request whose first token comes within"
        f" {goal.first_token_s:g} s and whose others take {1e3 * goal.per_token_s:g} ms at most in"
        " the mean.\n"
    )
    header = (
        *("requests/s", "", "tokens/s", "ratio", "first token p50, p95, s"),
        *("a token p50, p95, ms", "all p50, p95, s", "good/s"),
    )
    return f"{head}\n" + table(
        header, [_cells(results, rate, side) for rate in results.rates for side in SIDES]
    )


def result_line(results: LoadResults) -> str:
    """The line that scripts read."""
    rates = results.rates
    if not rates:
        return "result: load min_ratio=na saturation_ratio=na goodput_ratio=na"
    best = {side: max(results.goodput(side, rate) for rate in rates) for side in SIDES}
    gain = best[SPECULATED] / best[TARGET_ONLY] if best[TARGET_ONLY] else None
    peaks = {side: max(results.tokens_per_s(side, rate) for rate in rates) for side in SIDES}
    return (
        f"result: load min_ratio={min(map(results.ratio, rates)):.3f}"
        f" saturation_ratio={peaks[SPECULATED] / peaks[TARGET_ONLY]:.3f}"
        f" goodput_ratio={'na' if gain is None else f'{gain:.2f}'}"
        f" tokens_per_s={peaks[SPECULATED]:.1f}"
    )


def _cells(results: LoadResults, rate: float, side: str) -> Sequence[str]:
    def pair(field: str, scale: float, digits: int) -> str:
        values = (scale * results.percentile(side, rate, field, share) for share in (0.5, 0.95))
        return ", ".join(f"{value:.{digits}f}" for value in values)

    return (
        f"{rate:g}" if side == TARGET_ONLY else "",
        side,
        f"{results.tokens_per_s(side, rate):.1f}",
        "" if side == TARGET_ONLY else f"{results.ratio(rate):.3f}",
        pair("first_token_s", 1, 2),
        pair("per_token_s", 1e3, 0),
        pair("total_s", 1, 2),
        f"{results.goodput(side, rate):.2f}",
    )
