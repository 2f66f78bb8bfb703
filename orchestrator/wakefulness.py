"""Whether this process has stood still: stopped by a signal, or frozen with its machine.

Clocks go on meanwhile, so a deadline that passed says nothing, and whoever counted on this process
may have given it up. Being slow is something else: a thread that runs, or waits for a processor, is
awake, and so is one that others of its process keep waiting.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

_ACCOUNT = Path("/proc/thread-self/schedstat")


def used_s() -> float:
    """Seconds that this thread ran or waited for a processor, and that others of the process ran.

    Only Linux tells of waiting.
    """
    try:
        _, waited_ns, _ = _ACCOUNT.read_bytes().split()
    except (OSError, ValueError):
        waited_ns = b"0"
    return time.process_time() + int(waited_ns) / 1e9


class Wakefulness:
    """Of one thread. `refresh` is to be called several times within `stall_s`, being awake."""

    def __init__(
        self,
        stall_s: float,
        *,
        now_s: Callable[[], float] = time.monotonic,
        used_s: Callable[[], float] = used_s,
    ) -> None:
        """Sleeps shorter than `stall_s` are not noticed. `now_s` is the clock, for callers, too."""
        self._stall_s = stall_s
        self.now_s, self._used_s = now_s, used_s
        self._seen_s, self._used_before_s = now_s(), used_s()
        self.woke_s: float | None = None
        """When the last sleep was noticed, by `now_s`."""

    def slept_s(self) -> float:
        """Tell how long this process has just stood still, once; mostly 0, and then cheap."""
        now_s = self.now_s()
        gap_s, self._seen_s = now_s - self._seen_s, now_s
        if gap_s <= self._stall_s:
            return 0.0
        used_s = self._used_s()
        slept_s, self._used_before_s = gap_s - (used_s - self._used_before_s), used_s
        if slept_s <= self._stall_s:
            return 0.0
        self.woke_s = now_s
        return slept_s

    def refresh(self) -> None:
        """Note that this process is awake; tell of a sleep with `slept_s` before."""
        self._seen_s, self._used_before_s = self.now_s(), self._used_s()
