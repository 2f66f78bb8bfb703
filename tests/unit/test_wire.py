"""Protobuf to domain and back: what goes in comes out, and garbage costs nobody but its sender."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider import wire
from outrider.domain import (
    CANDIDATES_MAX,
    PROTOCOL_VERSION,
    REQUEST_ID,
    BindSpec,
    Candidates,
    Commit,
    CommitReport,
    Draft,
    DraftBudget,
    FinishReason,
    KvPeer,
    ModelInfo,
    Origin,
    PullOutcome,
    PullReport,
    Rejection,
    RejectionCode,
    Resync,
    SamplingParams,
    SessionSpec,
    SpeculationCounters,
    StepReport,
)
from outrider.errors import InvalidRequest, Mismatch
from outrider.v1 import drafter_pb2, types_pb2, verifier_pb2

thorough = settings(deadline=None, derandomize=True)
uint32 = st.integers(0, (1 << 32) - 1)
uint64 = st.integers(0, (1 << 64) - 1)
token_ids = st.lists(uint32, max_size=6).map(tuple)
some_ids = st.lists(uint32, min_size=1, max_size=6).map(tuple)
float32 = st.floats(width=32, allow_nan=False)
reasons = st.none() | st.sampled_from(FinishReason)
text = st.text(max_size=10)

commits = st.builds(Commit, epoch=uint32, base_length=uint32, tokens=token_ids, last=st.booleans())
# Taken as they are: `draft_fault` judges them, so even unequal lengths must come through.
drafts = st.builds(
    Draft,
    epoch=uint32,
    base_length=uint32,
    base_digest=uint64,
    tokens=token_ids,
    parents=st.lists(st.integers(-(1 << 31), (1 << 31) - 1), max_size=6).map(tuple),
    accept_logprobs=st.lists(float32, max_size=6).map(tuple),
)
counters = st.builds(
    SpeculationCounters,
    uint64,
    uint64,
    uint64,
    uint64,
    st.dictionaries(text, uint64, max_size=3),
    st.dictionaries(text, uint64, max_size=3),
    st.dictionaries(uint32, uint64, max_size=3),
    st.dictionaries(uint32, uint64, max_size=3),
)
candidates = st.integers(0, 3).flatmap(
    lambda width: st.lists(
        st.tuples(uint32, st.lists(uint32, min_size=width, max_size=width).map(tuple)),
        min_size=1,
        max_size=4,
    ).map(lambda rows: Candidates(tuple(t for t, _ in rows), tuple(tops for _, tops in rows)))
)
reports = st.builds(CommitReport, counters, token_ids, reasons)
infos = st.builds(
    ModelInfo,
    model=text,
    model_fingerprint=text,
    tokenizer_fingerprint=st.none() | text,
    vocabulary_size=uint32,
    length_max=uint32,
    dtype=text,
    eos_ids=token_ids,
    proposer=text,
    protocol_version=uint32,
    candidates=uint32,
)
samplings = st.builds(
    SamplingParams,
    temperature=st.floats(0.0, 100.0),
    top_k=st.integers(0, (1 << 31) - 1),
    top_p=st.floats(0.0, 1.0, exclude_min=True),
    min_p=st.floats(0.0, 1.0),
)
rejections = st.builds(
    Rejection,
    session=uint64,
    epoch=uint32,
    code=st.sampled_from(RejectionCode),
    message=text,
    field=text,
    binding=uint32,
    current_epoch=uint32,
)
resyncs = st.builds(Resync, uint64, uint32, uint32, uint32)
kv_peers = st.builds(
    KvPeer,
    address=st.sampled_from(["h:1", "10.0.0.1:7000", "[::1]:7000", "a-b.c_d.example:65535"]),
    incarnation=st.text("0123456789abcdef", min_size=1, max_size=32),
    blocks=st.integers(1, (1 << 32) - 1),
)
origins = st.builds(
    Origin,
    request_id=st.just("") | st.from_regex(REQUEST_ID, fullmatch=True),
    traceparent=text,
    tracestate=text,
)
sessions = st.builds(
    SessionSpec,
    session=uint64,
    epoch=uint32,
    prompt=some_ids,
    committed=token_ids,
    sampling=samplings,
    seed=uint64,
    tokens_max=uint32,
    stop_ids=st.frozensets(uint32, max_size=4),
    ignore_eos=st.booleans(),
    candidates=st.integers(0, CANDIDATES_MAX),
    origin=origins,
    kv_peer=st.none() | kv_peers,
    own_guesses=st.booleans(),
)
budgets = st.builds(
    DraftBudget,
    nodes_max=uint32,
    depth_max=uint32,
    flush_interval_s=st.floats(0.0, 60.0, width=32),
    width_max=uint32,
    probability_min=st.floats(0.0, 1.0, width=32),
)
binds = st.builds(
    BindSpec,
    session=uint64,
    epoch=uint32,
    binding=uint32,
    prompt=some_ids,
    committed=token_ids,
    sampling=samplings,
    seed=uint64,
    tokenizer_fingerprint=text,
    vocabulary_size=uint32,
    budget=budgets,
    cache_salt=text,
    origin=origins,
    tenant=text,
    tenant_weight=st.floats(2.0**-10, 1_000.0, width=32),
)


# --- round trips ------------------------------------------------------------------------------


@thorough
@given(drafts)
def test_drafts_come_back(draft: Draft) -> None:
    assert wire.draft_from_bytes(wire.draft_to_bytes(draft)) == draft


def test_scores_that_are_no_numbers_come_through_to_be_refused() -> None:
    draft = Draft(1, 1, 0, (1, 2), (-1, 0), (math.nan, -math.inf))
    back = wire.draft_from_bytes(wire.draft_to_bytes(draft))
    assert back is not None
    assert math.isnan(back.accept_logprobs[0])
    assert back.accept_logprobs[1] == -math.inf


@thorough
@given(commits)
def test_commits_come_back(commit: Commit) -> None:
    assert wire.commit_from_bytes(wire.commit_to_bytes(commit)) == commit


@thorough
@given(reports)
def test_reports_come_back(report: CommitReport) -> None:
    assert wire.report_from_pb(wire.report_to_pb(report)) == report


@thorough
@given(reports)
def test_relayed_reports_say_the_same(report: CommitReport) -> None:
    relayed = wire.relayed_report_from_pb(wire.report_to_pb(report))
    assert relayed.counters == report.counters
    assert (relayed.sources, relayed.finish_reason) == (report.sources, report.finish_reason)
    assert relayed.logprobs == report.logprobs


@thorough
@given(counters)
def test_counters_come_back(values: SpeculationCounters) -> None:
    assert wire.counters_from_pb(wire.counters_to_pb(values)) == values


@thorough
@given(infos)
def test_model_infos_come_back(info: ModelInfo) -> None:
    assert wire.model_info_from_pb(wire.model_info_to_pb(info)) == info


@thorough
@given(samplings)
def test_sampling_parameters_come_back(params: SamplingParams) -> None:
    message = wire.sampling_to_pb(params)
    assert wire.sampling_from_pb(message) == params
    assert message.HasField("temperature"), "0 means greedy, so it must be said"


@thorough
@given(rejections)
def test_rejections_come_back(rejection: Rejection) -> None:
    assert wire.rejection_from_pb(wire.rejection_to_pb(rejection)) == rejection


@thorough
@given(resyncs)
def test_resyncs_come_back(resync: Resync) -> None:
    assert wire.resync_from_pb(wire.resync_to_pb(resync)) == resync


@thorough
@given(sessions)
def test_sessions_come_back(spec: SessionSpec) -> None:
    assert wire.session_from_pb(wire.session_to_pb(spec)) == spec


@thorough
@given(budgets)
def test_budgets_come_back(budget: DraftBudget) -> None:
    assert wire.budget_from_pb(wire.budget_to_pb(budget)) == budget


@thorough
@given(binds)
def test_bindings_come_back(spec: BindSpec) -> None:
    assert wire.bind_from_pb(wire.bind_to_pb(spec)) == spec


@pytest.mark.parametrize("reason", [None, *FinishReason])
def test_finish_reasons_come_back(reason: FinishReason | None) -> None:
    assert wire.finish_reason_from_pb(wire.finish_reason_to_pb(reason)) is reason


def test_step_reports_are_read() -> None:
    message = verifier_pb2.StepReport(duration_s=0.25, rows=3, tokens=17)
    assert wire.step_report_from_pb(message) == StepReport(0.25, 3, 17)


def test_step_reports_come_back() -> None:
    report = StepReport(0.25, 3, 70, 400, 2, 0.125, 8.5, 0.5, prefill_tokens=64)
    assert wire.step_report_from_pb(wire.step_report_to_pb(report)) == report


# --- what may be absent -----------------------------------------------------------------------


@thorough
@given(
    st.builds(
        PullReport,
        session=uint64,
        epoch=uint32,
        outcome=st.none() | st.sampled_from(PullOutcome),
        blocks=uint32,
        size_bytes=uint64,
        duration_s=float32,
    )
)
def test_what_became_of_fetching_comes_back(report: PullReport) -> None:
    assert wire.pull_report_from_pb(wire.pull_report_to_pb(report)) == report


def test_every_outcome_of_fetching_has_a_number() -> None:
    assert {outcome for outcome in PullOutcome} == wire._PULL.keys() - {None}
    assert (
        len(set(wire._PULL.values())) == len(wire._PULL) == len(verifier_pb2.KvPullOutcome.keys())
    )
    newer = verifier_pb2.KvPull(outcome=99)  # type: ignore[arg-type]
    assert wire.pull_report_from_pb(newer).outcome is PullOutcome.FAILED


@pytest.mark.parametrize(
    "hint",
    [
        verifier_pb2.KvPeer(),
        verifier_pb2.KvPeer(address="unix:/run/x", incarnation="i", blocks=1),
        verifier_pb2.KvPeer(address="h:1", incarnation="", blocks=1),
        verifier_pb2.KvPeer(address="h:1", incarnation="i" * 129, blocks=1),
        verifier_pb2.KvPeer(address="h:1", incarnation="i", blocks=0),
    ],
    ids=["empty", "another scheme", "nobody", "long", "nothing held"],
)
def test_a_hint_that_makes_no_sense_is_none_and_costs_no_session(hint: verifier_pb2.KvPeer) -> None:
    opening = verifier_pb2.OpenSession(prompt=[7], kv_peer=hint)
    assert wire.session_from_pb(opening).kv_peer is None


def test_absent_sampling_parameters_take_the_stated_defaults() -> None:
    assert wire.sampling_from_pb(types_pb2.SamplingParams()) == SamplingParams()
    greedy = wire.sampling_from_pb(types_pb2.SamplingParams(temperature=0.0))
    assert greedy == SamplingParams(temperature=0.0)
    message = types_pb2.SamplingParams(top_k=5, top_p=0.5, min_p=0.25)
    assert wire.sampling_from_pb(message) == SamplingParams(top_k=5, top_p=0.5, min_p=0.25)
    bare = wire.session_from_pb(verifier_pb2.OpenSession(session=1, prompt=[7]))
    assert bare == SessionSpec(1, 0, (7,), (), SamplingParams(), 0, 0)


def test_an_absent_tokenizer_is_not_an_empty_one() -> None:
    assert wire.model_info_from_pb(types_pb2.ModelInfo()).tokenizer_fingerprint is None
    empty = types_pb2.ModelInfo(tokenizer_fingerprint="")
    assert wire.model_info_from_pb(empty).tokenizer_fingerprint == ""


def test_numbers_of_a_newer_protocol_are_read_as_the_safest_known() -> None:
    report = types_pb2.CommitReport()
    report.ParseFromString(b"\x08\x63")  # finish_reason 99
    assert wire.report_from_pb(report).finish_reason is None
    rejection = types_pb2.Rejection()
    rejection.ParseFromString(b"\x20\x63")  # code 99
    assert wire.rejection_from_pb(rejection).code is RejectionCode.INTERNAL


# --- what is wrong ----------------------------------------------------------------------------

GARBAGE = [
    b"\xff",
    b"\x08",  # a field without its value
    b"\x22\x7fabc",  # a list longer than the message
    b"\x00\x01",  # field number 0
    b"\x0b",  # a group that never ends
]


@pytest.mark.parametrize("data", GARBAGE)
def test_garbage_is_no_message(data: bytes) -> None:
    assert wire.draft_from_bytes(data) is None
    assert wire.commit_from_bytes(data) is None
    assert wire.candidates_from_bytes(data) is None


@thorough
@given(candidates)
def test_candidates_come_back(found: Candidates) -> None:
    assert wire.candidates_from_bytes(wire.candidates_to_bytes(found)) == found


def test_candidates_of_unequal_number_are_none() -> None:
    cut = types_pb2.Candidates(tokens=[1, 2], top_ids=[3, 4, 5]).SerializeToString()
    assert wire.candidates_from_bytes(cut) is None
    assert wire.candidates_from_bytes(b"") is None


def test_too_many_candidates_are_refused() -> None:
    asked = verifier_pb2.OpenSession(prompt=[1], tokens_max=1, candidates=CANDIDATES_MAX + 1)
    with pytest.raises(InvalidRequest) as raised:
        wire.session_from_pb(asked)
    assert raised.value.field == "candidates"


@thorough
@given(st.binary(max_size=40))
def test_no_bytes_break_the_decoders(data: bytes) -> None:
    wire.candidates_from_bytes(data)
    draft, commit = wire.draft_from_bytes(data), wire.commit_from_bytes(data)
    assert draft is None or all(0 <= token < 1 << 32 for token in draft.tokens)
    assert commit is None or 0 <= commit.base_length < 1 << 32


@thorough
@given(drafts, st.integers(1, 8))
def test_a_cut_draft_is_none_or_a_shorter_one(draft: Draft, count: int) -> None:
    back = wire.draft_from_bytes(wire.draft_to_bytes(draft)[:-count])
    assert back is None or len(back.tokens) <= len(draft.tokens)


def test_values_out_of_range_name_their_field() -> None:
    with pytest.raises(InvalidRequest) as raised:
        wire.sampling_from_pb(types_pb2.SamplingParams(temperature=math.nan))
    assert raised.value.field == "sampling.temperature"
    with pytest.raises(InvalidRequest) as raised:
        wire.session_from_pb(verifier_pb2.OpenSession(session=1))
    assert raised.value.field == "prompt"
    with pytest.raises(InvalidRequest) as raised:
        wire.bind_from_pb(drafter_pb2.BindSession(session=1))
    assert raised.value.field == "prompt"


@pytest.mark.parametrize("weight", [0.0, -1.0, 1_001.0, math.nan, math.inf])
def test_shares_out_of_range_are_refused(weight: float) -> None:
    with pytest.raises(InvalidRequest) as raised:
        wire.bind_from_pb(drafter_pb2.BindSession(prompt=[1], tenant_weight=weight))
    assert raised.value.field == "tenant_weight"
    assert wire.bind_from_pb(drafter_pb2.BindSession(prompt=[1])).tenant_weight == 1.0


@pytest.mark.parametrize("interval_s", [-1.0, 61.0, math.nan, math.inf])
def test_flush_intervals_out_of_range_are_refused(interval_s: float) -> None:
    with pytest.raises(InvalidRequest) as raised:
        wire.budget_from_pb(drafter_pb2.DraftBudget(flush_interval_s=interval_s))
    assert raised.value.field == "budget.flush_interval_s"


@pytest.mark.parametrize("probability", [-0.1, 1.1, math.nan, math.inf])
def test_probabilities_out_of_range_are_refused(probability: float) -> None:
    with pytest.raises(InvalidRequest, match="probability_min"):
        wire.budget_from_pb(drafter_pb2.DraftBudget(probability_min=probability))


def test_a_stream_begins_with_a_hello_of_our_version() -> None:
    hello = types_pb2.Hello(orchestrator="here", protocol_version=PROTOCOL_VERSION)
    for first in (verifier_pb2.VerifyRequest(hello=hello), drafter_pb2.ProposeRequest(hello=hello)):
        assert wire.checked_hello(first) == hello
    newer = types_pb2.Hello(protocol_version=PROTOCOL_VERSION + 1)
    with pytest.raises(Mismatch, match="same release"):
        wire.checked_hello(verifier_pb2.VerifyRequest(hello=newer))
    for silent in (None, verifier_pb2.VerifyRequest()):
        with pytest.raises(Mismatch, match="first message"):
            wire.checked_hello(silent)
