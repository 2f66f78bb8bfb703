"""The benchmark of drafters runs from end to end, with tiny models."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.drafting import main

TARGET = "random:tiny?seed=1"


def result_of(tmp_path: Path, *arguments: str) -> dict[str, str]:
    options = ["--quick", "--model", TARGET, "--dtype", "float32", "--results-dir", str(tmp_path)]
    ended = CliRunner().invoke(main, [*options, *arguments], catch_exceptions=False)
    assert ended.exit_code == 0, ended.output
    last = ended.output.strip().splitlines()[-1]
    assert last.startswith("result: drafters ")
    return dict(pair.split("=") for pair in last.split()[2:])


@pytest.mark.timeout(300)
def test_every_part_measures_and_the_others_are_kept(tmp_path: Path) -> None:
    drafter = ("--drafter", f"{TARGET}&noise=0.1")
    first = result_of(tmp_path, *drafter, "--parts", "proposers,coupling,calibration")
    assert all(re.fullmatch(r"\d+\.\d{3}", first[name]) for name in first if name != "ahead_ready")
    assert first["ahead_ready"] == "na"
    # A tiny target is as quick as its drafter, so that little is won; it must not be less.
    assert float(first["model_tau_writing"]) >= 1.0
    second = result_of(tmp_path, *drafter, "--parts", "ahead")
    assert second.pop("ahead_ready") != "na"
    first.pop("ahead_ready")
    assert second == first
    record = json.loads((tmp_path / "drafting.json").read_text())
    assert set(record["results"]["times"]) == {"proposers", "coupling", "calibration", "ahead"}
    contenders = {run["contender"] for run in record["results"]["runs"]}
    assert contenders == {"target", "lookup", "model", "union", "recycling", "cascade"}
    assert "| union |" in (tmp_path / "drafting.md").read_text()


@pytest.mark.timeout(300)
def test_categories_add_up(tmp_path: Path) -> None:
    parts = ("--parts", "proposers", "--categories")
    first = result_of(tmp_path, *parts, "summarization, writing")
    assert first["lookup_tau_rag"] == "na"
    second = result_of(tmp_path, *parts, "rag")
    assert second["lookup_tau_rag"] != "na"
    assert second["lookup_tau_summarization"] == first["lookup_tau_summarization"]
    runs = json.loads((tmp_path / "drafting.json").read_text())["results"]["runs"]
    # What is measured again replaces what was there.
    result_of(tmp_path, *parts, "rag")
    assert len(json.loads((tmp_path / "drafting.json").read_text())["results"]["runs"]) == len(runs)


@pytest.mark.parametrize(
    ("option", "said"),
    [("--parts", "unknown part 'speed'"), ("--categories", "unknown category 'speed'")],
)
def test_what_is_unknown_is_refused(tmp_path: Path, option: str, said: str) -> None:
    ended = CliRunner().invoke(main, [option, "speed", "--results-dir", str(tmp_path)])
    assert ended.exit_code == 2
    assert said in ended.output
