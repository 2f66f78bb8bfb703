"""Results of the pipelining benchmark survive the file, and are told from others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench.pipeline_effort import QUICK, Effort
from bench.pipeline_prompts import Case
from bench.pipeline_results import Disturbance, Recovery, Results
from bench.pipeline_store import Store, begun, measured_alike
from bench.timelines import Spread
from outrider.errors import ConfigError
from tests.unit.bench.test_pipeline_results import row
from tests.unit.bench.test_relaying import ROW


def full() -> Results:
    return Results(
        rows=[row("rtt", 2.0, 3.5, planned=160.0, occupancy=(0.5,)), row("floor", 2.0, 0.99)],
        recovery=Recovery(45.0, 160.0, (1.0,), ((0.5, 1.0),), (0.5, None), (0.75, 1.0), (0, 1), 3),
        disturbances=[Disturbance("late", (1.0, 2.0), Spread(0.5, 1.0, 2.0, 3.0, 400))],
        real=[Case("code", 96, 3.0, 2.0, 2.5, None, identical=True)],
        relay=[ROW],
        origins={"rtt": replace(begun(Effort()), whole=True, errors=("one: failed",))},
    )


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    store = Store(tmp_path / "new")
    assert store.read() == Results()
    store.write(full())
    assert store.read() == full()
    assert [path.name for path in store.path.parent.iterdir()] == ["pipeline.json"]


def test_a_part_is_forgotten_alone() -> None:
    results = full()
    results.forget("rtt")
    assert [one.part for one in results.rows] == ["floor"]
    assert "rtt" not in results.origins
    for part in ("recover", "drafters", "real", "orchestrator", "floor"):
        results.forget(part)
    assert results == Results()


def test_a_file_of_another_kind_is_refused_by_name(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for text in ("[]", "{", '{"rows": []}', '{"measured": {"rows": [{"name": 1}]}}'):
        store.path.write_text(text)
        with pytest.raises(ConfigError, match=r"pipeline\.json: does not hold"):
            store.read()


def test_only_a_part_measured_whole_without_fault_and_alike_is_left_out() -> None:
    done = replace(begun(Effort()), whole=True, seconds=300.0, time="yesterday")
    assert measured_alike(done, Effort())
    assert not measured_alike(None, Effort())
    assert not measured_alike(done, QUICK)
    assert not measured_alike(replace(done, whole=False), Effort())
    assert not measured_alike(replace(done, errors=("rtt 2 ms: failed",)), Effort())
    assert not measured_alike(replace(done, outrider="0.0.1"), Effort())
    assert not measured_alike(replace(done, machine={"cores": "64"}), Effort())
