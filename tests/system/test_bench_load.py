"""The load benchmark over a real orchestrator, verifier and drafter with tiny models."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from click.testing import CliRunner

from bench.load import command, serve
from bench.load_results import SPECULATED
from outrider.client import Request
from tests.support.fleet import TARGET, drafter, load, lookup, orchestrator, verifier


async def test_both_sides_serve_the_same_arrivals(tmp_path: Path) -> None:
    async with (
        verifier(load(TARGET)) as target,
        drafter(lookup()) as guesser,
        orchestrator([target.address], [guesser.address]) as fleet,
    ):
        arguments = ["--endpoint", fleet.address, "--rates", "20,5", "--window", "0.5"]
        arguments += ["--max-tokens", "6", "--concurrency", "2", "--results-dir", str(tmp_path)]
        answer = await asyncio.to_thread(
            CliRunner().invoke, command, arguments, catch_exceptions=False
        )
    assert answer.exit_code == 0, answer.output
    assert answer.output.strip().splitlines()[-1].startswith("result: load min_ratio=")
    runs = json.loads((tmp_path / "load.json").read_text())["runs"]
    assert [run["rate"] for run in runs] == [5.0, 5.0, 20.0, 20.0]
    for one, other in zip(runs[::2], runs[1::2], strict=True):
        assert {one["side"], other["side"]} == {"target-only", "outrider"}
        # Greedy in float32: the same arrivals make the same tokens.
        counts = [[request["tokens"] for request in run["requests"]] for run in (one, other)]
        assert counts[0] == counts[1]
        assert counts[0]
    assert (tmp_path / "load.md").exists()


async def test_results_may_be_printed_as_json(tmp_path: Path) -> None:
    async with (
        verifier(load(TARGET)) as target,
        orchestrator([target.address]) as fleet,
    ):
        arguments = ["--endpoint", fleet.address, "--rates", "5", "--window", "0.3", "--json"]
        arguments += ["--max-tokens", "4", "--results-dir", str(tmp_path)]
        answer = await asyncio.to_thread(
            CliRunner().invoke, command, arguments, catch_exceptions=False
        )
    assert json.loads(answer.stdout) == json.loads((tmp_path / "load.json").read_text())


async def test_who_waits_for_a_slot_has_waited_since_the_arrival() -> None:
    async with (
        verifier(load(TARGET)) as target,
        orchestrator([target.address]) as fleet,
    ):
        request = Request(prompt="abc", tokens_max=8, temperature=0.0, ignore_eos=True)
        run = await serve(
            fleet.client, SPECULATED, 1.0, [0.0, 0.0, 0.0], [request] * 3, 1, lambda: None
        )
    assert [served.tokens for served in run.requests] == [8, 8, 8]
    totals = sorted(served.total_s for served in run.requests)
    firsts = sorted(served.first_token_s for served in run.requests)
    # One at a time: each begins when the one before has ended.
    assert firsts[1] > totals[0] - 1e-3
    assert firsts[2] > totals[1] - 1e-3
