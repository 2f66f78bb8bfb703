"""What the benchmark of drafters measured, and what it says of it. Pure."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from bench.calibrated import Decile, worst
from bench.coupling import Coupling
from bench.sharing import Sharing

TARGET_ONLY = "target"
COUNT_MIN = 200
"""Guesses of a decile, fewer of which say nothing."""
DEPTHS = 8


@dataclass(frozen=True, slots=True)
class Run:
    """One prompt, decoded once."""

    contender: str
    category: str
    prompt: int
    temperature: float
    tokens: int
    """After the first commit, which no drafter could help with."""
    decode_s: float
    accepted: tuple[int, ...]
    """Guesses accepted, step by step; the last step, which may be cut, is left out."""
    draft_ms: float
    """Mean of a growing step; for a lookup, of what it does about a commit."""


@dataclass(frozen=True, slots=True)
class Tau:
    """What proposers guessed of a text that was known."""

    contender: str
    category: str
    temperature: float
    accepted: tuple[int, ...]
    """As in `Run`."""


@dataclass(frozen=True, slots=True)
class Line:
    """A contender in a category at a temperature."""

    contender: str
    category: str
    temperature: float
    runs: int
    tokens_per_s: float
    tau: float
    by_depth: tuple[float | None, ...]
    """Share of steps in which a guess was accepted at depth 1, 2, ..., of those in which one was
    at the depth before; None where there are none."""
    draft_ms: float


@dataclass(frozen=True, slots=True)
class Calibrated:
    """Claims of a proposer at a temperature."""

    proposer: str
    temperature: float
    deciles: tuple[Decile, ...]
    learnt: bool = False
    """The proposer had guessed for the other half of the texts before. Otherwise it began with
    nothing, and the claims by which it learnt are among those that are counted."""

    @property
    def worst(self) -> float | None:
        """How far the worst decile is off."""
        return worst(self.deciles, COUNT_MIN)


@dataclass(frozen=True, slots=True)
class Ahead:
    """Drafting ahead with synthetic models."""

    agree: str
    verify_ms: float
    draft_ms: float
    steps: int
    tau: float
    ready: float
    """Share of verify steps that began with guesses below the tip."""
    ready_on_path: float
    """The same, of steps after one that decided nothing but what had been guessed: of all others
    nothing can be ready."""


@dataclass(slots=True)
class Results:
    """What was measured; a part that was not asked for stays as it was."""

    runs: list[Run] = field(default_factory=list)
    taus: list[Tau] = field(default_factory=list)
    couplings: dict[str, Coupling] = field(default_factory=dict)
    """By pair of models."""
    calibrated: list[Calibrated] = field(default_factory=list)
    ahead: list[Ahead] = field(default_factory=list)
    sharing: Sharing | None = None
    unavailable: dict[str, str] = field(default_factory=dict)
    """Why a contender has no numbers."""
    times: dict[str, str] = field(default_factory=dict)
    """When each part was measured."""


def lines(runs: Iterable[Run]) -> list[Line]:
    """Sum up by temperature, category and contender, in the order in which they come."""
    groups: dict[tuple[float, str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.temperature, run.category, run.contender), []).append(run)
    order = {category: at for at, (_, category, _) in enumerate(groups)}
    ranked = sorted(groups.items(), key=lambda item: (item[0][0], order[item[0][1]]))
    return [_line(group) for _, group in ranked]


def _line(runs: Sequence[Run]) -> Line:
    accepted = [count for run in runs for count in run.accepted]
    return Line(
        contender=runs[0].contender,
        category=runs[0].category,
        temperature=runs[0].temperature,
        runs=len(runs),
        tokens_per_s=sum(run.tokens for run in runs) / sum(run.decode_s for run in runs),
        tau=1.0 + statistics.fmean(accepted) if accepted else math.nan,
        by_depth=acceptance_by_depth(accepted),
        draft_ms=statistics.fmean(run.draft_ms for run in runs),
    )


def acceptance_by_depth(accepted: Sequence[int]) -> tuple[float | None, ...]:
    """See `Line.by_depth`; `accepted` has the guesses accepted in each step."""
    reached = [sum(count >= depth for count in accepted) for depth in range(DEPTHS + 1)]
    return tuple(
        deeper / before if before else None for before, deeper in itertools.pairwise(reached)
    )


Taus = Mapping[tuple[str, float, str], float]
"""By category, temperature and contender."""


def taus_of(results: Results) -> Taus:
    """Return tau over known texts, or else as it was with the clock running."""
    if not results.taus:
        return {(x.category, x.temperature, x.contender): x.tau for x in lines(results.runs)}
    groups: dict[tuple[str, float, str], list[int]] = {}
    for one in results.taus:
        key = (one.category, one.temperature, one.contender)
        groups.setdefault(key, []).extend(one.accepted)
    return {key: 1.0 + statistics.fmean(sizes) for key, sizes in groups.items() if sizes}


def union_gains(taus: Taus) -> dict[str, float]:
    """By category and temperature: tau of the union over the better of the two that it unites."""
    gains = {}
    for category, temperature, contender in taus:
        parts = [taus.get((category, temperature, name)) for name in ("lookup", "model")]
        if contender == "union" and all(part is not None for part in parts):
            best = max(part for part in parts if part is not None)
            gains[f"{category} at {temperature:g}"] = taus[category, temperature, "union"] / best
    return gains


_HEADER = ("T", "category", "contender", "tokens/s", "speed-up", "tau", "draft ms")


def markdown(results: Results) -> str:
    """Tables of everything that was measured."""
    parts: list[str] = []
    found = lines(results.runs)
    if found:
        plain = {
            (line.temperature, line.category): line.tokens_per_s
            for line in found
            if line.contender == TARGET_ONLY
        }
        depths = tuple(f"d{depth}" for depth in range(1, DEPTHS + 1))
        rows = [_cells(line, plain.get((line.temperature, line.category))) for line in found]
        parts.append(_table((*_HEADER, *depths), rows))
    if results.taus:
        parts.append("Known texts\n\n" + _tau_table(results))
    if results.couplings:
        rows = [
            (pair, *(f"{share:.4f}" for share in (c.measured, c.exact, c.independent, c.rejection)))
            for pair, c in results.couplings.items()
        ]
        parts.append(_table(("coupling", "measured", "exact", "independent", "1 - TV"), rows))
    if results.calibrated:
        claims = [
            (
                one.proposer,
                f"{one.temperature:g}",
                "the other texts" if one.learnt else "nothing",
                f"0.{decile.tenth}",
                str(decile.count),
                f"{decile.claimed:.3f}",
                f"{decile.observed:.3f}",
            )
            for one in results.calibrated
            for decile in one.deciles
        ]
        names = ("claims", "T", "learnt from", "from", "guesses", "claimed", "observed")
        parts.append(_table(names, claims))
    if results.ahead:
        rows = [
            (
                one.agree,
                f"{one.verify_ms:g}",
                f"{one.draft_ms:.2f}",
                f"{one.tau:.2f}",
                f"{one.ready_on_path:.3f}",
                f"{one.ready:.3f}",
            )
            for one in results.ahead
        ]
        header = ("agreement", "verify ms", "draft ms", "tau", "ready below a path", "ready")
        parts.append("Synthetic models\n\n" + _table(header, rows))
    if results.sharing is not None:
        parts.append(_sharing(results.sharing))
    for name, why in results.unavailable.items():
        parts.append(f"na: {name}: {why}\n")
    return "\n".join(parts)


def _tau_table(results: Results) -> str:
    taus = taus_of(results)
    contenders = list(dict.fromkeys(one.contender for one in results.taus))
    places = dict.fromkeys((temperature, category) for category, temperature, _ in taus)
    rows = [
        (
            f"{temperature:g}",
            category,
            *(
                "-" if (tau := taus.get((category, temperature, name))) is None else f"{tau:.2f}"
                for name in contenders
            ),
        )
        for temperature, category in places
    ]
    return _table(("T", "category", *(f"tau of {name}" for name in contenders)), rows)


def _cells(line: Line, plain: float | None) -> tuple[str, ...]:
    return (
        f"{line.temperature:g}",
        line.category,
        line.contender,
        f"{line.tokens_per_s:.1f}",
        "-" if plain is None else f"{line.tokens_per_s / plain:.2f}",
        f"{line.tau:.2f}",
        f"{line.draft_ms:.2f}",
        *("-" if share is None else f"{share:.2f}" for share in line.by_depth),
    )


def _sharing(sharing: Sharing) -> str:
    rows = [
        ("best first", str(sharing.accepted), f"{sharing.least:.2f}"),
        ("in turn", str(sharing.accepted_in_turn), f"{sharing.least_in_turn:.2f}"),
    ]
    header = ("order", f"guesses accepted, {sharing.sessions} sessions", "least a session and step")
    shares = [
        (name, f"{wanted:.3f}", f"{had:.3f}") for name, (wanted, had) in sharing.shares.items()
    ]
    return _table(header, rows) + "\n" + _table(("tenant", "share", "leaves"), shares)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, ("---",) * len(header), *rows))


def result_line(results: Results) -> str:
    """The last line, for scripts; what was not measured is `na`."""
    taus = taus_of(results)
    gains = union_gains(taus)
    real = next(iter(results.couplings.values()), None)
    ahead = results.ahead[0].ready_on_path if results.ahead else None
    figures = {
        "lookup_tau_summarization": taus.get(("summarization", 0.0, "lookup")),
        "lookup_tau_rag": taus.get(("rag", 0.0, "lookup")),
        "model_tau_writing": taus.get(("writing", 0.0, "model")),
        "union_worst_gain": min(gains.values(), default=None),
        "coupling_gap": None if real is None else real.gap,
        "ahead_ready": ahead,
        "claims_off": max(
            (one.worst for one in results.calibrated if one.learnt and one.worst is not None),
            default=None,
        ),
    }
    said = (
        f"{name}={'na' if value is None else format(value, '.3f')}"
        for name, value in figures.items()
    )
    return f"result: drafters {' '.join(said)}"
