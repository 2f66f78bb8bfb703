"""Whether the loop that does a worker's work still turns: what liveness probes ask.

An event loop that answers says nothing of a model that hangs in another thread.
"""

from __future__ import annotations

import math
import time

HANGS_AFTER_S = 180.0
"""A loop turns twice a second, and once a step; no step of a sane setting takes so long."""


class Pulse:
    """When a loop has turned last. For any thread: one float is written and read."""

    def __init__(self) -> None:
        self._beat_s = math.inf

    def beat(self) -> None:
        """The loop turns."""
        self._beat_s = time.monotonic()

    def rest(self) -> None:
        """What follows may take as long as it likes; the next beat ends that."""
        self._beat_s = math.inf

    def silent_s(self) -> float:
        """For how long it has not; 0 if it has not begun, or rests."""
        return max(0.0, time.monotonic() - self._beat_s)
