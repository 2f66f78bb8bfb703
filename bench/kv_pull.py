"""Measures KV fetched from a peer against computing it: the time to the first token of a prompt.

Two verifiers, each a process; one has computed the prompt, the other is told so. Between them lie
emulated links of several bandwidths. Whether it fetches is the verifier's own decision, by what it
has measured so far: over each link it is asked several times.

    python -m bench.kv_pull --dtype bfloat16
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click

from bench.links import LinkProxy, LinkShape
from bench.machine import origin
from bench.texts import Texts
from orchestrator.workers import LinkState, VerifierBatch, VerifierLink
from outrider.config import DEFAULT_CACHE
from outrider.domain import KvPeer, ModelInfo, PullReport, SamplingParams, SessionSpec
from outrider.errors import OutriderError, Unavailable
from outrider.kv_blocks import BLOCK_TOKENS, shareable_blocks
from outrider.processes import spawn, stop

RESULTS = Path(__file__).parent / "results"
TOKENS = 4
_READY_S = 300.0
_ANSWER_S = 120.0
_NEXT_S = 0.2


@dataclass(frozen=True, slots=True)
class Attempt:
    """One prompt, and what became of it."""

    ttft_s: float
    outcome: str
    """Of fetching; empty: nobody was told of a peer."""
    blocks: int
    size_bytes: int
    pull_s: float
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """Attempts over one link."""

    link: str
    bandwidth_bytes_per_s: float | None
    """None: as it is."""
    attempts: list[Attempt]


@dataclass(slots=True)
class _Session:
    done: asyncio.Event = field(default_factory=asyncio.Event)
    ids: list[int] = field(default_factory=list)
    first_s: float = 0.0
    pull: PullReport | None = None
    fault: str = ""


class BenchVerifier:
    """A verifier's process, and a stream to it."""

    def __init__(self, address: str, on_tokenizer: dict[str, bytes]) -> None:
        self._files = on_tokenizer
        self._sessions: dict[int, _Session] = {}
        self._ready = asyncio.Event()
        self.link = VerifierLink(
            address,
            "bench",
            on_change=self._changed,
            on_batch=self._heard,
            on_tokenizer=self._keep,
            has_tokenizer=lambda info: bool(self._files),
        )

    async def connect(self) -> None:
        """Wait until it serves. Raises `Unavailable`."""
        self.link.start()
        try:
            await asyncio.wait_for(self._ready.wait(), _READY_S)
        except TimeoutError:
            raise Unavailable(f"{self.link.address}: {self.link.reason}") from None

    async def ask(
        self, number: int, prompt: Sequence[int], salt: str, peer: KvPeer | None = None
    ) -> Attempt:
        """Have it say a few tokens."""
        session = self._sessions[number] = _Session()
        spec = SessionSpec(
            session=number,
            epoch=1,
            prompt=tuple(prompt),
            committed=(),
            sampling=SamplingParams(temperature=0.0),
            seed=1,
            tokens_max=TOKENS,
            ignore_eos=True,
            cache_salt=salt,
            kv_peer=peer,
        )
        began_s = time.perf_counter()
        self.link.open(spec)
        await asyncio.wait_for(session.done.wait(), _ANSWER_S)
        if session.fault:
            raise Unavailable(session.fault)
        pull = session.pull
        return Attempt(
            session.first_s - began_s,
            "" if pull is None or pull.outcome is None else pull.outcome.value,
            0 if pull is None else pull.blocks,
            0 if pull is None else pull.size_bytes,
            0.0 if pull is None else pull.duration_s,
            tuple(session.ids),
        )

    async def _keep(self, info: ModelInfo, files: dict[str, bytes]) -> None:
        self._files |= files

    def _changed(self, link: VerifierLink) -> None:
        if link.state is LinkState.READY:
            self._ready.set()

    def _heard(self, link: VerifierLink, batch: VerifierBatch) -> None:
        now_s = time.perf_counter()
        for rejection in batch.rejections:
            session = self._sessions[rejection.session]
            session.fault = rejection.message
            session.done.set()
        for pull in batch.kv_pulls:
            if pull.outcome is not None:
                self._sessions[pull.session].pull = pull
        for number, _, commit, _ in batch.commits:
            session = self._sessions[number]
            session.first_s = session.first_s or now_s
            session.ids += commit.tokens
            if commit.last:
                session.done.set()


@contextlib.asynccontextmanager
async def verifiers(
    model: str, dtype: str, threads: int, cache_dir: Path, log_dir: Path
) -> AsyncIterator[tuple[list[BenchVerifier], Texts]]:
    """Run two verifiers."""
    processes, found = [], []
    files: dict[str, bytes] = {}
    try:
        for number, port in enumerate(_free_ports(2)):
            arguments = [
                *("--model", model, "--dtype", dtype, "--threads", str(threads)),
                *("--port", str(port), "--cache-dir", str(cache_dir), "--device", "cpu"),
                # The first prompt measures all that is needed here.
                *("--worker-id", f"verifier-{number}", "--drain", "0", "--no-warm-up"),
            ]
            command = [sys.executable, "-m", "verifier_service", *arguments]
            processes.append(spawn(command, log_dir / f"verifier-{number}.log"))
            found.append(BenchVerifier(f"127.0.0.1:{port}", files))
        for verifier in found:
            await verifier.connect()
        yield found, Texts(files)
    finally:
        for verifier in found:
            await verifier.link.close()
        for process in processes:
            stop(process)


async def measure(
    there: BenchVerifier,
    here: BenchVerifier,
    texts: Texts,
    *,
    tokens: int,
    repeats: int,
    megabits: Sequence[float],
) -> tuple[list[Attempt], list[Row]]:
    """Return attempts that computed everything, and those that were told of a peer."""
    numbers = itertools.count(1)
    prompt = texts.take(0, tokens)

    async def one(name: str, address: str | None) -> Attempt:
        number = next(numbers)
        salt = f"{name}-{number}"
        peer = None
        if address is not None:
            await there.ask(number, prompt, salt)
            # What was only just computed may still be on its way to the first token of others.
            await asyncio.sleep(_NEXT_S)
            peer = KvPeer(address, there.link.incarnation, shareable_blocks(tokens))
        attempt = await here.ask(number, prompt, salt, peer)
        print(f"{name}: {_told(attempt)}", flush=True)
        return attempt

    await one("warm", None)
    computed = [await one("computed", None) for _ in range(repeats)]
    rows = []
    with LinkProxy() as proxy:
        for megabit in (math.inf, *megabits):
            name = "loopback" if math.isinf(megabit) else f"{megabit:g} Mbit/s"
            shape = LinkShape(bandwidth_bytes_per_s=megabit * 1e6 / 8)
            address = there.link.address
            if not math.isinf(megabit):
                address = proxy.open(name, address, shape)
            attempts = [await one(name, address) for _ in range(repeats)]
            bandwidth = None if math.isinf(megabit) else shape.bandwidth_bytes_per_s
            rows.append(Row(name, bandwidth, attempts))
            computed.append(await one("computed", None))
    return computed, rows


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in held:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in held]


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else math.nan


def _told(one: Attempt) -> str:
    return f"{one.outcome or 'nobody asked'} {one.ttft_s:.3f} s ({one.blocks} blocks)"


def result_lines(tokens: int, computed: Sequence[Attempt], rows: Sequence[Row]) -> list[str]:
    """For people and for scripts."""
    prefill_s = _median([one.ttft_s for one in computed])
    lines = [f"{tokens} tokens computed: first token after {prefill_s:.3f} s (median)"]
    for row in rows:
        lines.append(f"{row.link}: {', '.join(map(_told, row.attempts))}")
    ids = {one.ids for one in computed} | {one.ids for row in rows for one in row.attempts}
    for row in rows:
        ttft_s = _median([one.ttft_s for one in row.attempts])
        best = max(row.attempts, key=lambda one: one.blocks)
        rate = best.size_bytes / best.pull_s / 1e6 if best.pull_s else 0.0
        lines.append(
            f"result: kv_pull link={row.link.replace(' ', '_')} tokens={tokens}"
            f" ttft_prefill_s={prefill_s:.3f} ttft_s={ttft_s:.3f}"
            f" speedup={prefill_s / ttft_s:.2f} outcomes="
            + ",".join(one.outcome or "none" for one in row.attempts)
            + f" blocks={best.blocks} megabytes={best.size_bytes / 1e6:.1f}"
            f" megabytes_per_s={rate:.0f} identical={int(len(ids) == 1)}"
        )
    return lines


async def _run(options: dict[str, Any], log_dir: Path) -> tuple[list[Attempt], list[Row]]:
    async with verifiers(
        options["model"], options["dtype"], options["threads"], options["cache_dir"], log_dir
    ) as ((there, here), texts):
        return await measure(
            there,
            here,
            texts,
            tokens=options["tokens"],
            repeats=options["repeats"],
            megabits=[float(one) for one in options["megabits"].split(",") if one],
        )


@click.command()
@click.option("--model", default="smollm2", show_default=True, help="The target.")
@click.option("--dtype", default="float32", show_default=True)
@click.option("--threads", default=0, show_default=True, help="Of each verifier; 0: torch's own.")
@click.option("--tokens", default=1_000, show_default=True, help="Of the prompt.")
@click.option("--repeats", default=2, show_default=True, help="Prompts over each link.")
@click.option("--megabits", default="10000,1000,100", show_default=True, help="Links, Mbit/s.")
@click.option("--cache-dir", type=click.Path(path_type=Path), default=DEFAULT_CACHE)
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS / "kv_pull.json")
def main(output: Path, **options: Any) -> None:
    """Time to the first token of a prompt that another verifier has computed."""
    log_dir = Path(tempfile.mkdtemp(prefix="outrider-kv-pull-"))
    try:
        computed, rows = asyncio.run(_run(options, log_dir))
    except OutriderError as error:
        raise click.ClickException(f"{error}; logs are in {log_dir}") from error
    settings = {name: value for name, value in options.items() if name != "cache_dir"}
    record = {
        "origin": asdict(origin(["python", "-m", "bench.kv_pull", *sys.argv[1:]])),
        "settings": settings,
        "block_tokens": BLOCK_TOKENS,
        "computed": [asdict(one) for one in computed],
        "links": [asdict(row) for row in rows],
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=1) + "\n")
    for line in result_lines(options["tokens"], computed, rows):
        print(line)


if __name__ == "__main__":
    main()
