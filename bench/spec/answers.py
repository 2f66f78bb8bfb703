"""Answers and what they took, in Spec-Bench's own field names, in files that grow.

A line is one answer of one contender: `{question_id, category, answer_id, model_id, choices:
[{index, turns, decoding_steps, new_tokens, wall_time, accept_lengths}], tstamp}`, as Spec-Bench's
`evaluation/eval.py` writes it and `evaluation/speed.py` reads it, one file a contender and
temperature. `accept_lengths` counts the target's own token of each step, so it is 1 without
speculation. What else is known stands in further fields.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from outrider.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Turn:
    """One answer within a conversation; times in seconds as whoever asked saw them."""

    text: str
    token_ids: tuple[int, ...]
    """All of them, with an end-of-sequence id if there was one."""
    prompt_tokens: int
    wall_s: float
    first_token_s: float
    accept_lengths: tuple[int, ...]
    """Tokens of each step of the target; they add up to the length of `token_ids`."""
    verified: int | None = None
    """Guesses that the target looked at; None if the contender does not say."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One contender's answers to all turns of a question."""

    question_id: int
    category: str
    contender: str
    temperature: float
    repeat: int
    round: str
    """Names the round in which contenders answered this question in turn."""
    turns: tuple[Turn, ...]
    unix_s: float

    @property
    def tokens(self) -> int:
        """Output tokens of all turns, as ids: texts are never counted again."""
        return sum(len(turn.token_ids) for turn in self.turns)

    @property
    def tokens_per_s(self) -> float:
        """Output tokens over wall time, prefill included."""
        return self.tokens / sum(turn.wall_s for turn in self.turns)

    @property
    def accept_lengths(self) -> tuple[int, ...]:
        """Of all turns."""
        return tuple(length for turn in self.turns for length in turn.accept_lengths)


def to_line(answer: Answer) -> str:
    """Write an answer as a line, without its end."""
    turns = answer.turns
    return json.dumps(
        {
            "question_id": answer.question_id,
            "category": answer.category,
            "answer_id": f"{answer.round}-{answer.contender}",
            "model_id": answer.contender,
            "choices": [
                {
                    "index": answer.repeat,
                    "turns": [turn.text for turn in turns],
                    "decoding_steps": [len(turn.accept_lengths) for turn in turns],
                    "new_tokens": [len(turn.token_ids) for turn in turns],
                    "wall_time": [round(turn.wall_s, 6) for turn in turns],
                    "accept_lengths": list(answer.accept_lengths),
                    "first_token_time": [round(turn.first_token_s, 6) for turn in turns],
                    "prompt_tokens": [turn.prompt_tokens for turn in turns],
                    "verified_draft_tokens": [turn.verified for turn in turns],
                    "token_ids": [list(turn.token_ids) for turn in turns],
                }
            ],
            "tstamp": answer.unix_s,
            "temperature": answer.temperature,
            "round": answer.round,
        }
    )


def from_line(line: str) -> Answer:
    """Read what `to_line` wrote. Raises ValueError, KeyError or TypeError."""
    entry: dict[str, Any] = json.loads(line)
    (choice,) = entry["choices"]
    lengths = iter(choice["accept_lengths"])
    turns = tuple(
        Turn(text, tuple(ids), prompt, wall_s, first_s, tuple(islice(lengths, steps)), verified)
        for text, ids, prompt, wall_s, first_s, steps, verified in zip(
            choice["turns"],
            choice["token_ids"],
            choice["prompt_tokens"],
            choice["wall_time"],
            choice["first_token_time"],
            choice["decoding_steps"],
            choice["verified_draft_tokens"],
            strict=True,
        )
    )
    return Answer(
        entry["question_id"],
        entry["category"],
        entry["model_id"],
        entry["temperature"],
        choice["index"],
        entry["round"],
        turns,
        entry["tstamp"],
    )


class AnswerStore:
    """A folder of answers, all measured under one setting; written to its end or gone on with."""

    def __init__(self, folder: Path, setting: Mapping[str, Any], *, fresh: bool = False) -> None:
        """`setting` is whatever makes answers comparable. Raises `ConfigError` if those differ."""
        self.folder = folder
        self._header = folder / "setting.json"
        current: dict[str, Any] = json.loads(json.dumps(setting))
        folder.mkdir(parents=True, exist_ok=True)
        if fresh:
            for path in (*folder.glob("*.jsonl"), self._header):
                path.unlink(missing_ok=True)
        if self._header.exists():
            self._check(current)
        self._header.write_text(json.dumps(current, indent=2) + "\n")

    def _check(self, setting: dict[str, Any]) -> None:
        try:
            before: dict[str, Any] = json.loads(self._header.read_text())
        except ValueError:
            before = {}
        names = sorted({*before, *setting})
        other = [name for name in names if before.get(name) != setting.get(name)]
        if other:
            says = ", ".join(f"{n} was {before.get(n)!r}, is {setting.get(n)!r}" for n in other)
            raise ConfigError(
                f"{self.folder} holds answers of another setting ({says});"
                " --fresh begins anew, --results-dir names another folder"
            )

    def read(self) -> list[Answer]:
        """Read all answers. Raises `ConfigError`. A line that was never finished is cut off."""
        return [answer for path in self._files() for answer in self._read(path)]

    def append(self, answers: Iterable[Answer]) -> None:
        """Add answers, each to its contender's file."""
        for answer in answers:
            with self._path(answer).open("a") as file:
                file.write(to_line(answer) + "\n")

    def _path(self, answer: Answer) -> Path:
        return self.folder / f"{answer.contender}-temperature-{answer.temperature:g}.jsonl"

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*-temperature-*.jsonl"))

    def _read(self, path: Path) -> list[Answer]:
        text = path.read_text()
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            path.write_text(whole)
        try:
            return [from_line(line) for line in whole.splitlines()]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path} does not hold answers of this version ({type(error).__name__}: {error});"
                " --fresh begins anew"
            ) from error


def lengths_of_sources(sources: Sequence[int]) -> tuple[int, ...]:
    """Tokens of each verify step, from who guessed each token.

    A step commits accepted guesses and one token of the target's own (source 0), which is missing
    only where the output was cut.
    """
    lengths: list[int] = []
    run = 0
    for source in sources:
        run += 1
        if source == 0:
            lengths.append(run)
            run = 0
    return (*lengths, run) if run else tuple(lengths)


def lengths_of_times(times_s: Sequence[float]) -> tuple[int, ...]:
    """Tokens of each step, from the times at which tokens came: those of a step come at once."""
    lengths: list[int] = []
    last_s: float | None = None
    for at_s in times_s:
        if at_s == last_s:
            lengths[-1] += 1
        else:
            lengths.append(1)
        last_s = at_s
    return tuple(lengths)
