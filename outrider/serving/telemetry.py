"""Traces in OpenTelemetry's format: what a request did in each service, and for how long.

Off unless a process is told where to send them; then `pip install 'outrider[otel]'` is needed,
which nothing else here imports. A session's spans are made when it ends, from times that were
noted anyway: never one for a token, and none for a verify step.

No span holds prompt or output.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Literal, TypeAlias

from outrider.domain import Origin
from outrider.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry import trace as otel

Attributes: TypeAlias = Mapping[str, str | int | float | bool]

_FLUSH_MS = 2_000


class Tracing:
    """Where one service's spans go. Its owner calls `close` at the end, off the event loop."""

    def __init__(self, service: str, endpoint: str, *, instance: str = "") -> None:
        """`endpoint` is a collector's URL for OTLP over gRPC; http:// means plaintext.

        Raises `ConfigError` if the packages are missing or the endpoint is no URL.
        """
        if not endpoint.startswith(("http://", "https://")):
            raise ConfigError(
                f"--otlp-endpoint {endpoint}: must be a URL such as http://127.0.0.1:4317"
            )
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            text = f"--otlp-endpoint needs pip install 'outrider[otel]' ({error})"
            raise ConfigError(text) from error
        resource = {"service.name": f"outrider-{service}", "service.instance.id": instance}
        self._provider = TracerProvider(
            resource=Resource.create({name: value for name, value in resource.items() if value}),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("outrider")
        self._propagator = TraceContextTextMapPropagator()
        self._trace = trace

    def begin(
        self,
        name: str,
        parent: Origin,
        *,
        kind: Literal["server", "internal"] = "internal",
        attributes: Attributes | None = None,
    ) -> Span:
        """Begin a span below `parent`, or a trace of its own where that has none."""
        return Span(self, self._start(name, parent, time.monotonic(), kind, attributes), parent)

    def record(
        self,
        name: str,
        parent: Origin,
        started_s: float,
        ended_s: float,
        attributes: Attributes | None = None,
    ) -> None:
        """Tell of what is over; times are those of `time.monotonic`."""
        span = self._start(name, parent, started_s, "internal", attributes)
        span.end(end_time=_wall_ns(ended_s))

    def close(self) -> None:
        """Send what is left, within two seconds."""
        self._provider.force_flush(_FLUSH_MS)
        self._provider.shutdown()

    def origin(self, span: otel.Span, request_id: str) -> Origin:
        """What a span's children know of it."""
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, self._trace.set_span_in_context(span))
        return Origin(request_id, carrier.get("traceparent", ""), carrier.get("tracestate", ""))

    def _start(
        self,
        name: str,
        parent: Origin,
        started_s: float,
        kind: Literal["server", "internal"],
        attributes: Attributes | None,
    ) -> otel.Span:
        carrier = {"traceparent": parent.traceparent, "tracestate": parent.tracestate}
        span = self._tracer.start_span(
            name,
            self._propagator.extract(carrier),
            self._trace.SpanKind[kind.upper()],
            attributes,
            start_time=_wall_ns(started_s),
        )
        if parent.request_id:
            span.set_attribute("outrider.request_id", parent.request_id)
        return span


class Span:
    """Something under way."""

    def __init__(self, tracing: Tracing, span: otel.Span, parent: Origin) -> None:
        self._tracing, self._span = tracing, span
        self.origin = tracing.origin(span, parent.request_id)
        """For what happens on its behalf, here or in other services."""

    def tell(self, attributes: Attributes) -> None:
        """Add what has become known."""
        self._span.set_attributes(attributes)

    def end(self, failure: str = "") -> None:
        """End it; `failure` names the kind of error that ended it."""
        if failure:
            self._span.set_attribute("error.type", failure)
            self._span.set_status(self._tracing._trace.StatusCode.ERROR)
        self._span.end()


@contextlib.asynccontextmanager
async def tracing(
    service: str, endpoint: str | None, instance: str
) -> AsyncIterator[Tracing | None]:
    """Trace while the context lasts; None without an endpoint. Raises `ConfigError`."""
    if endpoint is None:
        yield None
        return
    spans = Tracing(service, endpoint, instance=instance)
    try:
        yield spans
    finally:
        await asyncio.to_thread(spans.close)


def _wall_ns(monotonic_s: float) -> int:
    return time.time_ns() - round((time.monotonic() - monotonic_s) * 1e9)
