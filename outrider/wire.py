"""Protobuf to domain and back, in one place; protobuf stops here and at the edges.

Decoders raise `InvalidRequest` naming the field; they do not check what needs knowledge of the
session (vocabulary, epoch, digest).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError

from outrider.domain import (
    PROTOCOL_VERSION,
    BindSpec,
    Candidates,
    Commit,
    CommitReport,
    Draft,
    DraftBudget,
    FinishReason,
    Grammar,
    GrammarKind,
    GrowReport,
    KvPeer,
    ModelInfo,
    Origin,
    PromptLogprobs,
    PullOutcome,
    PullReport,
    Rejection,
    RejectionCode,
    Resync,
    SamplingParams,
    SessionSpec,
    SpeculationCounters,
    StepReport,
    TokenLogprobs,
)
from outrider.errors import InvalidRequest, Mismatch
from outrider.kv_transfer import KvChunk, KvGeometry
from outrider.v1 import drafter_pb2, kv_pb2, types_pb2, verifier_pb2

_FINISH = {
    None: types_pb2.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: types_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: types_pb2.FINISH_REASON_LENGTH,
    FinishReason.ABORTED: types_pb2.FINISH_REASON_ABORTED,
}
_FINISH_BACK = {number: reason for reason, number in _FINISH.items()}

_REJECTION = {
    RejectionCode.INVALID: types_pb2.REJECTION_CODE_INVALID,
    RejectionCode.EXHAUSTED: types_pb2.REJECTION_CODE_EXHAUSTED,
    RejectionCode.DRAINING: types_pb2.REJECTION_CODE_DRAINING,
    RejectionCode.STALE_EPOCH: types_pb2.REJECTION_CODE_STALE_EPOCH,
    RejectionCode.MISMATCH: types_pb2.REJECTION_CODE_MISMATCH,
    RejectionCode.INTERNAL: types_pb2.REJECTION_CODE_INTERNAL,
    RejectionCode.UNKNOWN_SESSION: types_pb2.REJECTION_CODE_UNKNOWN_SESSION,
}
_REJECTION_BACK = {number: code for code, number in _REJECTION.items()}

_PULL = {
    None: verifier_pb2.KV_PULL_OUTCOME_UNSPECIFIED,
    PullOutcome.COMPLETE: verifier_pb2.KV_PULL_OUTCOME_COMPLETE,
    PullOutcome.SHORT: verifier_pb2.KV_PULL_OUTCOME_SHORT,
    PullOutcome.SLOW: verifier_pb2.KV_PULL_OUTCOME_SLOW,
    PullOutcome.REFUSED: verifier_pb2.KV_PULL_OUTCOME_REFUSED,
    PullOutcome.FAILED: verifier_pb2.KV_PULL_OUTCOME_FAILED,
    PullOutcome.CORRUPT: verifier_pb2.KV_PULL_OUTCOME_CORRUPT,
    PullOutcome.NO_ROOM: verifier_pb2.KV_PULL_OUTCOME_NO_ROOM,
    PullOutcome.DECLINED: verifier_pb2.KV_PULL_OUTCOME_DECLINED,
}
_PULL_BACK = {number: outcome for outcome, number in _PULL.items()}


# --- the hot path -----------------------------------------------------------------------------


def draft_to_bytes(draft: Draft) -> bytes:
    """Serialize a draft, to be relayed unread."""
    return types_pb2.Draft(
        epoch=draft.epoch,
        base_length=draft.base_length,
        base_digest=draft.base_digest,
        tokens=draft.tokens,
        parents=draft.parents,
        accept_logprobs=draft.accept_logprobs,
    ).SerializeToString()


def draft_from_bytes(data: bytes) -> Draft | None:
    """Parse a draft; None if the bytes are not one. Contents are checked by `draft_fault`."""
    try:
        message = types_pb2.Draft.FromString(data)
    except DecodeError:
        return None
    # Sliced first, which takes a third less time than reading one by one.
    return Draft(
        message.epoch,
        message.base_length,
        message.base_digest,
        tuple(message.tokens[:]),
        tuple(message.parents[:]),
        tuple(message.accept_logprobs[:]),
    )


def commit_to_bytes(commit: Commit) -> bytes:
    """Serialize a commit, to be relayed unread."""
    return types_pb2.Commit(
        epoch=commit.epoch,
        base_length=commit.base_length,
        tokens=commit.tokens,
        last=commit.last,
    ).SerializeToString()


def commit_from_bytes(data: bytes) -> Commit | None:
    """Parse a commit; None if the bytes are not one."""
    try:
        message = types_pb2.Commit.FromString(data)
    except DecodeError:
        return None
    # Sliced, since copying a repeated field at once is twice as fast as iterating over it.
    return Commit(message.epoch, message.base_length, tuple(message.tokens[:]), message.last)


def candidates_to_bytes(candidates: Candidates) -> bytes:
    """Serialize a step's candidates, to be relayed unread."""
    return types_pb2.Candidates(
        tokens=candidates.tokens, top_ids=[top for tops in candidates.tops for top in tops]
    ).SerializeToString()


def candidates_from_bytes(data: bytes) -> Candidates | None:
    """Parse a step's candidates; None if there are none, or the bytes are not candidates."""
    if not data:
        return None
    try:
        message = types_pb2.Candidates.FromString(data)
    except DecodeError:
        return None
    tokens, tops = tuple(message.tokens[:]), tuple(message.top_ids[:])
    if not tokens or len(tops) % len(tokens):
        return None
    width = len(tops) // len(tokens)
    rows = tuple(tops[at * width : (at + 1) * width] for at in range(len(tokens)))
    return Candidates(tokens, rows)


def report_to_pb(report: CommitReport) -> types_pb2.CommitReport:
    """Convert what goes to the orchestrator beside a commit."""
    return types_pb2.CommitReport(
        finish_reason=_FINISH[report.finish_reason],
        sources=report.sources,
        counters=counters_to_pb(report.counters),
        logprobs=[token_logprobs_to_pb(token) for token in report.logprobs],
    )


def report_from_pb(message: types_pb2.CommitReport) -> CommitReport:
    """Convert back."""
    return CommitReport(
        counters_from_pb(message.counters),
        tuple(message.sources),
        finish_reason_from_pb(message.finish_reason),
        tuple(token_logprobs_from_pb(token) for token in message.logprobs),
    )


class RelayedReport(NamedTuple):
    """A `CommitReport` whose counters are decoded when they are read.

    Decoding them costs more than all the rest of a commit, and those of most commits are
    outdated before anybody asks. A named tuple, which is quicker to make than a dataclass.
    """

    packed_counters: bytes
    sources: tuple[int, ...]
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()

    @property
    def counters(self) -> SpeculationCounters:
        """The session's counters up to this commit."""
        return counters_from_pb(types_pb2.SpeculationCounters.FromString(self.packed_counters))


def relayed_report_from_pb(message: types_pb2.CommitReport) -> RelayedReport:
    """Convert what goes to the orchestrator beside a commit, except for the counters."""
    logprobs = message.logprobs
    return RelayedReport(
        # Bytes, as a part of a message would keep the whole of it alive.
        message.counters.SerializeToString(),
        tuple(message.sources[:]),
        finish_reason_from_pb(message.finish_reason),
        tuple(token_logprobs_from_pb(token) for token in logprobs) if logprobs else (),
    )


def token_logprobs_to_pb(token: TokenLogprobs) -> types_pb2.TokenLogprobs:
    """Convert a token's log-probability and its alternatives'."""
    return types_pb2.TokenLogprobs(
        token=token.token,
        logprob=token.logprob,
        top_ids=[top for top, _ in token.top],
        top_logprobs=[logprob for _, logprob in token.top],
    )


def token_logprobs_from_pb(message: types_pb2.TokenLogprobs) -> TokenLogprobs:
    """Convert back."""
    top = tuple(zip(message.top_ids, message.top_logprobs, strict=False))
    return TokenLogprobs(message.token, message.logprob, top)


def prompt_logprobs_to_pb(piece: PromptLogprobs) -> verifier_pb2.PromptLogprobsRow:
    """Convert log-probabilities of a stretch of a prompt."""
    return verifier_pb2.PromptLogprobsRow(
        session=piece.session,
        epoch=piece.epoch,
        start=piece.start,
        tokens=[token_logprobs_to_pb(token) for token in piece.tokens],
    )


def prompt_logprobs_from_pb(message: verifier_pb2.PromptLogprobsRow) -> PromptLogprobs:
    """Convert back."""
    tokens = tuple(token_logprobs_from_pb(token) for token in message.tokens)
    return PromptLogprobs(message.session, message.epoch, message.start, tokens)


# --- values -----------------------------------------------------------------------------------


def finish_reason_to_pb(reason: FinishReason | None) -> types_pb2.FinishReason.ValueType:
    """Convert a finish reason; None is unspecified."""
    return _FINISH[reason]


def finish_reason_from_pb(number: types_pb2.FinishReason.ValueType) -> FinishReason | None:
    """Convert back; numbers of a newer protocol count as unspecified."""
    return _FINISH_BACK.get(number)


def counters_to_pb(counters: SpeculationCounters) -> types_pb2.SpeculationCounters:
    """Convert counters."""
    return types_pb2.SpeculationCounters(
        verify_steps=counters.verify_steps,
        verified_draft_tokens=counters.verified_draft_tokens,
        accepted_draft_tokens=counters.accepted_draft_tokens,
        received_draft_tokens=counters.received_draft_tokens,
        dropped_drafts=counters.dropped_drafts,
        dropped_nodes=counters.dropped_nodes,
        accepted_by_source=counters.accepted_by_source,
        verified_by_source=counters.verified_by_source,
    )


def counters_from_pb(message: types_pb2.SpeculationCounters) -> SpeculationCounters:
    """Convert back."""
    return SpeculationCounters(
        message.verify_steps,
        message.verified_draft_tokens,
        message.accepted_draft_tokens,
        message.received_draft_tokens,
        dict(message.dropped_drafts),
        dict(message.dropped_nodes),
        dict(message.accepted_by_source),
        dict(message.verified_by_source),
    )


def model_info_to_pb(info: ModelInfo) -> types_pb2.ModelInfo:
    """Convert a model's identity."""
    message = types_pb2.ModelInfo(
        model=info.model,
        model_fingerprint=info.model_fingerprint,
        vocabulary_size=info.vocabulary_size,
        length_max=info.length_max,
        protocol_version=info.protocol_version,
        eos_ids=info.eos_ids,
        dtype=info.dtype,
        proposer=info.proposer,
        candidates=info.candidates,
    )
    if info.tokenizer_fingerprint is not None:
        message.tokenizer_fingerprint = info.tokenizer_fingerprint
    return message


def model_info_from_pb(message: types_pb2.ModelInfo) -> ModelInfo:
    """Convert back."""
    has_tokenizer = message.HasField("tokenizer_fingerprint")
    return ModelInfo(
        model=message.model,
        model_fingerprint=message.model_fingerprint,
        tokenizer_fingerprint=message.tokenizer_fingerprint if has_tokenizer else None,
        vocabulary_size=message.vocabulary_size,
        length_max=message.length_max,
        dtype=message.dtype,
        eos_ids=tuple(message.eos_ids),
        proposer=message.proposer,
        protocol_version=message.protocol_version,
        candidates=message.candidates,
    )


def sampling_to_pb(params: SamplingParams) -> types_pb2.SamplingParams:
    """Convert sampling parameters, every field set."""
    return types_pb2.SamplingParams(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=dict(params.logit_bias),
        tokens_min=params.tokens_min,
        grammar=None if params.grammar is None else grammar_to_pb(params.grammar),
    )


def grammar_to_pb(grammar: Grammar) -> types_pb2.Grammar:
    """Convert a grammar."""
    if grammar.kind is GrammarKind.REGEX:
        return types_pb2.Grammar(regex=grammar.source)
    return types_pb2.Grammar(json_schema=grammar.source)


def grammar_from_pb(message: types_pb2.Grammar) -> Grammar:
    """Convert back; raises `InvalidRequest`."""
    match message.WhichOneof("kind"):
        case "json_schema":
            return Grammar(GrammarKind.JSON_SCHEMA, message.json_schema)
        case "regex":
            return Grammar(GrammarKind.REGEX, message.regex)
        case _:
            raise InvalidRequest("sampling.grammar", "give one of json_schema and regex")


def sampling_from_pb(message: types_pb2.SamplingParams) -> SamplingParams:
    """Convert back, defaults for absent fields; raises `InvalidRequest` for wrong values."""
    given: dict[str, Any] = {field.name: value for field, value in message.ListFields()}
    if "logit_bias" in given:
        given["logit_bias"] = tuple(sorted(message.logit_bias.items()))
    if "grammar" in given:
        given["grammar"] = grammar_from_pb(message.grammar)
    return SamplingParams(**given)


def rejection_to_pb(rejection: Rejection) -> types_pb2.Rejection:
    """Convert a refusal."""
    return types_pb2.Rejection(
        session=rejection.session,
        epoch=rejection.epoch,
        binding=rejection.binding,
        code=_REJECTION[rejection.code],
        field=rejection.field,
        message=rejection.message,
        current_epoch=rejection.current_epoch,
    )


def rejection_from_pb(message: types_pb2.Rejection) -> Rejection:
    """Convert back; an unknown code counts as internal."""
    return Rejection(
        session=message.session,
        epoch=message.epoch,
        code=_REJECTION_BACK.get(message.code, RejectionCode.INTERNAL),
        message=message.message,
        field=message.field,
        binding=message.binding,
        current_epoch=message.current_epoch,
    )


def resync_to_pb(resync: Resync) -> types_pb2.Resync:
    """Convert a request for missing commits."""
    return types_pb2.Resync(
        session=resync.session,
        epoch=resync.epoch,
        have_length=resync.have_length,
        binding=resync.binding,
    )


def resync_from_pb(message: types_pb2.Resync) -> Resync:
    """Convert back."""
    return Resync(message.session, message.epoch, message.have_length, message.binding)


def step_report_from_pb(message: verifier_pb2.StepReport) -> StepReport:
    """Convert a step's measures."""
    return StepReport(
        message.duration_s,
        message.rows,
        message.tokens,
        message.kv_tokens_used,
        message.waiting,
        message.plain_s,
        message.started_s,
        message.pay_min,
        message.prefill_tokens,
    )


def step_report_to_pb(report: StepReport) -> verifier_pb2.StepReport:
    """Convert back."""
    return verifier_pb2.StepReport(
        duration_s=report.duration_s,
        rows=report.rows,
        tokens=report.tokens,
        kv_tokens_used=report.kv_tokens_used,
        waiting=report.waiting,
        plain_s=report.plain_s,
        started_s=report.started_s,
        pay_min=report.pay_min,
        prefill_tokens=report.prefill_tokens,
    )


def grow_report_to_pb(report: GrowReport) -> drafter_pb2.GrowReport:
    """Convert a proposer's step."""
    return drafter_pb2.GrowReport(
        duration_s=report.duration_s, leaves_max=report.leaves_max, started_s=report.started_s
    )


def grow_report_from_pb(message: drafter_pb2.GrowReport) -> GrowReport:
    """Convert back."""
    return GrowReport(message.duration_s, message.leaves_max, message.started_s)


def checked_hello(
    first: verifier_pb2.VerifyRequest | drafter_pb2.ProposeRequest | None,
) -> types_pb2.Hello:
    """Refuse a caller that says nothing, or speaks another version. Raises `Mismatch`."""
    if first is None or not first.HasField("hello"):
        raise Mismatch("hello: the first message on the stream must carry it")
    if first.hello.protocol_version != PROTOCOL_VERSION:
        raise Mismatch(
            f"hello.protocol_version: the caller speaks {first.hello.protocol_version}, this "
            f"worker {PROTOCOL_VERSION}; run the same release of both"
        )
    return first.hello


# --- KV of peers ------------------------------------------------------------------------------


def kv_peer_to_pb(peer: KvPeer) -> verifier_pb2.KvPeer:
    """Convert a hint at who holds KV."""
    return verifier_pb2.KvPeer(
        address=peer.address, incarnation=peer.incarnation, blocks=peer.blocks
    )


def kv_peer_from_pb(message: verifier_pb2.KvPeer) -> KvPeer | None:
    """Convert back; None for what is none, as a hint must not cost anybody a session."""
    try:
        return KvPeer(message.address, message.incarnation, message.blocks)
    except InvalidRequest:
        return None


def pull_report_to_pb(report: PullReport) -> verifier_pb2.KvPull:
    """Convert what became of fetching KV."""
    return verifier_pb2.KvPull(
        session=report.session,
        epoch=report.epoch,
        outcome=_PULL[report.outcome],
        blocks=report.blocks,
        bytes=report.size_bytes,
        duration_s=report.duration_s,
    )


def pull_report_from_pb(message: verifier_pb2.KvPull) -> PullReport:
    """Convert back; an outcome of a newer protocol counts as failed."""
    return PullReport(
        message.session,
        message.epoch,
        _PULL_BACK.get(message.outcome, PullOutcome.FAILED),
        message.blocks,
        message.bytes,
        message.duration_s,
    )


def kv_geometry_to_pb(geometry: KvGeometry) -> kv_pb2.KvGeometry:
    """Convert what KV looks like."""
    return kv_pb2.KvGeometry(
        model_fingerprint=geometry.model_fingerprint,
        layout=geometry.layout,
        dtype=geometry.dtype,
        layers=geometry.layers,
        kv_heads=geometry.kv_heads,
        head_dim=geometry.head_dim,
        block_tokens=geometry.block_tokens,
    )


def kv_geometry_from_pb(message: kv_pb2.KvGeometry) -> KvGeometry:
    """Convert back."""
    return KvGeometry(
        message.model_fingerprint,
        message.layout,
        message.dtype,
        message.layers,
        message.kv_heads,
        message.head_dim,
        message.block_tokens,
    )


def kv_chunk_to_pb(chunk: KvChunk) -> kv_pb2.KvChunk:
    """Convert some bytes of a block."""
    return kv_pb2.KvChunk(
        block=chunk.block, offset=chunk.offset, data=chunk.data, checksum=chunk.checksum
    )


def kv_chunk_from_pb(message: kv_pb2.KvChunk) -> KvChunk:
    """Convert back; nothing is checked."""
    return KvChunk(message.block, message.offset, message.data, message.checksum)


# --- opening ----------------------------------------------------------------------------------


def origin_to_pb(origin: Origin) -> types_pb2.Origin:
    """Convert what names a request in logs and traces."""
    return types_pb2.Origin(
        request_id=origin.request_id,
        traceparent=origin.traceparent,
        tracestate=origin.tracestate,
    )


def origin_from_pb(message: types_pb2.Origin) -> Origin:
    """Convert back; raises `InvalidRequest`."""
    return Origin(message.request_id, message.traceparent, message.tracestate)


def session_to_pb(spec: SessionSpec) -> verifier_pb2.OpenSession:
    """Convert a session to open on a verifier."""
    return verifier_pb2.OpenSession(
        session=spec.session,
        epoch=spec.epoch,
        prompt=spec.prompt,
        committed=spec.committed,
        sampling=sampling_to_pb(spec.sampling),
        seed=spec.seed,
        tokens_max=spec.tokens_max,
        stop_ids=sorted(spec.stop_ids),
        ignore_eos=spec.ignore_eos,
        logprobs=spec.logprobs,
        prompt_logprobs=spec.prompt_logprobs,
        cache_salt=spec.cache_salt,
        candidates=spec.candidates,
        origin=origin_to_pb(spec.origin),
        kv_peer=None if spec.kv_peer is None else kv_peer_to_pb(spec.kv_peer),
        own_guesses=spec.own_guesses,
    )


def session_from_pb(message: verifier_pb2.OpenSession) -> SessionSpec:
    """Convert back; raises `InvalidRequest`."""
    return SessionSpec(
        session=message.session,
        epoch=message.epoch,
        prompt=_some(message.prompt, "prompt"),
        committed=tuple(message.committed),
        sampling=sampling_from_pb(message.sampling),
        seed=message.seed,
        tokens_max=message.tokens_max,
        stop_ids=frozenset(message.stop_ids),
        ignore_eos=message.ignore_eos,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
        cache_salt=message.cache_salt,
        candidates=message.candidates,
        origin=origin_from_pb(message.origin),
        kv_peer=kv_peer_from_pb(message.kv_peer) if message.HasField("kv_peer") else None,
        own_guesses=message.own_guesses,
    )


def bind_to_pb(spec: BindSpec) -> drafter_pb2.BindSession:
    """Convert a session to mirror on a drafter."""
    return drafter_pb2.BindSession(
        session=spec.session,
        epoch=spec.epoch,
        binding=spec.binding,
        prompt=spec.prompt,
        committed=spec.committed,
        sampling=sampling_to_pb(spec.sampling),
        seed=spec.seed,
        tokenizer_fingerprint=spec.tokenizer_fingerprint,
        vocabulary_size=spec.vocabulary_size,
        budget=budget_to_pb(spec.budget),
        cache_salt=spec.cache_salt,
        origin=origin_to_pb(spec.origin),
        tenant=spec.tenant,
        tenant_weight=spec.tenant_weight,
    )


def bind_from_pb(message: drafter_pb2.BindSession) -> BindSpec:
    """Convert back; raises `InvalidRequest`."""
    return BindSpec(
        session=message.session,
        epoch=message.epoch,
        binding=message.binding,
        prompt=_some(message.prompt, "prompt"),
        committed=tuple(message.committed),
        sampling=sampling_from_pb(message.sampling),
        seed=message.seed,
        tokenizer_fingerprint=message.tokenizer_fingerprint,
        vocabulary_size=message.vocabulary_size,
        budget=budget_from_pb(message.budget) if message.HasField("budget") else DraftBudget(),
        cache_salt=message.cache_salt,
        origin=origin_from_pb(message.origin),
        tenant=message.tenant,
        tenant_weight=message.tenant_weight if message.HasField("tenant_weight") else 1.0,
    )


def budget_to_pb(budget: DraftBudget) -> drafter_pb2.DraftBudget:
    """Convert a budget."""
    return drafter_pb2.DraftBudget(
        nodes_max=budget.nodes_max,
        depth_max=budget.depth_max,
        flush_interval_s=budget.flush_interval_s,
        width_max=budget.width_max,
        probability_min=budget.probability_min,
    )


def budget_from_pb(message: drafter_pb2.DraftBudget) -> DraftBudget:
    """Convert back; raises `InvalidRequest`."""
    if not 0.0 <= message.flush_interval_s <= 60.0:
        raise InvalidRequest(
            "budget.flush_interval_s",
            f"must lie between 0 and 60 seconds, got {message.flush_interval_s}",
        )
    if not 0.0 <= message.probability_min <= 1.0:
        raise InvalidRequest(
            "budget.probability_min",
            f"must lie between 0 and 1, got {message.probability_min}",
        )
    return DraftBudget(
        message.nodes_max,
        message.depth_max,
        message.flush_interval_s,
        message.width_max,
        message.probability_min,
    )


def _some(ids: Iterable[int], field: str) -> tuple[int, ...]:
    tokens = tuple(ids)
    if not tokens:
        raise InvalidRequest(field, "must hold at least one token id")
    return tokens
