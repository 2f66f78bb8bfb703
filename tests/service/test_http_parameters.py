"""No parameter is silently ignored: each makes a difference, or has none and says so."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from orchestrator.http.schemas import ChatCompletionRequest, CompletionRequest, Generating
from outrider.domain import Origin
from tests.support.http_door import RunningDoor, http_door
from tests.support.scripted_verifier import RunningScript, answer, scripted_verifier

COMPLETE, CHAT = "/v1/completions", "/v1/chat/completions"
STREAM = {"stream": True}

# By field: what to ask for, and what has to be asked for with it.
TELLING: dict[str, tuple[Any, dict[str, Any]]] = {
    "model": ("other", {}),
    "n": (2, {}),
    "temperature": (0.5, {}),
    "top_p": (0.5, {}),
    "top_k": (3, {}),
    "min_p": (0.25, {}),
    "repetition_penalty": (1.25, {}),
    "presence_penalty": (0.5, {}),
    "frequency_penalty": (0.5, {}),
    "logit_bias": ({"65": 1.5}, {}),
    "seed": (2, {}),
    "stop": ("l", {}),
    "stop_token_ids": ([65], {}),
    "ignore_eos": (True, {}),
    "min_tokens": (2, {}),
    "max_tokens": (5, {}),
    "stream": (True, {}),
    "stream_options": ({"include_usage": True}, STREAM),
    "response_format": ({"type": "json_object"}, {}),
    "speculative": ({"timeline": True}, {}),
    "cache_salt": ("salt", {}),
    "return_token_ids": (True, {}),
}
OF_COMPLETIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "prompt": ("Other", {}),
    "echo": (True, {}),
    "logprobs": (2, {}),
}
OF_CHATS: dict[str, tuple[Any, dict[str, Any]]] = {
    "messages": ([{"role": "system", "content": "Other"}], {}),
    "max_completion_tokens": (5, {}),
    "logprobs": (True, {}),
    "top_logprobs": (2, {"logprobs": True}),
}
ELSEWHERE = {"prediction"}
"""Has its test before a whole fleet, tests/system/test_http_fleet.py: it is speed alone."""
WITHOUT_EFFECT = {"user"}
"""As the published document says."""
# These are taken only where they ask for nothing.
REFUSED: dict[str, dict[str, Any]] = {
    COMPLETE: {"best_of": 2, "suffix": "end"},
    CHAT: {
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "tool_choice": "auto",
        "functions": [{"name": "f"}],
        "modalities": ["audio"],
        "service_tier": "flex",
        "store": True,
    },
}
CASES = [
    *((COMPLETE, name, *case) for name, case in (TELLING | OF_COMPLETIONS).items()),
    *((CHAT, name, *case) for name, case in (TELLING | OF_CHATS).items()),
    (COMPLETE, "stream_options", {"continuous_usage_stats": True}, STREAM),
]


def body(path: str, **options: Any) -> dict[str, Any]:
    said: dict[str, Any] = {"prompt": "Say"}
    if path == CHAT:
        said = {"messages": [{"role": "user", "content": "Say"}]}
    return {"model": "scripted", "seed": 1, **said, **options}


async def effect(
    door: RunningDoor, target: RunningScript, path: str, request: dict[str, Any]
) -> tuple[Any, ...]:
    """What a request comes to: what the verifier is asked, and what the client is told."""
    target.verifier.opens.clear()
    response = await door.client.post(path, json=request)
    asked = [
        dataclasses.replace(spec, session=index, origin=Origin(""))
        for index, spec in enumerate(target.verifier.opens)
    ]
    # Names and times differ from request to request.
    told = re.sub(r"gen-[0-9a-f]+|\"(created|\w+_s)\":[0-9.e-]+", "", response.text)
    return response.status_code, asked, told


def test_all_parameters_are_here() -> None:
    common = set(Generating.model_fields) - ELSEWHERE - WITHOUT_EFFECT
    assert common == set(TELLING)
    for schema, path, own in (
        (CompletionRequest, COMPLETE, OF_COMPLETIONS),
        (ChatCompletionRequest, CHAT, OF_CHATS),
    ):
        assert set(schema.model_fields) - set(Generating.model_fields) == {*own, *REFUSED[path]}


@pytest.mark.parametrize(("path", "name", "value", "others"), CASES)
async def test_a_parameter_makes_a_difference(
    path: str, name: str, value: Any, others: dict[str, Any]
) -> None:
    async with (
        scripted_verifier(lambda spec: answer(spec, b"hello you")) as target,
        http_door([target.address]) as door,
    ):
        plain = await effect(door, target, path, body(path, **others))
        assert plain[0] == 200, plain[2]
        assert await effect(door, target, path, body(path, **others)) == plain
        changed = await effect(door, target, path, body(path, **others) | {name: value})
        assert changed != plain
        assert changed[0] == (404 if name == "model" else 200), changed[2]


@pytest.mark.parametrize(
    ("path", "name", "value"),
    [(path, name, value) for path, fields in REFUSED.items() for name, value in fields.items()],
)
async def test_what_there_is_not_is_refused(path: str, name: str, value: Any) -> None:
    async with (
        scripted_verifier(lambda spec: answer(spec, b"hello you")) as target,
        http_door([target.address]) as door,
    ):
        refused = await door.client.post(path, json=body(path, **{name: value}))
        assert refused.status_code == 400
        assert refused.json()["error"]["param"].split(".")[0] == name
