"""What placement wins and what Redis has to do for it, and for the journals; by `bench`."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.journal import Samples, measure
from bench.placement import result_lines
from outrider.redis_server import start_redis

SESSIONS = 64
STEP_S = 0.025
DURATION_S = 5.0


def measure_placement(results_dir: Path) -> list[str]:
    """Measure placement, and lookups among a million blocks; takes some minutes.

    Raises `subprocess.CalledProcessError`.
    """
    command = [sys.executable, "-m", "bench.placement", "--results-dir", str(results_dir)]
    subprocess.run(command, check=True)
    return result_lines(_record(results_dir))[:1]


def measure_journal(results_dir: Path) -> list[str]:
    """Measure what journals cost Redis, and add it to what `measure_placement` found of it."""
    with (
        tempfile.TemporaryDirectory() as folder,
        start_redis(None, Path(folder) / "redis.log") as server,
    ):
        samples = asyncio.run(measure(server.url, SESSIONS, STEP_S, DURATION_S))
    return result_lines(_record(results_dir), journal_words(samples))[-1:]


def _record(results_dir: Path) -> Any:
    return json.loads((results_dir / "placement.json").read_text())


def journal_words(samples: Samples) -> str:
    """What journaling adds, for the end of a line."""
    return (
        f" journal_ops_per_token={samples.commands / samples.tokens:.3f}"
        f" journal_calls_per_token={samples.batches / samples.tokens:.4f}"
        f" journal_delay_p99_ms={samples.quantile_ms(0.99):.2f}"
    )
