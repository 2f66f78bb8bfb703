"""The verifier beside its peers: steps, throughput, prefix hits, memory, useless drafters.

    python -m bench.verifier            # or: make bench-verifier; make peers installs vLLM

Everything that is compared runs in turn within this one run: same model, same precision, same
number of threads. A contender that is not installed or fails is `na`, and the reason is printed.
Of parts that are not asked for (`--parts`) the results file keeps what it had, with its time.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import click
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.progress import Progress

import outrider
from bench.engine_driver import EngineDriver, ModelThread
from bench.floor import Floor
from bench.memory import MemoryResult
from bench.peers.catalogue import Target, start
from bench.peers.process import ROOT, Peer, PeerError
from bench.rates import Run
from bench.steps import measure_steps
from bench.texts import Texts
from bench.throughput import (
    PROMPT_TOKENS,
    SESSIONS,
    Generate,
    measure_prefix,
    measure_throughput,
)
from bench.useless import SESSIONS as USELESS_SESSIONS
from bench.useless import measure_recovery, measure_useless
from bench.verifier_report import Results, markdown, result_lines
from outrider.config import DEFAULT_CACHE, Dtype
from outrider.model.language_model import LanguageModel
from outrider.model.loading import load_language_model, resolve_model
from outrider.model.threads import set_threads
from outrider.serving.loops import SWITCH_INTERVAL_S
from verifier_service.config import EngineConfig

RESULTS = Path(__file__).with_name("results")
_RECORD = RESULTS / "verifier.json"
_FIELDS = {
    "steps": ("steps",),
    "throughput": ("throughput", "peers"),
    "prefix": ("prefix",),
    "memory": ("memory",),
    "useless": ("useless", "recovery"),
}
PARTS = tuple(_FIELDS)
OURS = "outrider"
_PEERS = {"hf": "hf-batching", "vllm": "vllm"}
"""What tables call them, and which engines they are."""
_STEP_TEXTS = 16
_SETTLE_S = 0.5
"""Between contenders: OpenMP threads of the one before spin on for a while."""


def _counts(_context: click.Context, _option: click.Parameter, value: str) -> tuple[int, ...]:
    """Read numbers with commas between them."""
    known = {str(count): count for count in USELESS_SESSIONS}
    try:
        return tuple(known[count.strip()] for count in value.split(","))
    except KeyError as error:
        raise click.BadParameter(f"{error} is none of {', '.join(known)}") from error


@click.command()
@click.option("--model", default="smollm2", show_default=True, help="A model with a folder.")
@click.option("--dtype", type=click.Choice(get_args(Dtype)), default="bfloat16", show_default=True)
@click.option(
    "--peer-dtype", type=click.Choice(get_args(Dtype)), help="Of the peers.  [default: as --dtype]"
)
@click.option(
    "--compile/--no-compile", "compiled", default=True, show_default=True, help="Our own steps."
)
@click.option("--threads", type=click.IntRange(1, 256), default=2, show_default=True)
@click.option("--parts", default=",".join(PARTS), show_default=True, help="Some of them.")
@click.option("--repeats", type=click.IntRange(1, 20), default=3, show_default=True)
@click.option("--rounds", type=click.IntRange(4, 1_000), default=40, show_default=True)
@click.option("--tokens", type=click.IntRange(24, 512), default=96, show_default=True)
@click.option("--window", "window_s", type=click.FloatRange(0.5, 60), default=4.0)
@click.option(
    "--useless-sessions",
    callback=_counts,
    default=",".join(map(str, USELESS_SESSIONS)),
    show_default=True,
    help="How many of them useless drafters are measured at; others stay as they were measured.",
)
@click.option("--quick", is_flag=True, help="One repeat of everything, to see that it runs.")
@click.option("--cache-dir", type=click.Path(path_type=Path), default=DEFAULT_CACHE)
def main(parts: str, quick: bool, **options: Any) -> None:
    """Measure the verifier against raw matrix products and against other engines."""
    chosen = [part.strip() for part in parts.split(",")]
    unknown = sorted(set(chosen) - set(PARTS))
    if unknown:
        raise click.BadParameter(f"unknown part {unknown[0]!r}; there are {', '.join(PARTS)}")
    if quick:
        options |= {"repeats": 1, "rounds": 8, "tokens": 40, "window_s": 1.5}
    sys.setswitchinterval(SWITCH_INTERVAL_S)  # As in a verifier: what hands drafts in is a thread.
    console = Console()
    with Progress(console=console) as progress:
        bench = _Bench(console, progress, options)
        try:
            for part in PARTS:
                if part in chosen:
                    getattr(bench, part)()
                    bench.results.times[part] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        finally:
            bench.close()
    _report(console, _completed(bench.results), options)


class _Bench:
    """The parts, over one model on one thread."""

    def __init__(self, console: Console, progress: Progress, options: dict[str, Any]) -> None:
        self.results = Results()
        self._console = console
        self._progress = progress
        self._options = options
        self._thread = ModelThread()
        self._thread.run(set_threads, options["threads"])
        self._model: LanguageModel = self._thread.run(self._load)
        self._texts = Texts(self._model.tokenizer_files)
        self._config = EngineConfig()
        self._running: EngineDriver | None = None

    def close(self) -> None:
        """Stop the engine and the thread."""
        if self._running is not None:
            self._running.stop()
        self._thread.close()

    def steps(self) -> None:
        """Steps against raw matrix products; before there is an engine on the thread."""
        options = self._options
        folder = resolve_model(options["model"], options["cache_dir"]).folder
        task = self._progress.add_task("steps", total=options["rounds"] + _STEP_TEXTS)
        floor = self._thread.run(Floor, folder, options["dtype"])
        texts = [self._texts.take(index, 320) for index in range(_STEP_TEXTS)]
        self.results.steps = self._thread.run(
            measure_steps,
            self._model,
            floor,
            texts,
            options["rounds"],
            lambda: self._progress.advance(task),
        )

    def throughput(self) -> None:
        """Target-only throughput beside the peers."""
        options = self._options
        driver = self._driver()
        runs = iter(range(1_000_000))

        def ours(prompts: Sequence[Sequence[int]], tokens: int) -> Run:
            return driver.generate(prompts, tokens, f"throughput-{next(runs)}")

        contenders: dict[str, Generate] = {OURS: ours}
        peers = self._start_peers()
        for name, peer in peers.items():
            contenders[name] = _settled(peer)
        count = len(SESSIONS) * (options["repeats"] + 1) * len(contenders)
        task = self._progress.add_task("throughput", total=count)

        def advance(what: str) -> None:
            self._progress.update(task, advance=1, description=f"throughput: {what}")

        try:
            self.results.throughput = measure_throughput(
                contenders,
                self._texts,
                options["tokens"],
                options["repeats"],
                advance,
                self._unavailable,
            )
        finally:
            for peer in peers.values():
                peer.close()
        self._progress.update(task, completed=count)

    def prefix(self) -> None:
        """Time to the first token with and without a prefix hit."""
        repeats = self._options["repeats"] + 1
        task = self._progress.add_task("prefix", total=2 * repeats)
        self.results.prefix = measure_prefix(
            self._driver(), self._texts, repeats, lambda: self._progress.advance(task)
        )

    def memory(self) -> None:
        """Memory against the budget, in a process that does nothing else."""
        options = self._options
        task = self._progress.add_task("memory", total=1)
        command = [sys.executable, "-m", "bench.memory", options["model"], options["dtype"]]
        command += [str(options["threads"]), str(options["cache_dir"])]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if ended.returncode:
            lines = ended.stderr.strip().splitlines() or ["no message"]
            self._unavailable("memory", lines[-1])
        else:
            self.results.memory = MemoryResult(**json.loads(ended.stdout.splitlines()[-1]))
        self._progress.advance(task)

    def useless(self) -> None:
        """What useless drafters cost, and recovery from one."""
        options = self._options
        driver = self._driver()
        rounds = 2 * options["repeats"]
        counts: tuple[int, ...] = options["useless_sessions"]
        task = self._progress.add_task("useless", total=len(counts) * rounds + 1)

        def advance(what: str) -> None:
            self._progress.update(task, advance=1, description=f"useless: {what}")

        self.results.useless = measure_useless(
            driver,
            self._texts,
            counts,
            driver.engine.pool.tokens_max,
            options["window_s"],
            rounds,
            advance,
        )
        advance("recovery")
        self.results.recovery = measure_recovery(driver, self._texts, wrong_s=4.0, attempts=4)
        if self.results.recovery is None:
            self._unavailable("recovery", "each text took another turn than its target-only run")

    def _load(self) -> LanguageModel:
        options = self._options
        return load_language_model(
            options["model"],
            dtype=options["dtype"],
            compiled=options["compiled"],
            cache_dir=options["cache_dir"],
        )

    def _driver(self) -> EngineDriver:
        if self._running is None:
            self._running = EngineDriver(self._model, self._config, self._thread)
        return self._running

    def _start_peers(self) -> dict[str, Peer]:
        """Start the peers one after the other; those that do not start are reported."""
        options = self._options
        target = Target(
            resolve_model(options["model"], options["cache_dir"]).folder,
            options["peer_dtype"] or options["dtype"],
            options["threads"],
            2 * (PROMPT_TOKENS + options["tokens"]),
        )
        task = self._progress.add_task("starting peers", total=len(_PEERS))
        peers = {}
        for name, engine in _PEERS.items():
            self._progress.update(task, description=f"starting {name} (may compile for minutes)")
            try:
                peers[name] = start(engine, target)
                self.results.peers[name] = peers[name].settings
            except PeerError as error:
                self._unavailable(name, str(error))
            self._progress.advance(task)
        return peers

    def _unavailable(self, name: str, why: str) -> None:
        self.results.unavailable[name] = why
        self._console.print(f"na: {name}: {why}", highlight=False, markup=False)


def _settled(peer: Peer) -> Generate:
    def generate(prompts: Sequence[Sequence[int]], tokens: int) -> Run:
        try:
            return peer.generate(prompts, tokens)
        finally:
            time.sleep(_SETTLE_S)

    return generate


def _completed(results: Results) -> Results:
    """Take the parts that were not asked for from the last run's file, if it is of this version."""
    try:
        record = json.loads(_RECORD.read_text())
        last = TypeAdapter(Results).validate_python(record["results"])
    except (OSError, ValueError, KeyError, TypeError, ValidationError):
        return results
    kept = [part for part in last.times if part not in results.times]
    for part in kept:
        for name in _FIELDS[part]:
            setattr(results, name, getattr(last, name))
        results.times[part] = last.times[part]
    if "useless" not in kept:
        counts = {result.sessions for result in results.useless}
        results.useless += [one for one in last.useless if one.sessions not in counts]
        results.useless.sort(key=lambda one: one.sessions)
    if "throughput" in kept:
        results.unavailable = {**last.unavailable, **results.unavailable}
    return results


def _report(console: Console, results: Results, options: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    record = {
        "benchmark": "verifier",
        "outrider": outrider.__version__,
        **{key: value for key, value in options.items() if isinstance(value, (int, float, str))},
        "machine": {
            "platform": platform.platform(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
        },
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "results": asdict(results),
    }
    _RECORD.write_text(json.dumps(record, indent=2) + "\n")
    text = markdown(results)
    _RECORD.with_suffix(".md").write_text(text)
    console.print(text, highlight=False, markup=False, soft_wrap=True)
    plain = Console(width=1_000, highlight=False)
    for line in result_lines(results):
        plain.print(line)


if __name__ == "__main__":
    main()
