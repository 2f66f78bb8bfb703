"""What clients heard, and whether it could have happened: contiguous, monotone, fenced. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Heard:
    """A delivery of one stream of a generation."""

    at_s: float
    generation: str
    stream: int
    """Streams of a generation count up: each later one has taken over from those before."""
    choice: int
    start: int
    """Output ids of the choice before these, by the client's count."""
    tokens: tuple[int, ...]


def faults_of(history: Iterable[Heard]) -> list[str]:
    """Say what cannot have been if every generation had one writer at a time."""
    streams: dict[tuple[str, int], list[Heard]] = defaultdict(list)
    for heard in sorted(history, key=lambda heard: heard.at_s):
        streams[heard.generation, heard.choice].append(heard)
    return [fault for key, heards in streams.items() for fault in _faults(*key, heards)]


def _faults(generation: str, choice: int, heards: Sequence[Heard]) -> Iterable[str]:
    name = f"{generation}, choice {choice}"
    truth: dict[int, int] = {}
    """Position to token, over all streams."""
    ends: dict[int, int] = {}
    """Where each stream stands."""
    newest = 0
    for heard in heards:
        if heard.stream < newest and heard.tokens:
            yield f"{name}: stream {heard.stream} spoke after stream {newest} had taken over"
        newest = max(newest, heard.stream)
        if heard.start != ends.setdefault(heard.stream, heard.start):
            yield f"{name}: stream {heard.stream} goes on at {heard.start}, not where it was"
        ends[heard.stream] = heard.start + len(heard.tokens)
        for position, token in enumerate(heard.tokens, start=heard.start):
            if truth.setdefault(position, token) != token:
                yield f"{name}: two tokens at {position}: {truth[position]} and {token}"
    if truth and set(truth) != set(range(max(truth) + 1)):
        yield f"{name}: tokens are missing before {max(truth)}"
