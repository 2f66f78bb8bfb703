"""Measured figures in a file, and how well they were predicted.

The file is JSON: an object with `rows`, or a list of rows. Other keys are left alone, so that a
benchmark's own results can be read. A row is an object with

    mode            one of the modes' names; "remote-tree" if absent
    name            shown in tables; the mode's name if absent
    step_ms         verify step: milliseconds, or [[tokens, milliseconds], ...]
    draft_ms        draft step: milliseconds, or [[leaves, milliseconds], ...]
    colocated_draft_ms   the same on a verifier's own device; `draft_ms` if absent
    leaves          most leaves of a draft step; 16 if absent
    agreement       probability that the first, second, ... choice is right: a list, or one number
    rtt_ms          drafter to orchestrator to verifier and back, as measured
    sessions, verifiers, drafters, drafters_per_session, silent_drafters, nodes_max
                    1, 1, 1, 1, 0 and 31 if absent
    tokens_per_s    committed by all sessions together, as measured
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.budgets import FLUSHES_PER_STEP
from orchestrator.planner.knots import Knots, check_knots
from orchestrator.planner.modes import SESSION_STEPS, Mode, tokens_per_s
from orchestrator.planner.tree_simulation import TreeScenario
from outrider.errors import ConfigError

_COUNTS = (
    "leaves",
    "sessions",
    "verifiers",
    "drafters",
    "drafters_per_session",
    "silent_drafters",
    "nodes_max",
)


@dataclass(frozen=True, slots=True)
class MeasuredRow:
    """What was measured, and the figures that a prediction may use."""

    name: str
    mode: Mode
    scenario: TreeScenario
    colocated_draft: Knots | None
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """A row beside its prediction."""

    row: MeasuredRow
    tokens_per_s: float

    @property
    def error(self) -> float:
        """Predicted over measured, less one."""
        return self.tokens_per_s / self.row.tokens_per_s - 1.0


def predict(row: MeasuredRow, *, session_steps: int = SESSION_STEPS) -> Prediction:
    """Predict a row from its figures."""
    rate = tokens_per_s(
        row.mode, row.scenario, colocated_draft=row.colocated_draft, session_steps=session_steps
    )
    return Prediction(row, rate)


def read_measured(path: Path) -> list[MeasuredRow]:
    """Read a file. Raises `ConfigError` naming row and key."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON: {error}") from None
    rows = content.get("rows") if isinstance(content, dict) else content
    if not isinstance(rows, list) or not rows:
        raise ConfigError(f"{path}: must be a list of rows, or an object with a list `rows`")
    return [measured_row(f"{path}: rows[{index}]", row) for index, row in enumerate(rows)]


def measured_row(where: str, row: object) -> MeasuredRow:
    """Turn a row of the file into figures. Raises `ConfigError` naming `where` and the key."""
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: must be an object")
    try:
        return _measured_row(row)
    except ConfigError as error:
        raise ConfigError(f"{where}.{error}") from None


def _measured_row(row: Mapping[str, Any]) -> MeasuredRow:
    name = row.get("mode", Mode.REMOTE_TREE.value)
    try:
        mode = Mode(name)
    except ValueError:
        known = ", ".join(mode.value for mode in Mode)
        raise ConfigError(f"mode: {name!r} is none of {known}") from None
    agreement = row.get("agreement")
    if not isinstance(agreement, list):
        agreement = [_number(row, "agreement")]
    if not all(_is_number(probability) for probability in agreement):
        raise ConfigError(f"agreement: must be numbers, got {agreement!r}")
    counts: dict[str, int] = {}
    for key in _COUNTS:
        if key in row:
            if type(row[key]) is not int:
                raise ConfigError(f"{key}: must be a whole number, got {row[key]!r}")
            counts[key] = row[key]
    measured = _number(row, "tokens_per_s")
    if measured <= 0.0:
        raise ConfigError(f"tokens_per_s: must be positive, got {measured}")
    has_colocated = "colocated_draft_ms" in row
    return MeasuredRow(
        name=str(row.get("name", name)),
        mode=mode,
        scenario=TreeScenario(
            step=_knots(row, "step_ms"),
            draft_step_s=_knots(row, "draft_ms"),
            agreement=tuple(probability for probability in agreement if probability),
            rtt_s=_number(row, "rtt_ms") / 1e3,
            flushes_per_step=FLUSHES_PER_STEP,
            **counts,
        ),
        colocated_draft=_knots(row, "colocated_draft_ms") if has_colocated else None,
        tokens_per_s=measured,
    )


def _number(row: Mapping[str, Any], key: str) -> float:
    if key not in row:
        raise ConfigError(f"{key}: is missing")
    if not _is_number(row[key]):
        raise ConfigError(f"{key}: must be a number, got {row[key]!r}")
    return float(row[key])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _knots(row: Mapping[str, Any], key: str) -> Knots:
    value = row.get(key)
    if not isinstance(value, list):
        value = [[1, _number(row, key)]]
    knots: list[tuple[int, float]] = []
    for pair in value:
        if (
            not isinstance(pair, list)
            or len(pair) != 2
            or type(pair[0]) is not int
            or not _is_number(pair[1])
        ):
            raise ConfigError(f"{key}: must be a number or pairs [size, milliseconds]")
        knots.append((pair[0], pair[1] / 1e3))
    check_knots(key, knots)
    return tuple(knots)
