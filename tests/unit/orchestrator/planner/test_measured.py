"""Files of measured figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.planner.measured import measured_row, predict, read_measured
from orchestrator.planner.modes import Mode
from outrider.errors import ConfigError

ROW: dict[str, Any] = {
    "step_ms": [[1, 22], [32, 22]],
    "draft_ms": 2.5,
    "leaves": 16,
    "agreement": [0.8, 0.1, 0.05],
    "rtt_ms": 2.0,
    "tokens_per_s": 160.0,
}


def test_a_row_says_what_its_prediction_needs() -> None:
    row = measured_row("row", ROW | {"sessions": 4, "verifiers": 2, "p50_ms": 3})
    assert row.mode is Mode.REMOTE_TREE
    assert row.name == "remote-tree"
    assert row.scenario.step == ((1, 0.022), (32, 0.022))
    assert row.scenario.draft_knots == ((1, 0.0025),)
    assert (row.scenario.sessions, row.scenario.verifiers, row.scenario.drafters) == (4, 2, 1)
    assert row.tokens_per_s == 160.0


def test_predictions_and_their_error() -> None:
    plain = predict(measured_row("row", ROW | {"mode": "target-only", "tokens_per_s": 50}))
    assert plain.tokens_per_s == pytest.approx(1 / 0.022)
    assert plain.error == pytest.approx(1 / 0.022 / 50 - 1)
    chain = predict(measured_row("row", ROW | {"mode": "colocated-chain"}))
    assert chain.tokens_per_s == pytest.approx(2.35 / 0.022, rel=0.01)
    slower = predict(measured_row("row", ROW | {"mode": "colocated-chain", "draft_ms": 6.7}))
    quick = {"mode": "colocated-chain", "draft_ms": 6.7, "colocated_draft_ms": [[1, 2.5]]}
    assert slower.tokens_per_s < chain.tokens_per_s
    assert predict(measured_row("row", ROW | quick)).tokens_per_s == chain.tokens_per_s


def test_the_remote_tree_is_predicted_by_simulation() -> None:
    prediction = predict(measured_row("row", ROW | {"tokens_per_s": 3.7 / 0.022}))
    assert abs(prediction.error) < 0.05


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_list_or_an_object_of_rows(tmp_path: Path, wrapped: bool) -> None:
    path = tmp_path / "rows.json"
    rows = [ROW, ROW | {"name": "second"}]
    path.write_text(json.dumps({"rows": rows, "host": "x"} if wrapped else rows))
    assert [row.name for row in read_measured(path)] == ["remote-tree", "second"]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"rtt_ms": "fast"}, "rtt_ms"),
        ({"tokens_per_s": 0}, "tokens_per_s"),
        ({"tokens_per_s": True}, "tokens_per_s"),
        ({"sessions": 1.5}, "sessions"),
        ({"sessions": 0}, "sessions"),
        ({"mode": "magic"}, "mode"),
        ({"agreement": ["a"]}, "agreement"),
        ({"agreement": [0.9, 0.9]}, "agreement"),
        ({"step_ms": [[1, 2, 3]]}, "step_ms"),
        ({"step_ms": [[2, 2], [1, 2]]}, "step_ms"),
        ({"draft_ms": None}, "draft_ms"),
    ],
)
def test_errors_name_row_and_key(tmp_path: Path, change: dict[str, Any], key: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([ROW, ROW | change]))
    with pytest.raises(ConfigError, match=rf"rows\.json: rows\[1\]\.{key}: "):
        read_measured(path)


@pytest.mark.parametrize("key", ["step_ms", "draft_ms", "agreement", "rtt_ms", "tokens_per_s"])
def test_what_is_missing_is_named(key: str) -> None:
    row = {name: value for name, value in ROW.items() if name != key}
    with pytest.raises(ConfigError, match=rf"^here\.{key}: is missing"):
        measured_row("here", row)


@pytest.mark.parametrize("content", ["{", "[]", "3", '{"rows": 3}', "[3]"])
def test_other_content_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"rows\.json"):
        read_measured(path)
