"""Inbox (loop to thread) and mailbox (anything to one reader on the loop)."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from outrider.serving.queues import JOIN_AT, Inbox, Mailbox

PATIENCE_S = 20.0
"""Nothing here takes this long unless it hangs."""


# --- inbox ------------------------------------------------------------------------------------


def test_the_inbox_gives_everything_at_once_in_order() -> None:
    inbox: Inbox[int] = Inbox(droppable_max=4)
    for item in range(3):
        assert inbox.put(item)
    assert inbox.take_all(wait_s=0.0) == [0, 1, 2]
    assert inbox.take_all(wait_s=0.0) == []


def test_only_what_is_droppable_is_dropped_when_full() -> None:
    inbox: Inbox[str] = Inbox(droppable_max=2)
    assert inbox.put("hint 1", droppable=True)
    assert inbox.put("truth 1")
    assert not inbox.put("hint 2", droppable=True)
    assert inbox.put("truth 2")
    assert inbox.take_all(wait_s=0.0) == ["hint 1", "truth 1", "truth 2"]
    assert inbox.put("hint 3", droppable=True)


def test_a_closed_inbox_refuses_and_still_gives_what_it_has() -> None:
    inbox: Inbox[int] = Inbox(droppable_max=2)
    inbox.put(1)
    assert not inbox.closed
    inbox.close()
    assert inbox.closed
    assert not inbox.put(2)
    assert inbox.take_all(wait_s=PATIENCE_S) == [1]
    started = time.monotonic()
    assert inbox.take_all(wait_s=PATIENCE_S) == []
    assert time.monotonic() - started < PATIENCE_S / 2


def test_waiting_ends_by_itself() -> None:
    inbox: Inbox[int] = Inbox(droppable_max=2)
    assert inbox.take_all(wait_s=0.001) == []


@pytest.mark.parametrize("wake", ["put", "close"])
def test_a_waiting_thread_is_woken(wake: str) -> None:
    inbox: Inbox[int] = Inbox(droppable_max=2)
    taken: list[list[int]] = []
    waiting = threading.Event()

    def reader() -> None:
        waiting.set()
        taken.append(inbox.take_all(wait_s=PATIENCE_S))

    thread = threading.Thread(target=reader)
    started = time.monotonic()
    thread.start()
    assert waiting.wait(PATIENCE_S)
    if wake == "put":
        inbox.put(7)
    else:
        inbox.close()
    thread.join(PATIENCE_S)
    assert taken == [[7] if wake == "put" else []]
    assert time.monotonic() - started < PATIENCE_S / 2


def test_many_threads_lose_nothing() -> None:
    inbox: Inbox[tuple[int, int]] = Inbox(droppable_max=0)
    threads = [
        threading.Thread(target=lambda n=n: [inbox.put((n, i)) for i in range(200)])
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    taken: list[tuple[int, int]] = []
    deadline_s = time.monotonic() + PATIENCE_S
    while len(taken) < 800 and time.monotonic() < deadline_s:
        taken += inbox.take_all(wait_s=0.1)
    for thread in threads:
        thread.join(PATIENCE_S)
    for number in range(4):
        assert [i for n, i in taken if n == number] == list(range(200))


# --- mailbox ----------------------------------------------------------------------------------


async def take(mailbox: Mailbox[int]) -> list[int]:
    return await asyncio.wait_for(mailbox.take(), PATIENCE_S)


async def test_the_mailbox_joins_what_piled_up() -> None:
    mailbox: Mailbox[int] = Mailbox()
    mailbox.put(1)
    mailbox.put(2)
    assert await take(mailbox) == [1, 2]
    reader = asyncio.create_task(mailbox.take())
    await asyncio.sleep(0)
    assert not reader.done(), "an empty mailbox is waited for, not read as closed"
    mailbox.put(3)
    assert await asyncio.wait_for(reader, PATIENCE_S) == [3]


async def test_a_closed_mailbox_is_drained_and_then_empty_for_good() -> None:
    mailbox: Mailbox[int] = Mailbox()
    mailbox.put(1)
    mailbox.close()
    mailbox.put(2)
    assert mailbox.closed
    assert await take(mailbox) == [1]
    assert await take(mailbox) == []
    assert await take(mailbox) == []


async def test_closing_wakes_the_reader() -> None:
    mailbox: Mailbox[int] = Mailbox()
    reader = asyncio.create_task(take(mailbox))
    await asyncio.sleep(0)
    mailbox.close()
    assert await reader == []


async def test_a_reader_that_gave_up_loses_nothing() -> None:
    mailbox: Mailbox[int] = Mailbox()
    reader = asyncio.create_task(mailbox.take())
    await asyncio.sleep(0)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    mailbox.put(1)
    assert await take(mailbox) == [1]


async def test_a_mailbox_joins_what_its_reader_lets_pile_up() -> None:
    box: Mailbox[str] = Mailbox(lambda items: ["".join(items)])
    for index in range(10 * JOIN_AT):
        box.put(str(index % 10))
        assert box.waiting <= 2 * JOIN_AT
    items = await box.take()
    assert len(items) < 2 * JOIN_AT
    assert "".join(items) == "0123456789" * JOIN_AT
    box.put("next")
    assert await box.take() == ["next"]


async def test_what_cannot_be_joined_is_not_looked_at_each_time() -> None:
    looked = 0

    def join(items: list[int]) -> list[int]:
        nonlocal looked
        looked += len(items)
        return items

    box: Mailbox[int] = Mailbox(join)
    count = 100 * JOIN_AT
    for item in range(count):
        box.put(item)
    assert looked < 2 * count
    assert await box.take() == list(range(count))
