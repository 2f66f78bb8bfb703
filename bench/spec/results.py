"""What a run of the benchmark comes to, as a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from bench.machine import Origin
from bench.spec.identity import Identity
from bench.spec.statistics import Summary
from outrider.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Results:
    """All figures of one folder of answers."""

    origin: Origin
    setting: Mapping[str, Any]
    questions: int
    summaries: tuple[Summary, ...]
    identity: Identity | None
    peers: Mapping[str, Mapping[str, Any]]
    """Versions and settings, as the peers themselves state them."""
    unavailable: Mapping[str, str]
    """Why a peer has no figures."""
    ours_over: Mapping[str, float]
    """By contender: greedy speed of ours over its speed, over the rounds that have both."""

    def summary(self, contender: str, temperature: float) -> Summary | None:
        """Find one contender's."""
        for summary in self.summaries:
            if summary.contender == contender and summary.temperature == temperature:
                return summary
        return None


_ADAPTER = TypeAdapter(Results)


def write_results(results: Results, path: Path) -> None:
    """Write them as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"benchmark": "spec-bench", "synthetic": False, **asdict(results)}
    path.write_text(json.dumps(record, indent=1) + "\n")


def read_results(path: Path) -> Results:
    """Read what `write_results` wrote. Raises `ConfigError`."""
    try:
        return _ADAPTER.validate_python(json.loads(path.read_text()))
    except (OSError, ValueError, ValidationError) as error:
        raise ConfigError(f"{path} holds no results of this version: {error}") from error
