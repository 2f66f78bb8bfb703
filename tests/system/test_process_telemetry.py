"""Logs and traces of a fleet as it is run: a process for each service."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import grpc.aio
import pytest
from rich.console import Console

from outrider.local import LocalConfig, LocalFleet
from outrider.v1 import generation_pb2, generation_pb2_grpc, types_pb2
from tests.support.fleet import DRAFT, TARGET, until

pytest.importorskip("opentelemetry.sdk", reason="needs outrider[otel]")

from tests.support.collector import collector

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="processes are Linux's"),
]

ASKED = "xylophone"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


async def generate(endpoint: str) -> str:
    """One named and traced generation; returns its text."""
    request = generation_pb2.GenerateRequest(
        prompt=f"{ASKED}, {ASKED}",
        tokens_max=32,
        ignore_eos=True,
        sampling=types_pb2.SamplingParams(temperature=0),
    )
    named = (("x-request-id", "r-42"), ("traceparent", f"00-{TRACE}-00f067aa0ba902b7-01"))
    async with grpc.aio.insecure_channel(endpoint) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        return "".join([one.delta.text async for one in stub.Generate(request, metadata=named)])


def lines(folder: Path, service: str) -> list[dict[str, object]]:
    text = next(folder.glob(f"{service}*.log")).read_text()
    return [json.loads(line) for line in text.splitlines()]


async def test_one_request_is_found_in_all_logs_and_in_one_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LocalConfig(
        model=TARGET,
        dtype="float32",
        device="cpu",
        verifiers=1,
        drafters=1,
        draft_model=DRAFT,
        redis_url=None,
        log_dir=tmp_path / "logs",
        cache_dir=tmp_path / "cache",
        port=None,
    )
    async with collector() as heard:
        for name, value in (
            ("OUTRIDER_LOG_FORMAT", "json"),
            ("OUTRIDER_LOG_LEVEL", "debug"),
            ("OUTRIDER_OTLP_ENDPOINT", heard.url),
            ("OUTRIDER_VERIFIER_WARM_UP", "0"),
        ):
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("REDIS_URL", raising=False)
        with LocalFleet(config, Console(stderr=True, quiet=True)) as fleet:
            text = await generate(fleet.endpoint)
            # Off this thread, where the collector listens: the last spans come at the end.
            await asyncio.to_thread(fleet.stop)

        async def complete() -> bool:
            return len({span.service for span in heard.spans}) == 3

        await until(complete, what="all services have sent their spans", timeout_s=30)
    assert {span.trace_id for span in heard.spans} == {TRACE}
    assert {span.name for span in heard.spans} >= {"session", "prefill", "verify steps", "draft"}
    for service in ("orchestrator", "verifier", "drafter"):
        told = lines(tmp_path / "logs", service)
        assert {line["service"] for line in told} == {service}
        assert any(line.get("request_id") == "r-42" for line in told), service
        content = (next((tmp_path / "logs").glob(f"{service}*.log"))).read_text()
        assert ASKED not in content
        assert json.dumps(text)[1:-1] not in content
