"""What the chaos runs say at the end: pieces that add up to one report."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos.faults import Done
from tests.chaos.history import Heard, faults_of
from tests.chaos.load import Outcomes
from tests.chaos.witness import Seen
from tests.chaos.worker_history import Decided, faults_of_workers, held_twice

ON_ITS_WAY_S = 0.05
"""What a dead verifier had sent may still arrive for so long."""
_EXAMPLES_MAX = 10


@dataclass(frozen=True, slots=True)
class Piece:
    """What one run found; of several with the same number the last one counts."""

    number: int
    """Its seed, too."""
    settings: Mapping[str, Any]
    duration_s: float
    counts: Mapping[str, int]
    in_flight: Mapping[str, int]
    died: Mapping[str, int]
    generations: int
    mismatches: int
    """Generations that did not end with the ids of their undisturbed run."""
    lost: int
    doubled: int
    contradictions: int
    """In what clients heard."""
    worker_commits: int
    worker_contradictions: int
    """In what verifiers committed."""
    held_twice: int
    """Epochs that two verifiers held; see `worker_history.held_twice`."""
    takeovers: int
    """Generations resumed elsewhere while their old streams were listened to."""
    positions: int
    """Ids that were compared."""
    ties: int
    deliveries: int
    moves_s: Sequence[float] = ()
    """From each death of a verifier until all of its generations were heard again."""
    gaps_s: Sequence[float] = ()
    """Longest silence of each generation."""
    hits_back_s: Sequence[float] = ()
    hits_lost: int = 0
    examples: Sequence[str] = field(default_factory=tuple)
    """Of what was wrong."""

    @property
    def good(self) -> bool:
        """True if nothing was wrong."""
        wrong = self.mismatches, self.lost, self.doubled, self.contradictions
        return not any((*wrong, self.worker_contradictions, self.hits_lost))


def piece_of(
    number: int,
    settings: Mapping[str, Any],
    duration_s: float,
    done: Done,
    outcomes: Outcomes,
    seen: Seen,
    *,
    decided: Sequence[Decided],
) -> Piece:
    """Judge a run."""
    contradictions = faults_of([*outcomes.history, *seen.history])
    worker_faults = faults_of_workers(decided)
    tally = outcomes.tally
    wrong = [*tally.faults, *outcomes.errors, *seen.wrong, *seen.lost, *contradictions]
    return Piece(
        number=number,
        settings=settings,
        duration_s=round(duration_s, 1),
        # As what JSON gives back.
        counts=dict(done.counts),
        in_flight=dict(done.in_flight),
        died=dict(done.died),
        generations=outcomes.generations + seen.generations,
        mismatches=outcomes.mismatches + len(seen.wrong),
        lost=outcomes.lost + len(seen.lost),
        doubled=outcomes.doubled,
        contradictions=len(contradictions),
        worker_commits=len(decided),
        worker_contradictions=len(worker_faults),
        held_twice=held_twice(decided),
        takeovers=seen.takeovers,
        positions=tally.positions,
        ties=tally.ties,
        deliveries=len(outcomes.history) + len(seen.history),
        moves_s=_rounded(moves_s(done.verifier_deaths_s, outcomes.history)),
        gaps_s=_rounded(outcomes.gaps_s),
        hits_back_s=_rounded(done.hits_back_s),
        hits_lost=len(done.hits_lost),
        examples=[*wrong, *worker_faults, *done.hits_lost][:_EXAMPLES_MAX],
    )


def _rounded(times_s: Iterable[float]) -> list[float]:
    return [round(time_s, 3) for time_s in times_s]


def moves_s(deaths_s: Sequence[float], history: Iterable[Heard]) -> list[float]:
    """For each death of a verifier the time until the last of its generations was heard again.

    Whose it was is not known here: it is the generation that was silent for longest.
    """
    times: dict[str, list[float]] = defaultdict(list)
    for heard in history:
        times[heard.generation].append(heard.at_s)
    moves: list[float] = []
    for death_s in deaths_s:
        silences = [
            next((at_s - death_s for at_s in ats if at_s > death_s + ON_ITS_WAY_S), 0.0)
            for ats in times.values()
            if ats[0] < death_s < ats[-1]
        ]
        moves += [max(silences)] if silences else []
    return moves


def quantile(values: Sequence[float], share: float) -> float:
    """Return a quantile, NaN of nothing."""
    if not values:
        return float("nan")
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


class Store:
    """The pieces and the other parts' results, in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        found = json.loads(path.read_text()) if path.exists() else {}
        self.pieces: dict[int, Piece] = {
            one["number"]: Piece(**one) for one in found.get("pieces", [])
        }
        self.lines: dict[str, list[str]] = found.get("lines", {})
        """`result:` lines of other parts."""

    def add(self, piece: Piece) -> None:
        """Keep a piece."""
        self.pieces[piece.number] = piece
        self._write()

    def put(self, part: str, lines: list[str]) -> None:
        """Keep what another part says."""
        self.lines[part] = lines
        self._write()

    def _write(self) -> None:
        pieces = [asdict(piece) for _, piece in sorted(self.pieces.items())]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        found = {"pieces": pieces, "lines": self.lines}
        self._path.write_text(json.dumps(found, indent=2) + "\n")
        self._path.with_suffix(".md").write_text("\n".join(markdown(self)) + "\n")


def lines(pieces: Sequence[Piece]) -> list[str]:
    """Say it for people, and at last for scripts."""
    moves = [move for piece in pieces for move in piece.moves_s]
    gaps = [gap for piece in pieces for gap in piece.gaps_s]
    hits = [back for piece in pieces for back in piece.hits_back_s]
    contradictions = _sum(pieces, "contradictions") + _sum(pieces, "worker_contradictions")
    died = _counter(pieces, "died")
    return [
        f"{len(pieces)} pieces, {_sum(pieces, 'duration_s') / 60:.1f} minutes",
        "incarnations that died with generations in flight: "
        + ", ".join(f"{count} {role}" for role, count in sorted(died.items())),
        f"ids compared: {_sum(pieces, 'positions')}, near-ties {_sum(pieces, 'ties')}",
        f"heard by clients: {_sum(pieces, 'deliveries')} deliveries, "
        f"{_sum(pieces, 'contradictions')} contradictions; committed by verifiers: "
        f"{_sum(pieces, 'worker_commits')}, {_sum(pieces, 'worker_contradictions')} contradictions"
        f", {_sum(pieces, 'held_twice')} epochs held twice",
        f"taken over while the old stream was listened to: {_sum(pieces, 'takeovers')}",
        f"longest silence of a generation: p50 {quantile(gaps, 0.5):.2f} s, "
        f"p99 {quantile(gaps, 0.99):.2f} s",
        f"first token after a verifier's death: p50 {quantile(moves, 0.5):.2f} s, "
        f"worst {max(moves, default=float('nan')):.2f} s of {len(moves)}",
        f"prefix hits after a fault of Redis: back after p50 {quantile(hits, 0.5):.2f} s, worst "
        f"{max(hits, default=float('nan')):.2f} s of {len(hits)}; "
        f"{_sum(pieces, 'hits_lost')} times never",
        *[example for piece in pieces for example in piece.examples],
        f"result: chaos faults={_counter(pieces, 'counts').total()} "
        f"generations={_sum(pieces, 'generations')} "
        f"mismatches={_sum(pieces, 'mismatches') + contradictions} "
        f"lost={_sum(pieces, 'lost')} doubled={_sum(pieces, 'doubled')} "
        f"ttft_after_death_s={quantile(moves, 0.5):.2f} "
        f"ttft_after_death_max_s={max(moves, default=float('nan')):.2f} "
        f"died_in_flight={died.total()} hits_back_max_s={max(hits, default=float('nan')):.2f}",
    ]


def table(pieces: Sequence[Piece]) -> list[str]:
    """Faults by kind, as Markdown."""
    counts, in_flight = _counter(pieces, "counts"), _counter(pieces, "in_flight")
    return [
        "| fault | times | with generations in flight |",
        "|---|---|---|",
        *(f"| {name} | {count} | {in_flight[name]} |" for name, count in sorted(counts.items())),
    ]


def markdown(store: Store) -> list[str]:
    """The whole report."""
    pieces = [piece for _, piece in sorted(store.pieces.items())]
    said = ["# Faults at random moments", ""]
    if pieces:
        said += [*table(pieces), "", *(f"- {line}" for line in lines(pieces)[:-1]), ""]
    return [*said, "```", *results(store), "```"]


def results(store: Store) -> list[str]:
    """Lines for scripts, the most important ones last."""
    chaos = lines([piece for _, piece in sorted(store.pieces.items())])[-1:] if store.pieces else []
    named = {"overload": store.lines.get("overload", []), "chaos": chaos}
    return [
        *named["overload"],
        *named["chaos"],
        *store.lines.get("placement", []),
        *store.lines.get("redis", []),
    ]


def _sum(pieces: Sequence[Piece], name: str) -> Any:
    return sum(getattr(piece, name) for piece in pieces)


def _counter(pieces: Sequence[Piece], name: str) -> Counter[str]:
    total: Counter[str] = Counter()
    for piece in pieces:
        total.update(getattr(piece, name))
    return total
