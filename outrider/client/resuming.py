"""What a client has of a generation, and whether a stream that broke is asked for again."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import xxhash

from outrider.client.types import Delta, Event, Finished, PromptTokens, Request, Started
from outrider.errors import Exhausted, OutriderError, StaleEpoch, Unavailable
from outrider.v1 import generation_pb2

RESUME_S = 30.0
"""For how long a generation without progress is asked for again."""
_PAUSE_MIN_S = 0.05
_PAUSE_MAX_S = 1.0


@dataclass(slots=True)
class _Point:
    """How far one continuation has come."""

    offset: int = 0
    characters: int = 0
    finished: bool = False
    hasher: xxhash.xxh3_64 = field(default_factory=xxhash.xxh3_64)

    def add(self, delta: Delta) -> None:
        self.offset += len(delta.token_ids)
        self.characters += len(delta.text)
        self.hasher.update(struct.pack(f"<{len(delta.token_ids)}I", *delta.token_ids))


class Progress:
    """Follows the events of one generation over all its streams."""

    def __init__(self, request: Request) -> None:
        self._choices = request.n
        self._points: dict[int, _Point] = {}
        self._prompt_known = request.prompt_logprobs is None
        self.started: Started | None = None
        self.events = 0
        """How many there were."""

    @property
    def complete(self) -> bool:
        """True once all continuations have ended."""
        ended = sum(point.finished for point in self._points.values())
        return self.started is not None and ended == self._choices

    def takes(self, event: Event) -> bool:
        """Note an event; False if the caller has it already, from an earlier stream."""
        self.events += 1
        match event:
            case Started():
                fresh, self.started = self.started is None, event
                return fresh
            case PromptTokens():
                self._prompt_known = True
            case Delta():
                self._point(event.choice).add(event)
            case Finished():
                self._point(event.choice).finished = True
        return True

    def _point(self, choice: int) -> _Point:
        return self._points.setdefault(choice, _Point())

    def to_pb(self) -> generation_pb2.ResumeRequest:
        """Return what asks for the rest of a generation that has started."""
        assert self.started is not None, "what has not started is asked for anew"
        return generation_pb2.ResumeRequest(
            generation_id=self.started.generation_id,
            prompt_logprobs_known=self._prompt_known,
            choices=[
                generation_pb2.ResumePoint(
                    choice=choice,
                    offset=point.offset,
                    digest=point.hasher.intdigest(),
                    characters=point.characters,
                    finished=point.finished,
                )
                for choice, point in sorted(self._points.items())
            ],
        )


class Attempts:
    """Decides whether one more stream is worth a try; knows no clock."""

    def __init__(self, progress: Progress, addresses: int, resume_s: float) -> None:
        self._progress = progress
        self._addresses = addresses
        self._resume_s = resume_s
        self._asked = 0
        self._events = 0
        self._since_s: float | None = None
        """When the present trouble began."""
        self._pause_s = _PAUSE_MIN_S
        self._first: OutriderError | None = None

    def pause_s(self, error: OutriderError, now_s: float, *, answered: bool) -> float:
        """Return how long to wait before the next stream.

        `answered`: the error is a server's own word, and not that of a broken connection. Raises
        the error if there is nothing left to try.
        """
        progress = self._progress
        started = progress.started
        if self._resume_s <= 0:
            raise error
        if started is None:
            # Nothing was said, so asking anew is the same: of another orchestrator if one answered,
            # and of the same one if a connection broke, which may have been an old one.
            self._asked += 1
            elsewhere = isinstance(error, Unavailable | Exhausted)
            asked_max = self._addresses if answered else 2 * self._addresses
            if not elsewhere or self._asked >= asked_max:
                raise error
            return _PAUSE_MIN_S
        fresh = progress.events > self._events
        self._events = progress.events
        if fresh or self._since_s is None:
            self._since_s, self._pause_s, self._first = now_s, _PAUSE_MIN_S, error
        # Whoever is fenced out in the middle has been resumed by somebody else.
        transient = isinstance(error, Unavailable | Exhausted)
        transient |= isinstance(error, StaleEpoch) and not fresh
        if not started.resumable or now_s - self._since_s > self._resume_s:
            raise error
        if not transient:
            if error is self._first:
                raise error
            raise Unavailable(
                f"the stream broke ({self._first}) and cannot be resumed: {error}"
            ) from error
        pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, _PAUSE_MAX_S)
        return pause_s
