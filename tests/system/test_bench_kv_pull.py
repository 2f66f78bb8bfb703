"""The benchmark of fetched KV runs, and what it prints can be read by a script."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.kv_pull import main


@pytest.mark.slow
def test_a_quick_run(tmp_path: Path) -> None:
    output = tmp_path / "kv_pull.json"
    options = {"model": "random:tiny?seed=1", "tokens": 300, "repeats": 1, "megabits": "1000"}
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    result = CliRunner().invoke(main, [*arguments, "--output", str(output)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()[-2:]
    # Whether it pays for so small a model is the verifier's business; the answers are the same.
    for line, link in zip(lines, ("loopback", "1000_Mbit/s"), strict=True):
        pattern = rf"result: kv_pull link={link} tokens=300 ttft_prefill_s=[\d.]+ .* identical=1$"
        assert re.match(pattern, line), line
    record = json.loads(output.read_text())
    assert len(record["computed"]) == 3
    assert [row["link"] for row in record["links"]] == ["loopback", "1000 Mbit/s"]
