"""Traces, as a collector gets them over a socket."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable, Iterable

import pytest

from outrider.domain import Origin, SessionSpec
from outrider.errors import ConfigError
from outrider.serving.origins import origin_of
from outrider.serving.telemetry import Tracing, tracing
from outrider.v1 import verifier_pb2
from tests.support.fleet import TARGET, drafter, load, lookup, verifier
from tests.support.http_door import http_door
from tests.support.scripted_verifier import answer, scripted_verifier

pytest.importorskip("opentelemetry.sdk", reason="needs outrider[otel]")

from tests.support.collector import CollectedSpan, collector

CALLER_TRACE, CALLER_SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
CALLER = {"traceparent": f"00-{CALLER_TRACE}-{CALLER_SPAN}-01", "tracestate": "theirs=1"}
SAY = {"model": "scripted", "prompt": "x"}
TEXT = "one two three, one two three, one two"


def only(spans: Iterable[CollectedSpan], wanted: Callable[[CollectedSpan], bool]) -> CollectedSpan:
    (one,) = [span for span in spans if wanted(span)]
    return one


async def test_a_request_is_one_trace_through_all_services() -> None:
    async with collector() as heard:
        services = {name: Tracing(name, heard.url) for name in ("orchestrator", "v", "d")}
        async with (
            verifier(load(TARGET), tracing=services["v"]) as target,
            drafter(lookup(), tracing=services["d"]) as guesser,
            http_door(
                [target.address], [guesser.address], tracing=services["orchestrator"]
            ) as door,
        ):
            body = {"model": "tiny", "prompt": TEXT, "max_tokens": 24, "temperature": 0}
            body["ignore_eos"] = True
            headers = {**CALLER, "x-request-id": "r-1"}
            response = await door.client.post("/v1/completions", json=body, headers=headers)
            answered = response.json()
        for one in services.values():
            await asyncio.to_thread(one.close)
        spans = heard.spans

    assert {span.trace_id for span in spans} == {CALLER_TRACE}
    request = only(spans, lambda span: span.name == "POST /v1/completions")
    assert request.parent_id == CALLER_SPAN
    assert request.service == "outrider-orchestrator"
    assert request.attributes["http.response.status_code"] == 200
    session = only(spans, lambda span: span.name == "session")
    assert session.parent_id == request.span_id
    assert session.attributes["gen_ai.request.model"] == "tiny"
    assert session.attributes["gen_ai.usage.output_tokens"] == 24
    assert session.attributes["outrider.request_id"] == "r-1"
    below = [span for span in spans if span.parent_id == session.span_id]
    assert {(span.service, span.name) for span in below} == {
        ("outrider-orchestrator", "placement"),
        ("outrider-v", "prefill"),
        ("outrider-v", "verify steps"),
        ("outrider-d", "draft"),
    }
    steps = only(below, lambda span: span.name == "verify steps")
    told = answered["metrics"]["speculative_decoding"]
    assert steps.attributes["outrider.verify_steps"] == told["num_spec_steps"]
    assert steps.attributes["outrider.committed_tokens"] == 24
    draft = only(below, lambda span: span.name == "draft")
    assert draft.attributes["outrider.draft_tokens"] >= told["num_accepted_draft_tokens"]
    # Never one for a token or a step.
    assert len(spans) == 6
    now_ns = time.time_ns()
    for span in spans:
        assert now_ns - 60e9 < span.started_ns <= span.ended_ns <= now_ns
    prefill = only(below, lambda span: span.name == "prefill")
    assert request.started_ns <= session.started_ns <= prefill.started_ns
    assert prefill.ended_ns <= steps.started_ns + 1e6
    assert steps.ended_ns <= request.ended_ns + 1e8
    text = answered["choices"][0]["text"]
    assert not any(text in str(value) for span in spans for value in span.attributes.values())
    assert not any(TEXT in str(value) for span in spans for value in span.attributes.values())


async def test_a_refused_request_is_a_failed_span() -> None:
    async with collector() as heard:
        spans = Tracing("orchestrator", heard.url)
        async with (
            scripted_verifier(lambda spec: answer(spec, b"x")) as target,
            http_door([target.address], tracing=spans) as door,
        ):
            await door.client.post("/v1/completions", json={**SAY, "n": 0})
            await door.client.get("/health")
        await asyncio.to_thread(spans.close)
    (span,) = heard.spans
    assert span.failed
    assert span.attributes["error.type"] == "InvalidRequest"
    assert span.attributes["http.response.status_code"] == 400
    assert not span.parent_id


async def test_a_callers_trace_reaches_workers_of_an_orchestrator_that_traces_nothing() -> None:
    seen: list[SessionSpec] = []

    def script(spec: SessionSpec) -> Iterable[verifier_pb2.VerifyResponse]:
        seen.append(spec)
        return answer(spec, b"x")

    async with scripted_verifier(script) as target, http_door([target.address]) as door:
        headers = {**CALLER, "x-request-id": "r-1"}
        await door.client.post("/v1/completions", json=SAY, headers=headers)
    assert seen[0].origin == Origin("r-1", CALLER["traceparent"], "theirs=1")


@pytest.mark.parametrize("parent", ["", "nonsense", "00-0-0-01", "x" * 10_000])
async def test_a_context_that_is_none_begins_a_trace_of_its_own(parent: str) -> None:
    async with collector() as heard:
        spans = Tracing("orchestrator", heard.url)
        spans.begin("alone", origin_of({"traceparent": parent})).end()
        await asyncio.to_thread(spans.close)
    (span,) = heard.spans
    assert not span.parent_id
    assert int(span.trace_id, 16)


async def test_a_collector_that_is_away_costs_nothing_but_its_spans() -> None:
    started_s = time.monotonic()
    async with tracing("orchestrator", "http://127.0.0.1:9", "one") as spans:
        assert spans is not None
        for _ in range(100):
            spans.begin("lost", Origin()).end()
        assert time.monotonic() - started_s < 2.0
    assert time.monotonic() - started_s < 30.0


def test_an_endpoint_that_is_no_url_is_refused() -> None:
    with pytest.raises(ConfigError, match="--otlp-endpoint"):
        Tracing("orchestrator", "127.0.0.1:4317")


def test_nothing_is_imported_without_an_endpoint() -> None:
    program = (
        "import sys, orchestrator.app, outrider.serving.telemetry;"
        # The metrics half is imported by the client of Redis wherever it is installed.
        "sys.exit('opentelemetry.sdk.trace' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
