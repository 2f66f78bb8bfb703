"""Results of the pipelining benchmark in a file, which grows row by row and part by part."""

from __future__ import annotations

import json
import os
import platform
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

import outrider
from bench.pipeline_effort import Effort
from bench.pipeline_results import Origin, Results, colocated_tree_wins_ms
from outrider.errors import ConfigError

_ADAPTER = TypeAdapter(Results)


class Store:
    """`pipeline.json` in a folder: written whenever something was measured, read to go on."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "pipeline.json"

    def read(self) -> Results:
        """Return what the file holds; nothing, if there is none. Raises `ConfigError`."""
        if not self.path.exists():
            return Results()
        try:
            return _ADAPTER.validate_python(json.loads(self.path.read_text())["measured"])
        except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
            raise ConfigError(
                f"{self.path}: does not hold results of this version ({type(error).__name__});"
                " move it away, or name another --results-dir"
            ) from None

    def write(self, results: Results) -> None:
        """Write everything; the file is whole at any time."""
        record: dict[str, Any] = {
            "benchmark": "pipeline",
            "synthetic": True,
            "figures": results.figures(),
            "colocated_tree_wins_from_ms": colocated_tree_wins_ms(results.of("rtt")),
            "rows": [row.record() for row in results.rows],
            "measured": _ADAPTER.dump_python(results, mode="json"),
        }
        unfinished = self.path.with_suffix(".json.new")
        unfinished.write_text(json.dumps(record, indent=2) + "\n")
        unfinished.replace(self.path)


def begun(effort: Effort) -> Origin:
    """Describe a part that begins now, on this machine."""
    return Origin(
        time=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        seconds=0.0,
        outrider=outrider.__version__,
        machine={
            "platform": platform.platform(),
            "processor": _processor(),
            "cores": str(os.cpu_count()),
            "python": platform.python_version(),
        },
        # As JSON has it, so that it equals what is read back.
        effort=json.loads(json.dumps(asdict(effort))),
    )


def measured_alike(origin: Origin | None, effort: Effort) -> bool:
    """Tell whether a part was measured to its end and without a fault, as it would be now."""
    if origin is None or not origin.whole or origin.errors:
        return False
    fresh = begun(effort)
    same = replace(origin, time=fresh.time, seconds=fresh.seconds, whole=False)
    return same == fresh


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
