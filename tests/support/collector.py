"""An OpenTelemetry collector that keeps what it is sent, on a socket of its own."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc.aio
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


@dataclass(frozen=True, slots=True)
class CollectedSpan:
    """One span as it came."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    started_ns: int
    ended_ns: int
    failed: bool
    attributes: dict[str, Any]


@dataclass(slots=True)
class RunningCollector:
    """A collector that is being served."""

    url: str
    spans: list[CollectedSpan] = field(default_factory=list)

    def named(self, name: str) -> list[CollectedSpan]:
        """Spans of that name."""
        return [span for span in self.spans if span.name == name]


class _Service(trace_service_pb2_grpc.TraceServiceServicer):  # type: ignore[misc, unused-ignore]
    def __init__(self, spans: list[CollectedSpan]) -> None:
        self._spans = spans

    async def Export(self, request: Any, context: Any) -> Any:
        for resource in request.resource_spans:
            of_service = _attributes(resource.resource.attributes)
            for scope in resource.scope_spans:
                self._spans += [_span(of_service["service.name"], one) for one in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()


def _span(service: str, span: Any) -> CollectedSpan:
    return CollectedSpan(
        service,
        span.name,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        span.status.code == 2,
        _attributes(span.attributes),
    )


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}


@contextlib.asynccontextmanager
async def collector() -> AsyncIterator[RunningCollector]:
    """Serve a collector."""
    server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
    port = server.add_insecure_port("127.0.0.1:0")
    running = RunningCollector(f"http://127.0.0.1:{port}")
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(_Service(running.spans), server)
    await server.start()
    try:
        yield running
    finally:
        await server.stop(0)
