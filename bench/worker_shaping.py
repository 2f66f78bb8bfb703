"""What the benchmarks put around the parts of real workers: records of steps, changed behaviour."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeAlias

from drafter_service.mirror import Mirror
from drafter_service.proposers.base import Overlapping, Proposer
from outrider.domain import ModelInfo
from outrider.draft_tree import Advance
from verifier_service.step_times import StepTimes

Step: TypeAlias = tuple[float, float, int]
"""Begin and end on the monotonic clock in seconds, and tokens computed."""


class RecordingTimes(StepTimes):
    """The engine's own knowledge of step times, which also remembers each step."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []

    def reset(self) -> None:
        """Forget the steps so far; what was learned of their times stays."""
        self.steps = []

    def observe(
        self, tokens: int, duration_s: float, *, kv_tokens: int = 0, prefill_tokens: int = 0
    ) -> None:
        """Take note of a step that has just ended."""
        end_s = time.monotonic()
        self.steps.append((end_s - duration_s, end_s, tokens))
        super().observe(tokens, duration_s, kv_tokens=kv_tokens, prefill_tokens=prefill_tokens)


class ShapedProposer:
    """A proposer that can be silenced and slowed down while it runs."""

    def __init__(self, inner: Proposer) -> None:
        self.silent = False
        """It is bound and follows, but guesses nothing."""
        self.slower = 1.0
        """A step takes so many times as long."""
        self.steps = 0
        self.busy_s = 0.0
        self._inner = inner

    @property
    def info(self) -> ModelInfo:
        """The draft model's identity."""
        return self._inner.info

    @property
    def leaves_max(self) -> int:
        """Leaves that a step expands."""
        return self._inner.leaves_max

    def reset(self) -> None:
        """Forget the steps so far."""
        self.steps, self.busy_s = 0, 0.0

    def overlap(self, work: Callable[[], None]) -> bool:
        """See `Overlapping`."""
        return isinstance(self._inner, Overlapping) and self._inner.overlap(work)

    def open(self, mirror: Mirror) -> None:
        """Begin with a session."""
        self._inner.open(mirror)

    def advanced(self, mirror: Mirror, tokens: Sequence[int], advance: Advance) -> None:
        """Follow a commit."""
        self._inner.advanced(mirror, tokens, advance)

    def close(self, mirror: Mirror) -> None:
        """Forget a session."""
        self._inner.close(mirror)

    def grow(self, mirrors: Sequence[Mirror]) -> bool:
        """Do one step, and whatever else it should last."""
        if self.silent:
            return False
        begin_s = time.monotonic()
        busy = self._inner.grow(mirrors)
        if busy:
            if self.slower > 1:
                time.sleep((time.monotonic() - begin_s) * (self.slower - 1))
            self.steps += 1
            self.busy_s += time.monotonic() - begin_s
        return busy
