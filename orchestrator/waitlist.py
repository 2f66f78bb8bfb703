"""When those who found no room had better come back: one after the other. Pure.

Room comes free at intervals. If all who wait were told the next one, all but one of them would come
in vain, and answering them would slow those down who are served. So each is told another one.
"""

from __future__ import annotations

from dataclasses import dataclass

WAIT_MIN_S, WAIT_MAX_S = 0.1, 30.0
"""Bounds of the advice."""
LINE_MAX_S = 5.0
"""Nobody is sent away for longer because of others who wait: some of them never come back."""


@dataclass(slots=True)
class Waitlist:
    """Spreads what it advises over the time to come."""

    promised_s: float = 0.0
    """When the last one was told to come."""

    def wait_s(self, now_s: float, interval_s: float) -> float:
        """Return how long one more should wait, if there is room every `interval_s`."""
        interval_s = min(WAIT_MAX_S, max(WAIT_MIN_S, interval_s))
        latest_s = now_s + max(interval_s, LINE_MAX_S)
        self.promised_s = min(max(now_s, self.promised_s) + interval_s, latest_s)
        return self.promised_s - now_s
