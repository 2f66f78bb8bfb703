"""What is done at once and then at intervals, whether Redis is there or not."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from types import TracebackType
from typing import Self

from outrider.errors import RegistryUnavailable

logger = logging.getLogger(__name__)


class Renewal:
    """Does something at once and then at intervals, for as long as the context lasts.

    An interval is waited for on an event, so closing does not wait for its end.
    """

    def __init__(self, name: str, place: str, interval_s: float) -> None:
        """`name` and `place`, where Redis is, are for the log."""
        self._name = name
        self._place = place
        self._interval_s = interval_s
        self._wake = asyncio.Event()
        self._closing = False
        self._task: asyncio.Task[None] | None = None
        self.connected: bool | None = None
        """Whether the last attempt reached Redis; None before the first."""

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name=self._name)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Let the attempt under way end, which the registry bounds in time."""
        self._closing = True
        self._wake.set()
        if self._task is not None:
            # Not cancelled: an interrupted command may still be carried out, after what we do
            # next. If we are cancelled ourselves, so is the task.
            await self._task

    def wake(self) -> None:
        """Do it now instead of at the end of the interval."""
        self._wake.set()

    async def _run(self) -> None:
        while not self._closing:
            self._wake.clear()
            await self._attempt()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._interval_s):
                    await self._wake.wait()

    async def _attempt(self) -> None:
        try:
            await self._act()
        except RegistryUnavailable as error:
            if self.connected is not False:
                logger.warning("%s: going on without the registry: %s", self._name, error)
            self.connected = False
        except Exception:
            # A defect in a callback. The task must live: nobody would notice its end.
            logger.exception("%s failed; trying again", self._name)
        else:
            if self.connected is False:
                logger.info("%s: Redis at %s is back", self._name, self._place)
            self.connected = True

    async def _act(self) -> None:
        raise NotImplementedError
