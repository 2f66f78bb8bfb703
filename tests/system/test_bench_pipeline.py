"""The pipelining benchmark runs: a fleet behind links, measured, described, written down."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench import pipeline
from bench.pipeline_effort import Effort
from bench.pipeline_setting import Setting
from bench.streams import Load, observe
from bench.synthetic_fleet import SyntheticFleet

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

TINY = Effort(
    repeats=1,
    window_s=1.0,
    skipped_s=0.5,
    plain_window_s=0.7,
    simulated_steps=200,
    round_trips_ms=(2.0,),
    phase_s=1.5,
    streams=(4,),
    streams_window_s=0.5,
    streams_repeats=1,
)


def test_parts_are_measured_and_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "QUICK", TINY)
    arguments = ["--quick", "--parts", "rtt,recover", "--results-dir", str(tmp_path)]
    answer = CliRunner().invoke(pipeline.main, arguments, catch_exceptions=False)
    assert answer.exit_code == 0, answer.output
    said = answer.output.strip().splitlines()[-2:]
    assert said[0].startswith("result: pipeline rtt0.5=na rtt2=")
    assert said[1].startswith("result: orchestrator tokens_per_core=na")
    record = json.loads((tmp_path / "pipeline.json").read_text())
    (row,) = record["rows"]
    assert row["synthetic"] is True
    # Steps of 22 ms: at most 45 tokens a second without guesses, and more with a good drafter.
    assert 20 < row["target_only_tokens_per_s"] < 46
    assert row["speedup"] > 1.5
    assert 2.0 <= row["rtt_ms"] < 6.0
    assert row["planned_tokens_per_s"] > 0
    assert len(record["measured"]["recovery"]["changes_s"]) == 4

    # Another part joins them; what is there already is not measured again.
    arguments = ["--quick", "--parts", "rtt,orchestrator", "--resume"]
    arguments += ["--results-dir", str(tmp_path)]
    answer = CliRunner().invoke(pipeline.main, arguments, catch_exceptions=False)
    assert answer.exit_code == 0, answer.output
    joined = json.loads((tmp_path / "pipeline.json").read_text())
    assert joined["rows"] == [row]
    assert joined["measured"]["origins"].keys() == {"rtt", "recover", "orchestrator"}
    relayed = joined["measured"]["relay"]
    assert [(one["sessions"], one["drafts"]) for one in relayed] == [(4, False), (4, True)]
    assert "result: orchestrator tokens_per_core=na" not in answer.output


def test_a_part_that_fails_says_why_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "QUICK", TINY)
    # There is no such model.
    arguments = ["--quick", "--parts", "real,orchestrator", "--model", str(tmp_path / "nothing")]
    arguments += ["--results-dir", str(tmp_path)]
    answer = CliRunner().invoke(pipeline.main, arguments)
    assert answer.exit_code == 1
    assert "real FAILED" in answer.output
    record = json.loads((tmp_path / "pipeline.json").read_text())["measured"]
    assert record["origins"]["real"]["errors"]
    assert not record["origins"]["orchestrator"]["errors"]
    assert len(record["relay"]) == 2
    assert (
        answer.output.strip().splitlines()[-1].startswith("result: orchestrator tokens_per_core=")
    )


def test_drafters_are_changed_while_the_fleet_runs() -> None:
    setting = Setting()
    load = Load(1, speculation=True, skipped_s=0.3, window_s=1.0)
    with SyntheticFleet(setting, links=False) as fleet:
        rates = {}
        for silent in (True, False):
            fleet.change(silent=silent)
            fleet.reset_steps()
            seen = observe(fleet.address, load)
            rates[silent] = sum(n for _, n in seen.merged)
            ((drafted, _),) = fleet.draft_steps()
            assert (drafted == 0) == silent
        assert rates[False] > 1.5 * rates[True]
