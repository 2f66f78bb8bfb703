"""What journaling before delivery costs: delay of a delivery, processor time, operations of Redis.

    python -m bench.journal --sessions 64 --step-ms 25

Sessions commit as verify steps would have it, those of one verifier at once; Redis is a real one,
on this machine. There are no models and no clients: what is measured is what the journal adds.
"""

from __future__ import annotations

import asyncio
import random
import resource
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import click

from orchestrator.config import JournalConfig
from orchestrator.journaling import JournalWriter, Record
from outrider.redis_server import start_redis
from outrider.registry import Connection, Leases

TOKENS = (17, 4_711, 23)
"""Of one commit."""
VERIFIER_SESSIONS = 16


@dataclass(slots=True)
class Samples:
    """What came out of one run."""

    delays_s: list[float] = field(default_factory=list)
    commits: int = 0
    batches: int = 0
    commands: int = 0
    """That Redis carried out, those inside of scripts included."""
    cpu_s: float = 0.0

    @property
    def tokens(self) -> int:
        """Journaled."""
        return self.commits * len(TOKENS)

    def quantile_ms(self, share: float) -> float:
        """Of the delays."""
        ordered = sorted(self.delays_s)
        return 1e3 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def measure(url: str, sessions: int, step_s: float, duration_s: float) -> Samples:
    """Commit for all sessions every `step_s`, verifier by verifier."""
    samples = Samples()
    connection = Connection(url)
    store = Leases(connection)
    writer = JournalWriter(store, JournalConfig())
    writer.start()
    records: list[Record[float]] = [
        writer.record(
            f"gen-{number}",
            b"x" * 2_000,
            deliver=lambda said_s: samples.delays_s.append(time.perf_counter() - said_s),
            lost=lambda error: None,
        )
        for number in range(sessions)
    ]
    chance = random.Random(1)
    until_s = time.monotonic() + duration_s

    async def verifier(mine: list[Record[float]]) -> None:
        await asyncio.sleep(chance.uniform(0, step_s))
        while time.monotonic() < until_s:
            for record in mine:
                record.note(0, 1, TOKENS)
                record.say(time.perf_counter())
                samples.commits += 1
            await asyncio.sleep(step_s)

    before = resource.getrusage(resource.RUSAGE_SELF)
    groups = [
        records[first : first + VERIFIER_SESSIONS]
        for first in range(0, sessions, VERIFIER_SESSIONS)
    ]
    calls_before, commands_before = await _calls(connection), await _commands(connection)
    await asyncio.gather(*(verifier(group) for group in groups))
    await asyncio.sleep(0.1)
    samples.batches = await _calls(connection) - calls_before
    samples.commands = await _commands(connection) - commands_before
    after = resource.getrusage(resource.RUSAGE_SELF)
    samples.cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    await writer.close()
    await connection.close()
    return samples


async def _commands(connection: Connection) -> int:
    return int((await connection.redis.info("stats"))["total_commands_processed"])


async def _calls(connection: Connection) -> int:
    statistics = await connection.redis.info("commandstats")
    return int(statistics.get("cmdstat_evalsha", {}).get("calls", 0))


@click.command()
@click.option("--sessions", default=64, show_default=True)
@click.option("--step-ms", default=25.0, show_default=True)
@click.option("--seconds", default=5.0, show_default=True)
def main(sessions: int, step_ms: float, seconds: float) -> None:
    """Measure what journaling adds."""
    with (
        tempfile.TemporaryDirectory() as folder,
        start_redis(None, Path(folder) / "redis.log") as server,
    ):
        samples = asyncio.run(measure(server.url, sessions, step_ms / 1e3, seconds))
    print(
        f"result: journal sessions={sessions} step_ms={step_ms:g} commits={samples.commits} "
        f"delay_p50_ms={samples.quantile_ms(0.5):.2f} delay_p99_ms={samples.quantile_ms(0.99):.2f} "
        f"cpu_us_per_commit={1e6 * samples.cpu_s / samples.commits:.1f} "
        f"redis_calls_per_token={samples.batches / samples.tokens:.4f} "
        f"redis_ops_per_token={samples.commands / samples.tokens:.3f}"
    )


if __name__ == "__main__":
    main()
