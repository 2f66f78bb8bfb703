"""Answers in files: Spec-Bench's field names, growing, going on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.spec.answers import (
    Answer,
    AnswerStore,
    Turn,
    from_line,
    lengths_of_sources,
    lengths_of_times,
    to_line,
)
from outrider.errors import ConfigError

_TURNS = (
    Turn("one two", (5, 6, 7), 11, 0.75, 0.25, (1, 2), 4),
    Turn("three", (8, 9), 20, 0.5, 0.125, (2,), None),
)
ANSWER = Answer(81, "writing", "outrider", 0.0, 0, "aa", _TURNS, 1700000000.0)


def _speed_of_spec_bench(line: str) -> tuple[float, float]:
    """What Spec-Bench's `evaluation/speed.py` makes of a line: tokens/s and mean accepted."""
    choice: dict[str, Any] = json.loads(line)["choices"][0]
    lengths = choice["accept_lengths"]
    speed = sum(choice["new_tokens"]) / sum(choice["wall_time"])
    return speed, sum(lengths) / len(lengths)


def test_a_line_has_the_fields_of_spec_bench_and_comes_back_as_it_was() -> None:
    line = to_line(ANSWER)
    entry = json.loads(line)
    assert {"question_id", "category", "answer_id", "model_id", "choices", "tstamp"} <= set(entry)
    assert entry["choices"][0]["turns"] == ["one two", "three"]
    assert entry["choices"][0]["decoding_steps"] == [2, 1]
    assert _speed_of_spec_bench(line) == (5 / 1.25, 5 / 3)
    assert from_line(line) == ANSWER


def test_sources_tell_the_steps() -> None:
    assert lengths_of_sources((0, 1, 1, 0, 2, 0, 0)) == (1, 3, 2, 1)
    # Cut at a stop id or limit: the last step has no token of the target's own.
    assert lengths_of_sources((0, 1, 1)) == (1, 2)
    assert lengths_of_sources(()) == ()


def test_tokens_of_one_time_are_one_step() -> None:
    assert lengths_of_times((0.1, 0.2, 0.2, 0.2, 0.3)) == (1, 3, 1)


def test_answers_are_appended_and_read_in_a_file_for_each_contender(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path, {"model": "m", "drafters": ("a",)})
    other = replace(ANSWER, contender="vllm")
    store.append([ANSWER, other])
    store.append([replace(ANSWER, round="bb", temperature=1.0)])
    # Settings come back as JSON has them: a list is a tuple.
    again = AnswerStore(tmp_path, {"model": "m", "drafters": ["a"]})
    assert len(again.read()) == 3
    assert (tmp_path / "vllm-temperature-0.jsonl").read_text() == to_line(other) + "\n"


def test_a_line_that_was_broken_off_is_cut_and_the_rest_kept(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path, {})
    store.append([ANSWER])
    path = tmp_path / "outrider-temperature-0.jsonl"
    path.write_text(path.read_text() + to_line(ANSWER)[:40])
    assert store.read() == [ANSWER]
    store.append([ANSWER])
    assert store.read() == [ANSWER, ANSWER]


def test_another_setting_is_refused_unless_begun_anew(tmp_path: Path) -> None:
    AnswerStore(tmp_path, {"dtype": "bfloat16"}).append([ANSWER])
    with pytest.raises(ConfigError, match="dtype was 'bfloat16', is 'float32'"):
        AnswerStore(tmp_path, {"dtype": "float32"})
    assert AnswerStore(tmp_path, {"dtype": "float32"}, fresh=True).read() == []
