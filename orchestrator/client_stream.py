"""Writes to one gRPC client, and an end to waiting for one that reads nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import grpc.aio

from outrider.errors import Unavailable

_log = logging.getLogger(__name__)


class ClientStream:
    """Answers of one call, written by the task that serves it, which also makes and closes this.

    One timer watches all writes: one for each message would cost as much as the rest of it here.
    """

    def __init__(self, send: Callable[[Any], Awaitable[None]], limit_s: float) -> None:
        """`send` is the call's `write`; one that takes longer than `limit_s` ends the call."""
        self._send = send
        self._limit_s = limit_s
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._began_s: float | None = None
        """When the write under way began, on the loop's clock."""
        self._timer: asyncio.TimerHandle | None = None
        self._given_up = False

    async def write(self, message: Any) -> None:
        """Write a message, which waits for the client.

        Raises `Unavailable` if it reads nothing, CancelledError if it has left.
        """
        self._began_s = self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_later(self._limit_s, self._look)
        try:
            await self._send(message)
        except grpc.aio.InternalError:
            # The client has left; often this is heard first, and then that the call is cancelled.
            raise asyncio.CancelledError from None
        except asyncio.CancelledError:
            if not self._given_up:
                raise
            assert self._task is not None, "made by the task that writes"
            self._task.uncancel()
            _log.info("a client read nothing for %g s", self._limit_s)
            text = f"the client read nothing for {self._limit_s:g} s"
            raise Unavailable(f"{text}; what it has not read can be resumed") from None
        self._began_s = None

    def close(self) -> None:
        """Watch no longer."""
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        self._timer = None
        if self._began_s is None:
            return  # the next write begins to watch anew
        left_s = self._began_s + self._limit_s - self._loop.time()
        if left_s > 0.0:
            self._timer = self._loop.call_later(left_s, self._look)
        elif self._task is not None:
            self._given_up = True
            self._task.cancel()
