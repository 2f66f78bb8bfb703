"""Domain types: what the services say to each other, without the wire format.

Frozen dataclasses that cross module lines. Token ids are ints in [0, vocabulary size); lengths
count tokens, prompt included; log-probabilities are natural logarithms.
"""

from __future__ import annotations

import enum
import hashlib
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from outrider.errors import InvalidRequest

PROTOCOL_VERSION = 1
RULE_VERSION = 1
"""Version of noise and sampling: part of the model fingerprint, since output depends on it."""

TARGET_SOURCE = 0
"""Source number of the target itself; an orchestrator numbers its drafters from 1."""

OWN_TEXT_SOURCE = (1 << 32) - 1
"""Source number of what a verifier guesses itself, from a session's own text."""

TEMPERATURE_MAX = 100.0
REPETITION_PENALTY_MAX = 10.0
PENALTY_MAX = 2.0
LOGIT_BIAS_MAX = 100.0
LOGIT_BIASES_MAX = 1_024
LOGPROBS_MAX = 20
CANDIDATES_MAX = 32
GRAMMAR_BYTES_MAX = 1 << 16
CACHE_SALT_BYTES_MAX = 256
TRACE_CHARACTERS_MAX = 512
PEER_ADDRESS = re.compile(r"(?:[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.%]{2,64}\]):[0-9]{1,5}")
"""host:port and nothing else: gRPC would take other schemes, such as paths of sockets."""
INCARNATION_CHARACTERS_MAX = 128
REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
"""What a request may be called in logs."""
REQUEST_ID_RULE = "has 1 to 128 letters, digits, or any of . _ : / + = @ -"
TENANT_WEIGHT_MAX = 1_000.0


class FinishReason(enum.Enum):
    """Why a session ended."""

    STOP = "stop"
    """An end-of-sequence id, a stop id or a stop string."""
    LENGTH = "length"
    """The maximum number of tokens, or the end of the context."""
    ABORTED = "aborted"
    """Somebody aborted it."""


class GrammarKind(enum.Enum):
    """How a grammar is written."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"


@dataclass(frozen=True, slots=True)
class Grammar:
    """A language that the output must belong to. Raises `InvalidRequest`.

    Only what needs no grammar library is checked here.
    """

    kind: GrammarKind
    source: str

    def __post_init__(self) -> None:
        name = f"sampling.grammar.{self.kind.value}"
        if not self.source:
            raise InvalidRequest(name, "must not be empty")
        if len(self.source.encode()) > GRAMMAR_BYTES_MAX:
            raise InvalidRequest(name, f"has at most {GRAMMAR_BYTES_MAX} bytes")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen from the target's logits. Raises `InvalidRequest`.

    Everything but temperature and filters is path-dependent or masks tokens: it is applied first,
    in the order grammar, minimum length, bias, penalties, as vLLM does.
    """

    temperature: float = 1.0
    """0 is greedy; range [0, 100]."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 is off."""
    top_p: float = 1.0
    """Keep the smallest set whose probability reaches this; range (0, 1], 1 is off."""
    min_p: float = 0.0
    """Drop tokens below this fraction of the best one's probability; range [0, 1], 0 is off."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt or output (CTRL, arXiv
    1909.05858); range (0, 10], 1 is off."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens in the output; range [-2, 2], 0 is off."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time it is in the output; range [-2, 2]."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(id, what is added to its logit), ascending by id; range [-100, 100]."""
    tokens_min: int = 0
    """Output tokens before which no id ends the output."""
    grammar: Grammar | None = None
    """What the output must be like."""

    def __post_init__(self) -> None:
        self._check_filters()
        if not 0.0 < self.repetition_penalty <= REPETITION_PENALTY_MAX:
            raise InvalidRequest(
                "sampling.repetition_penalty",
                f"must lie above 0 and at most at {REPETITION_PENALTY_MAX:g},"
                f" got {self.repetition_penalty}",
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not abs(getattr(self, name)) <= PENALTY_MAX:
                raise InvalidRequest(
                    f"sampling.{name}",
                    f"must lie between {-PENALTY_MAX:g} and {PENALTY_MAX:g},"
                    f" got {getattr(self, name)}",
                )
        if len(self.logit_bias) > LOGIT_BIASES_MAX:
            raise InvalidRequest("sampling.logit_bias", f"has at most {LOGIT_BIASES_MAX} entries")
        for token, bias in self.logit_bias:
            if token < 0 or not abs(bias) <= LOGIT_BIAS_MAX:
                raise InvalidRequest(
                    "sampling.logit_bias",
                    f"must lie between {-LOGIT_BIAS_MAX:g} and {LOGIT_BIAS_MAX:g} and name ids"
                    f" of the vocabulary, got {bias} for id {token}",
                )
        if self.tokens_min < 0:
            raise InvalidRequest("sampling.tokens_min", f"must not be negative: {self.tokens_min}")

    def _check_filters(self) -> None:
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

    @property
    def penalized(self) -> bool:
        """True if a token's logit depends on which tokens came before."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


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
    candidates: int = 0
    """Of the target, that a drafter asks for at each verified node."""


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
    """A node counts for the source that proposed it first."""
    verified_by_source: Mapping[int, int] = field(default_factory=dict)

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
            Counter(self.verified_by_source) + Counter(other.verified_by_source),
        )


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """A token's log-probability under the target's unprocessed distribution, and the best ids'."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """(id, log-probability), best first, equal ones by id; as many as were asked for."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """What the target thinks most probable after each node that a step computed for a session.

    `tops[i]` are ids that may follow `tokens[i]`, most probable first; all have the same length.
    """

    tokens: tuple[int, ...]
    tops: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Log-probabilities of a stretch of a prompt."""

    session: int
    epoch: int
    start: int
    """Index in the prompt of the first token here; at least 1."""
    tokens: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class CommitReport:
    """What only the orchestrator needs of a commit."""

    counters: SpeculationCounters
    sources: tuple[int, ...]
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One entry a committed token, if the session asked for them."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Who asked for a session: what names it in logs and traces, and changes nothing else."""

    request_id: str = ""
    """The client's own name for its request, or one that the orchestrator drew."""
    traceparent: str = ""
    """W3C trace context; empty: not traced."""
    tracestate: str = ""

    def __post_init__(self) -> None:
        if self.request_id and not REQUEST_ID.fullmatch(self.request_id):
            raise InvalidRequest("origin.request_id", REQUEST_ID_RULE)
        for name in ("traceparent", "tracestate"):
            if len(getattr(self, name)) > TRACE_CHARACTERS_MAX:
                text = f"has at most {TRACE_CHARACTERS_MAX} characters"
                raise InvalidRequest(f"origin.{name}", text)


NOBODY = Origin()
"""Origin of what no request asked for, and of requests that are not named."""


@dataclass(frozen=True, slots=True)
class KvPeer:
    """A verifier that is said to hold the beginning of a session's text. A hint, no more."""

    address: str
    """host:port"""
    incarnation: str
    blocks: int
    """How many of the text's first blocks."""

    def __post_init__(self) -> None:
        if not PEER_ADDRESS.fullmatch(self.address):
            raise InvalidRequest("kv_peer.address", "must be host:port")
        if not 0 < len(self.incarnation) <= INCARNATION_CHARACTERS_MAX:
            text = f"has 1 to {INCARNATION_CHARACTERS_MAX} characters"
            raise InvalidRequest("kv_peer.incarnation", text)
        if self.blocks < 1:
            raise InvalidRequest("kv_peer.blocks", f"must be positive, got {self.blocks}")


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
    logprobs: int | None = None
    """Alternatives wanted beside each committed token's log-probability; None: no log-probs."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens."""
    cache_salt: str = ""
    """Sessions share KV of equal prefixes only within one salt."""
    candidates: int = 0
    """Of the target, that drafters want to know at each verified node."""
    origin: Origin = NOBODY
    kv_peer: KvPeer | None = None
    """Who holds more of this text's KV."""
    own_guesses: bool = False
    """The verifier may guess as well, from the session's own text."""

    def __post_init__(self) -> None:
        if not 0 <= self.candidates <= CANDIDATES_MAX:
            raise InvalidRequest(
                "candidates", f"must lie between 0 and {CANDIDATES_MAX}, got {self.candidates}"
            )
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            if count is not None and not 0 <= count <= LOGPROBS_MAX:
                raise InvalidRequest(name, f"must lie between 0 and {LOGPROBS_MAX}, got {count}")
        if len(self.cache_salt.encode()) > CACHE_SALT_BYTES_MAX:
            raise InvalidRequest("cache_salt", f"has at most {CACHE_SALT_BYTES_MAX} bytes")
        if self.sampling.tokens_min > self.tokens_max:
            raise InvalidRequest(
                "sampling.tokens_min",
                f"must not exceed tokens_max ({self.tokens_max}), got {self.sampling.tokens_min}",
            )
        if self.sampling.grammar is not None and self.ignore_eos:
            raise InvalidRequest(
                "ignore_eos", "cannot be combined with a grammar, which an end id completes"
            )


@dataclass(frozen=True, slots=True)
class DraftBudget:
    """How far, how wide and how often a drafter guesses for a session."""

    nodes_max: int = 64
    depth_max: int = 32
    flush_interval_s: float = 0.002
    """Least time between two drafts for the session."""
    width_max: int = 3
    """Guesses after one node."""
    probability_min: float = 1.0 / 256.0
    """Of a path; guesses below are not worth making."""


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
    cache_salt: str = ""
    """Sessions share KV of equal prefixes only within one salt."""
    origin: Origin = NOBODY
    tenant: str = ""
    """Whose it is; drafters share their work out among tenants."""
    tenant_weight: float = 1.0
    """That tenant's share beside the others'; range (0, `TENANT_WEIGHT_MAX`]."""

    def __post_init__(self) -> None:
        # Written so that NaN is refused.
        if not 0.0 < self.tenant_weight <= TENANT_WEIGHT_MAX:
            raise InvalidRequest(
                "tenant_weight",
                f"must lie above 0 and at most at {TENANT_WEIGHT_MAX:g}, got {self.tenant_weight}",
            )


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


class PullOutcome(enum.Enum):
    """How an attempt to fetch KV from a peer ended."""

    COMPLETE = "complete"
    """All that was asked for came."""
    SHORT = "short"
    """The peer held less than was said."""
    SLOW = "slow"
    """Computing the rest was expected to be quicker."""
    REFUSED = "refused"
    """The peer is another one now, has another model, or is busy."""
    FAILED = "failed"
    """The peer could not be reached, or broke off."""
    CORRUPT = "corrupt"
    """What came was not what had been sent, or not what was asked for."""
    NO_ROOM = "no_room"
    """There was no room for it."""
    DECLINED = "declined"
    """It was not tried, as it would not have paid."""


@dataclass(frozen=True, slots=True)
class PullReport:
    """A session's attempt to fetch KV from a peer."""

    session: int
    epoch: int
    outcome: PullOutcome | None
    """None: it goes on."""
    blocks: int = 0
    """That came and need not be computed."""
    size_bytes: int = 0
    """Of them."""
    duration_s: float = 0.0
    """How long the session has waited for them."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """What a verify step cost."""

    duration_s: float
    rows: int
    tokens: int
    kv_tokens_used: int = 0
    waiting: int = 0
    plain_s: float = 0.0
    """What the step would have taken without guesses, as far as the verifier knows."""
    started_s: float = 0.0
    """On the verifier's own clock."""
    pay_min: float = 0.0
    """If no guess is more probable than this, none was worth verifying in this step."""
    prefill_tokens: int = 0
    """Of the tokens, those of prompts."""


@dataclass(frozen=True, slots=True)
class GrowReport:
    """What a step of a proposer cost."""

    duration_s: float
    """A moving average."""
    leaves_max: int
    """That a step expands at most; 0: no bound."""
    started_s: float
    """When that began, on the drafter's own clock."""


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
