"""A breaker for each worker: one that keeps failing is left alone for a while. Pure."""

from __future__ import annotations

from dataclasses import dataclass

FAILURES_MAX = 2
"""In a row; the next one opens the breaker."""
PAUSE_MIN_S = 1.0
PAUSE_MAX_S = 30.0


@dataclass(slots=True)
class Breaker:
    """Counts failures that follow each other without any work done in between."""

    failures: int = 0
    opened_until_s: float = 0.0

    def failed(self, now_s: float) -> None:
        """Note that the worker broke, hung or failed inside."""
        self.failures += 1
        excess = self.failures - FAILURES_MAX - 1
        if excess >= 0:
            # Once the pause is over, the worker gets one try: if that fails too, a longer pause.
            self.opened_until_s = now_s + min(PAUSE_MAX_S, PAUSE_MIN_S * 2.0 ** min(excess, 16))

    def worked(self) -> None:
        """Note that the worker did what it is for."""
        self.failures = 0
        self.opened_until_s = 0.0

    def allows(self, now_s: float) -> bool:
        """True if new work may be given to the worker."""
        return now_s >= self.opened_until_s
