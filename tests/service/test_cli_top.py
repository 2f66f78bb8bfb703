"""`outrider top` before an orchestrator whose verifier is a script."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Iterable

from click.testing import CliRunner, Result

from orchestrator.http.keys import ApiKey, Keyring
from outrider.cli import main
from outrider.cli_top import Figures, Look, figures
from outrider.domain import FinishReason, SessionSpec
from outrider.v1 import verifier_pb2
from tests.support.http_door import http_door
from tests.support.scripted_verifier import commit, opened, scripted_verifier


def script(spec: SessionSpec) -> Iterable[verifier_pb2.VerifyResponse]:
    yield opened(spec)
    yield commit(spec, 0, b"AB", FinishReason.STOP)


async def top(*arguments: str) -> Result:
    return await asyncio.to_thread(CliRunner().invoke, main, ["top", *arguments])


def look(at_s: float, rounds: int, drafted: int, accepted: int) -> Look:
    counters = {"rounds": rounds, "draft_tokens": drafted, "accepted_tokens": accepted}
    return Look(at_s, counters)


def test_figures_are_those_between_two_looks() -> None:
    first, second = look(10.0, 100, 50, 25), look(12.0, 110, 90, 45)
    assert figures(first, None) == Figures(1.25, 0.5, None)
    assert figures(second, first) == Figures(3.0, 0.5, 15.0)
    assert figures(second, look(11.0, 110, 90, 45)) == Figures(None, None, 0.0)
    anew = look(14.0, 2, 0, 0)
    assert figures(anew, second) == Figures(1.0, None, None)


async def test_a_look_is_a_table_or_a_line_of_json() -> None:
    async with scripted_verifier(script) as target, http_door([target.address]) as door:
        body = {"model": "scripted", "prompt": "Hi"}
        assert (await door.client.post("/v1/completions", json=body)).status_code == 200
        result = await top("--url", door.url)
        assert result.exit_code == 0, result.output
        assert "tokens so far 2" in result.stdout
        assert target.address in result.stdout
        assert "0/100000" in result.stdout
        result = await top("--url", door.url, "--json", "--looks", "2", "--interval", "0.1")
        first, second = map(json.loads, result.stdout.splitlines())
        assert (first["completion_tokens"], first["tokens_per_s"]) == (2, None)
        assert second["tokens_per_s"] == 0.0
        assert [worker["role"] for worker in second["workers"]] == ["verifier"]


async def test_a_key_is_shown_where_one_is_wanted() -> None:
    async with scripted_verifier(script) as target, http_door([target.address]) as door:
        door.door.keyring = Keyring([ApiKey("me", hashlib.sha256(b"secret").digest())])
        refused = await top("--url", door.url)
        assert refused.exit_code == 1
        assert "401" in refused.stderr
        assert "--api-key" in refused.stderr
        assert (await top("--url", door.url, "--api-key", "secret")).exit_code == 0


async def test_who_does_not_answer_is_named() -> None:
    nobody = await top("--url", "http://127.0.0.1:1")
    assert nobody.exit_code == 1
    assert nobody.stderr.startswith("error: http://127.0.0.1:1 does not answer")
    nonsense = await top("--url", "localhost")
    assert "must begin with http://" in nonsense.stderr
