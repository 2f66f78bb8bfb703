"""`outrider distill`: make a small drafter for a target out of the target's own text."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from outrider.serving.options import apply, cache_option

if TYPE_CHECKING:
    from outrider.model.distillation.evaluation import Score, StepTimes
    from outrider.model.distillation.training import Report

F = TypeVar("F", bound=Callable[..., Any])

_run_argument = click.argument("run", type=click.Path(path_type=Path, file_okay=False))


def _model_options(command: F) -> F:
    """Add where and how the target runs, and whether to speak JSON."""
    return apply(
        command,
        click.option(
            "--device",
            type=click.Choice(["auto", "cpu", "cuda"]),
            default="auto",
            show_default=True,
            help="auto takes a GPU if there is one.",
        ),
        click.option(
            "--threads",
            type=click.IntRange(min=0),
            default=0,
            show_default=True,
            help="Processors to use; 0: one thread per core.",
        ),
        cache_option,
        click.option("--json", "as_json", is_flag=True, help="Print JSON lines."),
    )


@click.group()
def distill() -> None:
    """Make a drafter for a target out of the target's own text.

    A drafter is a few of the target's layers and the frequent part of its vocabulary, trained to
    choose as the target would. RUN is a folder; every stage can be stopped and goes on where it
    was when it is called again.

    \b
    1. The target writes:      outrider distill generate RUN --target smollm2 --tokens 300000
    2. The drafter learns:     outrider distill train RUN --tokens 1000000
    3. How good is it?         outrider distill evaluate RUN/drafter --prompts questions.jsonl
    4. Use it:                 outrider local --draft-model RUN/drafter
    5. Use it elsewhere:       outrider distill export RUN/drafter FOLDER

    \b
    Two processes write twice as fast on two cores; call both, with --process 0 and --process 1:
      outrider distill generate RUN --target smollm2 --threads 1 --processes 2 --process 0
    Training may begin while they write: new text is taken up from one epoch to the next.
    """


@distill.command()
@_run_argument
@click.option("--target", help="Model to learn from; needed to begin a run.")
@click.option(
    "--prompts",
    "prompts_path",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="What to ask: JSON lines with 'prompt' or 'turns', or a TOML file of kinds as the one"
    " that is built in.  [default: built-in kinds; the target completes many questions itself]",
)
@click.option(
    "--tokens",
    "tokens_max",
    type=click.IntRange(min=1),
    default=300_000,
    show_default=True,
    help="Answer tokens to have in the end, those there are included.",
)
@click.option(
    "--answer-tokens",
    "answer_tokens_max",
    type=click.IntRange(min=1),
    default=160,
    show_default=True,
    help="Longest answer.",
)
@click.option(
    "--rows",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Conversations at a time.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Another one asks other things.",
)
@click.option("--process", type=click.IntRange(min=0), default=0, help="Which of --processes.")
@click.option("--processes", type=click.IntRange(min=1), default=1, help="That share the work.")
@_model_options
def generate(
    run: Path,
    target: str | None,
    prompts_path: Path | None,
    device: Any,
    threads: int,
    cache_dir: Path,
    as_json: bool,
    **options: Any,
) -> None:
    """Let the target write conversations into RUN.

    Most answers are greedy, some are sampled. Which conversations there are depends on --seed
    alone.
    """
    if options["process"] >= options["processes"]:
        raise click.UsageError("--process counts from 0 and must be below --processes")
    from outrider.model.distillation import openings, stages
    from outrider.model.distillation.generation import GenerationConfig

    _log_to_stderr()
    config = GenerationConfig(**options)
    questions = openings.read_openings(prompts_path or openings.KINDS_FILE)
    opened = stages.open_run(run, target, cache_dir)
    started, before = time.monotonic(), opened.corpus.answer_tokens()
    with _bar("tokens", config.tokens_max, as_json) as advance:

        def progress(tokens: int) -> None:
            rate = (tokens - before) / (time.monotonic() - started)
            advance(tokens, f"{rate:.0f} tokens/s")
            if as_json:
                click.echo(json.dumps({"tokens": tokens, "tokens_per_s": rate}))

        advance(before, "")
        total = stages.generate(
            opened, questions, config, device=device, threads=threads, progress=progress
        )
    if not as_json:
        click.echo(f"{total} answer tokens in {run / 'corpus'}")


@distill.command()
@_run_argument
@click.option(
    "--tokens",
    "tokens_max",
    type=click.IntRange(min=1),
    default=1_000_000,
    show_default=True,
    help="Answer tokens to train on in all, each time they are seen. More continues a run.",
)
@click.option(
    "--layers",
    "layer_count",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Layers of the drafter; the target's first ones are what they start from.",
)
@click.option(
    "--head",
    "head_size",
    type=click.IntRange(min=2),
    default=8_192,
    show_default=True,
    help="Tokens that the drafter can guess, the most frequent ones.",
)
@click.option(
    "--begin-with",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="A drafter to start from, such as the shipped one, when RUN has nothing trained yet.",
)
@click.option(
    "--batch-tokens", type=click.IntRange(min=16), default=1_536, show_default=True, help="A step."
)
@click.option(
    "--rate",
    type=click.FloatRange(min=0, min_open=True),
    default=1.4e-3,
    show_default=True,
    help="Learning rate between warm-up and decay.",
)
@click.option(
    "--decay-share",
    type=click.FloatRange(0, 1),
    default=0.4,
    show_default=True,
    help="Share of --tokens, at the end, over which the learning rate falls to nothing.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Order of the conversations.",
)
@click.option(
    "--score-every",
    "score_s",
    type=click.FloatRange(min=1),
    default=180.0,
    show_default=True,
    help="Seconds between scores on held-out text; the drafter and the run's state are then kept.",
)
@_model_options
def train(
    run: Path,
    layer_count: int,
    head_size: int,
    begin_with: Path | None,
    score_s: float,
    device: Any,
    threads: int,
    cache_dir: Path,
    as_json: bool,
    **options: Any,
) -> None:
    """Train a drafter on what lies in RUN; it is RUN/drafter.

    Agreement is how often the drafter's first choice is the target's, on conversations that are
    held out.
    """
    from outrider.model.distillation import stages
    from outrider.model.distillation.training import TrainingConfig

    _log_to_stderr()
    opened = stages.open_run(run, None, cache_dir)
    config = TrainingConfig(**options)
    with _bar("tokens", config.tokens_max, as_json) as advance:

        def report(entry: Report) -> None:
            if as_json:
                click.echo(json.dumps(asdict(entry)))
            advance(entry.tokens, f"loss {entry.loss:.3f}, {entry.tokens_per_s:.0f} tokens/s")
            if entry.agreement is not None and not as_json:
                click.echo(f"{entry.tokens:>9} tokens  agreement {entry.agreement:.3f}")

        last = stages.train(
            opened,
            config,
            report,
            layer_count=layer_count,
            head_size=head_size,
            begin_with=begin_with,
            device=device,
            threads=threads,
            score_s=score_s,
        )
    if not as_json:
        said = "nothing left to do" if last is None else f"agreement {last.agreement:.3f}"
        click.echo(f"{opened.drafter}: {said}")


@distill.command()
@click.argument("drafter", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option(
    "--prompts",
    "prompts_path",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    required=True,
    help="Questions: JSON lines with 'prompt' or 'turns', and perhaps 'category'.",
)
@click.option("--category", "categories", multiple=True, help="Only these; may be repeated.")
@click.option("--limit", type=click.IntRange(min=1), help="At most so many of each category.")
@click.option("--target", help="Where the target is, if not where it was.")
@click.option(
    "--answer-tokens",
    type=click.IntRange(min=2),
    default=128,
    show_default=True,
    help="Tokens of each answer that count.",
)
@click.option(
    "--tree/--no-tree", default=True, show_default=True, help="Measure tau as well; takes longer."
)
@_model_options
def evaluate(
    drafter: Path,
    prompts_path: Path,
    categories: tuple[str, ...],
    limit: int | None,
    target: str | None,
    answer_tokens: int,
    tree: bool,
    device: Any,
    threads: int,
    cache_dir: Path,
    as_json: bool,
) -> None:
    """Ask the target the questions in a file, and see how much of its answers DRAFTER guesses.

    \b
    agreement   share of tokens that are the drafter's first choice
    tau         tokens committed per verify step, with 16 nodes of a tree grown in 5 passes
    """
    from outrider.model.distillation import openings, stages
    from outrider.model.distillation.evaluation import TreeShape

    _log_to_stderr()
    prompts: list[openings.Prompt] = []
    for prompt in openings.read_prompts(prompts_path):
        same = sum(other.category == prompt.category for other in prompts)
        if (not categories or prompt.category in categories) and (limit is None or same < limit):
            prompts.append(prompt)
    if not prompts:
        raise click.UsageError(f"{prompts_path} has no questions of these categories")
    with _bar("answers", 2 * len(prompts), as_json) as advance:
        scores, times = stages.evaluate(
            drafter,
            prompts,
            cache_dir,
            target=target,
            answer_tokens_max=answer_tokens,
            shape=TreeShape() if tree else None,
            device=device,
            threads=threads,
            progress=lambda stage, count: advance(
                count if stage == "answered" else len(prompts) + count, stage
            ),
        )
    _print_scores(scores, tree, as_json)
    _print_times(times, as_json)


@distill.command()
@click.argument("drafter", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--target", help="Where the target is, if not where it was.")
@cache_option
def export(drafter: Path, folder: Path, target: str | None, cache_dir: Path) -> None:
    """Write DRAFTER to FOLDER as an ordinary model, for other engines.

    With embeddings, tokenizer and a head over the whole vocabulary, in float32; several times as
    large. Transformers takes it as `assistant_model`, others as their draft model.
    """
    from outrider.model.distillation.export import export_drafter
    from outrider.model.distillation.folder import read_folder
    from outrider.model.loading import resolve_model

    _log_to_stderr()
    place = resolve_model(target or read_folder(drafter).target.model, cache_dir).folder
    export_drafter(drafter, place, folder, cache_dir)
    click.echo(f"{folder}: ready")


def _print_scores(scores: dict[str, Score], tree: bool, as_json: bool) -> None:
    from outrider.model.distillation.evaluation import Score

    everything = Score()
    for score in scores.values():
        everything = everything.plus(score)
    rows = [*scores.items(), ("all", everything)] if len(scores) > 1 else list(scores.items())
    if as_json:
        for name, score in rows:
            entry = {"category": name, "tokens": score.tokens, "agreement": score.agreement}
            click.echo(json.dumps(entry | ({"tau": score.tau} if tree else {})))
        return
    table = Table("category", "tokens", "agreement", *(["tau"] if tree else []), box=None)
    for name, score in rows:
        table.add_row(
            name,
            str(score.tokens),
            f"{score.agreement:.3f}",
            *([f"{score.tau:.2f}"] if tree else []),
        )
    Console().print(table)


def _print_times(times: StepTimes, as_json: bool) -> None:
    draft_ms, verify_ms = 1e3 * times.draft_s, 1e3 * times.verify_s
    if as_json:
        click.echo(json.dumps({"draft_step_ms": draft_ms, "verify_step_ms": verify_ms}))
        return
    click.echo(
        f"A draft step of one leaf takes {draft_ms:.1f} ms, {times.share:.3f} of a verify step "
        f"of one row ({verify_ms:.1f} ms)."
    )


@contextlib.contextmanager
def _bar(unit: str, total: int, silent: bool) -> Iterator[Callable[[int, str], None]]:
    """Show a progress bar on a terminal; yields what moves it, with a remark."""
    console = Console(stderr=True)
    columns = (
        BarColumn(),
        TextColumn(f"{{task.completed:.0f}} of {{task.total:.0f}} {unit}"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, disable=silent or not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        yield lambda done, text: bar.update(task, completed=done, description=text)


def _log_to_stderr() -> None:
    logging.basicConfig(level="INFO", format="%(message)s")
