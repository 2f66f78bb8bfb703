"""Questions: reading, refusing, choosing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.spec.options import QUESTIONS
from bench.spec.questions import SUB_TASKS, Question, choose, in_order, read_questions
from outrider.errors import ConfigError


def _write(path: Path, *entries: object) -> Path:
    path.write_text("\n".join(json.dumps(entry) for entry in entries))
    return path


def test_our_own_questions_cover_every_sub_task_and_a_second_turn() -> None:
    questions = read_questions(QUESTIONS)
    assert {question.sub_task for question in questions} == set(SUB_TASKS)
    assert any(len(question.turns) > 1 for question in questions)


def test_sub_tasks_take_turns_and_the_limit_holds_for_each() -> None:
    questions = [
        Question(number, category, ("x",))
        for number, category in enumerate(
            ["rag", "rag", "rag", "writing", "writing", "coding", "translation"]
        )
    ]
    chosen = choose(questions, 2)
    assert [q.category for q in chosen] == ["writing", "translation", "rag", "coding", "rag"]
    assert len(choose(questions, None)) == len(questions)


def test_unknown_categories_stand_for_themselves_and_come_last() -> None:
    assert in_order(["poems", "rag", "mt_bench"]) == ["mt_bench", "rag", "poems"]


@pytest.mark.parametrize(
    "entry",
    [
        {"question_id": 1, "category": "qa"},
        {"question_id": 1, "category": "qa", "turns": "one text"},
        {"question_id": 1, "category": "qa", "turns": []},
        {"question_id": "x", "category": "qa", "turns": ["a"]},
        ["no", "object"],
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, entry: object) -> None:
    good = {"question_id": 0, "category": "qa", "turns": ["a"]}
    with pytest.raises(ConfigError, match="line 2"):
        read_questions(_write(tmp_path / "q.jsonl", good, entry))


def test_a_number_twice_is_refused(tmp_path: Path) -> None:
    good = {"question_id": 7, "category": "qa", "turns": ["a"]}
    with pytest.raises(ConfigError, match="question_id 7 twice"):
        read_questions(_write(tmp_path / "q.jsonl", good, good))


def test_a_missing_or_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        read_questions(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="has none"):
        read_questions(_write(tmp_path / "q.jsonl"))
