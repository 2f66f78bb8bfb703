"""What the chaos runs say at the end."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from tests.chaos.faults import Done
from tests.chaos.history import Heard, faults_of
from tests.chaos.load import Outcomes

ON_ITS_WAY_S = 0.05
"""What a dead verifier had sent may still arrive for so long."""


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


def lines(done: Done, outcomes: Outcomes) -> list[str]:
    """Say it for people, and at last for scripts."""
    counts = ", ".join(f"{count} x {name}" for name, count in sorted(done.counts.items()))
    faults = faults_of(outcomes.history)
    moves = moves_s(done.verifier_deaths_s, outcomes.history)
    tally = outcomes.tally
    return [
        f"faults: {counts}; {done.with_work} while generations were under way",
        f"positions compared: {tally.positions}, near-ties {tally.ties}, taken {tally.flips}",
        f"longest silence of a generation: p50 {quantile(outcomes.gaps_s, 0.5):.2f} s, "
        f"p99 {quantile(outcomes.gaps_s, 0.99):.2f} s",
        f"first token after a verifier's death: p50 {quantile(moves, 0.5):.2f} s, "
        f"worst {max(moves, default=float('nan')):.2f} s of {len(moves)}",
        f"history: {len(outcomes.history)} deliveries, {len(faults)} contradictions",
        *faults[:10],
        *outcomes.errors[:10],
        *tally.faults[:5],
        f"result: chaos faults={done.counts.total()} generations={outcomes.generations} "
        f"mismatches={outcomes.mismatches + len(faults)} lost={outcomes.lost} "
        f"doubled={outcomes.doubled} ttft_after_death_s={quantile(moves, 0.5):.2f}",
    ]
