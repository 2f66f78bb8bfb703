"""Speculation pays, and a useless drafter costs little: ratios over synthetic models."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from bench.smoke import synthetic

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]


def test_a_good_drafter_pays_and_a_useless_one_costs_little(tmp_path: Path) -> None:
    checks = list(synthetic(48, Console(quiet=True), tmp_path))
    assert len(checks) == 4
    failed = [f"{one.name}: {one.ratio:.2f}" for one in checks if not one.passed]
    assert not failed
