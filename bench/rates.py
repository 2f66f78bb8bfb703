"""Throughput from the times of tokens. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Run:
    """What one contender did with a set of prompts opened at once.

    Session by session: the second of each output token since the prompts were handed over, in
    ascending order, and its id.
    """

    times_s: tuple[tuple[float, ...], ...]
    ids: tuple[tuple[int, ...], ...]

    @property
    def total_rate(self) -> float:
        """Output tokens a second, prefill included."""
        return sum(map(len, self.times_s)) / max(row[-1] for row in self.times_s)

    @property
    def decode_rate(self) -> float:
        """Output tokens a second while every session decodes.

        From the last of the first tokens to the first of the last ones, so that neither another
        session's prefill nor a batch that runs empty counts. Raises ValueError if there is no
        such time.
        """
        begin = max(row[0] for row in self.times_s)
        end = min(row[-1] for row in self.times_s)
        if end <= begin:
            raise ValueError("a session ended before all had started: ask for more tokens")
        return sum(begin < at <= end for row in self.times_s for at in row) / (end - begin)


def tau_reached(commits: Sequence[tuple[float, int]], tau: float, width: int) -> float | None:
    """When the mean over the last `width` commits first exceeded `tau`; None if never.

    `commits` are (time, tokens committed) in order.
    """
    for end in range(width, len(commits) + 1):
        if sum(tokens for _, tokens in commits[end - width : end]) > tau * width:
            return commits[end - 1][0]
    return None
