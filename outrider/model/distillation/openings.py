"""What conversations with the target begin with: whole questions, or starts that it completes.

The target's answers are what a drafter must learn, so the questions should be of the kinds that
users ask. A file of kinds (TOML) combines templates with topics; a file of prompts (JSON lines)
gives the questions themselves. Both are cheap to write; the target does the rest.
"""

from __future__ import annotations

import json
import random
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from outrider.errors import ConfigError

KINDS_FILE = Path(__file__).with_name("openings.toml")
"""The kinds that ship with Outrider: what people ask an assistant, in English."""

TOPIC = "{topic}"
NUMBER = "{number}"


@dataclass(frozen=True, slots=True)
class Opening:
    """The first turn of a conversation, or its beginning."""

    text: str
    complete: bool
    """False: the target itself writes the rest of the turn."""


@dataclass(frozen=True, slots=True)
class Kind:
    """Questions of one kind."""

    name: str
    turns: tuple[str, ...]
    """Whole questions; `{topic}` stands for one of the topics, `{number}` for some number."""
    starts: tuple[str, ...]
    """Beginnings of questions, likewise."""
    topics: tuple[str, ...]


class Openings(Protocol):
    """An endless, reproducible series of openings."""

    def opening(self, seed: int, index: int) -> Opening:
        """Return the opening of a conversation, a function of its arguments."""


@dataclass(frozen=True, slots=True)
class KindsOpenings:
    """Kinds in turn; within a kind, templates and topics by chance."""

    kinds: Sequence[Kind]
    starts_share: float = 0.6
    """Share of conversations that only have a start, where a kind has both."""

    def opening(self, seed: int, index: int) -> Opening:
        """Return the opening of a conversation; see `Openings`."""
        kind = self.kinds[index % len(self.kinds)]
        chance = random.Random(f"{seed} {index}")
        share = self.starts_share if kind.turns else 1.0
        complete = not kind.starts or chance.random() >= share
        text = chance.choice(kind.turns if complete else kind.starts)
        while TOPIC in text:
            text = text.replace(TOPIC, chance.choice(kind.topics), 1)
        while NUMBER in text:
            text = text.replace(NUMBER, str(chance.randint(2, chance.choice((12, 60, 300)))), 1)
        return Opening(text, complete)


@dataclass(frozen=True, slots=True)
class PromptsOpenings:
    """The prompts of a file, one after the other and again from the first."""

    prompts: Sequence[str]

    def opening(self, seed: int, index: int) -> Opening:
        """Return the opening of a conversation; see `Openings`."""
        return Opening(self.prompts[index % len(self.prompts)], True)


def read_openings(path: Path) -> Openings:
    """Read a file of kinds (.toml) or of prompts (JSON lines). Raises `ConfigError`."""
    if path.suffix == ".toml":
        return KindsOpenings(read_kinds(path))
    return PromptsOpenings([prompt.text for prompt in read_prompts(path)])


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question and what kind of question it is."""

    text: str
    category: str


def read_prompts(path: Path) -> list[Prompt]:
    """Read JSON lines with `prompt`, or the first of `turns`, and perhaps a `category`.

    Raises `ConfigError`, which names the line.
    """
    prompts = []
    for number, line in enumerate(_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            text = entry["prompt"] if "prompt" in entry else entry["turns"][0]
            category = entry.get("category", "all")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            text, category = None, ""
        if not isinstance(text, str) or not isinstance(category, str) or not text:
            raise ConfigError(
                f"{path}, line {number}: a line is a JSON object with 'prompt' or 'turns'"
            )
        prompts.append(Prompt(text, category))
    if not prompts:
        raise ConfigError(f"{path} has no prompts")
    return prompts


def read_kinds(path: Path) -> list[Kind]:
    """Read a file of kinds. Raises `ConfigError`, which names the kind."""
    try:
        tables = tomllib.loads(_text(path)).get("kind", [])
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(tables, list) or not tables:
        raise ConfigError(f"{path} has no [[kind]]")
    return [_kind(path, table) for table in tables]


def _kind(path: Path, table: Mapping[str, Any]) -> Kind:
    name = str(table.get("name", "?"))
    unknown = table.keys() - {"name", "turns", "starts", "topics"}
    if unknown:
        raise ConfigError(f"{path}, kind '{name}': unknown key '{min(unknown)}'")
    lists = {}
    for key in ("turns", "starts", "topics"):
        values = table.get(key, [])
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise ConfigError(f"{path}, kind '{name}': {key} must be a list of texts")
        lists[key] = tuple(values)
    if not lists["turns"] and not lists["starts"]:
        raise ConfigError(f"{path}, kind '{name}': it has neither turns nor starts")
    if not lists["topics"] and any(TOPIC in text for text in (*lists["turns"], *lists["starts"])):
        raise ConfigError(f"{path}, kind '{name}': it uses {TOPIC} and has no topics")
    return Kind(name, **lists)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
