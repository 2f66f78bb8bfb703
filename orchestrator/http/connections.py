"""Connections: uvicorn's, with bounds that it does not set by itself."""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from orchestrator.config import HttpConfig

SPARE_CONNECTIONS = 64
"""Beyond the most, for probes and whoever scrapes metrics: a door that is full is not dead."""

_log = logging.getLogger(__name__)


def connection_class(bounds: HttpConfig) -> type[HttpToolsProtocol]:
    """Return the protocol for connections within these bounds."""

    class BoundConnection(Connection):
        limits = bounds

    return BoundConnection


class _HeadTooLargeError(Exception):
    """Raised into the parser, which reports it as a malformed request."""


class Connection(HttpToolsProtocol):
    """One client's connection: its requests' heads are bounded in size and time."""

    limits: HttpConfig

    def __init__(self, config: Config, *args: Any, **others: Any) -> None:
        super().__init__(config, *args, **others)
        self._head_bytes = 0
        self._deadline: asyncio.TimerHandle | None = None
        self._in_head = False
        self._stalled: asyncio.TimerHandle | None = None
        self._unread_bytes = 0
        self._surplus = False
        """It came when there were as many as are let in."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=self.limits.write_buffer_bytes)
        self._surplus = len(self.connections) > self.limits.connections_max
        if len(self.connections) > self.limits.connections_max + SPARE_CONNECTIONS:
            transport.abort()
            return
        connected = transport.get_extra_info("socket")
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.limits.send_buffer_bytes)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._head_over()
        self._flows()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client is behind: answers wait for it, but not for ever."""
        super().pause_writing()
        self._unread_bytes = self.transport.get_write_buffer_size()
        self._stalled = self.loop.call_later(self.limits.write_timeout_s, self._still_behind)

    def resume_writing(self) -> None:
        """The client has caught up."""
        self._flows()
        super().resume_writing()

    def _still_behind(self) -> None:
        unread = self.transport.get_write_buffer_size()
        if self._unread_bytes - unread < self.limits.write_buffer_bytes // 4:
            _log.info("a client read nothing for %g s", self.limits.write_timeout_s)
            # Closing would wait until all has been read.
            self.transport.abort()
            return
        self._unread_bytes = unread
        self._stalled = self.loop.call_later(self.limits.write_timeout_s, self._still_behind)

    def _flows(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def data_received(self, data: bytes) -> None:
        """Parse; the parser itself would collect a head of any size."""
        super().data_received(data)
        if self._in_head:
            self._take_head(len(data))
            if self._head_bytes > self.limits.header_bytes_max:
                self.transport.abort()

    def on_message_begin(self) -> None:
        """A request's first bytes have come."""
        super().on_message_begin()
        self._head_bytes = 0
        self._await_head()
        # Lets an answer break off so that it cannot be taken for a complete one.
        self.scope["state"]["abort"] = self.transport.abort
        self.scope["state"]["surplus"] = self._surplus

    def on_url(self, url: bytes) -> None:
        """Collect a piece of the URL."""
        self._refuse_beyond(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Collect a header."""
        self._refuse_beyond(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is there."""
        self._head_over()
        super().on_headers_complete()

    def _refuse_beyond(self, count: int) -> None:
        self._take_head(count)
        if self._head_bytes > self.limits.header_bytes_max:
            raise _HeadTooLargeError

    def _take_head(self, count: int) -> None:
        self._head_bytes += count

    def _await_head(self) -> None:
        self._head_over()
        self._in_head = True
        self._deadline = self.loop.call_later(self.limits.header_timeout_s, self._late)

    def _late(self) -> None:
        self.transport.abort()

    def _head_over(self) -> None:
        self._in_head = False
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
