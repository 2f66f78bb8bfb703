"""Reading and drawing timelines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from outrider.cli import main
from outrider.errors import InvalidRequest
from outrider.trace_plot import read_trace

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
