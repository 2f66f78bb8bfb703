"""Domain types: what the services say to each other, without the wire format.

Frozen dataclasses that cross module lines. Token ids are ints in [0, vocabulary size); lengths
count tokens, prompt included; log-probabilities are natural logarithms.
"""

from __future__ import annotations

import enum
import hashlib
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from outrider.errors import InvalidRequest

PROTOCOL_VERSION = 1
RULE_VERSION = 1
"""Version of noise and sampling: part of the model fingerprint, since output depends on it."""

TARGET_SOURCE = 0
"""Source number of the target itself; drafters of a session count from 1."""

TEMPERATURE_MAX = 100.0


class FinishReason(enum.Enum):
    """Why a session ended."""

    STOP = "stop"
    """An end-of-sequence id, a stop id or a stop string."""
    LENGTH = "length"
    """The maximum number of tokens, or the end of the context."""
    ABORTED = "aborted"
    """Somebody aborted it."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen from the target's logits. Raises `InvalidRequest`."""

    temperature: float = 1.0
    """0 is greedy; range [0, 100]."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 is off."""
    top_p: float = 1.0
    """Keep the smallest set whose probability reaches this; range (0, 1], 1 is off."""
    min_p: float = 0.0
    """Drop tokens below this fraction of the best one's probability; range [0, 1], 0 is off."""

    def __post_init__(self) -> None:
        # Written so that NaN fails each comparison and is refused.
        if not 0.0 <= self.temperature <= TEMPERATURE_MAX:
            raise InvalidRequest(
                "sampling.temperature",
                f"must lie between 0 (greedy) and {TEMPERATURE_MAX:g}, got {self.temperature}",
            )
        if self.top_k < 0:
            raise InvalidRequest("sampling.top_k", f"must not be negative, got {self.top_k}")
        if not 0.0 < self.top_p <= 1.0:
            raise InvalidRequest(
                "sampling.top_p", f"must lie above 0 and at most at 1, got {self.top_p}"
            )
        if not 0.0 <= self.min_p <= 1.0:
            raise InvalidRequest("sampling.min_p", f"must lie between 0 and 1, got {self.min_p}")

    @property
    def greedy(self) -> bool:
        """True if noise plays no part."""
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Identity of the model behind a worker; see `ModelInfo` in types.proto."""

    model: str
    model_fingerprint: str
    tokenizer_fingerprint: str | None
    vocabulary_size: int
    length_max: int
    dtype: str
    eos_ids: tuple[int, ...] = ()
    proposer: str = ""
    protocol_version: int = PROTOCOL_VERSION


@dataclass(frozen=True, slots=True)
class Draft:
    """A token tree rooted at the committed prefix of `base_length` tokens.

    `parents[i]` is -1 for children of the tip, else an index below `i`. All three tuples have the
    same length. Not validated here: `outrider.draft_tree.draft_fault` does that.
    """

    epoch: int
    base_length: int
    base_digest: int
    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    accept_logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Commit:
    """Tokens that a verify step decided for a session."""

    epoch: int
    base_length: int
    tokens: tuple[int, ...]
    last: bool = False


@dataclass(frozen=True, slots=True)
class SpeculationCounters:
    """Counters of one session since it was opened on its verifier."""

    verify_steps: int = 0
    verified_draft_tokens: int = 0
    accepted_draft_tokens: int = 0
    received_draft_tokens: int = 0
    dropped_drafts: Mapping[str, int] = field(default_factory=dict)
    dropped_nodes: Mapping[str, int] = field(default_factory=dict)
    accepted_by_source: Mapping[int, int] = field(default_factory=dict)

    @property
    def acceptance_rate(self) -> float:
        """Accepted over verified draft tokens; NaN if none was verified."""
        if not self.verified_draft_tokens:
            return math.nan
        return self.accepted_draft_tokens / self.verified_draft_tokens

    def plus(self, other: SpeculationCounters) -> SpeculationCounters:
        """Sum of two spells of the same session, on one verifier and on the next."""
        return SpeculationCounters(
            self.verify_steps + other.verify_steps,
            self.verified_draft_tokens + other.verified_draft_tokens,
            self.accepted_draft_tokens + other.accepted_draft_tokens,
            self.received_draft_tokens + other.received_draft_tokens,
            Counter(self.dropped_drafts) + Counter(other.dropped_drafts),
            Counter(self.dropped_nodes) + Counter(other.dropped_nodes),
            Counter(self.accepted_by_source) + Counter(other.accepted_by_source),
        )


@dataclass(frozen=True, slots=True)
class CommitReport:
    """What only the orchestrator needs of a commit."""

    counters: SpeculationCounters
    sources: tuple[int, ...]
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class SessionSpec:
    """Everything that a verifier needs to start or continue a session."""

    session: int
    epoch: int
    prompt: tuple[int, ...]
    committed: tuple[int, ...]
    sampling: SamplingParams
    seed: int
    tokens_max: int
    stop_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class DraftBudget:
    """How far, how wide and how often a drafter guesses for a session."""

    nodes_max: int = 64
    depth_max: int = 32
    flush_interval_s: float = 0.002


@dataclass(frozen=True, slots=True)
class BindSpec:
    """Everything that a drafter needs to mirror a session."""

    session: int
    epoch: int
    binding: int
    prompt: tuple[int, ...]
    committed: tuple[int, ...]
    sampling: SamplingParams
    seed: int
    tokenizer_fingerprint: str
    vocabulary_size: int
    budget: DraftBudget


class RejectionCode(enum.Enum):
    """Why a worker refused or ended a session."""

    INVALID = "invalid"
    EXHAUSTED = "exhausted"
    DRAINING = "draining"
    STALE_EPOCH = "stale_epoch"
    MISMATCH = "mismatch"
    INTERNAL = "internal"
    UNKNOWN_SESSION = "unknown_session"


@dataclass(frozen=True, slots=True)
class Rejection:
    """A session was not opened, or was ended by the worker, and why."""

    session: int
    epoch: int
    code: RejectionCode
    message: str
    field: str = ""
    binding: int = 0
    current_epoch: int = 0


@dataclass(frozen=True, slots=True)
class Resync:
    """Asks for the committed tokens after `have_length`."""

    session: int
    epoch: int
    have_length: int
    binding: int = 0


@dataclass(frozen=True, slots=True)
class StepReport:
    """What a verify step cost."""

    duration_s: float
    rows: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a generation."""

    prompt_tokens: int
    completion_tokens: int


def session_seed(request_seed: int, choice: int) -> int:
    """Derive a session's noise seed (uint64) from the request's seed (uint64) and choice index.

    BLAKE2b, so that the choices of one request, and requests with neighbouring seeds, are
    independent streams.
    """
    message = request_seed.to_bytes(8, "little") + choice.to_bytes(8, "little")
    digest = hashlib.blake2b(message, digest_size=8, person=b"outrider-seed").digest()
    return int.from_bytes(digest, "little")
