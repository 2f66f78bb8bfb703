"""What the pipelining benchmark says of its measurements."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from bench.pipeline_report import markdown, result_lines
from bench.pipeline_results import Disturbance, Recovery, Results, Row, colocated_tree_wins_ms
from bench.pipeline_setting import Expected, Setting
from bench.timelines import Spread
from orchestrator.planner.measured import measured_row

EXPECTED = Expected(
    target_only=45.0,
    simulation=180.0,
    simulated_occupancy=1.0,
    colocated_chain=105.0,
    colocated_tree=140.0,
    lockstep=100.0,
    pull=160.0,
    push=170.0,
)


def row(part: str, rtt_ms: float, speculated: float, **changes: object) -> Row:
    values: dict[str, object] = {
        "name": f"{part} {rtt_ms:g}",
        "part": part,
        "setting": Setting(),
        "rtt_nominal_ms": rtt_ms,
        "rtt_ms": rtt_ms + 0.5,
        "target_only": (44.0, 44.0, 44.0, 44.0, 44.0),
        "speculated": (speculated * 40, speculated * 44, speculated * 50),
        "expected": EXPECTED,
    }
    return Row(**(values | changes))  # type: ignore[arg-type]


def last_line(results: Results) -> dict[str, str]:
    line = result_lines(results)[-2]
    assert line.startswith("result: pipeline ")
    return dict(word.split("=") for word in line.split()[2:])


def test_a_speedup_is_the_median_of_ratios_to_the_target_only_runs_around() -> None:
    measured = replace(
        row("rtt", 2.0, 1.0),
        target_only=(10.0, 11.0, 9.0, 11.0, 29.0),
        speculated=(30.0, 50.0, 60.0),
    )
    assert measured.speedups == [3.0, 5.0, 3.0]
    assert measured.speedup == 3.0
    assert measured.spread == pytest.approx(1 / 3)
    assert measured.vs_simulation == pytest.approx(3.0 / (180 / 45)), "of one session, speed-ups"
    several = replace(measured, setting=Setting(sessions=2))
    assert several.vs_simulation == pytest.approx(50 / 180), "of several, tokens a second"
    assert measured.noise == 1.1
    assert measured.vs_planned is None
    assert replace(measured, planned=40.0).vs_planned == 1.25


def test_a_record_is_plain_carries_the_planners_keys_and_its_label() -> None:
    measured = row("rtt", 2.0, 3.0, step_stretch=(1.1, 1.2, 1.3), draft_step_ms=(2.0, 3.0))
    record = json.loads(json.dumps(measured.record()))
    planner = {"step_ms", "draft_ms", "leaves", "agreement", "rtt_ms", "sessions", "verifiers"}
    assert planner | {"drafters", "tokens_per_s"} <= record.keys()
    assert record["synthetic"] is True
    assert record["rtt_ms"] == 2.5
    assert record["tokens_per_s"] == 132.0
    # The planner is fed with what was measured; what was stated stands beside it.
    assert record["step_ms"][0] == [1, pytest.approx(26.4)]
    assert record["draft_ms"] == 2.5
    assert record["nodes_max"] == 32
    assert record["stated"]["step_ms"][0] == [1, 22.0]
    # As it is, and as it is read from the file.
    for read in (measured.planner_row(), record):
        figures = measured_row("a row", read)
        assert figures.scenario.step[0] == (1, pytest.approx(0.0264))
        assert figures.scenario.agreement == (0.8, 0.1, 0.05)


def test_a_silent_drafter_is_one_for_the_planner_too() -> None:
    silent = row("floor", 2.0, 1.0, setting=Setting(silent=True, drafters=2))
    assert silent.planner_row()["silent_drafters"] == 2


def test_the_last_line_has_every_key_even_if_nothing_was_measured() -> None:
    keys = (
        "rtt0.5 rtt2 rtt5 rtt10 rtt20 worst_vs_target occupancy vs_simulation vs_simulation_slowed"
        " planner_error floor"
    )
    expected = dict.fromkeys([*keys.split(), "recover_s", "recover_up_s"], "na")
    assert last_line(Results()) == expected


def test_the_last_line_says_the_worst_of_each() -> None:
    rows = [
        row("rtt", 2.0, 3.5, occupancy=(0.2,)),
        row("rtt", 20.0, 2.5, planned=2.5 * 44 / 0.93),
        row("slowed", 10.0, 3.8),
        row("slowed", 50.0, 3.7),
        row("floor", 2.0, 0.99),
        row("floor", 50.0, 0.97),
        row("fleet", 2.0, 2.0, setting=Setting(sessions=4), occupancy=(0.4,)),
        row("fleet", 2.0, 1.5, setting=Setting(sessions=16), occupancy=(0.9, 0.97, 0.99)),
        row("fleet", 2.0, 0.95, setting=Setting(sessions=64), occupancy=(0.98,)),
    ]
    curve = ((0.5, 1.0),)
    recovery = Recovery(45.0, 160.0, (1.0, 2.0), curve, (0.5, 1.5), (0.75, None))
    said = last_line(Results(rows=rows, recovery=recovery))
    assert said["rtt2"] == "3.50"
    assert said["rtt20"] == "2.50"
    assert said["rtt5"] == "na"
    assert said["worst_vs_target"] == "0.95"
    assert said["floor"] == "0.97"
    assert said["occupancy"] == "0.97"
    # Useless drafters have no business with it.
    assert said["vs_simulation"] == f"{0.95 * 44 / 180:.2f}"
    assert said["vs_simulation_slowed"] == f"{3.7 / (180 / 45):.2f}"
    assert said["planner_error"] == "0.07"
    assert said["recover_s"] == "1.50"
    assert said["recover_up_s"] == "na"


def test_the_colocated_tree_wins_where_the_measured_line_comes_down_to_it() -> None:
    tree = EXPECTED.colocated_tree / 44
    rows = [row("rtt", 9.5, tree * 0.9), row("rtt", 1.5, tree * 1.1)]
    assert colocated_tree_wins_ms(rows) == pytest.approx(6.0)
    assert colocated_tree_wins_ms(rows[1:]) is None


def test_the_tables_name_everything_and_say_that_it_is_synthetic() -> None:
    gaps = Spread(0.5, 1.0, 2.0, 3.0, 400)
    results = Results(
        rows=[row("rtt", 2.0, 3.5, planned=160.0)],
        recovery=Recovery(45.0, 160.0, (), (), (0.5, None), (0.75, 1.0), (0, 2), 3),
        disturbances=[Disturbance("one 300 ms late", (150.0,), gaps)],
    )
    text = markdown(results)
    assert "| rtt 2 | 2.50 | 44.0 | 1.000 | 154.0 | 3.50 | 11.4% | 4.00 | 0.88 | 0.96 |" in text
    assert "at none of these" in text
    assert "| dropped, again | never | - |" in text
    assert "| raised, again | 1.00 | 2 of 3 |" in text
    assert "| vs_simulation | at least 0.9 | 0.875 | no |" in text
    assert "| occupancy | at least 0.95 | - | not measured |" in text
    assert "| one 300 ms late | 150.0 | 0.50 | 1.00 | 2.00 | 3.00 | 400 |" in text
    assert text.count("(synthetic)") == 3
