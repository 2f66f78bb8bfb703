"""Stop strings: which one is complete first in text that arrives in pieces. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from outrider.errors import InvalidRequest

STOPS_MAX: Final = 16
STOP_CHARACTERS_MAX: Final = 1024
"""Bounds on the stop strings of a session, which cost time with every token."""


@dataclass(frozen=True, slots=True)
class StopMatch:
    """Where a stop string is complete."""

    end: int
    """Index behind the last character of the stop string, in the text scanned last."""
    length: int
    """Characters of the stop string; it may have begun in earlier text."""


class StopMatcher:
    """Finds the stop string that is complete first, in text that arrives in pieces.

    Knuth-Morris-Pratt for each stop string: what it needs to know of the past is one number, the
    length of the longest end of the text that is a beginning of the stop string. So the cost is a
    few operations per character however long and repetitive the stop strings are, and that number
    is also what must be held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises `InvalidRequest` for empty, overlong or too many stop strings."""
        _check(stops)
        self._stops = [(stop, _borders(stop)) for stop in stops]
        self._matched = [0] * len(stops)
        self.empty: Final = not stops

    @property
    def open_characters(self) -> int:
        """Length of the longest end of the text that may become a stop string."""
        return max(self._matched, default=0)

    def scan(self, text: str) -> StopMatch | None:
        """Go on with `text`. Must not be called again after a match."""
        best: StopMatch | None = None
        for index, (stop, borders) in enumerate(self._stops):
            matched = self._matched[index]
            if not matched and stop[0] not in text:
                continue
            for end, character in enumerate(text, start=1):
                if best is not None and end > best.end:
                    break
                matched = _advance(stop, borders, matched, character)
                if matched == len(stop):
                    # Loops end at the best match so far, so this one is complete no later.
                    if best is None or end < best.end or matched > best.length:
                        best = StopMatch(end, matched)
                    break
            self._matched[index] = matched
        return best


def _advance(stop: str, borders: Sequence[int], matched: int, character: str) -> int:
    """Return how much of `stop` is matched after one more character."""
    while matched and stop[matched] != character:
        matched = borders[matched - 1]
    return matched + (stop[matched] == character)


def _borders(stop: str) -> list[int]:
    """For each beginning of `stop`: length of its longest proper beginning that also ends it."""
    borders = [0]
    for character in stop[1:]:
        borders.append(_advance(stop, borders, borders[-1], character))
    return borders


def _check(stops: Sequence[str]) -> None:
    """Raise `InvalidRequest` unless there are few stop strings, none empty, none overlong."""
    if len(stops) > STOPS_MAX:
        raise InvalidRequest("stop", f"at most {STOPS_MAX} strings, got {len(stops)}")
    for stop in stops:
        if not stop:
            raise InvalidRequest("stop", "must not contain an empty string")
        if len(stop) > STOP_CHARACTERS_MAX:
            raise InvalidRequest(
                "stop", f"at most {STOP_CHARACTERS_MAX} characters each, got {len(stop)}"
            )
