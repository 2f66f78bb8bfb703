"""What a student is shown at a time: conversations side by side, in a repeatable random order."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from outrider.model.distillation.corpus import Conversation, Corpus

_HELD_OUT_EVERY = 24
"""Every so many files one is held out."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Some conversations, padded at their ends."""

    tokens: torch.Tensor
    """int64 [conversations, longest]"""
    places: torch.Tensor
    """int64 [answers' tokens]: where in the flat `tokens` the answers' tokens are decided."""
    hidden: torch.Tensor
    """float32 [answers' tokens, hidden]: what the target's head saw there."""


def batch_of(conversations: Sequence[Conversation]) -> Batch:
    """Lay conversations out side by side."""
    longest = max(len(entry.tokens) for entry in conversations)
    tokens = torch.zeros((len(conversations), longest), dtype=torch.int64)
    places = []
    for row, entry in enumerate(conversations):
        tokens[row, : len(entry.tokens)] = entry.tokens
        # A token is decided at the one before it.
        places.append(row * longest + torch.arange(entry.answer_start, len(entry.tokens)) - 1)
    hidden = torch.cat([entry.hidden for entry in conversations]).float()
    return Batch(tokens, torch.cat(places), hidden)


def batches(
    corpus: Corpus, files: Sequence[Path], batch_tokens: int, order: random.Random
) -> Iterator[Batch]:
    """Return an epoch's batches of about `batch_tokens`, padding included, in random order."""
    conversations = [entry for path in files for entry in corpus.read(path)]
    order.shuffle(conversations)
    groups: list[list[Conversation]] = []
    # Neighbours in length share a batch, so that little is padding; but only within a stretch,
    # so that batches differ from epoch to epoch.
    for begin in range(0, len(conversations), 256):
        stretch = sorted(conversations[begin : begin + 256], key=lambda entry: len(entry.tokens))
        group: list[Conversation] = []
        for entry in stretch:
            if group and (len(group) + 1) * len(entry.tokens) > batch_tokens:
                groups.append(group)
                group = []
            group.append(entry)
        groups.append(group)
    order.shuffle(groups)
    for group in groups:
        yield batch_of(group)


def split(files: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Return the files to train on and those that are held out, by their numbers."""
    held_out = [path for path in files if _number(path) % _HELD_OUT_EVERY == 0]
    return [path for path in files if path not in held_out], held_out


def _number(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])
