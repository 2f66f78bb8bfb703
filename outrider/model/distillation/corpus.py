"""Conversations that a target has written, in files that come and go as a whole.

A file holds some conversations end to end: their ids, where each answer begins, and what the
target's output head saw before each token of an answer. From the latter the target's whole
distribution can be computed for any part of the vocabulary, at two bytes a number.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from outrider.errors import ConfigError

_PATTERN = "conversations-*.safetensors"


@dataclass(frozen=True, slots=True)
class Conversation:
    """A question and the target's answer."""

    tokens: torch.Tensor
    """int32 [length]"""
    answer_start: int
    """Index of the answer's first token."""
    hidden: torch.Tensor
    """float16 [length - answer_start, hidden]: what the head saw for each token of the answer."""


class Corpus:
    """A folder of conversations of one target."""

    def __init__(self, folder: Path, target_digest: str) -> None:
        self.folder = folder
        self._target_digest = target_digest

    def path(self, number: int) -> Path:
        """Return where the conversations of a file's number are, or will be."""
        return self.folder / f"conversations-{number:05d}.safetensors"

    def files(self) -> list[Path]:
        """Return the files there are, in the order of their numbers."""
        return sorted(self.folder.glob(_PATTERN))

    def write(self, number: int, conversations: Sequence[Conversation]) -> None:
        """Write a file; readers see all of it or nothing."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            "tokens": torch.cat([conversation.tokens for conversation in conversations]),
            "hidden": torch.cat([conversation.hidden for conversation in conversations]),
            "sizes": torch.tensor(
                [[len(entry.tokens), entry.answer_start] for entry in conversations],
                dtype=torch.int32,
            ),
        }
        path = self.path(number)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        save_file(tensors, partial, {"target": self._target_digest})
        partial.replace(path)

    def answer_tokens(self) -> int:
        """Return how many tokens all answers have."""
        return sum(count for _, count in map(self._header, self.files()))

    def read(self, path: Path) -> Iterator[Conversation]:
        """Read a file. Raises `ConfigError` if it is damaged or another target's."""
        self._header(path)
        try:
            with safe_open(path, framework="pt") as file:
                tokens, hidden = file.get_tensor("tokens"), file.get_tensor("hidden")
                sizes = file.get_tensor("sizes").tolist()
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from error
        at = at_hidden = 0
        for length, answer_start in sizes:
            answer = length - answer_start
            yield Conversation(
                tokens[at : at + length], answer_start, hidden[at_hidden : at_hidden + answer]
            )
            at, at_hidden = at + length, at_hidden + answer

    def _header(self, path: Path) -> tuple[str, int]:
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                count: int = file.get_slice("hidden").get_shape()[0]
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from error
        target = metadata.get("target", "")
        if target != self._target_digest:
            raise ConfigError(
                f"{path} was written by another target ({target[:12]}, this one is"
                f" {self._target_digest[:12]})"
            )
        return target, count
