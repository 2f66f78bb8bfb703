"""What a client says and hears. Plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from outrider.domain import FinishReason, ModelInfo, SpeculationCounters, TokenLogprobs, Usage


@dataclass(frozen=True, slots=True)
class Request:
    """One generation to ask for; exactly one of prompt, chat and token_ids is given.

    None leaves the server's default: temperature 1, no filters, output up to the end of the
    context, a seed drawn by the server and reported.
    """

    prompt: str | None = None
    chat: Sequence[tuple[str, str]] | None = None
    """(role, content), oldest first."""
    token_ids: Sequence[int] | None = None
    model: str = ""
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    tokens_max: int | None = None
    stop: Sequence[str] = ()
    stop_ids: Sequence[int] = ()
    ignore_eos: bool = False
    speculation: bool = True
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """What is added to the logits of these ids."""
    tokens_min: int | None = None
    """Output tokens before which no id ends the output."""
    json_schema: str | Mapping[str, Any] | None = None
    """The output is JSON that fits this schema."""
    regex: str | None = None
    """The whole output matches this regular expression. At most one of the two is given."""
    n: int = 1
    """Continuations, each with noise of its own; the first is what one alone would be."""
    logprobs: int | None = None
    """Log-probabilities of the output's tokens are wanted, with this many alternatives."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens."""
    cache_salt: str = ""
    """Requests share computed prefixes only within one salt."""
    trace: bool = False
    """A timeline of each continuation is wanted."""
    resumable: bool = True
    """False: nothing of it is kept in Redis, so a stream that breaks is the end."""


@dataclass(frozen=True, slots=True)
class Started:
    """The request was admitted."""

    generation_id: str
    model: str
    prompt_tokens: int
    seed: int
    model_fingerprint: str
    resumable: bool = False
    """Another orchestrator can go on with it."""


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """The prompt's log-probabilities, if they were asked for: once, before any output."""

    logprobs: tuple[TokenLogprobs, ...]
    """From the prompt's second token on: nothing precedes the first."""


@dataclass(frozen=True, slots=True)
class Delta:
    """More output of one continuation."""

    text: str
    token_ids: tuple[int, ...]
    sources: tuple[int, ...]
    """For each id the drafter that guessed it; 0 is the target itself."""
    choice: int = 0
    """Which continuation, from 0."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One entry for each id, if they were asked for."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of one continuation."""

    reason: FinishReason
    usage: Usage
    speculation: SpeculationCounters
    first_token_s: float
    """From admission to the first token, as the orchestrator saw it."""
    total_s: float
    choice: int = 0
    trace: bytes = b""
    """Timeline as a Chrome trace (JSON), if it was asked for."""
    proposers: Mapping[int, str] = field(default_factory=dict)
    """What guesses under each source number whose guesses were verified, such as "lookup"."""

    @property
    def by_proposer(self) -> dict[str, tuple[int, int]]:
        """(verified, accepted) guesses of each kind of proposer; a guess counts for its first."""
        found: dict[str, tuple[int, int]] = {}
        for source, verified in self.speculation.verified_by_source.items():
            name = self.proposers.get(source, "unknown")
            accepted = self.speculation.accepted_by_source.get(source, 0)
            before = found.get(name, (0, 0))
            found[name] = before[0] + verified, before[1] + accepted
        return found


Event: TypeAlias = Started | PromptTokens | Delta | Finished


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole generation."""

    text: str
    token_ids: tuple[int, ...]
    sources: tuple[int, ...]
    started: Started
    finished: Finished
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One entry for each id, if they were asked for."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """From the prompt's second token on, if they were asked for."""


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker as the orchestrator sees it."""

    role: str
    address: str
    state: str
    reason: str
    info: ModelInfo | None
    sessions: int
    incarnation: str
    step_s: float
    """Duration of a verifier's last step in seconds; 0 until known."""
    kv_tokens_used: int = 0
    """Tokens of KV in use on a verifier at its last step, whoever uses them; 0 until known."""
    waiting: int = 0
    """Admitted sessions that waited for KV there."""
    placement: str = ""
    """What placing a request on a verifier would cost, for people, if it was asked about."""
