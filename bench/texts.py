"""Token sequences of given lengths out of the benchmark's prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from tokenizers import Tokenizer

PROMPTS = Path(__file__).with_name("prompts.json")
_STRIDE = 37


class Texts:
    """Plain text as a tokenizer sees it; each index starts elsewhere in it."""

    def __init__(self, tokenizer_files: Mapping[str, bytes]) -> None:
        self._tokenizer = Tokenizer.from_buffer(tokenizer_files["tokenizer.json"])
        entries = json.loads(PROMPTS.read_text())["prompts"]
        self._ids = self.encode("\n\n".join(entry["prompt"] for entry in entries))

    def encode(self, text: str) -> tuple[int, ...]:
        """Tokenize without special tokens."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def take(self, index: int, length: int) -> tuple[int, ...]:
        """`length` tokens that differ from the first on between indices below 10 or so."""
        start = index * _STRIDE
        return tuple(self._ids[(start + at) % len(self._ids)] for at in range(length))

    def counting(self, first: int) -> tuple[int, ...]:
        """A text whose continuation leaves a model no doubt: numbers in order."""
        return self.encode(", ".join(str(number) for number in range(first, first + 24)) + ",")
