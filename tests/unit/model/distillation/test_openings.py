"""What conversations begin with: the built-in kinds, files of prompts, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from outrider.errors import ConfigError
from outrider.model.distillation.openings import (
    KINDS_FILE,
    KindsOpenings,
    Opening,
    Prompt,
    read_kinds,
    read_openings,
    read_prompts,
)


def test_built_in_kinds_give_reproducible_and_varied_openings() -> None:
    openings = read_openings(KINDS_FILE)
    first = [openings.opening(0, index) for index in range(300)]
    assert first == [openings.opening(0, index) for index in range(300)]
    assert first != [openings.opening(1, index) for index in range(300)]
    assert len({opening.text for opening in first}) > 200
    assert 0.2 < sum(opening.complete for opening in first) / len(first) < 0.8


def test_no_placeholder_is_left() -> None:
    openings = read_openings(KINDS_FILE)
    for index in range(2_000):
        assert "{" not in openings.opening(3, index).text


def test_a_start_may_leave_everything_to_the_target() -> None:
    anything = KindsOpenings([kind for kind in read_kinds(KINDS_FILE) if kind.name == "anything"])
    found = {anything.opening(0, index) for index in range(200)}
    assert Opening("", False) in found
    assert not any(opening.complete for opening in found)


def test_kinds_take_turns_and_fill_in_topics(tmp_path: Path) -> None:
    path = tmp_path / "kinds.toml"
    path.write_text(
        '[[kind]]\nname = "a"\nturns = ["About {topic}?"]\ntopics = ["tea"]\n'
        '[[kind]]\nname = "b"\nstarts = ["Why "]\n'
    )
    openings = read_openings(path)
    assert [openings.opening(0, index) for index in range(3)] == [
        Opening("About tea?", True),
        Opening("Why ", False),
        Opening("About tea?", True),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no \\[\\[kind\\]\\]"),
        ("kind = 3", "no \\[\\[kind\\]\\]"),
        ("[[kind", "cannot be read"),
        ('[[kind]]\nname = "a"', "'a': it has neither"),
        ('[[kind]]\nname = "a"\nturns = ["{topic}"]', "'a': it uses {topic}"),
        ('[[kind]]\nname = "a"\nturns = "no list"', "'a': turns must be a list"),
        ('[[kind]]\nname = "a"\nturn = ["x"]', "'a': unknown key 'turn'"),
    ],
)
def test_wrong_kinds_are_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "kinds.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_kinds(path)


def test_prompts_are_texts_or_first_turns(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": "one", "category": "x"}\n\n{"turns": ["two", "three"]}\n', encoding="utf-8"
    )
    assert read_prompts(path) == [Prompt("one", "x"), Prompt("two", "all")]
    openings = read_openings(path)
    assert [openings.opening(0, index).text for index in range(3)] == ["one", "two", "one"]


@pytest.mark.parametrize(
    "line", ["{", "[]", "3", "{}", '{"turns": []}', '{"prompt": 3}', '{"prompt": ""}']
)
def test_wrong_prompts_are_refused_by_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "fine"}}\n{line}\n')
    with pytest.raises(ConfigError, match="line 2"):
        read_prompts(path)


def test_no_prompts_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n")
    with pytest.raises(ConfigError, match="no prompts"):
        read_prompts(path)
