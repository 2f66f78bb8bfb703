"""`outrider distill` from the command line, with a tiny target: all stages, and wrong uses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import outrider.local
from outrider.cli import local_config, main
from outrider.shipped import CORES_MIN

TARGET = "random:tiny?seed=1&layers=4"
COMMON = ["--device", "cpu", "--threads", "1"]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["distill", *map(str, arguments)])


def lines(result: Result) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    entries = [("why", "a"), ("who", "b"), ("when", "b"), ("where", "c")]
    path.write_text(
        "".join(json.dumps({"prompt": text, "category": kind}) + "\n" for text, kind in entries)
    )
    return path


def test_from_a_target_to_a_scored_drafter(tmp_path: Path, prompts: Path) -> None:
    folder = tmp_path / "run"
    written = lines(
        run(
            *("generate", folder, "--target", TARGET, "--prompts", prompts, "--tokens", 2_000),
            *("--answer-tokens", 30, "--rows", 8, "--json", *COMMON),
        )
    )
    assert written[-1]["tokens"] >= 2_000
    reports = lines(
        run("train", folder, "--tokens", 2_000, "--layers", 1, "--head", 100, "--json", *COMMON)
    )
    assert reports[-1]["tokens"] >= 2_000
    assert 0.0 < reports[-1]["agreement"] <= 1.0
    scores = lines(
        run(
            *("evaluate", folder / "drafter", "--prompts", prompts, "--json", *COMMON),
            *("--answer-tokens", 20, "--category", "a", "--category", "b", "--limit", 1),
        )
    )
    times = scores.pop()
    assert min(times["draft_step_ms"], times["verify_step_ms"]) > 0.0
    assert [score["category"] for score in scores] == ["a", "b", "all"]
    assert all(score["tau"] >= 1.0 for score in scores)
    table = run("evaluate", folder / "drafter", "--prompts", prompts, "--no-tree", *COMMON)
    assert "agreement" in table.stdout
    assert "tau" not in table.stdout
    assert "of a verify step" in table.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "run", "--process", "1"], "below --processes"),
        (["generate", "run"], "begin with"),
        (["train", "run"], "begin with"),
        (["generate", "run", "--target", "synthetic:x"], "computes nothing"),
    ],
)
def test_wrong_uses_are_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code != 0
    assert said in result.output
    assert "Traceback" not in result.output


def test_what_is_no_drafter_is_refused(tmp_path: Path, prompts: Path) -> None:
    result = run("evaluate", tmp_path, "--prompts", prompts)
    assert result.exit_code == 1
    assert "config.json cannot be read" in result.output


def test_help_says_how_to_go_about_it() -> None:
    text = run("--help").output
    for stage in ("generate", "train", "evaluate"):
        assert f"outrider distill {stage}" in text


def config_of(model: str, draft_model: str | None, folder: Path) -> str | None:
    return local_config(
        None,
        model=model,
        dtype="float32",
        device="cpu",
        verifiers=1,
        drafters=2,
        draft_model=draft_model,
        redis_url=None,
        log_dir=None,
        cache_dir=folder,
    ).draft_model


def test_fleets_on_one_machine_use_the_shipped_drafter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outrider.local, "cores", lambda: CORES_MIN)
    shipped = config_of("smollm2", None, tmp_path)
    assert shipped is not None
    assert shipped.endswith("smollm2-drafter")
    assert config_of("smollm2", "lookup", tmp_path) is None
    assert config_of("smollm2", "other", tmp_path) == "other"
    assert config_of("random:tiny", None, tmp_path) is None
    # Where the target needs every core, it keeps them, unless somebody wants it otherwise.
    monkeypatch.setattr(outrider.local, "cores", lambda: CORES_MIN - 1)
    assert config_of("smollm2", None, tmp_path) is None
    assert config_of("smollm2", "other", tmp_path) == "other"
