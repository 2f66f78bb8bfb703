"""A job as bytes and back: what a journal begins with. Pure.

Everything that the output depends on is in it, with the session's numbers, so that whoever reads
it continues the very same generation.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from orchestrator.jobs import Job
from outrider.domain import (
    RULE_VERSION,
    Grammar,
    GrammarKind,
    ModelInfo,
    SamplingParams,
    SessionSpec,
    session_seed,
)
from outrider.errors import Mismatch

_LAYOUT = 1


@dataclass(frozen=True, slots=True)
class CanonicalRequest:
    """What is known of a journaled generation before its model is found again."""

    model: str
    model_fingerprint: str
    tenant: str
    fields: dict[str, Any]


def request_to_bytes(job: Job, numbers: Sequence[int]) -> bytes:
    """Write down a job; `numbers` are those of its choices' sessions."""
    first = job.choices[0]
    fields = {
        "layout": _LAYOUT,
        "rule_version": RULE_VERSION,
        "tenant": job.tenant,
        "model": job.info.model,
        "model_fingerprint": job.info.model_fingerprint,
        "seed": job.seed,
        "sessions": list(numbers),
        "prompt": _packed(first.prompt),
        "sampling": _sampling_fields(first.sampling),
        "tokens_max": first.tokens_max,
        "stop_ids": sorted(first.stop_ids),
        "ignore_eos": first.ignore_eos,
        "logprobs": first.logprobs,
        "prompt_logprobs": first.prompt_logprobs,
        "cache_salt": first.cache_salt,
        "stop": list(job.stop),
        "speculation": job.speculation,
        "prediction": _packed(job.prediction),
    }
    return json.dumps(fields, separators=(",", ":")).encode()


def request_from_bytes(data: bytes) -> CanonicalRequest:
    """Read a request. Raises `Mismatch` for one of another release."""
    try:
        fields = json.loads(data)
        layout, rule_version = fields["layout"], fields["rule_version"]
        request = CanonicalRequest(
            fields["model"], fields["model_fingerprint"], fields["tenant"], fields
        )
    except (ValueError, KeyError, TypeError) as error:
        raise Mismatch(f"the journal's request cannot be read: {error!r}") from None
    if (layout, rule_version) != (_LAYOUT, RULE_VERSION):
        raise Mismatch("the generation was begun by another release, which decides differently")
    return request


def job_of_request(request: CanonicalRequest, info: ModelInfo) -> Job:
    """Rebuild the job; its sessions have their old numbers. Raises `Mismatch`."""
    fields = request.fields
    try:
        first = SessionSpec(
            session=0,
            epoch=0,
            prompt=_unpacked(fields["prompt"]),
            committed=(),
            sampling=_sampling(fields["sampling"]),
            seed=0,
            tokens_max=fields["tokens_max"],
            stop_ids=frozenset(fields["stop_ids"]),
            ignore_eos=fields["ignore_eos"],
            logprobs=fields["logprobs"],
            prompt_logprobs=fields["prompt_logprobs"],
            cache_salt=fields["cache_salt"],
        )
        choices = tuple(
            replace(
                first,
                session=number,
                seed=session_seed(fields["seed"], choice),
                prompt_logprobs=first.prompt_logprobs if choice == 0 else None,
            )
            for choice, number in enumerate(fields["sessions"])
        )
        return Job(
            info,
            fields["seed"],
            choices,
            tuple(fields["stop"]),
            fields["speculation"],
            tenant=request.tenant,
            # Only a hint: releases that did not write it down are understood.
            prediction=_unpacked(fields.get("prediction", "")),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise Mismatch(f"the journal's request cannot be read: {error!r}") from None


def _packed(ids: Sequence[int]) -> str:
    return base64.b64encode(struct.pack(f"<{len(ids)}I", *ids)).decode()


def _unpacked(text: str) -> tuple[int, ...]:
    data = base64.b64decode(text)
    return struct.unpack(f"<{len(data) // 4}I", data)


def _sampling_fields(sampling: SamplingParams) -> dict[str, Any]:
    fields = asdict(sampling)
    if sampling.grammar is not None:
        fields["grammar"] = {sampling.grammar.kind.value: sampling.grammar.source}
    return fields


def _sampling(fields: dict[str, Any]) -> SamplingParams:
    given = dict(fields)
    given["logit_bias"] = tuple((token, bias) for token, bias in given["logit_bias"])
    if given["grammar"] is not None:
        ((kind, source),) = given["grammar"].items()
        given["grammar"] = Grammar(GrammarKind(kind), source)
    return SamplingParams(**given)
