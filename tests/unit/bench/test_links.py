"""Links: what goes through is intact, in order, and as late as it was asked to be."""

from __future__ import annotations

import math
import random
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress

import pytest

from bench.links import Lane, LinkProxy, LinkShape


@pytest.fixture(scope="module")
def proxy() -> Iterator[LinkProxy]:
    with LinkProxy() as running:
        yield running


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)
        yield server


class Ends:
    """A connection through a link: the near end, and the far one behind the proxy."""

    def __init__(
        self, proxy: LinkProxy, listener: socket.socket, name: str, shape: LinkShape
    ) -> None:
        self.address = proxy.open(name, _address(listener), shape)
        self.near = _connect(self.address)
        self.far, _ = listener.accept()
        self.far.settimeout(10)

    def close(self) -> None:
        self.near.close()
        self.far.close()


def _address(listener: socket.socket) -> str:
    return f"127.0.0.1:{listener.getsockname()[1]}"


def _connect(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=10)


def _read(source: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = source.recv(1 << 20)
        assert piece, f"ended after {len(data)} of {size} bytes"
        data += piece
    return bytes(data)


def _crossing_s(ends: Ends, back: bool = False) -> float:
    """The least time of some one-way trips."""
    source, sink = (ends.far, ends.near) if back else (ends.near, ends.far)
    times_s = []
    for _ in range(20):
        begin_s = time.monotonic()
        source.sendall(b"x")
        _read(sink, 1)
        times_s.append(time.monotonic() - begin_s)
    return min(times_s)


def _exchange(ends: Ends, there: bytes, back: bytes) -> None:
    """Send both ways at once; fails if anything else arrives."""
    received: list[bytes] = []
    threads = [
        threading.Thread(target=ends.near.sendall, args=(there,)),
        threading.Thread(target=ends.far.sendall, args=(back,)),
        threading.Thread(target=lambda: received.append(_read(ends.far, len(there)))),
    ]
    for thread in threads:
        thread.start()
    assert _read(ends.near, len(back)) == back
    for thread in threads:
        thread.join()
    assert received == [there]


class TestLinkProxy:
    @pytest.mark.parametrize("delay_s", [0.0, 0.01])
    def test_each_way_takes_the_delay(
        self, proxy: LinkProxy, listener: socket.socket, delay_s: float
    ) -> None:
        with closing(Ends(proxy, listener, f"delay {delay_s}", LinkShape(delay_s=delay_s))) as ends:
            for back in (False, True):
                # What this machine's scheduler adds is in the upper bound.
                assert delay_s <= _crossing_s(ends, back) < delay_s + 0.004

    def test_a_delay_can_be_changed_while_connected(
        self, proxy: LinkProxy, listener: socket.socket
    ) -> None:
        with closing(Ends(proxy, listener, "changing", LinkShape(delay_s=0.05))) as ends:
            assert _crossing_s(ends) >= 0.05
            proxy.delay("changing", 0.0)
            assert _crossing_s(ends) < 0.01

    @pytest.mark.parametrize(
        "shape",
        [
            LinkShape(),
            LinkShape(delay_s=0.002, jitter_s=0.004),
            LinkShape(bandwidth_bytes_per_s=20e6),
            LinkShape(delay_s=0.001, loss=0.05),
        ],
        ids=["plain", "jitter", "bandwidth", "loss"],
    )
    def test_data_is_intact_and_in_order_both_ways(
        self, proxy: LinkProxy, listener: socket.socket, shape: LinkShape
    ) -> None:
        chance = random.Random(1)
        there, back = chance.randbytes(600_000), chance.randbytes(300_000)
        with closing(Ends(proxy, listener, f"data {shape}", shape)) as ends:
            _exchange(ends, there, back)

    def test_a_reader_that_comes_late_finds_all_in_order(
        self, proxy: LinkProxy, listener: socket.socket
    ) -> None:
        data = random.Random(2).randbytes(32 << 20)
        with closing(Ends(proxy, listener, "late", LinkShape())) as ends:
            sent = 0
            # Until socket buffers and the link's own queue are full: nothing is taken any more.
            while select.select([], [ends.near], [], 0.3)[1]:
                sent += ends.near.send(data[sent : sent + (1 << 16)])
            assert sent < len(data)
            rest = threading.Thread(target=ends.near.sendall, args=(data[sent:],))
            rest.start()
            assert _read(ends.far, len(data)) == data
            rest.join()

    def test_bandwidth_takes_its_time(self, proxy: LinkProxy, listener: socket.socket) -> None:
        shape = LinkShape(bandwidth_bytes_per_s=1e6)
        with closing(Ends(proxy, listener, "narrow", shape)) as ends:
            begin_s = time.monotonic()
            ends.near.sendall(bytes(200_000))
            _read(ends.far, 200_000)
            assert 0.2 <= time.monotonic() - begin_s < 0.4

    def test_a_half_close_passes_after_the_data_and_the_other_half_goes_on(
        self, proxy: LinkProxy, listener: socket.socket
    ) -> None:
        with closing(Ends(proxy, listener, "half", LinkShape(delay_s=0.01))) as ends:
            ends.near.sendall(b"last words")
            ends.near.shutdown(socket.SHUT_WR)
            assert _read(ends.far, 10) == b"last words"
            assert ends.far.recv(1) == b""
            ends.far.sendall(b"answer")
            assert _read(ends.near, 6) == b"answer"
            ends.far.close()
            assert ends.near.recv(1) == b""

    def test_a_reset_reaches_the_other_end(self, proxy: LinkProxy, listener: socket.socket) -> None:
        with closing(Ends(proxy, listener, "reset", LinkShape())) as ends:
            ends.far.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00"
            )
            ends.far.close()
            with suppress(ConnectionResetError):
                assert ends.near.recv(1) == b""

    def test_nobody_behind_a_link_ends_the_connection(self, proxy: LinkProxy) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = _address(server)
        with closing(_connect(proxy.open("nobody", address))) as near:
            assert near.recv(1) == b""

    def test_many_connections_share_a_link_and_do_not_mix(
        self, proxy: LinkProxy, listener: socket.socket
    ) -> None:
        address = proxy.open("many", _address(listener), LinkShape(delay_s=0.001))
        pairs = []
        for _ in range(40):
            near = _connect(address)
            far, _ = listener.accept()
            far.settimeout(10)
            pairs.append((near, far))
        for number, (near, _) in enumerate(pairs):
            near.sendall(bytes([number]) * 3)
        for number, (near, far) in enumerate(pairs):
            assert _read(far, 3) == bytes([number]) * 3
            near.close()
            assert far.recv(1) == b""
            far.close()


class TestLinkShape:
    @pytest.mark.parametrize(
        "wrong",
        [
            {"delay_s": -0.1},
            {"delay_s": math.inf},
            {"jitter_s": math.nan},
            {"bandwidth_bytes_per_s": 0.0},
            {"loss": 1.0},
            {"loss": -0.1},
        ],
    )
    def test_what_cannot_be_is_refused(self, wrong: dict[str, float]) -> None:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            LinkShape(**wrong)


class TestLane:
    def test_pieces_wait_for_the_line_and_then_take_the_delay(self) -> None:
        lane, shape = Lane(random.Random(1)), LinkShape(0.01, bandwidth_bytes_per_s=1000)
        assert lane.due_s(5.0, 100, shape) == pytest.approx(5.11)
        assert lane.due_s(5.0, 100, shape) == pytest.approx(5.21)
        assert lane.due_s(6.0, 100, shape) == pytest.approx(6.11)

    def test_nothing_overtakes_when_the_delay_shrinks_or_jitters(self) -> None:
        lane = Lane(random.Random(1))
        due_s = lane.due_s(0.0, 1, LinkShape(delay_s=1.0))
        for _ in range(100):
            later_s = lane.due_s(0.1, 1, LinkShape(jitter_s=0.5))
            assert later_s >= due_s
            due_s = later_s

    def test_losses_are_as_frequent_as_said_and_cost_a_retransmission(self) -> None:
        shape = LinkShape(delay_s=0.02, loss=0.1)
        lanes = [Lane(random.Random(seed)) for seed in range(4_000)]
        late = [lane.due_s(0.0, 100, shape) > 0.0201 for lane in lanes]
        assert 0.08 < sum(late) / len(late) < 0.12
        assert min(
            due_s for lane in lanes if (due_s := lane.due_s(1.0, 100, shape)) > 1.0201
        ) == pytest.approx(1.1)
