"""Adds up the events of a generation."""

from __future__ import annotations

from dataclasses import dataclass, field

from outrider.client.types import (
    Completion,
    Delta,
    Event,
    Finished,
    PromptTokens,
    Request,
    Started,
)
from outrider.domain import TokenLogprobs
from outrider.errors import InternalError, InvalidRequest


def check_single(request: Request) -> None:
    """Refuse a request for several continuations where one is returned."""
    if request.n > 1:
        raise InvalidRequest(
            "n", f"complete() returns one continuation, not {request.n}; use complete_all()"
        )


@dataclass(slots=True)
class _Choice:
    """What has come of one continuation."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finished: Finished | None = None


class Collector:
    """Events in, completions out."""

    def __init__(self) -> None:
        self._started: Started | None = None
        self._prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        self._choices: dict[int, _Choice] = {}

    def add(self, event: Event) -> None:
        """Take the next event of the stream."""
        match event:
            case Started():
                self._started = event
            case PromptTokens(logprobs):
                self._prompt_logprobs = logprobs
            case Delta():
                choice = self._choice(event.choice)
                choice.texts.append(event.text)
                choice.token_ids.extend(event.token_ids)
                choice.sources.extend(event.sources)
                choice.logprobs.extend(event.logprobs)
            case Finished():
                self._choice(event.choice).finished = event

    def completion(self, number: int) -> Completion:
        """Return a continuation. Raises `InternalError` if it has not ended."""
        choice = self._choice(number)
        if self._started is None or choice.finished is None:
            raise InternalError("the stream ended before the generation did")
        return Completion(
            "".join(choice.texts),
            tuple(choice.token_ids),
            tuple(choice.sources),
            self._started,
            choice.finished,
            tuple(choice.logprobs),
            self._prompt_logprobs,
        )

    def completions(self, count: int) -> tuple[Completion, ...]:
        """Return so many continuations, in order. Raises `InternalError` if one has not ended."""
        return tuple(self.completion(number) for number in range(count))

    def _choice(self, number: int) -> _Choice:
        return self._choices.setdefault(number, _Choice())
