"""Measures placement by KV: conversations over several verifiers, and the index in Redis.

Conversations of several turns go to orchestrators at random; each turn's prompt is all that was
said before and something new. How much of it need not be computed is compared with the ideal, all
full blocks of what was said before, and with taking the verifiers in turn.

Models are synthetic: they compute nothing and take a stated time. Services, streams and Redis are
real.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from bench.kv_lookups import measure_lookups
from bench.placement_fleet import BenchFleet, bench_fleet
from orchestrator.config import DriverConfig
from orchestrator.generation import Delivery
from orchestrator.jobs import Request, job_of
from outrider.domain import SamplingParams
from outrider.errors import OutriderError
from outrider.kv_blocks import BLOCK_TOKENS
from outrider.redis_server import start_redis
from outrider.registry import Connection

RESULTS = Path(__file__).parent / "results"
SPEC = "synthetic:target?step=1:20,32:22,256:40"
_FIRST_ID, _IDS = 32, 95
"""Printable ASCII, which is what synthetic models speak."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured."""

    conversations: int = 48
    at_once: int = 24
    turns: int = 5
    said_tokens: int = 160
    """New in each turn's prompt, about."""
    answer_tokens: int = 32
    verifiers: int = 4
    orchestrators: int = 2
    think_s: float = 0.3
    """Between the turns of a conversation, at most."""
    blocks: int = 1_000_000
    """In the index when lookups are timed."""
    lookups: int = 4_000


QUICK = Effort(conversations=8, at_once=8, turns=3, think_s=0.05, blocks=20_000, lookups=200)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one way of placing made of the conversations."""

    hit_share: float
    """Of all prompt tokens: those that were not computed."""
    ideal_share: float
    """Of all prompt tokens: those in full blocks of the turn before."""
    hit_ratio: float
    """The one over the other."""
    imbalance: float
    """Sessions of the verifier that had most, over the mean."""
    ttft_p50_s: float
    """Of turns that follow another."""
    ttft_p99_s: float
    lookups: int
    lookups_late: int
    generated_tokens: int
    requests: int
    redis_commands: int
    """That Redis carried out, those inside of scripts included."""
    redis_round_trips: int


class _Conversations:
    """Talks to a fleet; the same words each time."""

    def __init__(self, fleet: BenchFleet, effort: Effort, seed: int) -> None:
        self._fleet, self._effort, self._seed = fleet, effort, seed
        self._config = DriverConfig()
        self.prompt_tokens = self.ideal_tokens = self.generated = self.requests = 0
        self.ttfts_s: list[float] = []
        self.served: dict[str, int] = {}

    async def run(self) -> None:
        gate = asyncio.Semaphore(self._effort.at_once)

        async def one(number: int) -> None:
            async with gate:
                await self._converse(random.Random(self._seed * 10_000 + number))

        async with asyncio.TaskGroup() as group:
            for number in range(self._effort.conversations):
                group.create_task(one(number))

    async def _converse(self, chance: random.Random) -> None:
        text: list[int] = []
        for turn in range(self._effort.turns):
            await asyncio.sleep(chance.uniform(0, self._effort.think_s))
            before = len(text)
            said = round(self._effort.said_tokens * chance.uniform(0.5, 1.5))
            text += [_FIRST_ID + chance.randrange(_IDS) for _ in range(said)]
            answer, ttft_s = await self._ask(tuple(text), chance)
            self.prompt_tokens += len(text)
            if turn:
                # The answer's last token was never put into the model.
                self.ideal_tokens += (before - 1) // BLOCK_TOKENS * BLOCK_TOKENS
                self.ttfts_s.append(ttft_s)
            text += answer

    async def _ask(self, prompt: tuple[int, ...], chance: random.Random) -> tuple[list[int], float]:
        one = chance.choice(self._fleet.orchestrators)
        info = next(iter(one.fleet.models().values()))
        request = Request(
            seed=chance.randrange(1 << 62),
            token_ids=prompt,
            sampling=SamplingParams(temperature=0.0),
            tokens_max=self._effort.answer_tokens,
            ignore_eos=True,
            speculation=False,
        )
        began_s = time.perf_counter()
        job = job_of(request, info, one.fleet.codec(info), self._config)
        prefix = await one.driver.placer.find(job)
        generation = one.driver.generate(job, prefix)
        answer: list[int] = []
        ttft_s = 0.0
        while outputs := await generation.take():
            for output in outputs:
                if isinstance(output, OutriderError):
                    raise output
                if isinstance(output, Delivery) and output.deliver.token_ids:
                    ttft_s = ttft_s or time.perf_counter() - began_s
                    answer += output.deliver.token_ids
        address = generation.choices[0].session.verifier or ""
        self.served[address] = self.served.get(address, 0) + 1
        self.generated += len(answer)
        self.requests += 1
        return answer, ttft_s


async def _outcome(
    effort: Effort, redis_url: str, *, seed: int, use_redis: bool = True, round_robin: bool = False
) -> Outcome:
    connection = Connection(redis_url)
    async with connection.call():
        await connection.redis.flushall()
    try:
        async with bench_fleet(
            SPEC,
            effort.verifiers,
            effort.orchestrators,
            redis_url if use_redis else None,
            round_robin=round_robin,
        ) as fleet:
            before = await _redis_commands(connection)
            talk = _Conversations(fleet, effort, seed)
            await talk.run()
            after = await _redis_commands(connection)
            return _summary(fleet, talk, after - before)
    finally:
        await connection.close()


def _summary(fleet: BenchFleet, talk: _Conversations, commands: int) -> Outcome:
    adopted = sum(verifier.engine.pool.tokens_adopted for verifier in fleet.verifiers)
    lookups = [one.lookup for one in fleet.orchestrators if one.lookup is not None]
    publishers = [v.publisher for v in fleet.verifiers if v.publisher is not None]
    return Outcome(
        hit_share=adopted / talk.prompt_tokens,
        ideal_share=talk.ideal_tokens / talk.prompt_tokens,
        hit_ratio=adopted / talk.ideal_tokens,
        imbalance=max(talk.served.values()) / (talk.requests / len(fleet.verifiers)),
        ttft_p50_s=statistics.median(talk.ttfts_s),
        ttft_p99_s=_quantile(talk.ttfts_s, 0.99),
        lookups=sum(lookup.asked for lookup in lookups),
        lookups_late=sum(lookup.late + lookup.skipped for lookup in lookups),
        generated_tokens=talk.generated,
        requests=talk.requests,
        redis_commands=commands,
        redis_round_trips=sum(lookup.asked for lookup in lookups)
        + sum(publisher.counters.round_trips for publisher in publishers),
    )


async def _redis_commands(connection: Connection) -> int:
    async with connection.call():
        stats: dict[str, Any] = await connection.redis.info("stats")
    return int(stats["total_commands_processed"])


def _quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


async def _measure(effort: Effort, parts: set[str], seed: int, log_dir: Path) -> dict[str, Any]:
    record: dict[str, Any] = {"effort": asdict(effort), "model": SPEC, "seed": seed}
    with start_redis(None, log_dir / "redis.log") as server:
        if "placement" in parts:
            ways: dict[str, dict[str, bool]] = {
                "by KV": {},
                "by KV, without Redis": {"use_redis": False},
                "in turn": {"round_robin": True},
            }
            for name, way in ways.items():
                outcome = await _outcome(effort, server.url, seed=seed, **way)
                record[name] = asdict(outcome)
                print(
                    f"{name}: {outcome.hit_share:.1%} of prompt tokens were there, ideal "
                    f"{outcome.ideal_share:.1%}; busiest verifier {outcome.imbalance:.2f} of the "
                    f"mean; first token after {outcome.ttft_p50_s * 1e3:.0f} ms (median), "
                    f"{outcome.ttft_p99_s * 1e3:.0f} ms (99 %)"
                )
        if "lookups" in parts:
            lookups = await measure_lookups(server.url, effort.blocks, effort.lookups, seed)
            record["lookups"] = asdict(lookups)
            print(
                f"{lookups.blocks} blocks: {lookups.bytes_per_block:.0f} bytes each, published at "
                f"{lookups.published_per_s:.0f} a second; a lookup takes "
                f"{lookups.p50_ms:.2f} ms (median)"
            )
    return record


def result_lines(record: dict[str, Any], journal: str = "") -> list[str]:
    """For scripts; `journal` is added to what is said of Redis."""
    lines = []
    ops = ""
    if "by KV" in record:
        ours, alone, turns = (record[name] for name in ("by KV", "by KV, without Redis", "in turn"))
        lines.append(
            f"result: placement hit_ratio={ours['hit_ratio']:.3f} "
            f"round_robin={turns['hit_ratio']:.3f} without_redis={alone['hit_ratio']:.3f} "
            f"hit_share={ours['hit_share']:.3f} round_robin_share={turns['hit_share']:.3f} "
            f"imbalance={ours['imbalance']:.2f} "
            f"ttft_p50_ms={ours['ttft_p50_s'] * 1e3:.0f} "
            f"round_robin_ttft_p50_ms={turns['ttft_p50_s'] * 1e3:.0f} "
            f"ttft_p99_ms={ours['ttft_p99_s'] * 1e3:.0f} "
            f"round_robin_ttft_p99_ms={turns['ttft_p99_s'] * 1e3:.0f} models=synthetic"
        )
        ops = (
            f" ops_per_token={ours['redis_commands'] / ours['generated_tokens']:.3f}"
            f" ops_per_request={ours['redis_commands'] / ours['requests']:.1f}"
            f" round_trips_per_request={ours['redis_round_trips'] / ours['requests']:.1f}"
        )
    if ops or "lookups" in record:
        lookups = record.get("lookups")
        if lookups is not None:
            ops += (
                f" lookup_p50_ms={lookups['p50_ms']:.2f} lookup_p99_ms={lookups['p99_ms']:.2f}"
                f" blocks={lookups['blocks']} bytes_per_block={lookups['bytes_per_block']:.0f}"
            )
        lines.append(f"result: redis{ops}{journal}")
    return lines


@click.command()
@click.option("--parts", default="placement,lookups", show_default=True, help="Some of them.")
@click.option("--quick", is_flag=True, help="Little of everything, to see that it runs.")
@click.option("--seed", default=1, show_default=True, help="Of what is said, and when.")
@click.option("--results-dir", type=click.Path(path_type=Path, file_okay=False), default=RESULTS)
def main(parts: str, quick: bool, seed: int, results_dir: Path) -> None:
    """Measure placement by KV and its index in Redis."""
    # Whoever reads the results is told that models are synthetic.
    logging.getLogger("outrider.model").setLevel(logging.ERROR)
    chosen = {part.strip() for part in parts.split(",")}
    if not chosen <= {"placement", "lookups"}:
        raise click.BadParameter("there are placement and lookups", param_hint="--parts")
    with tempfile.TemporaryDirectory(prefix="outrider-bench-") as folder:
        record = asyncio.run(_measure(QUICK if quick else Effort(), chosen, seed, Path(folder)))
    results_dir.mkdir(parents=True, exist_ok=True)
    (results_dir / "placement.json").write_text(json.dumps(record, indent=2) + "\n")
    for line in result_lines(record):
        print(line)


if __name__ == "__main__":
    main()
