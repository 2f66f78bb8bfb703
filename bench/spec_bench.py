"""Spec-Bench over a whole fleet, and over peers beside it: `outrider bench spec-bench`.

Multi-turn questions through the public API, one at a time. Contenders answer in turn, question by
question, so that a noisy machine treats all alike; target-only is the same fleet with speculation
switched off by the request. Answers are appended to files as they come: a run that was broken off
goes on where it was, if it is started again with the same settings.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from bench.machine import command_line, origin, processor, usable_cores
from bench.peers.catalogue import NAMES
from bench.peers.process import Peer
from bench.spec.answers import AnswerStore
from bench.spec.contenders import BASELINE, Contender, Ours, Theirs
from bench.spec.fleet import OURS, DrafterSpec
from bench.spec.identity import Identity, IdentityStore, run_with, summed
from bench.spec.measuring import Field, Plan, measure, open_jobs, seconds_of
from bench.spec.options import check_where, fleet_of, fleet_options
from bench.spec.peers import Served, names_of, start_peers
from bench.spec.publishing import ours_over, publish, summaries_of
from bench.spec.questions import choose, read_questions
from bench.spec.results import Results, read_results
from outrider.client import Client
from outrider.config import Tls
from outrider.errors import ConfigError
from outrider.serving.options import apply

PARTS = ("speed", "identity")
_SETTLE_S = 0.25
"""Longer than the threads of any contender spin when they have nothing to do."""


def _options(command: Any) -> Any:
    options = (
        fleet_options,
        click.option(
            "--each/--no-each",
            default=True,
            show_default=True,
            help="With several drafters, also measure each of them alone.",
        ),
        click.option(
            "--peers",
            default="",
            help="Other engines beside us: 'all', or some of " + ",".join(NAMES) + " (--local).",
        ),
        click.option("--assistant", help="Draft model of hf-assisted.  [default: a drafter's]"),
        click.option("--parts", default=",".join(PARTS), show_default=True, help="Some of them."),
        click.option(
            "--temperature",
            "temperatures",
            multiple=True,
            type=click.FloatRange(0, 100),
            default=(0.0, 1.0),
            show_default=True,
            help="Repeatable. Peers answer at 0 only.",
        ),
        click.option(
            "--max-tokens",
            type=click.IntRange(1, 4096),
            default=128,
            show_default=True,
            help="Output tokens of each answer, at most.",
        ),
        click.option(
            "--repeats",
            type=click.IntRange(1, 20),
            default=1,
            show_default=True,
            help="Times that each question is asked of each contender.",
        ),
        click.option(
            "--limit-per-category",
            type=click.IntRange(1),
            help="Questions of each of the six sub-tasks.  [default: all]",
        ),
        click.option(
            "--minutes",
            type=click.FloatRange(min=0, min_open=True),
            help="Ask no further question after so long; sub-tasks take turns.",
        ),
        click.option(
            "--identity-tokens",
            type=click.IntRange(1, 1024),
            default=24,
            show_default=True,
            help="Output tokens of the float32 comparison.",
        ),
        click.option("--fresh", is_flag=True, help="Forget what was measured before."),
    )
    return apply(command, *options)


@click.command("spec-bench")
@_options
def command(local: bool, tls: Tls | None, parts: str, **options: Any) -> None:
    """Answer Spec-Bench's questions, speculated and not, and say how much faster it was.

    \b
    Try it:                  outrider bench spec-bench --local --limit-per-category 1
    Two drafters and peers:  outrider bench spec-bench --local --drafter lookup \\
                               --drafter language-model=DIR --peers vllm,hf --minutes 15
    A fleet that runs:       outrider bench spec-bench --endpoint HOST:PORT --questions FILE
    """
    check_where(options["endpoint"], local)
    if options["endpoint"] and options["peers"]:
        raise click.UsageError("--peers run beside a fleet of this machine: --local")
    chosen = [part.strip() for part in parts.split(",")]
    unknown = sorted(set(chosen) - set(PARTS))
    if unknown:
        raise click.BadParameter(f"unknown part {unknown[0]!r}; there are {', '.join(PARTS)}")
    bench = _Bench(tls, options)
    try:
        if "speed" in chosen:
            bench.speed()
        if "identity" in chosen:
            bench.identity()
    except KeyboardInterrupt:
        bench.console.print("interrupted; the same command goes on")
    bench.report()


class _Bench:
    """One run of the program."""

    def __init__(self, tls: Tls | None, options: dict[str, Any]) -> None:
        self.console = Console(stderr=True)
        self._endpoint: str | None = options["endpoint"]
        self._tls = tls
        self._options = options
        path: Path = options["questions_path"]
        self._questions = choose(read_questions(path), options["limit_per_category"])
        self._folder: Path = options["results_dir"]
        fresh = options["fresh"]
        self._store = AnswerStore(self._folder / "spec_bench", self._setting(path), fresh=fresh)
        self._identities = IdentityStore(self._store.folder / "same_ids.ndjson", fresh=fresh)
        self._peers: dict[str, dict[str, Any]] = {}
        self._unavailable: dict[str, str] = {}

    def _setting(self, questions: Path) -> dict[str, Any]:
        """Whatever makes answers comparable."""
        options = self._options
        here: dict[str, Any] = {"endpoint": self._endpoint}
        if self._endpoint is None:
            here = {
                "model": options["model"],
                "dtype": options["dtype"],
                "compiled": options["compiled"],
                "drafters": list(options["drafters"]),
                "cores": len(usable_cores()),
                "environment": origin([]).environment,
            }
        return {
            **here,
            "tokens_max": options["max_tokens"],
            "questions": hashlib.sha256(questions.read_bytes()).hexdigest()[:16],
            "processor": processor(),
            "outrider": origin([]).versions["outrider"],
        }

    # --- parts ---

    def speed(self) -> None:
        """Measure until all is answered, or the time is over."""
        options = self._options
        plan = Plan(
            self._questions, options["temperatures"], options["repeats"], options["max_tokens"]
        )
        with contextlib.ExitStack() as stack:
            progress = stack.enter_context(_progress(self.console))
            # Peers first: they compile for minutes, and the fleet need not wait for them.
            peers = self._start_peers(stack, progress)
            endpoints = stack.enter_context(self._fleet(options["dtype"]))
            field = self._field(stack, endpoints, peers)
            jobs = open_jobs(plan, field, self._store.read())
            if not jobs:
                self.console.print("all questions are answered already")
                return
            deadline_s = self._warm_up(progress, field, jobs, len(plan.jobs))
            task = progress.add_task("speed", total=seconds_of(jobs, field))
            for job in measure(
                jobs,
                plan.tokens_max,
                field,
                self._store,
                lambda what: progress.update(task, description=what),
            ):
                progress.advance(task, seconds_of([job], field))
                if time.monotonic() > deadline_s:
                    self.console.print("time is over; the same command goes on from here")
                    break

    def identity(self) -> None:
        """Compare ids in float32."""
        tokens_max = self._options["identity_tokens"]
        found = self._identities.read("float32", tokens_max)
        todo = [question for question in self._questions if question.question_id not in found]
        if not todo:
            return
        if self._endpoint is not None and not self._serves_float32():
            self.console.print("identity: left out, since the endpoint does not serve float32")
            return
        with (
            _progress(self.console) as progress,
            self._fleet("float32") as endpoints,
            Client(endpoints[OURS], tls=self._tls) as client,
        ):
            task = progress.add_task("same ids in float32", total=len(todo))
            run_with(
                self._identities,
                client,
                todo,
                "float32",
                tokens_max,
                2 * len(usable_cores()),
                lambda: progress.advance(task),
            )

    def report(self) -> None:
        """Write what there is to files, and to the terminal."""
        answers = self._store.read()
        path = self._folder / "spec_bench.json"
        peers, unavailable = self._known_of_peers(path, {answer.contender for answer in answers})
        results = Results(
            origin(command_line()),
            json.loads((self._store.folder / "setting.json").read_text()),
            len({answer.question_id for answer in answers}),
            summaries_of(answers),
            self._identity_so_far(),
            peers,
            unavailable,
            ours_over(answers),
        )
        publish(results, path, self.console, as_json=self._options["as_json"])

    # --- what they need ---

    def _fleet(self, dtype: str) -> contextlib.AbstractContextManager[dict[str, str]]:
        return fleet_of(self._options, self.console, dtype=dtype, each=self._options["each"])

    def _start_peers(self, stack: contextlib.ExitStack, progress: Progress) -> list[Peer]:
        options = self._options
        names = names_of(options["peers"])
        drafts = [DrafterSpec.parse(text).model for text in options["drafters"]]
        draft = options["assistant"] or next((name for name in drafts if name), None)
        task = progress.add_task("starting peers", total=len(names), visible=bool(names))
        return start_peers(
            names,
            Served(options["model"], options["dtype"], draft, options["cache_dir"]),
            options["max_tokens"],
            stack,
            lambda what: progress.update(task, advance=1, description=what),
            self._failed,
        )

    def _field(
        self, stack: contextlib.ExitStack, endpoints: dict[str, str], peers: list[Peer]
    ) -> Field:
        found: list[Contender] = []
        for name, endpoint in endpoints.items():
            client = stack.enter_context(Client(endpoint, tls=self._tls))
            if name == OURS:
                found.append(Ours(BASELINE, client, speculation=False))
                if peers:
                    layout = Served.layout(self._options["model"], self._options["cache_dir"])
                    eos_ids = client.models()[0].eos_ids
                    found += [Theirs(peer, layout, eos_ids, _settle) for peer in peers]
            found.append(Ours(name, client, speculation=True))
        self._peers = {peer.name: peer.settings for peer in peers}
        return Field(
            {contender.name: contender for contender in found},
            frozenset(peer.name for peer in peers),
            self._failed,
        )

    def _warm_up(
        self, progress: Progress, field: Field, jobs: Sequence[Any], jobs_total: int
    ) -> float:
        """Warm up and print an estimate; returns when to stop."""
        task = progress.add_task("warming up", total=2 * len(field.contenders))
        field.warm_up(
            self._questions[0],
            self._options["max_tokens"],
            lambda name: progress.update(task, advance=1, description=f"warming up {name}"),
        )
        minutes = seconds_of(jobs, field) / 60
        limit = self._options["minutes"]
        says = "" if limit is None else f"; stops after {limit:g}"
        self.console.print(
            f"{len(jobs)} of {jobs_total} conversations to go, {len(field.contenders)} contenders:"
            f" about {minutes:.0f} minutes{says}"
        )
        return time.monotonic() + (float("inf") if limit is None else 60 * limit)

    def _failed(self, name: str, why: str) -> None:
        self._unavailable[name] = why
        self.console.print(f"not measured: {name}: {why}", highlight=False, markup=False)

    def _serves_float32(self) -> bool:
        assert self._endpoint is not None
        with Client(self._endpoint, tls=self._tls) as client:
            return all(info.dtype == "float32" for info in client.models())

    def _identity_so_far(self) -> Identity | None:
        tokens_max = self._options["identity_tokens"]
        found = self._identities.read("float32", tokens_max)
        identity = summed(found, self._questions, "float32", tokens_max)
        return identity if identity.questions else None

    def _known_of_peers(
        self, path: Path, measured: set[str]
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """What peers said of themselves, in this run and in those that it goes on with."""
        try:
            before = read_results(path)
        except ConfigError:
            return self._peers, self._unavailable
        peers = {n: s for n, s in before.peers.items() if n in measured} | self._peers
        missing = dict(before.unavailable) | self._unavailable
        return peers, {name: why for name, why in missing.items() if name not in measured}


def _settle() -> None:
    time.sleep(_SETTLE_S)


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)
