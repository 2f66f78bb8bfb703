"""Makes a datastore of a corpus: documents in, ids and their suffix array out.

Sorting is prefix doubling (Manber and Myers, 1990) in numpy, stopped at `MATCH_MAX` ids: four
doublings, each one sort of integers. Libraries that build whole suffix arrays sort bytes, and
suffixes much longer than anything that is ever looked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from drafter_service.datastore import MATCH_MAX, TOKENS_MAX, Header, Tokens, write_datastore
from outrider.errors import ConfigError
from outrider.tokenizer import tokenizer_fingerprint

_BATCH_DOCUMENTS = 256
_CHUNK_CHARACTERS = 1 << 20
"""A plain text file is read in pieces of about so much, ended at a line's end."""

Document = str | Sequence[int]
"""Text, or ids of it."""


def load_tokenizer(path: Path) -> Tokenizer:
    """Load `tokenizer.json`, or that of a model's folder. Raises `ConfigError`."""
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(f"tokenizer {file} cannot be loaded: {error}") from error


def documents_of(path: Path, field: str) -> Iterator[Document]:
    """Read a corpus file: `.jsonl` holds a document a line, anything else is one document.

    That one is cut into several if it is very long. A line of `.jsonl` is a text, a list of ids,
    or an object whose `field` is one of these. Raises `ConfigError` naming file and line.
    """
    try:
        with path.open(encoding="utf-8") as file:
            if path.suffix != ".jsonl":
                while text := "".join(file.readlines(_CHUNK_CHARACTERS)):
                    yield text
                return
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _document(line, field, f"{path}:{number}")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"corpus file {path} cannot be read: {error}") from error


def _document(line: str, field: str, place: str) -> Document:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{place}: not JSON: {error}") from error
    if isinstance(found, dict):
        if field not in found:
            known = ", ".join(sorted(found)) or "nothing"
            raise ConfigError(f"{place}: has no field {field!r}, but {known}; see --field")
        found = found[field]
    if isinstance(found, str):
        return found
    if isinstance(found, list) and all(type(token) is int for token in found):
        return found
    raise ConfigError(f"{place}: neither a text nor a list of ids")


def collect_tokens(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    *,
    tokens_max: int = TOKENS_MAX,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Tokens, int]:
    """Return the ids of all documents, each followed by the separator, and how many they are.

    Empty documents are left out. Stops before the document that would exceed `tokens_max`;
    `progress` is told of documents and ids so far. Raises `ConfigError` for ids outside the
    vocabulary, and for a corpus without any id.
    """
    separator = vocabulary_size_of(tokenizer)
    pieces: list[Tokens] = []
    total = 0
    for ids in _encoded(documents, tokenizer):
        if not ids:
            continue
        if total + len(ids) + 1 > tokens_max:
            break
        if min(ids) < 0 or max(ids) >= separator:
            raise ConfigError(
                f"document {len(pieces) + 1} of the corpus has ids outside the tokenizer's "
                f"vocabulary of {separator}"
            )
        pieces.append(np.array([*ids, separator], np.uint32))
        total += len(ids) + 1
        if progress is not None:
            progress(len(pieces), total)
    if not pieces:
        raise ConfigError("the corpus has no document that fits: there is nothing to build of")
    return np.concatenate(pieces), len(pieces)


def _encoded(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[Sequence[int]]:
    """Ids of each document, in order; texts are encoded in batches, on all cores."""
    batch: list[Document] = []
    for document in documents:
        batch.append(document)
        if len(batch) == _BATCH_DOCUMENTS:
            yield from _encoded_batch(batch, tokenizer)
            batch = []
    yield from _encoded_batch(batch, tokenizer)


def _encoded_batch(batch: Sequence[Document], tokenizer: Tokenizer) -> Iterator[Sequence[int]]:
    texts = [document for document in batch if isinstance(document, str)]
    encodings = iter(tokenizer.encode_batch_fast(texts, add_special_tokens=False))
    for document in batch:
        yield next(encodings).ids if isinstance(document, str) else document


def vocabulary_size_of(tokenizer: Tokenizer) -> int:
    """One more than the highest id."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def sorted_suffixes(
    tokens: Tokens, progress: Callable[[int, int], None] | None = None
) -> NDArray[np.uint32]:
    """Return where the suffixes of `tokens` begin, sorted by their first `MATCH_MAX` ids.

    Equal ones stay in the order of the text, and a suffix that ends comes before those that go
    on. `progress` is told of doublings done, and of all.
    """
    ranks = tokens.astype(np.uint64) + 1  # 0 is left for what lies behind the end
    doublings = MATCH_MAX.bit_length() - 1
    order: NDArray[np.intp] = np.zeros(0, np.intp)
    for done in range(doublings):
        width = 1 << done
        behind = np.zeros_like(ranks)
        behind[:-width] = ranks[width:]
        keys = (ranks << np.uint64(32)) | behind
        # A rank is the same whatever the order of equals: only the last one is kept.
        order = np.argsort(keys, kind="stable" if done == doublings - 1 else None)
        keys = keys[order]
        steps = np.ones(len(keys), np.uint64)
        steps[1:] = keys[1:] != keys[:-1]
        ranks[order] = np.cumsum(steps)
        if progress is not None:
            progress(done + 1, doublings)
    return order.astype(np.uint32)


def build_datastore(
    target: Path,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    *,
    tokens_max: int = TOKENS_MAX,
    collecting: Callable[[int, int], None] | None = None,
    sorting: Callable[[int, int], None] | None = None,
) -> Header:
    """Build a datastore; `target` is replaced at once when it is complete. Raises `ConfigError`."""
    tokens, count = collect_tokens(documents, tokenizer, tokens_max=tokens_max, progress=collecting)
    suffixes = sorted_suffixes(tokens, sorting)
    partial = target.with_name(target.name + ".partial")
    try:
        with partial.open("wb") as file:
            header = write_datastore(
                file,
                tokens,
                suffixes,
                tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
                vocabulary_size=vocabulary_size_of(tokenizer),
                documents=count,
            )
        # Processes that have the old one open keep it.
        partial.replace(target)
    except OSError as error:
        raise ConfigError(f"datastore {target} cannot be written: {error}") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    return header
