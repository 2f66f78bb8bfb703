"""Speeds by company, looked up instead of simulated."""

from __future__ import annotations

import numpy as np
import pytest

from orchestrator.planner import speed_table
from orchestrator.planner.speed_table import GRID, SpeedTable, build_speed_table
from orchestrator.planner.tree_simulation import TreeScenario


def table() -> SpeedTable:
    rows, loads = np.meshgrid(np.log2(GRID), np.log2(GRID), indexing="ij")
    return SpeedTable(10.0 - rows - 0.1 * loads, loads, np.full(65, 45.0))


def test_what_lies_between_is_interpolated_over_logarithms() -> None:
    rows, loads = np.array([1.0, 2.0, 16.0, 32.0]), np.array([1.0, 8.0, 4.0, 64.0])
    speedups, occupancies = table().look_up(rows, loads)
    assert speedups == pytest.approx(10.0 - np.log2(rows) - 0.1 * np.log2(loads))
    assert occupancies == pytest.approx(np.log2(loads))


def test_beyond_the_grid_is_as_at_its_edge() -> None:
    speedups, _ = table().look_up(np.array([1_000.0]), np.array([1_000.0]))
    assert speedups == pytest.approx([10.0 - 6.0 - 0.6])


def test_speeds_fall_with_company(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_table, "GRID", (1, 4, 8))
    cells: list[int] = []
    built = build_speed_table(
        TreeScenario(step=((1, 0.022), (32, 0.022))), 8, lambda: cells.append(1), session_steps=100
    )
    assert len(cells) == 9
    assert built.speedups[0, 0] > built.speedups[0, 2] > 1.0
    assert built.speedups[0, 0] > built.speedups[2, 0] > 1.0
    assert built.row_rates[8] == pytest.approx(1 / 0.022)
    assert built.tokens_per_s(1, 1) == pytest.approx(built.speedups[0, 0] / 0.022)
