"""The two queues between an event loop and the thread that owns a model.

`Inbox`: loop to thread. `Mailbox`: anything on the loop to one reader on the loop, joining what
has piled up, so that a slow reader gets fewer and larger messages instead of a longer queue.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Inbox(Generic[T]):
    """Bounded commands for a thread; thread-safe."""

    def __init__(self, droppable_max: int) -> None:
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._droppable_max = droppable_max
        self._closed = False

    def put(self, item: T, *, droppable: bool = False) -> bool:
        """Append; returns False if the item was dropped because the queue is full.

        Only hints are droppable. What is not is bounded by admission: a session has a handful of
        such messages.
        """
        with self._changed:
            if self._closed or (droppable and len(self._items) >= self._droppable_max):
                return False
            self._items.append(item)
            self._changed.notify()
            return True

    def take_all(self, *, wait_s: float) -> list[T]:
        """Return everything queued; waits up to `wait_s` while there is nothing."""
        with self._changed:
            if not self._items and wait_s > 0 and not self._closed:
                self._changed.wait(wait_s)
            items = list(self._items)
            self._items.clear()
            return items

    @property
    def waiting(self) -> int:
        """Items in the queue."""
        return len(self._items)

    def close(self) -> None:
        """Refuse further items and wake the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def closed(self) -> bool:
        """True once `close` was called."""
        return self._closed


JOIN_AT = 64
"""Items of a reader that lags before they are joined."""


class Mailbox(Generic[T]):
    """Items for one reader on the same event loop; `put` never blocks.

    The bound is the writer's: each session contributes at most one item a step, and a reader that
    stalls gets them all at once. Where items can be joined, those that pile up are, so that a
    reader that lags costs what it has to be told and not how often something was said.
    """

    def __init__(self, join: Callable[[list[T]], list[T]] | None = None) -> None:
        """`join` returns what says the same as the items in the same order, in fewer of them."""
        self._items: list[T] = []
        self._join = join
        self._join_at = JOIN_AT
        self._reader: asyncio.Future[None] | None = None
        """What the reader waits for. One reader needs no `asyncio.Event`, which costs twice."""
        self._closed = False

    def put(self, item: T) -> None:
        """Append; ignored after `close`."""
        if not self._closed:
            self._items.append(item)
            if len(self._items) >= self._join_at and self._join is not None:
                self._items = self._join(self._items)
                # What cannot be joined is not looked at again for each item more.
                self._join_at = JOIN_AT + 2 * len(self._items)
            self._wake()

    def close(self) -> None:
        """No more items; the reader gets what is left, then an empty list."""
        self._closed = True
        self._wake()

    @property
    def closed(self) -> bool:
        """True once `close` was called."""
        return self._closed

    @property
    def waiting(self) -> int:
        """Items in the mailbox."""
        return len(self._items)

    async def take(self) -> list[T]:
        """Wait for items and return all of them; an empty list means closed and drained."""
        if not (self._items or self._closed):
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        items, self._items = self._items, []
        self._join_at = JOIN_AT
        return items

    def _wake(self) -> None:
        if self._reader is not None:
            if not self._reader.done():
                self._reader.set_result(None)
            self._reader = None
