"""The process behind `bench.links`: relays the connections of all links.

One thread waits in `select` for sockets and due times alike: its timeout is exact to some ten
microseconds, where an event loop's is rounded up to whole milliseconds.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import random
import selectors
import socket
import sys
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, TypeAlias

from bench.links import Lane, LinkShape

_CHUNK_BYTES = 1 << 16
_QUEUED_BYTES_MAX = 8 << 20
_PR_SET_TIMERSLACK = 29


@dataclass(slots=True)
class _Link:
    target: tuple[str, int]
    shape: LinkShape


class _Direction:
    """From one socket of a connection to the other."""

    def __init__(self, link: _Link, source: socket.socket, sink: socket.socket, seed: int) -> None:
        self.link, self.source, self.sink = link, source, sink
        self.queue: deque[tuple[float, bytes]] = deque()
        """(when it arrives, what); nothing stands for the end."""
        self.queued_bytes = 0
        self.reading = True
        self.blocked = False
        """The sink takes no more for now."""
        self.ended = False
        self._lane = Lane(random.Random(seed))

    def receive(self) -> None:
        data = self.source.recv(_CHUNK_BYTES)
        due_s = self._lane.due_s(time.monotonic(), len(data), self.link.shape)
        self.queue.append((due_s, data))
        self.queued_bytes += len(data)
        self.reading = bool(data)

    def send(self, now_s: float) -> None:
        while self.queue and self.queue[0][0] <= now_s and not self.blocked:
            due_s, data = self.queue.popleft()
            if not data:
                self.sink.shutdown(socket.SHUT_WR)
                self.ended = True
                return
            try:
                sent = self.sink.send(data)
            except BlockingIOError:
                sent = 0
            self.queued_bytes -= sent
            if sent < len(data):
                self.queue.appendleft((due_s, data[sent:]))
                self.blocked = True

    @property
    def due_s(self) -> float:
        """When the next piece arrives; infinity: none, or the sink must take the last first."""
        return self.queue[0][0] if self.queue and not self.blocked else math.inf

    @property
    def wants(self) -> bool:
        return self.reading and self.queued_bytes < _QUEUED_BYTES_MAX


_Pair: TypeAlias = tuple[_Direction, _Direction]


class _Proxy:
    """All links, in one thread."""

    def __init__(self) -> None:
        self._selector = selectors.SelectSelector()
        self._links: dict[str, _Link] = {}
        self._pairs: set[_Pair] = set()
        self._connections = 0
        self._commands = b""

    def run(self) -> None:
        """Serve until the parent closes the pipe."""
        os.set_blocking(0, False)
        self._selector.register(0, selectors.EVENT_READ, None)
        _say({})
        while True:
            touched: set[_Pair] = set()
            for key, events in self._selector.select(self._wait_s()):
                if key.data is None:
                    if not self._obey():
                        return
                elif isinstance(key.data, _Link):
                    assert isinstance(key.fileobj, socket.socket)
                    self._accept(key.fileobj, key.data)
                else:
                    self._serve(key.data, key.fileobj, events)
                    touched.add(key.data)
            now_s = time.monotonic()
            due = {p for p in self._pairs if any(d.due_s <= now_s for d in p)}
            for pair in (touched | due) & self._pairs:
                self._advance(pair, now_s)

    def _wait_s(self) -> float | None:
        due_s = min((d.due_s for pair in self._pairs for d in pair), default=math.inf)
        return max(0.0, due_s - time.monotonic()) if due_s < math.inf else None

    def _accept(self, listener: socket.socket, link: _Link) -> None:
        near, _ = listener.accept()
        try:
            far = socket.create_connection(link.target, timeout=5)
        except OSError:
            near.close()
            return
        for one in (near, far):
            one.setblocking(False)
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connections += 2
        there = _Direction(link, near, far, self._connections)
        back = _Direction(link, far, near, self._connections + 1)
        pair = (there, back)
        self._pairs.add(pair)
        for one in (near, far):
            self._selector.register(one, selectors.EVENT_READ, pair)

    def _serve(self, pair: _Pair, ready: Any, events: int) -> None:
        if pair not in self._pairs:
            return
        try:
            for direction in pair:
                if direction.source is ready and events & selectors.EVENT_READ and direction.wants:
                    direction.receive()
                if direction.sink is ready and events & selectors.EVENT_WRITE:
                    direction.blocked = False
        except BlockingIOError:
            return
        except OSError:
            self._drop(pair)

    def _advance(self, pair: _Pair, now_s: float) -> None:
        try:
            for direction in pair:
                direction.send(now_s)
        except OSError:
            self._drop(pair)
            return
        there, back = pair
        if there.ended and back.ended:
            self._drop(pair)
            return
        # `there` reads from the near socket and `back` writes to it, and the other way round.
        for reads, writes in ((there, back), (back, there)):
            events = reads.wants * selectors.EVENT_READ | writes.blocked * selectors.EVENT_WRITE
            self._watch(reads.source, events, pair)

    def _watch(self, one: socket.socket, events: int, pair: Any) -> None:
        known = self._selector.get_map().get(one)
        if known is None:
            if events:
                self._selector.register(one, events, pair)
        elif not events:
            self._selector.unregister(one)
        elif known.events != events:
            self._selector.modify(one, events, pair)

    def _drop(self, pair: _Pair) -> None:
        self._pairs.discard(pair)
        for direction in pair:
            self._watch(direction.source, 0, None)
            direction.source.close()

    def _obey(self) -> bool:
        data = os.read(0, _CHUNK_BYTES)
        *lines, self._commands = (self._commands + data).split(b"\n")
        for line in lines:
            try:
                _say(self._carry_out(json.loads(line)))
            except (ValueError, KeyError, TypeError, OSError) as error:
                _say({"error": f"{type(error).__name__}: {error}"})
        return bool(data)

    def _carry_out(self, command: dict[str, Any]) -> dict[str, Any]:
        shape = LinkShape(**command["shape"])
        if "of" in command:
            self._links[command["of"]].shape = shape
            return {}
        host, _, port = command["target"].rpartition(":")
        link = self._links[command["open"]] = _Link((host, int(port)), shape)
        listener = socket.create_server(("127.0.0.1", 0))
        self._selector.register(listener, selectors.EVENT_READ, link)
        return {"address": f"127.0.0.1:{listener.getsockname()[1]}"}


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


def _fine_timers() -> None:
    """Ask the kernel not to join this thread's timeouts with others', by default within 50 µs."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1)


if __name__ == "__main__":
    _fine_timers()
    _Proxy().run()
