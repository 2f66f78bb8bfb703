"""schemathesis on the published OpenAPI document: no answer that the document does not foresee."""

from __future__ import annotations

import asyncio
import time

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.support.http_door import http_door
from tests.support.scripted_verifier import answer, scripted_verifier

EXAMPLES = 30
"""For each route, and for bodies that fit the schema and that do not."""
BUDGET_S = 40.0
CHECKS = [
    schemathesis.checks.not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


def hammer(url: str) -> dict[str, int]:
    """Send what the schema allows and what it does not; returns answers by status."""
    seen: dict[str, int] = {}
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    deadline_s = time.monotonic() + BUDGET_S
    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
        for result in schema.get_all_operations():
            operation = result.ok()
            if mode is GenerationMode.NEGATIVE and operation.method == "get":
                continue  # Nothing about it can be wrong.

            @settings(
                max_examples=EXAMPLES,
                deadline=None,
                database=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
            )
            @given(operation.as_strategy(generation_mode=mode))
            def examples(case: Case) -> None:
                if time.monotonic() > deadline_s:
                    return
                if isinstance(case.body, dict) and "model" in case.body and case.body["model"]:
                    case.body["model"] = "scripted"  # Any other is simply unknown.
                if isinstance(case.body, dict):
                    case.body.pop("stream", None)
                response = case.call(base_url=url)
                # A schema cannot say that the context is finite, say, but who is at fault it can.
                case.validate_response(response, checks=CHECKS)
                seen[str(response.status_code)] = seen.get(str(response.status_code), 0) + 1

            examples()
    return seen


@pytest.mark.filterwarnings("ignore")
async def test_no_answer_is_unforeseen() -> None:
    async with (
        scripted_verifier(lambda spec: answer(spec, b"hello")) as target,
        http_door([target.address], body_timeout_s=5.0) as door,
    ):
        seen = await asyncio.to_thread(hammer, door.url)
        assert seen.get("200", 0) > 20, seen
        assert seen.get("400", 0) > 20, seen
