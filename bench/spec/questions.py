"""Questions in Spec-Bench's format: which there are, and which of them are asked.

Spec-Bench is the benchmark of Xia et al., "Unlocking Efficiency in Large Language Model Inference:
A Comprehensive Survey of Speculative Decoding" (ACL Findings 2024): six sub-tasks, one JSON object
a line with `question_id`, `category` and `turns`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from outrider.errors import ConfigError

SUB_TASKS = ("mt_bench", "translation", "summarization", "qa", "math_reasoning", "rag")
"""In the order of the survey's table."""
_MT_BENCH = frozenset(
    ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
)


@dataclass(frozen=True, slots=True)
class Question:
    """One conversation: what the user says, turn by turn."""

    question_id: int
    category: str
    turns: tuple[str, ...]

    @property
    def sub_task(self) -> str:
        """The sub-task that its category belongs to; MT-bench has eight categories."""
        return sub_task_of(self.category)


def sub_task_of(category: str) -> str:
    """Return the sub-task of a category; one that Spec-Bench does not know stands for itself."""
    return "mt_bench" if category in _MT_BENCH else category


def in_order(sub_tasks: Iterable[str]) -> list[str]:
    """Sort sub-tasks as the survey's table does; others come last."""
    names = set(sub_tasks)
    return [name for name in SUB_TASKS if name in names] + sorted(names - set(SUB_TASKS))


def read_questions(path: Path) -> list[Question]:
    """Read a file. Raises `ConfigError`, which names the line."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"questions: cannot read {path}: {error}") from error
    questions = [
        _question(line, f"{path}, line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not questions:
        raise ConfigError(f"questions: {path} has none")
    ids = [question.question_id for question in questions]
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise ConfigError(f"questions: {path} has question_id {twice} twice")
    return questions


def choose(questions: Sequence[Question], limit_per_category: int | None) -> list[Question]:
    """Take so many questions of each sub-task, and let the sub-tasks take turns.

    So whoever breaks off has asked about as many of each. Within a sub-task categories take turns,
    too.
    """
    by_task: defaultdict[str, defaultdict[str, list[Question]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for question in questions:
        by_task[question.sub_task][question.category].append(question)
    columns = [
        _alternate(list(by_task[task].values()))[:limit_per_category] for task in in_order(by_task)
    ]
    return _alternate(columns)


def _alternate(columns: Sequence[Sequence[Question]]) -> list[Question]:
    rows = zip_longest(*columns)
    return [question for question in chain.from_iterable(rows) if question is not None]


def _question(line: str, where: str) -> Question:
    try:
        entry: dict[str, Any] = json.loads(line)
        question = Question(
            int(entry["question_id"]), str(entry["category"]), tuple(map(str, entry["turns"]))
        )
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"questions: {where} is no object with question_id, category and turns"
            f" ({type(error).__name__}: {error})"
        ) from error
    if isinstance(entry["turns"], str) or not question.turns or not all(question.turns):
        raise ConfigError(f"questions: {where}: turns must be a list of texts that are not empty")
    return question
