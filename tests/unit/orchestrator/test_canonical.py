"""A journaled request is the same request when it is read."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from orchestrator.canonical import job_of_request, request_from_bytes, request_to_bytes
from orchestrator.jobs import Job
from outrider.domain import (
    Grammar,
    GrammarKind,
    ModelInfo,
    SamplingParams,
    SessionSpec,
    session_seed,
)
from outrider.errors import Mismatch

INFO = ModelInfo("tiny", "f" * 64, "t" * 64, 260, 1024, "float32")
SAMPLING = SamplingParams(
    temperature=0.7,
    top_k=5,
    top_p=0.9,
    min_p=0.01,
    repetition_penalty=1.1,
    presence_penalty=0.5,
    frequency_penalty=-0.5,
    logit_bias=((3, -1.5), (9, 2.0)),
    tokens_min=2,
    grammar=Grammar(GrammarKind.REGEX, "[ab]*"),
)
FIRST = SessionSpec(
    session=0,
    epoch=0,
    prompt=(1, 2, 4_000_000_000),
    committed=(),
    sampling=SAMPLING,
    seed=session_seed(2**64 - 1, 0),
    tokens_max=50,
    stop_ids=frozenset({7, 8}),
    logprobs=2,
    prompt_logprobs=0,
    cache_salt="salt",
)
SECOND = replace(FIRST, seed=session_seed(2**64 - 1, 1), prompt_logprobs=None)
JOB = Job(
    INFO,
    2**64 - 1,
    (FIRST, SECOND),
    ("stop", "\n"),
    speculation=False,
    tenant="us",
    prediction=(5, 4_000_000_000),
)


@pytest.mark.parametrize("sampling", [SAMPLING, SamplingParams(temperature=0.0)])
def test_there_and_back(sampling):
    job = replace(JOB, choices=tuple(replace(spec, sampling=sampling) for spec in JOB.choices))
    numbers = (2**64 - 1, 5)
    request = request_from_bytes(request_to_bytes(job, numbers))
    assert (request.model, request.model_fingerprint) == ("tiny", "f" * 64)
    assert request.tenant == "us"
    numbered = zip(job.choices, numbers, strict=True)
    expected = replace(job, choices=tuple(replace(spec, session=n) for spec, n in numbered))
    assert job_of_request(request, INFO) == expected


@pytest.mark.parametrize("change", [{"layout": 2}, {"rule_version": 99}])
def test_what_another_release_wrote_is_refused(change):
    fields = json.loads(request_to_bytes(JOB, (1, 2))) | change
    with pytest.raises(Mismatch, match="another release"):
        request_from_bytes(json.dumps(fields).encode())


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"\xff", b'{"layout": 1}'])
def test_what_is_no_request_is_refused(data):
    with pytest.raises(Mismatch, match="cannot be read"):
        request_from_bytes(data)


def test_a_damaged_request_is_refused():
    fields = json.loads(request_to_bytes(JOB, (1, 2)))
    del fields["tokens_max"]
    request = request_from_bytes(json.dumps(fields).encode())
    with pytest.raises(Mismatch, match="cannot be read"):
        job_of_request(request, INFO)


def test_a_request_of_before_predictions_were_journaled_is_read():
    fields = json.loads(request_to_bytes(JOB, (1, 2)))
    del fields["prediction"]
    request = request_from_bytes(json.dumps(fields).encode())
    assert job_of_request(request, INFO).prediction == ()
