"""`outrider datastore`: builds and shows what `--proposer datastore` guesses from."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress

from drafter_service.datastore import TOKENS_MAX, open_datastore
from outrider.errors import OutriderError


class _Group(click.Group):
    """Shows our errors as one line, never as a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OutriderError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(1)


@click.group("datastore", cls=_Group)
def datastore() -> None:
    """Build and inspect datastores: corpora that drafters guess from.

    \b
    Build one:    outrider datastore build docs.store --tokenizer ./my-model notes/*.txt
    Look at it:   outrider datastore info docs.store
    Guess from it:
        outrider drafter --proposer datastore --datastore docs.store

    A drafter looks up the last few tokens of a session and guesses what followed them in the
    corpus. That pays where output resembles it: manuals, code, answers given before. The output
    never changes, but who can measure its speed can learn what is in the corpus.
    """


@datastore.command()
@click.argument("target", type=click.Path(dir_okay=False, path_type=Path))
@click.argument(
    "corpus",
    nargs=-1,
    required=True,
    type=click.Path(exists=True, dir_okay=False, allow_dash=False, path_type=Path),
)
@click.option(
    "--tokenizer",
    "tokenizer_path",
    required=True,
    type=click.Path(exists=True, path_type=Path),
    help="The target's: its folder, or tokenizer.json.",
)
@click.option(
    "--field", default="text", show_default=True, help="Where objects in .jsonl have their text."
)
@click.option(
    "--tokens-max",
    type=click.IntRange(1, TOKENS_MAX),
    default=TOKENS_MAX,
    help="Stop before the document that exceeds this.  [default: 4 billion]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON when done.")
def build(
    target: Path,
    corpus: tuple[Path, ...],
    tokenizer_path: Path,
    field: str,
    tokens_max: int,
    as_json: bool,
) -> None:
    """Build TARGET from the files of a CORPUS, replacing it when done.

    \b
    Files:  *.jsonl   a document a line: "text", [1, 2, 3] (ids), or an object with --field
            others    text in UTF-8, one document each
    Size:   8 bytes a token, of which a drafter has in memory what it looks at
    Time:   a few seconds a million tokens; memory about 40 bytes a token

    \b
    Of answers that were given:   outrider datastore build answers.store \\
                                    --tokenizer ./my-model --field completion log.jsonl
    """
    from drafter_service.datastore_building import (
        Document,
        build_datastore,
        documents_of,
        load_tokenizer,
    )

    tokenizer = load_tokenizer(tokenizer_path)
    began_s = time.perf_counter()
    with Progress(console=Console(stderr=True)) as progress:
        reading = progress.add_task("reading", total=len(corpus))
        sorting = progress.add_task("sorting", total=None, start=False)

        def documents() -> Iterator[Document]:
            for path in corpus:
                yield from documents_of(path, field)
                progress.advance(reading)

        def collected(count: int, tokens: int) -> None:
            progress.update(reading, description=f"reading: {count:,} documents, {tokens:,} tokens")

        def sorted_so_far(done: int, total: int) -> None:
            progress.start_task(sorting)
            progress.update(sorting, completed=done, total=total)

        build_datastore(
            target,
            documents(),
            tokenizer,
            tokens_max=tokens_max,
            collecting=collected,
            sorting=sorted_so_far,
        )
    _show(target, as_json, built_s=time.perf_counter() - began_s)


@datastore.command()
@click.argument("path", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def info(path: Path, as_json: bool) -> None:
    """Show what a datastore holds, after checking all of it.

    \b
    Does it fit a target?  Both must have the same tokenizer fingerprint:
        outrider datastore info docs.store --json | jq -r .tokenizer_fingerprint
    """
    _show(path, as_json)


def _show(path: Path, as_json: bool, **more: float) -> None:
    store = open_datastore(path)
    facts: dict[str, str | int | float] = {
        "path": str(path),
        "size_bytes": store.size_bytes,
        "digest": store.digest,
        **asdict(store.header),
        **{name: round(value, 3) for name, value in more.items()},
    }
    if as_json:
        click.echo(json.dumps(facts))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        # Not a table, which would cut paths and fingerprints off where the terminal ends.
        shown = f"{value:,}" if type(value) is int else value
        click.echo(f"{name:<{width}}  {shown}")
