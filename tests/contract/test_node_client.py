"""A client in another language, made from the protocol's files alone: Node's."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.fleet import TARGET, drafter, load, lookup, orchestrator, verifier

FOLDER = Path(__file__).with_name("node")
PROTOS = Path(__file__).parents[2] / "proto"

pytestmark = [
    pytest.mark.skipif(shutil.which("node") is None, reason="needs Node"),
    pytest.mark.skipif(
        not (FOLDER / "node_modules/@grpc/grpc-js").is_dir(), reason="needs `make node`"
    ),
]


async def ask(address: str, request: dict[str, Any]) -> tuple[int, list[dict[str, Any]]]:
    """Run the client; returns its exit status and what it was told."""
    command = ["node", str(FOLDER / "generate.js"), str(PROTOS), address, json.dumps(request)]
    child = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    said, complaints = await asyncio.wait_for(child.communicate(), 60)
    assert not complaints, complaints.decode()
    assert child.returncode is not None
    return child.returncode, [json.loads(line) for line in said.splitlines()]


async def test_node_streams_a_generation() -> None:
    async with (
        verifier(load(TARGET)) as target,
        drafter(lookup()) as guesser,
        orchestrator([target.address], [guesser.address]) as running,
    ):
        request = {
            "prompt": "one two three, one two three, one two",
            "tokensMax": 24,
            "ignoreEos": True,
            "sampling": {"temperature": 0},
        }
        status, messages = await ask(running.address, request)
        assert status == 0
        started, *deltas, finished = messages
        assert started["started"]["model"] == "tiny"
        ids = [number for one in deltas for number in one["delta"]["tokenIds"]]
        assert len(ids) == finished["finished"]["usage"]["completionTokens"] == 24
        assert finished["finished"]["reason"] == "FINISH_REASON_LENGTH"

        status, again = await ask(running.address, {**request, "speculation": False})
        assert status == 0
        told = [number for one in again[1:-1] for number in one["delta"]["tokenIds"]]
        assert told == ids


async def test_node_is_told_which_field_is_wrong() -> None:
    async with verifier(load(TARGET)) as target, orchestrator([target.address]) as running:
        request = {"prompt": "x", "sampling": {"temperature": -1}}
        status, messages = await ask(running.address, request)
        assert status == 1
        assert messages == [
            {
                "error": {
                    "code": "INVALID_ARGUMENT",
                    "field": "sampling.temperature",
                    "requestId": "from-node",
                }
            }
        ]
