"""`outrider plan` and `outrider simulate`, as typed."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from orchestrator.planner import speed_table
from orchestrator.planner.cli import plan as plan_command
from orchestrator.planner.cli import simulate as simulate_command


@pytest.fixture(autouse=True)
def small_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_table, "GRID", (1, 4))


def run(command: Any, *arguments: str) -> Result:
    return CliRunner().invoke(command, [*arguments, "--session-steps", "100"])


def test_a_plan_in_words() -> None:
    result = run(plan_command, "--verifiers", "1", "--drafters", "1")
    assert result.exit_code == 0, result.output
    assert "co-located tree" in result.stdout
    assert "Fastest at this load: remote tree." in result.stdout
    assert "Do not disaggregate" in result.stdout


def test_a_plan_for_scripts() -> None:
    arguments = "--verifiers 1 --rtt-ms 60 --acceptance 0.6 --verifier-price 4 --drafter-price 0.8"
    result = run(plan_command, *arguments.split(), "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["fastest"].startswith("colocated")
    assert answer["cheapest"].startswith("colocated")
    assert answer["break_even_rtt_ms"] < 60
    by_mode = {mode["mode"]: mode for mode in answer["modes"]}
    assert by_mode["target-only"]["tokens_per_s"] == pytest.approx(1 / 0.022)
    assert by_mode["target-only"]["cost_per_million"] == pytest.approx(4 / 3600 * 0.022 * 1e6)


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        ("--step-ms 1:x", "--step-ms"),
        ("--draft-ms -1", "--draft-ms"),
        ("--acceptance 0.9,0.3", "--acceptance"),
        ("--acceptance high", "--acceptance"),
        ("--rtt-ms -1", "--rtt-ms"),
        ("--verifier-price 3", "--drafter-price"),
        ("--sessions 2 --tokens-per-s-min 9999", "--tokens-per-s-min"),
    ],
)
def test_errors_name_the_option(arguments: str, option: str) -> None:
    result = run(plan_command, *arguments.split())
    assert result.exit_code == 2
    assert option in result.stderr
    assert "Traceback" not in result.output


def rows(tmp_path: Path, **change: object) -> str:
    row = {"step_ms": 22, "draft_ms": 2.5, "agreement": 0.8, "rtt_ms": 2, "tokens_per_s": 100}
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([row | {"mode": "colocated-chain"} | change]))
    return str(path)


def test_measured_beside_predicted(tmp_path: Path) -> None:
    path = rows(tmp_path, name="chain")
    result = run(plan_command, "--measured", path)
    assert result.exit_code == 0, result.output
    assert "+6.9%" in result.stdout
    assert "Largest error: 6.9%" in result.stdout
    answer = json.loads(run(plan_command, "--measured", path, "--json").stdout)
    assert answer["worst_error"] == pytest.approx(0.07, abs=0.005)
    assert answer["rows"][0]["name"] == "chain"


def test_a_bad_row_is_named(tmp_path: Path) -> None:
    result = run(plan_command, "--measured", rows(tmp_path, rtt_ms="near"))
    assert result.exit_code == 2
    assert "--measured" in result.stderr
    assert "rows[0].rtt_ms" in result.stderr


SMALL = (
    "--verifiers 4 --drafters 8 --duration-s 5 --warmup-s 2 --output-tokens-mean 50"
    " --verifier-sessions-max 8"
)


def test_a_fleet_in_words() -> None:
    result = run(simulate_command, *SMALL.split())
    assert result.exit_code == 0, result.output
    for word in ("tokens/s", "p95", "refused", "lost", "µs over the 16 least loaded", "all pods"):
        assert word in result.stdout


def test_a_fleet_for_scripts() -> None:
    first, again = (run(simulate_command, *SMALL.split(), "--json", "--seed", "3") for _ in "ab")
    answer, repeated = json.loads(first.stdout), json.loads(again.stdout)
    assert answer["tokens_per_s"] > 0
    assert answer["placement"].pop("drafters_all_us") > 0
    del answer["placement"], repeated["placement"]
    assert answer == repeated


def test_the_commands_are_registered() -> None:
    pyproject = Path(__file__).parents[4] / "pyproject.toml"
    text = pyproject.read_text()
    for name in ("plan", "simulate"):
        target = f"orchestrator.planner.cli:{name}"
        assert f'{name} = "{target}"' in text
        entry = importlib.metadata.EntryPoint(name, target, "outrider.commands")
        assert entry.load().name == name
