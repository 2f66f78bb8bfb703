"""Links between services as a network would make them: delay, jitter, bandwidth, loss.

    with LinkProxy() as proxy:
        address = proxy.open("drafter-1", "127.0.0.1:4321")   # connect here instead
        proxy.shape("drafter-1", LinkShape(delay_s=0.005))    # at any time

A TCP proxy in a process of its own; any number of links, and of connections on each. Bytes keep
their order and none is lost: what TCP makes of a lost segment is a delay, for it and for all that
follows. Report the round trips that were measured (`bench.round_trips`), not those asked for.
"""

from __future__ import annotations

import math
import random
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Self

from bench.children import Child

SEGMENT_BYTES = 1_448
"""Payload of a TCP segment on Ethernet: what is lost at once."""
_PROBE_MIN_S = 0.01


@dataclass(frozen=True, slots=True)
class LinkShape:
    """How a link behaves, in each direction alike. Raises ValueError for what cannot be."""

    delay_s: float = 0.0
    """One way."""
    jitter_s: float = 0.0
    """Up to so much more, evenly spread, drawn for each piece; order is kept."""
    bandwidth_bytes_per_s: float = math.inf
    loss: float = 0.0
    """Share of segments that arrive only when they have been sent again: after two round trips
    and at least 10 ms, as the tail loss probe of RFC 8985 does for sparse traffic."""

    def __post_init__(self) -> None:
        for name in ("delay_s", "jitter_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite time, not {getattr(self, name)}")
        if not self.bandwidth_bytes_per_s > 0:
            raise ValueError("bandwidth_bytes_per_s must be positive")
        if not 0 <= self.loss < 1:
            raise ValueError(f"loss must be at least 0 and less than 1, not {self.loss}")


class Lane:
    """When what enters one direction of a connection leaves it. Pure but for `chance`."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._sent_s = 0.0
        """When the sender's line is free again."""
        self._due_s = 0.0

    def due_s(self, now_s: float, size: int, shape: LinkShape) -> float:
        """Return when `size` bytes that come now arrive: never before what came earlier."""
        self._sent_s = max(now_s, self._sent_s) + size / shape.bandwidth_bytes_per_s
        due_s = self._sent_s + shape.delay_s
        if shape.jitter_s:
            due_s += self._chance.uniform(0, shape.jitter_s)
        if shape.loss:
            segments = math.ceil(size / SEGMENT_BYTES)
            while self._chance.random() > (1 - shape.loss) ** segments:
                due_s += max(4 * shape.delay_s, _PROBE_MIN_S)
                segments = 1
        self._due_s = max(self._due_s, due_s)
        return self._due_s


class LinkProxy:
    """The proxy's process; a context manager that ends it."""

    def __init__(self) -> None:
        self._child = Child("bench.link_proxy")
        self._shapes: dict[str, LinkShape] = {}

    def open(self, name: str, target: str, shape: LinkShape | None = None) -> str:
        """Make a link to `target` (host:port) and return the address to connect to instead."""
        shape = shape or LinkShape()
        self._shapes[name] = shape
        answer = self._child.ask({"open": name, "target": target, "shape": asdict(shape)})
        return str(answer["address"])

    def shape(self, name: str, shape: LinkShape) -> None:
        """Change a link; what is under way on it arrives as it would have."""
        self._shapes[name] = shape
        self._child.ask({"shape": asdict(shape), "of": name})

    def delay(self, name: str, delay_s: float) -> None:
        """Change only a link's delay, one way."""
        self.shape(name, replace(self._shapes[name], delay_s=delay_s))

    @property
    def pid(self) -> int:
        """Its process, which cuts all links for as long as it is stopped."""
        return self._child.pid

    def close(self) -> None:
        """End the process and all connections with it."""
        self._child.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
