"""A load client, unmodified, against the HTTP door."""

from __future__ import annotations

import asyncio
import csv
import os
import sys
from pathlib import Path

from tests.support.http_door import http_door
from tests.support.scripted_verifier import answer, scripted_verifier

USERS = 8
USERS_FILE = Path(__file__).parents[1] / "support" / "locust_users.py"


async def test_locust_finds_nothing_wrong(tmp_path: Path) -> None:
    async with (
        scripted_verifier(lambda spec: answer(spec, b"hello you")) as target,
        http_door([target.address]) as door,
    ):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "locust", "-f", str(USERS_FILE), "--headless"),
            *("--users", str(USERS), "--spawn-rate", str(USERS), "--run-time", "8s"),
            *("--host", door.url, "--csv", str(tmp_path / "load"), "--loglevel", "WARNING"),
            env={**os.environ, "OPENAI_BASE_URL": f"{door.url}/v1", "OPENAI_API_KEY": "unused"},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        said, _ = await process.communicate()
        assert process.returncode == 0, said.decode()
        with (tmp_path / "load_stats.csv").open() as file:
            total = list(csv.DictReader(file))[-1]
        assert int(total["Request Count"]) > USERS, said.decode()
        assert total["Failure Count"] == "0", said.decode()
        meters = door.orchestrator.driver.meters
        assert meters.requests["length"] >= int(total["Request Count"])
        assert door.orchestrator.driver.load <= USERS
