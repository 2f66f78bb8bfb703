"""What the orchestrator costs: synthetic workers, real sockets, one client stream a session.

    python -m bench.relay
    python -m bench.relay --sessions 10 --window 5 --profile

The orchestrator is a process of its own with one core to itself where the machine has two. The
verifiers, two drafters and the clients share the others and may be what limits the throughput,
so the measure is the orchestrator's processor time for an output token. Added latency is from
the moment a verifier hands a message to gRPC to the moment a client has read the token, so it
includes both of their sockets and whatever they wait for a core. How much of it is theirs is
measured at the same time: a stream that goes from the workers' process to the clients' without an
orchestrator in between, through the same event loops and under the same load (`generator`).

Paced: commits come at a total rate, half of what a core can do unless another is asked for,
whatever the orchestrator does, each message at a random time within its slot. Flood: verifiers
send as fast as flow control lets them; what piles up for a client is joined, which makes tokens
cheaper.
"""

from __future__ import annotations

import json
import os
import platform
import pstats
import secrets
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import click
import numpy as np
import psutil
from rich.console import Console

import outrider
from bench.relaying.control import Child
from bench.relaying.fleet import DRAFTERS, VERIFIERS, Usage, relay_fleet
from bench.relaying.samples import (
    Row,
    added_ns,
    markdown,
    quantiles_ms,
    result_line,
)

RESULTS = Path(__file__).with_name("results")
_SETTLE_S = 1.5
"""Between a change of load and the window that is measured."""
_ARRIVAL_S = 1.0
"""What the last commits of a window get to arrive; a flood leaves queues."""
_PROFILE_LINES = 40
_LIGHT_LOAD = 3_000.0
"""Output tokens a second from which half of a core's load is worked out, in so many seconds."""
_TRIED_S = 1.5


@dataclass(frozen=True)
class Options:
    """How to measure."""

    load: float | None = None
    """Output tokens a second in paced windows; None: half of what the orchestrator's core can do
    with as many sessions."""
    rows: int = 8
    """Commits in a verifier's message."""
    channels: int = 8
    window_s: float = 8.0
    profile: bool = False
    flood: bool = True


@click.command()
@click.option(
    "--sessions", "counts", type=click.IntRange(min=1), multiple=True, default=(10, 1_000, 10_000)
)
@click.option(
    "--load",
    type=click.FloatRange(min=1),
    help="Output tokens a second in paced windows.  [default: half of what a core can do]",
)
@click.option(
    "--rows",
    type=click.IntRange(min=1),
    default=Options.rows,
    show_default=True,
    help="Commits in a verifier's message.",
)
@click.option("--channels", type=click.IntRange(min=1), default=Options.channels, show_default=True)
@click.option(
    "--window",
    "window_s",
    type=click.FloatRange(min=0.5),
    default=Options.window_s,
    show_default=True,
)
@click.option("--repeats", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--drafts/--no-drafts", default=True, show_default=True)
@click.option("--flood/--no-flood", default=True, show_default=True)
@click.option("--profile", is_flag=True, help="Print where Python's time goes; slows it down.")
def main(
    counts: Sequence[int],
    repeats: int,
    drafts: bool,
    load: float | None,
    rows: int,
    channels: int,
    window_s: float,
    profile: bool,
    flood: bool,
) -> None:
    """Measure the orchestrator's cost for a token and the latency that it adds."""
    console = Console()
    options = Options(load, rows, channels, window_s, profile, flood)
    results: list[Row] = []
    for _ in range(repeats):
        for drafting in (False, True) if drafts else (False,):
            for sessions in counts:
                console.print(f"{sessions:,} sessions, {'with' if drafting else 'no'} drafts")
                with tempfile.TemporaryDirectory() as folder:
                    results += measure(sessions, drafting, options, Path(folder), console)
    _report(results, options)


def measure(
    sessions: int, drafts: bool, options: Options, folder: Path, console: Console
) -> list[Row]:
    """Measure a fleet of its own under the paced load, and in a flood if the options say so.

    Raises RuntimeError if output is lost or a process ends.
    """
    profile = folder / "orchestrator.prof" if options.profile else None
    with relay_fleet(sessions, rows=options.rows, channels=options.channels, profile=profile) as (
        workers,
        clients,
        orchestrator,
    ):
        clients.ask("open", sessions=sessions, speculation=drafts)
        bench = _Bench(sessions, drafts, options, folder, workers, clients, orchestrator)
        workers.ask("pace", tokens_per_s=options.load or bench.half_load())
        rows = [bench.window(flood=False)]
        if profile is not None:
            _print_profile(profile, console)
        if options.flood:
            workers.ask("flood")
            rows.append(bench.window(flood=True))
        return rows


@dataclass(frozen=True, slots=True)
class _Bench:
    sessions: int
    drafts: bool
    options: Options
    folder: Path
    workers: Child
    clients: Child
    orchestrator: psutil.Process

    def half_load(self) -> float:
        """Return half of the output tokens a second that one core can relay, from a light load."""
        self.workers.ask("pace", tokens_per_s=_LIGHT_LOAD)
        time.sleep(_SETTLE_S)
        before, begin = self.clients.ask("total"), Usage.of(self.orchestrator)
        time.sleep(_TRIED_S)
        after, end = self.clients.ask("total"), Usage.of(self.orchestrator)
        # Messages that share a wake-up are cheaper, so it is somewhat less than half.
        tokens = int(after["tokens"]) - int(before["tokens"])
        return 0.5 * tokens / (end.all_s - begin.all_s)

    def window(self, *, flood: bool) -> Row:
        """Measure under the load that is on, then take it off. Raises RuntimeError for losses."""
        time.sleep(_SETTLE_S)
        before = self.workers.ask("counts")
        self.clients.ask("record")
        self.workers.ask("record")
        if self.options.profile and not flood:
            self.orchestrator.send_signal(signal.SIGUSR1)
        generator_s = self._generator_cpu_s()
        begin = Usage.of(self.orchestrator)
        time.sleep(self.options.window_s)
        end = Usage.of(self.orchestrator)
        generator_s = self._generator_cpu_s() - generator_s
        if self.options.profile and not flood:
            self.orchestrator.send_signal(signal.SIGUSR2)
        after = self.workers.ask("counts")
        self.workers.ask("stop")
        memory_mib = self.orchestrator.memory_info().rss / 2**20
        self._settle()
        sent_path, read_path = self.folder / "sent.npy", self.folder / "read.npy"
        own_path = self.folder / "own.npy"
        said = self.workers.ask("dump", path=str(sent_path))
        heard = self.clients.ask("dump", path=str(read_path), own_path=str(own_path))
        if said["tokens"] != heard["tokens"] or heard["garbled"]:
            raise RuntimeError(f"output is not what was committed: {said} {heard}")
        sent, read = np.load(sent_path), np.load(read_path)
        in_window = (read[:, 3] >= begin.at_ns) & (read[:, 3] < end.at_ns)
        p50, p99, p999 = quantiles_ms(added_ns(sent, read))
        own_p50, own_p99, _ = quantiles_ms(np.load(own_path))
        return Row(
            sessions=self.sessions,
            drafts=self.drafts,
            flood=flood,
            seconds=(end.at_ns - begin.at_ns) / 1e9,
            tokens=int(read[in_window, 2].sum()),
            messages=int(in_window.sum()),
            commits=int(((sent[:, 2] >= begin.at_ns) & (sent[:, 2] < end.at_ns)).sum()),
            drafts_relayed=after["drafts"] - before["drafts"],
            cpu_s=end.all_s - begin.all_s,
            cpu_main_s=end.main_s - begin.main_s,
            cpu_kernel_s=end.kernel_s - begin.kernel_s,
            generator_cpu_s=generator_s,
            memory_mib=memory_mib,
            added_p50_ms=p50,
            added_p99_ms=p99,
            added_p999_ms=p999,
            own_p50_ms=own_p50,
            own_p99_ms=own_p99,
        )

    def _generator_cpu_s(self) -> float:
        times = [psutil.Process(one.pid).cpu_times() for one in (self.workers, self.clients)]
        return float(sum(one.user + one.system for one in times))

    def _settle(self) -> None:
        """Wait until what was sent has arrived, or nothing arrives any more."""
        heard = -1
        while heard != (now := self.clients.ask("total")["tokens"]):
            heard = now
            time.sleep(_ARRIVAL_S)


def _print_profile(path: Path, console: Console) -> None:
    deadline_s = time.monotonic() + 10
    while not path.exists() and time.monotonic() < deadline_s:
        time.sleep(0.1)
    time.sleep(0.5)
    console.rule("main thread of the orchestrator, by time in the function itself")
    pstats.Stats(str(path)).strip_dirs().sort_stats("tottime").print_stats(_PROFILE_LINES)


def _report(rows: Sequence[Row], options: Options) -> None:
    notes = [
        f"{VERIFIERS} synthetic verifier with {options.rows} commits of 1 to 3 tokens a message;"
        f" with drafts: {DRAFTERS} drafters, each answers every commit with a draft of 8 nodes",
        f"byte-level tokenizer; clients read ids and text over {options.channels} connections",
        f"{os.cpu_count()} cores: the orchestrator has one, workers and clients share the others",
        "generator: latency of a stream between the same two processes without an orchestrator",
        f"uvloop is {'used' if find_spec('uvloop') else 'not installed'}",
        f"Python {platform.python_version()}, grpcio {version('grpcio')},"
        f" outrider {outrider.__version__}, {platform.machine()} {platform.system()}",
    ]
    text = markdown(rows, notes)
    print(text)
    RESULTS.mkdir(exist_ok=True)
    data = {
        "id": secrets.token_hex(4),
        "unix_s": int(time.time()),
        "synthetic": True,
        "options": asdict(options),
        "notes": notes,
        "rows": [asdict(row) for row in rows],
    }
    (RESULTS / "relay.json").write_text(json.dumps(data, indent=2) + "\n")
    (RESULTS / "relay.md").write_text(text)
    print(result_line(rows))


if __name__ == "__main__":
    main()
