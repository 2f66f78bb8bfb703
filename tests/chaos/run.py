"""`python -m tests.chaos.run`: faults at random moments under load, and a report.

make chaos CHAOS_ARGS="--each 20 --clients 32 --seed 7"
"""

from __future__ import annotations

import asyncio
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from tests.chaos.cluster import Cluster, ClusterConfig
from tests.chaos.faults import Done, carry_out, plan
from tests.chaos.history import faults_of
from tests.chaos.load import Load, Outcomes, cases, expectations
from tests.chaos.overload import overload
from tests.chaos.report import lines


async def chaos(
    cluster: Cluster, *, each: int, clients: int, tokens: int, seed: int, pause_max_s: float
) -> tuple[Done, Outcomes]:
    """Generate while faults happen; returns when all of both have ended."""
    pairs = expectations(cases(8, tokens))
    load = Load(cluster.endpoints, pairs, clients, seed)
    load.start()
    done = await carry_out(cluster, load, plan(each, seed), seed, pause_max_s=pause_max_s)
    return done, await load.stop()


@click.command()
@click.option("--each", default=20, show_default=True, help="Times of each deed to each role.")
@click.option("--clients", default=32, show_default=True, help="Generations at any time.")
@click.option("--tokens", default=160, show_default=True, help="Output tokens of a generation.")
@click.option("--verifiers", default=3, show_default=True)
@click.option("--drafters", default=2, show_default=True)
@click.option("--orchestrators", default=3, show_default=True)
@click.option("--pause-max", default=8.0, show_default=True, help="Seconds that a fault lasts.")
@click.option("--overload/--no-overload", "overloaded", default=True, help="Measure that, too.")
@click.option("--seed", default=1, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="For logs.  [default: temporary]")
def main(
    each: int,
    clients: int,
    tokens: int,
    verifiers: int,
    drafters: int,
    orchestrators: int,
    pause_max: float,
    overloaded: bool,
    seed: int,
    folder: Path | None,
) -> None:
    """Break a fleet of processes in every way that it should survive."""
    folder = folder or Path(tempfile.mkdtemp(prefix="outrider-chaos-"))
    click.echo(f"logs in {folder / 'logs'}")
    config = ClusterConfig(
        folder, verifiers=verifiers, drafters=drafters, orchestrators=orchestrators
    )
    with Cluster(config) as cluster:
        done, outcomes = asyncio.run(
            chaos(
                cluster, each=each, clients=clients, tokens=tokens, seed=seed, pause_max_s=pause_max
            )
        )
    if overloaded:
        click.echo(_overload(folder / "overload", 8, 15.0))
    for line in lines(done, outcomes):
        click.echo(line)
    placed = True
    if importlib.util.find_spec("bench.placement") is not None:
        command = [sys.executable, "-m", "bench.placement"]
        placed = subprocess.run(command, check=False).returncode == 0
    bad = outcomes.lost or outcomes.mismatches or outcomes.doubled or faults_of(outcomes.history)
    sys.exit(1 if bad or not placed else 0)


def _overload(folder: Path, capacity: int, duration_s: float) -> str:
    config = ClusterConfig(
        folder,
        verifiers=1,
        drafters=0,
        orchestrators=1,
        orchestrator_options=("--sessions-max", str(capacity)),
    )
    with Cluster(config) as cluster:
        return asyncio.run(overload(cluster.endpoints[0], capacity, duration_s)).line()


if __name__ == "__main__":
    main()
