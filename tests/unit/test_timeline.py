"""Reading and drawing timelines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from outrider.cli import main
from outrider.errors import InvalidRequest
from outrider.timeline import read_trace

TRACE = {
    "traceEvents": [
        {"name": "process_name", "ph": "M", "pid": 1, "tid": 1, "args": {"name": "v"}},
        {"name": "verify step", "ph": "X", "pid": 1, "tid": 1, "ts": 1e4, "dur": 2e4, "args": {}},
        {"name": "miss", "ph": "i", "pid": 1, "tid": 1, "ts": 3e4, "s": "p", "args": {}},
    ]
}


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(TRACE))
    return path


def test_a_timeline_is_drawn(trace: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    output = tmp_path / "trace.png"
    found = CliRunner().invoke(main, ["trace", "plot", str(trace), "-o", str(output)])
    assert found.exit_code == 0, found.output
    assert "1 bars" in found.output
    assert output.read_bytes().startswith(b"\x89PNG")


def test_a_window_without_anything_is_said(trace: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    found = CliRunner().invoke(main, ["trace", "plot", str(trace), "--begin", "5"])
    assert found.exit_code == 1
    assert "nothing between 5" in found.output


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"traceEvents": [{"ph": "X"}]}'])
def test_what_is_no_trace_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(InvalidRequest, match="no trace"):
        read_trace(path)


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    found = CliRunner().invoke(main, ["trace", "plot", str(tmp_path / "none.json")])
    assert found.exit_code == 1
    assert "cannot read" in found.output


def test_a_timeline_in_figures(tmp_path: Path) -> None:
    events = [
        {"name": "process_name", "ph": "M", "pid": pid, "tid": 1, "args": {"name": name}}
        for pid, name in enumerate(("v:1", "d:2", "network", "session"))
    ]
    spans = [
        (0, "verify step", 0, 20_000),
        (0, "verify step", 30_000, 40_000),
        (1, "draft step", 0, 5_000),
        (2, "commit", 20_000, 1_000),
        (2, "commit", 20_000, 99_000),
    ]
    events += [
        {"name": name, "ph": "X", "pid": pid, "tid": 1, "ts": at, "dur": took, "args": {}}
        for pid, name, at, took in spans
    ]
    marks = (("hit 3", 21_000), ("miss", 22_000), ("hit 10", 71_000), ("unbind", 200_000))
    events += [
        {"name": name, "ph": "i", "pid": 3, "tid": 1, "ts": at, "s": "p", "args": {}}
        for name, at in marks
    ]
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"traceEvents": events}))
    found = CliRunner().invoke(main, ["trace", "show", str(path), "--json"])
    assert found.exit_code == 0, found.output
    said = json.loads(found.stdout)
    lanes = said.pop("lanes")
    assert said == {
        "length_s": pytest.approx(0.2),
        "hits": 2,
        "misses": 1,
        "guessed": 13,
        "decisions": {"unbind": 1},
    }
    assert [(lane["name"], lane["count"]) for lane in lanes] == [
        ("d:2", 1),
        ("v:1", 2),
        ("network", 2),
    ]
    assert lanes[1]["busy"] == pytest.approx(0.3)
    assert lanes[1]["median_s"] == pytest.approx(0.03)
    assert lanes[2]["busy"] is None
    shown = CliRunner().invoke(main, ["trace", "show", str(path)])
    assert shown.stdout.startswith("0.200 s: hits 2 (13 tokens), misses 1, unbind 1")
    assert "30.00 ms" in shown.stdout


def test_a_timeline_of_nothing_is_said(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text('{"traceEvents": []}')
    found = CliRunner().invoke(main, ["trace", "show", str(path)])
    assert found.exit_code == 1
    assert "no events" in found.stderr
