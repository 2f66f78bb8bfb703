"""`python -m tests.chaos.run`: faults at random moments under load, and a report.

    make chaos                                        # all of it: about 20 minutes on two cores
    make chaos CHAOS_ARGS="--parts faults --piece 3"  # one of the pieces that add up to it
    make chaos CHAOS_ARGS="--parts ''"                # what there is so far

Each piece has a fleet and a seed of its own and is kept in `bench/results/chaos.json`; measured
again, it replaces what was there.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from tests.chaos.cluster import Cluster, ClusterConfig
from tests.chaos.costs import measure_journal, measure_placement
from tests.chaos.faults import Havoc, Pauses, plan
from tests.chaos.load import Load, cases, expectations
from tests.chaos.overload import overload
from tests.chaos.probe import HitProbe
from tests.chaos.report import Piece, Store, lines, piece_of, results, table
from tests.chaos.witness import Witnesses
from tests.chaos.worker_history import decided_in
from tests.support.reference import Case, Expected

RESULTS = Path("bench") / "results"
PARTS = ("faults", "overload", "placement", "redis")
PIECES = 10
LONG_STOPS = {3, 8}
"""Pieces in which Redis is stopped for a minute."""
WITNESSES = 4
"""Of the clients: those that never let go of a stream."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is done in a piece."""

    each: int = 2
    """Times of each deed to each role."""
    clients: int = 32
    """Generations at any time, greedy and sampled in turn."""
    tokens: int = 160
    long_stops: int = 0
    redis_deeds: bool = True
    """Redis is flushed, filled and restarted, too."""
    witnesses: int = WITNESSES


async def chaos(
    cluster: Cluster,
    pairs: Sequence[tuple[Case, Expected]],
    scale: Scale,
    *,
    number: int,
    pauses: Pauses | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Piece:
    """Generate these cases while faults happen; returns when all of both have ended."""
    load = Load(cluster.endpoints, pairs, scale.clients - scale.witnesses, number)
    witnesses = Witnesses(cluster.endpoints, pairs, scale.witnesses, number)
    async with contextlib.aclosing(HitProbe(cluster.endpoints, number)) as probe:
        started_s = time.monotonic()
        load.start()
        witnesses.start()
        havoc = Havoc(cluster, load, probe, number, pauses or Pauses(), say)
        faults = plan(
            scale.each, number, long_stops=scale.long_stops, redis_deeds=scale.redis_deeds
        )
        done = await havoc.carry_out(faults)
        outcomes, seen = await asyncio.gather(load.stop(), witnesses.stop())
    decided = [
        commit
        for node in cluster.of("verifier")
        for commit in decided_in(
            node.name, (cluster.log_dir / f"{node.name}.log").read_text().splitlines()
        )
    ]
    return piece_of(
        number,
        asdict(scale),
        time.monotonic() - started_s,
        done,
        outcomes,
        seen,
        decided=decided,
    )


def _piece(number: int, scale: Scale, folder: Path) -> Piece:
    config = ClusterConfig(
        folder,
        verifiers=3,
        drafters=2,
        orchestrators=3,
        orchestrator_options=("--worker-timeout", "2"),
    )
    click.echo(f"piece {number}: a fleet starts; its logs are in {folder / 'logs'}")
    pairs = expectations(cases(8, scale.tokens))
    with Cluster(config) as cluster:
        begun_s = time.monotonic()

        def say(line: str) -> None:
            click.echo(f"piece {number}, {time.monotonic() - begun_s:5.1f} s: {line}")

        return asyncio.run(chaos(cluster, pairs, scale, number=number, say=say))


def _overload(folder: Path) -> list[str]:
    capacity = 8
    config = ClusterConfig(
        folder,
        verifiers=1,
        drafters=0,
        orchestrators=1,
        orchestrator_options=("--sessions-max", str(capacity)),
    )
    with Cluster(config) as cluster:
        pids = cluster.pids("orchestrator", "verifier")
        verdict = asyncio.run(overload(cluster.endpoints[0], capacity, 5.0, 4, pids))
    return [verdict.line()]


@click.command()
@click.option("--parts", default=",".join(PARTS), show_default=True, help="Some of them, or none.")
@click.option("--pieces", default=PIECES, show_default=True, help="That the faults consist of.")
@click.option("--piece", "only", type=int, multiple=True, help="Only these of them, from 1.")
@click.option("--each", default=2, show_default=True, help="Times of each deed in a piece.")
@click.option("--clients", default=32, show_default=True, help="Generations at any time.")
@click.option("--tokens", default=160, show_default=True, help="Output tokens of a generation.")
@click.option("--folder", type=click.Path(path_type=Path), help="For logs.  [default: temporary]")
@click.option("--results-dir", type=click.Path(path_type=Path, file_okay=False), default=RESULTS)
def main(
    parts: str,
    pieces: int,
    only: tuple[int, ...],
    each: int,
    clients: int,
    tokens: int,
    folder: Path | None,
    results_dir: Path,
) -> None:
    """Break a fleet of processes in every way that it should survive."""
    chosen = {part.strip() for part in parts.split(",") if part.strip()}
    if not chosen <= set(PARTS):
        raise click.BadParameter(f"there are {', '.join(PARTS)}", param_hint="--parts")
    folder = folder or Path(tempfile.mkdtemp(prefix="outrider-chaos-"))
    store, good = Store(results_dir / "chaos.json"), True
    for number in only or range(1, pieces + 1) if "faults" in chosen else ():
        scale = Scale(each, clients, tokens, long_stops=int(number in LONG_STOPS))
        piece = _piece(number, scale, folder / f"piece-{number}")
        store.add(piece)
        good &= piece.good
        click.echo("\n".join(lines([piece])))
    if "overload" in chosen:
        store.put("overload", _overload(folder / "overload"))
    if "placement" in chosen:
        store.put("placement", measure_placement(results_dir))
    if "redis" in chosen:
        store.put("redis", measure_journal(results_dir))
    all_pieces = [piece for _, piece in sorted(store.pieces.items())]
    if all_pieces:
        click.echo("\n".join(["", *table(all_pieces), "", *lines(all_pieces)[:-1]]))
    click.echo("\n".join(results(store)))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
