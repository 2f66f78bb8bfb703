"""Who asks: a request's name and its trace, as clients give them and services pass them on."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Iterator, Mapping

from outrider.domain import REQUEST_ID, TRACE_CHARACTERS_MAX, Origin
from outrider.errors import OutriderError
from outrider.serving.logs import request_named
from outrider.serving.telemetry import Attributes, Tracing

REQUEST_ID_KEY = "x-request-id"
"""Header, and metadata of a gRPC call, in which a client names its request and is told the name."""

_log = logging.getLogger(__name__)


def origin_of(metadata: Mapping[str, str]) -> Origin:
    """Read a request's name and W3C trace context from headers or metadata, keys in lower case.

    A name that cannot go into a log, or none, is replaced by one drawn here.
    """
    number = metadata.get(REQUEST_ID_KEY, "")
    if not REQUEST_ID.fullmatch(number):
        number = uuid.uuid4().hex
    parent, state = (metadata.get(name, "") for name in ("traceparent", "tracestate"))
    if len(parent) > TRACE_CHARACTERS_MAX:
        return Origin(number)
    return Origin(number, parent, state if len(state) <= TRACE_CHARACTERS_MAX else "")


class Answering:
    """A request that is being answered."""

    def __init__(self, tracing: Tracing | None, name: str, origin: Origin) -> None:
        self._span = None if tracing is None else tracing.begin(name, origin, kind="server")
        self._failure = ""
        self.origin = origin if self._span is None else self._span.origin
        """Of what is done for it."""

    def tell(self, attributes: Attributes) -> None:
        """Add to its span what has become known."""
        if self._span is not None:
            self._span.tell(attributes)

    def failed(self, error: BaseException) -> None:
        """It cannot be answered as it was meant.

        The reason and even the field may quote it, so only the kind of error is told.
        """
        self._failure = type(error).__name__
        if isinstance(error, OutriderError):
            _log.info("request refused", extra={"error": self._failure})

    def over(self) -> None:
        """All has been said."""
        if self._span is not None:
            self._span.end(self._failure)


@contextlib.contextmanager
def answering(tracing: Tracing | None, name: str, origin: Origin) -> Iterator[Answering]:
    """Answer a request within: logs name it, and its span lasts as long."""
    request = Answering(tracing, name, origin)
    with request_named(origin.request_id):
        try:
            yield request
        except (Exception, asyncio.CancelledError) as error:
            request.failed(error)
            raise
        finally:
            request.over()
